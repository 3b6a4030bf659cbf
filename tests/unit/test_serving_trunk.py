"""The trunk servicer as any gRPC client meets it: a real gateway and a real engine, without Ray."""

import grpc
import numpy as np
import pytest
import torch
from serving_fakes import OTHER_TOKEN, READER_TOKEN, TOKEN
from small_backbones import small_backbone
from trunk_gateway import TrunkGateway
from trunkline_wire import bottleneck_file, codecs, messages
from trunkline_wire.bottleneck import Bottleneck, ChannelLinear
from trunkline_wire.quantise import pack
from trunkline_wire.v1 import error_pb2, tensor_pb2
from trunkline_wire.v1 import trunk_pb2 as pb
from trunkline_wire.v1.trunk_pb2_grpc import TrunkServiceStub
from trunkline_worker.serving import replies

CUT = "patch"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    torch.set_num_threads(1)
    served = TrunkGateway(tmp_path_factory.mktemp("gateway"), [small_backbone()])
    yield served
    served.close()


@pytest.fixture(scope="module")
def stub(gateway):
    with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
        yield TrunkServiceStub(channel)


@pytest.fixture(scope="module")
def spec():
    return small_backbone().describe()


def metadata(token=TOKEN):
    return (("authorization", f"Bearer {token}"),)


def forward_request(spec, rows, outputs=(), cut=CUT, **fields):
    features = rows if isinstance(rows, tensor_pb2.Tensor) else codecs.encode_rows(rows)
    space = messages.space_to_proto(spec.space(spec.cut(cut)))
    return pb.ForwardRequest(space=space, features=features, outputs=outputs, **fields)


def backward_request(spec, rows, gradient, outputs=()):
    entry = forward_request(spec, rows, outputs)
    return pb.BackwardRequest(
        space=entry.space, features=entry.features, outputs=outputs, gradient=codecs.encode_array(gradient)
    )


def some_rows(spec, count=3, seed=0):
    shape = (count, *spec.cut(CUT).feature_shape)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def refused(call, *parts):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    for part in parts:
        assert part in caught.value.details()
    return caught.value


def test_one_call_there_and_one_back(stub, spec):
    rows = some_rows(spec)
    answer = stub.Forward(forward_request(spec, rows, ("logits",)), metadata=metadata())
    outputs = codecs.decode(answer.outputs)
    leaf = torch.from_numpy(rows.copy()).requires_grad_()
    expected = small_backbone().rest(CUT)(leaf * 1.0)
    np.testing.assert_allclose(outputs, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert answer.timings.total_s >= answer.timings.trunk_s > 0
    answer = stub.Backward(backward_request(spec, rows, np.ones_like(outputs), ("logits",)), metadata=metadata())
    (wanted,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
    np.testing.assert_allclose(codecs.decode(answer.gradient), wanted.numpy(), rtol=1e-5, atol=1e-7)
    assert not answer.HasField("decoder_gradient")


def test_halves_come_back_as_float32_and_a_decoder_gets_its_gradient(stub, spec):
    codes = some_rows(spec)[:, :2].astype(np.float16)
    decoder = bottleneck_file.linear_to_proto(
        ChannelLinear(np.full((16, 2), 0.5, np.float32), np.zeros(16, np.float32))
    )
    request = forward_request(spec, codes, decoder=decoder)
    outputs = codecs.decode(stub.Forward(request, metadata=metadata()).outputs)
    backward = backward_request(spec, codes, np.ones_like(outputs))
    backward.decoder.CopyFrom(decoder)
    answer = stub.Backward(backward, metadata=metadata())
    gradient = codecs.decode(answer.gradient)
    assert (gradient.shape, gradient.dtype) == (codes.shape, np.float32)
    layer = bottleneck_file.linear_from_proto(answer.decoder_gradient)
    assert (layer.weight.shape, layer.bias.shape) == ((16, 2), (16,))
    assert np.abs(layer.weight).max() > 0


def test_a_stream_answers_every_batch_and_survives_a_bad_one(stub, spec):
    rows = [some_rows(spec, 2, seed) for seed in range(4)]
    bad = rows[2].copy()
    bad[1, 0, 0, 0] = np.inf
    sent = [
        pb.StreamTrunkRequest(seq=1, forward=forward_request(spec, rows[0])),
        pb.StreamTrunkRequest(seq=2, backward=backward_request(spec, rows[1], np.ones((2, 16), np.float32))),
        pb.StreamTrunkRequest(seq=5, forward=forward_request(spec, bad)),
        pb.StreamTrunkRequest(seq=6, backward=backward_request(spec, rows[3], np.ones((3, 16), np.float32))),
        pb.StreamTrunkRequest(seq=7, forward=forward_request(spec, rows[3])),
        pb.StreamTrunkRequest(seq=8, end=error_pb2.EndOfStream(num_messages=5)),
    ]
    *replies, last = stub.StreamTrunk(iter(sent), metadata=metadata())
    assert (last.WhichOneof("kind"), last.end.num_messages) == ("end", 5)
    kinds = {one.seq: one.WhichOneof("kind") for one in replies}
    assert kinds == {1: "forward", 2: "backward", 5: "error", 6: "error", 7: "forward"}
    errors = {one.seq: messages.error_from_proto(one.error).code.name for one in replies if kinds[one.seq] == "error"}
    assert errors == {5: "NOT_FINITE", 6: "SHAPE_MISMATCH"}
    alone = stub.Forward(forward_request(spec, rows[0]), metadata=metadata())
    first = next(one for one in replies if one.seq == 1)
    assert first.forward.outputs == alone.outputs


def test_a_stream_without_its_end_is_refused(stub, spec):
    def sent():
        yield pb.StreamTrunkRequest(seq=1, forward=forward_request(spec, some_rows(spec)))

    refused(lambda: list(stub.StreamTrunk(sent(), metadata=metadata())), "without its end message")


def test_what_cannot_be_differentiated_is_refused(stub, spec):
    rows, gradient = some_rows(spec), np.ones((3, 16), np.float32)

    def forward(request):
        return lambda: stub.Forward(request, metadata=metadata())

    def backward(request):
        return lambda: stub.Backward(request, metadata=metadata())

    refused(forward(forward_request(spec, pack(rows, "int8", 0))), "[DTYPE_MISMATCH]", "packed")
    images = codecs.encode_images([b"x"])
    refused(forward(forward_request(spec, images, cut="input")), "[DTYPE_MISMATCH]")
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    refused(forward(forward_request(spec, pixels, cut="input")), "[INVALID_ARGUMENT]", "images")
    refused(forward(forward_request(spec, rows, ("pooed",))), "[NOT_FOUND]", "pooled")
    refused(forward(pb.ForwardRequest(features=codecs.encode_array(rows))), "[NOT_FOUND]", "places")
    unknown = forward_request(spec, rows)
    unknown.space.backbone = "nobody"
    refused(forward(unknown), "[NOT_FOUND]", "nobody")
    refused(backward(backward_request(spec, rows, gradient[:2])), "[SHAPE_MISMATCH]", "(3, 16)")
    packed = backward_request(spec, rows, gradient)
    packed.gradient.CopyFrom(codecs.encode_rows(pack(gradient, "bfloat16", 0)))
    refused(backward(packed), "[DTYPE_MISMATCH]", "plain")
    refused(backward(pb.BackwardRequest(space=packed.space, features=packed.features)), "[SHAPE_MISMATCH]")


def test_a_deadline_in_the_message_holds(stub, spec):
    late = forward_request(spec, some_rows(spec), timeout_s=1e-9)
    error = refused(lambda: stub.Forward(late, metadata=metadata()), "[DEADLINE_EXCEEDED]")
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_reply_that_fits_no_message_is_refused_before_anything_is_computed(stub, spec, gateway, monkeypatch):
    engine = gateway.engines["places"]
    monkeypatch.setattr(engine, "_differentiator", None)
    rows = some_rows(spec)
    monkeypatch.setattr(replies, "MAX_PAYLOAD_BYTES", 2 * 4 * 16)
    refused(
        lambda: stub.Forward(forward_request(spec, rows), metadata=metadata()), "[PAYLOAD_TOO_LARGE]", "at most 2 rows"
    )
    backward = backward_request(spec, rows, np.ones((3, 16), np.float32))
    refused(lambda: stub.Backward(backward, metadata=metadata()), "[PAYLOAD_TOO_LARGE]", "gradient")


def test_the_bytes_of_requests_are_bounded_together(stub, spec, gateway, monkeypatch):
    monkeypatch.setattr(gateway.budget, "limit", 1000)
    refused(lambda: stub.Forward(forward_request(spec, some_rows(spec)), metadata=metadata()), "[OVERLOADED]")
    sent = [
        pb.StreamTrunkRequest(seq=1, forward=forward_request(spec, some_rows(spec))),
        pb.StreamTrunkRequest(seq=2, end=error_pb2.EndOfStream(num_messages=1)),
    ]
    reply, _ = stub.StreamTrunk(iter(sent), metadata=metadata())
    error = messages.error_from_proto(reply.error)
    assert (error.code.name, error.retry_delay_s > 0) == ("OVERLOADED", True)


def test_a_reader_may_train_through_it_and_put_nothing_there(stub, spec):
    stub.Forward(forward_request(spec, some_rows(spec)), metadata=metadata(READER_TOKEN))
    error = refused(
        lambda: stub.PutBottleneck(pb.PutBottleneckRequest(file=b"x"), metadata=metadata(READER_TOKEN)),
        "[PERMISSION_DENIED]",
    )
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    request = forward_request(spec, some_rows(spec))
    refused(lambda: stub.Forward(request), "[UNAUTHENTICATED]")


def test_a_bottleneck_is_its_tenants(stub, spec):
    cut = spec.cut(CUT)
    channels = cut.feature_shape[cut.channel_axis]
    encoder = ChannelLinear(np.zeros((2, channels), np.float32), np.zeros(2, np.float32))
    decoder = ChannelLinear(np.zeros((channels, 2), np.float32), np.zeros(channels, np.float32))
    file = bottleneck_file.to_bytes(
        Bottleneck(spec.space(cut), cut.feature_shape, cut.channel_axis, encoder, decoder, "int8", 0.1)
    )
    put = stub.PutBottleneck(pb.PutBottleneckRequest(file=file), metadata=metadata())
    request = pb.GetBottleneckRequest(sha256=put.sha256)
    assert stub.GetBottleneck(request, metadata=metadata()).file == file
    refused(lambda: stub.GetBottleneck(request, metadata=metadata(OTHER_TOKEN)), "[NOT_FOUND]")
    refused(lambda: stub.PutBottleneck(pb.PutBottleneckRequest(file=file[:-3]), metadata=metadata()), "[CORRUPT_DATA]")
