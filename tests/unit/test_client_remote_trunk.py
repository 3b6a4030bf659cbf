"""A trunk on a cluster as a module of a PyTorch model, over a real gateway and a real engine, without Ray."""

import copy
import io
import pickle  # noqa: TID251
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import trunkline
from small_backbones import small_backbone
from torch import nn
from trunk_gateway import TrunkGateway
from trunkline.torch import RemoteTrunk
from trunkline.torch import remote_trunk as module
from trunkline_worker.backbones.catalogue import load_backbone

SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbones():
    return {
        "resnet18": load_backbone("resnet18", allow_untrained=True),
        "places": small_backbone(),
        "timm/test_vit": load_backbone("timm/test_vit", allow_untrained=True),
    }


@pytest.fixture(scope="module")
def gateway(backbones, tmp_path_factory):
    served = TrunkGateway(tmp_path_factory.mktemp("gateway"), backbones.values())
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(gateway):
    with gateway.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def trunk(client):
    return RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE)


def rows_for(trunk, count, seed=0):
    return torch.randn(count, *trunk.feature_shape, generator=torch.Generator().manual_seed(seed))


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "cut", "size", "outputs"),
    [
        ("resnet18", "layer2", SIZE, "pooled"),
        ("resnet18", "layer2", SIZE, "logits"),
        ("resnet18", "layer3", SIZE, ("layer4.mean", "layer3.grid")),
        ("places", "norm", 32, "logits"),
        ("timm/test_vit", "blocks.2", None, "pooled"),
        ("timm/test_vit", "blocks.2", None, "logits"),
    ],
)
def test_gradients_are_those_of_the_uncut_model(client, backbones, name, cut, size, outputs):
    backbone = backbones[name]
    trunk = RemoteTrunk(client, name, cut=cut, input_size=size, outputs=outputs, batch_rows=2)
    names = (outputs,) if isinstance(outputs, str) else outputs
    local = backbone.rest(cut) if names == ("logits",) else backbone.reader(cut, names)
    weights = torch.randn(trunk.num_outputs, generator=torch.Generator().manual_seed(1))
    found = []
    for part in (trunk, local):
        features = rows_for(trunk, 5).requires_grad_()
        result = part(features * 1.0)
        (result.square() @ weights).mean().backward()
        found.append((result.detach(), features.grad))
    assert found[0][0].shape == (5, trunk.num_outputs)
    assert relative(found[0][0], found[1][0]) <= 1e-5
    assert relative(found[0][1], found[1][1]) <= 1e-5


class Decoder(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(channels, width, generator=generator))
        self.bias = nn.Parameter(torch.randn(channels, generator=generator))

    def forward(self, codes):
        return nn.functional.conv2d(codes, self.weight[:, :, None, None], self.bias)


def test_a_decoder_is_trained_along_by_value(client, backbones):
    found = []
    for remote in (True, False):
        decoder = Decoder(128, 6)
        if remote:
            trunk = RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE, decoder=decoder, batch_rows=2)
            assert set(trunk.state_dict()) == {"decoder.weight", "decoder.bias"}
            part = trunk
        else:
            part = nn.Sequential(decoder, backbones["resnet18"].reader("layer2", ("pooled",)))
        codes = torch.randn(5, 6, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        part(codes * 1.0).square().mean().backward()
        found.append((codes.grad, decoder.weight.grad, decoder.bias.grad))
    for got, expected in zip(*found, strict=True):
        assert relative(got, expected) <= 1e-5


def loop(part, num_outputs, steps=6, on_step=lambda step: None):
    """Train a stem and a head around the trunk; return the losses."""
    torch.manual_seed(0)
    images, labels = torch.rand(8 * steps, 3, 32, 32), torch.randint(0, 4, (8 * steps,))
    stem, head = nn.Conv2d(3, 128, 5, stride=4, padding=2), nn.Linear(num_outputs, 4)
    optimiser = torch.optim.SGD([*stem.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for step in range(steps):
        on_step(step)
        rows = slice(8 * step, 8 * step + 8)
        loss = nn.functional.cross_entropy(head(part(stem(images[rows]))), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_a_loop_ends_where_the_local_one_does(trunk, backbones):
    remote = loop(trunk, trunk.num_outputs)
    local = loop(backbones["resnet18"].reader("layer2", ("pooled",)), trunk.num_outputs)
    np.testing.assert_allclose(remote, local, rtol=1e-4)
    assert loop(trunk, trunk.num_outputs) == remote


def test_a_gateway_that_goes_away_in_an_epoch_changes_no_number(client, gateway):
    trunk = RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE, batch_rows=2, timeout_s=60)
    undisturbed = loop(trunk, trunk.num_outputs)
    restarts = []

    def sometimes(step):
        if step in (2, 4):
            thread = threading.Thread(target=gateway.restart)
            thread.start()
            restarts.append(thread)

    assert loop(trunk, trunk.num_outputs, on_step=sometimes) == undisturbed
    for thread in restarts:
        thread.join(30)
    assert len(restarts) == 2


def test_what_is_unanswered_is_asked_again_after_the_stream_breaks(client, monkeypatch):
    """The first stream of each pass ends after one answer, without its end message."""
    caller = client._calls.caller
    monkeypatch.setattr(caller, "sleep", lambda seconds: None)
    trunk = RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE, batch_rows=1)
    features = rows_for(trunk, 4).requires_grad_()
    expected = trunk(features)
    expected.sum().backward()
    wanted = features.grad.clone()
    features.grad = None
    stub = caller.connection.stub
    opened = []

    class Cut:
        def __init__(self, call):
            self.call = call

        def __iter__(self):
            yield next(iter(self.call))

        def cancel(self):
            self.call.cancel()

    class Stubs:
        def __init__(self, real):
            self.real = real

        def StreamTrunk(self, *arguments, **named):  # noqa: N802
            opened.append(1)
            call = self.real.StreamTrunk(*arguments, **named)
            return Cut(call) if len(opened) % 2 else call

    monkeypatch.setattr(caller.connection, "stub", lambda kind: Stubs(stub(kind)))
    got = trunk(features)
    got.sum().backward()
    assert len(opened) == 4
    assert torch.equal(got, expected)
    assert torch.equal(features.grad, wanted)


def test_modes_that_need_no_gradient_ask_for_none(trunk, gateway, monkeypatch):
    engine = gateway.engines["resnet18"]
    asked = []
    backward = engine.backward

    async def count(*arguments, **named):
        asked.append(1)
        return await backward(*arguments, **named)

    monkeypatch.setattr(engine, "backward", count)
    features = rows_for(trunk, 2)
    assert not trunk(features).requires_grad
    with torch.no_grad():
        assert not trunk(features.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert trunk(rows_for(trunk, 2)).shape == (2, 512)
    assert asked == []
    trunk(features.requires_grad_()).sum().backward()
    assert asked == [1]


def test_training_and_evaluation_mode_are_the_same(trunk):
    features = rows_for(trunk, 2)
    assert torch.equal(trunk.train()(features), trunk.eval()(features))
    assert list(trunk.parameters()) == [] and trunk.state_dict() == {}


def test_halves_are_widened_and_get_gradients_of_their_own_type(trunk):
    features = rows_for(trunk, 2)
    half = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = trunk(half)
        loss = nn.functional.linear(outputs, torch.ones(1, 512)).sum()
    assert outputs.dtype == torch.float32
    loss.backward()
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(outputs, trunk(features.bfloat16().float()))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (lambda good: good[:0], trunkline.EmptyBatchError, "no features"),
        (lambda good: good[:, :5], trunkline.ShapeMismatchError, r"\(128, 8, 8\); got \(5, 8, 8\)"),
        (lambda good: good.int(), trunkline.DtypeMismatchError, "int32"),
        (lambda good: good.index_fill(0, torch.tensor([1]), float("nan")), trunkline.NotFiniteError, "row 1"),
    ],
)
def test_bad_features_are_refused_before_anything_is_sent(trunk, monkeypatch, features, error, message):
    monkeypatch.setattr(trunk._remote._client._calls.trunk, "run", None)
    with pytest.raises(error, match=message):
        trunk(features(rows_for(trunk, 3)))


def test_a_gradient_that_explodes_is_refused_and_no_weight_changes(trunk):
    stem = nn.Conv2d(3, 128, 1)
    before = stem.weight.detach().clone()
    scale = torch.ones(3, 1)
    scale[2] = float("inf")
    outputs = trunk(stem(torch.rand(3, 3, 8, 8)))
    with pytest.raises(trunkline.NotFiniteError, match="gradient of row 2"):
        (outputs * scale).sum().backward()
    assert stem.weight.grad is None
    assert torch.equal(stem.weight, before)


def test_what_overflows_on_the_cluster_names_the_row_of_its_message(client):
    trunk = RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE, batch_rows=2)
    features = rows_for(trunk, 5)
    features[3] = 3e38
    with pytest.raises(trunkline.NotFiniteError, match=r"outputs.*row 1\b.*counted from row 2 of the step"):
        trunk(features)


def test_a_decoder_that_is_lost_is_refused_before_anything_is_sent(client, monkeypatch):
    decoder = Decoder(128, 6)
    trunk = RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE, decoder=decoder)
    monkeypatch.setattr(client._calls.trunk, "run", None)
    with torch.no_grad():
        decoder.bias[3] = float("nan")
    with pytest.raises(trunkline.NotFiniteError, match="decoder"):
        trunk(torch.randn(2, 6, 8, 8))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_model_around_it_can_be_compiled(trunk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 128, 1), trunk, nn.Linear(512, 2))
    images = torch.rand(2, 3, 8, 8)
    found = []
    for part in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        part(images).square().sum().backward()
        found.append([one.grad.clone() for one in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_pass_has_a_deadline(client):
    trunk = RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE, timeout_s=0.0)
    with pytest.raises(trunkline.DeadlineExceededError):
        trunk(rows_for(trunk, 1))


def test_a_second_derivative_is_refused(trunk):
    features = rows_for(trunk, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(trunk(features).square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_backbone_that_was_replaced_is_noticed(client, gateway):
    trunk = RemoteTrunk(client, "places", cut="norm")
    features = rows_for(trunk, 1)
    trunk(features)
    engine = gateway.engines["places"]
    real = engine._backbone
    replaced = small_backbone()
    replaced.weights_sha256 = "f" * 64
    try:
        engine._backbone = replaced
        with pytest.raises(trunkline.IncompatibleModelError, match="new RemoteTrunk"):
            trunk(features)
    finally:
        engine._backbone = real


def test_several_threads_use_one_trunk(trunk):
    expected = [trunk(rows_for(trunk, 2, seed)) for seed in range(4)]
    got = [None] * 4

    def run(seed):
        got[seed] = trunk(rows_for(trunk, 2, seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


FORKED = """
import sys, threading
import numpy as np, torch, trunkline
from torch.utils.data import DataLoader, Dataset
from trunkline.torch import RemoteTrunk
torch.set_num_threads(1)
client = trunkline.connect(sys.argv[1], token=sys.argv[2])
trunk = RemoteTrunk(client, "places", cut="norm")
rows = torch.randn(4, *trunk.feature_shape, generator=torch.Generator().manual_seed(0))
here = trunk(rows)

class Embedded(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        with torch.no_grad():
            return trunk(rows[index : index + 1])[0]

loader = DataLoader(Embedded(), batch_size=2, num_workers=2, multiprocessing_context="fork")
there = torch.cat(list(loader))
assert torch.allclose(here, there, atol=1e-6), (here, there)
assert torch.equal(trunk(rows), here)
print("fine")
"""


def test_workers_of_a_data_loader_have_connections_of_their_own(gateway):
    command = [sys.executable, "-W", "ignore", "-c", FORKED, f"127.0.0.1:{gateway.port}", "a-token-of-the-tests-0123"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_it_does_not_go_to_another_process_and_says_what_to_do(trunk):
    for send in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
        with pytest.raises(trunkline.UnsupportedError, match="connect and build it there"):
            send(trunk)
    twin = copy.deepcopy(nn.Sequential(trunk, nn.Linear(512, 2)))
    features = rows_for(trunk, 1)
    assert torch.equal(twin[0](features), trunk(features))
    assert twin[0]._remote is trunk._remote


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cut": "input"}, trunkline.InvalidArgumentError, "no gradient"),
        ({"cut": "layer9"}, trunkline.NotFoundError, "layer4"),
        ({"cut": "layer2", "outputs": "pool"}, trunkline.NotFoundError, "pooled"),
        ({"cut": "layer2", "outputs": ()}, trunkline.NotFoundError, "pooled"),
        ({"cut": "layer2", "outputs": ("logits", "pooled")}, trunkline.NotFoundError, "alone"),
        ({"cut": "layer2", "outputs": ("pooled", "pooled")}, trunkline.InvalidArgumentError, "twice"),
        ({"cut": "layer2", "batch_rows": 0}, trunkline.InvalidArgumentError, "1 or more"),
        ({"cut": "layer2", "decoder": nn.ReLU()}, trunkline.InvalidArgumentError, "weight and bias"),
        ({"cut": "layer2", "decoder": nn.Linear(4, 64)}, trunkline.ShapeMismatchError, "128"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_made(client, options, error, message):
    with pytest.raises(error, match=message):
        RemoteTrunk(client, "resnet18", input_size=SIZE, **options)


def test_a_row_that_fits_no_message_is_refused(trunk, monkeypatch):
    monkeypatch.setattr(module, "MAX_PAYLOAD_BYTES", 1000)
    with pytest.raises(trunkline.PayloadTooLargeError, match="later cut"):
        trunk(rows_for(trunk, 1))


def test_without_torch_it_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import trunkline\n"
        "try:\n    import trunkline.torch\nexcept trunkline.MissingExtraError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "pip install 'trunkline[torch]'" in done.stdout, done.stderr
    light = "import sys, trunkline; trunkline.connect; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
