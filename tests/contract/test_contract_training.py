"""Jobs, from submission to model."""

import pytest
import trunkline
from trunkline import JobState


@pytest.fixture
def data(client, server, pictures, unique):
    """Upload a dataset of features."""
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)
    images, labels = pictures(30)
    return client.upload(images, labels, name=unique("data"), stem=stem)


def test_train_to_a_model(client, data, unique, server):
    job = client.train(data, name=unique("m"), seed=3)
    model = job.result(120)
    assert job.status().state is JobState.SUCCEEDED
    assert job.status().model == model.reference
    assert (model.version, model.task, model.class_names) == (1, "classification", ("0", "1", "2"))
    assert model.space == data.space
    assert model.record.dataset_digest == data.digest
    assert model.slices and set(model.slices) <= set(server.slices)
    assert client.model(model.name).record == model.record == client.model(model.reference).record
    assert model.reference in [one.reference for one in client.models()]


def test_events_are_numbered_and_resumable(client, data, unique):
    job = client.train(data, name=unique("m"))
    events = list(job.events(timeout_s=120))
    assert [one.seq for one in events] == list(range(1, len(events) + 1))
    assert events[-1].phase == "end"
    assert [one.seq for one in job.events(after_seq=2)] == [one.seq for one in events[2:]]


def test_training_again_makes_a_version(client, data, unique):
    name = unique("m")
    first, second = (client.train(data, name=name, embedding="pooled").result(120) for _ in range(2))
    assert (first.version, second.version) == (1, 2)
    assert client.model(name).version == 2


def test_named_slices(client, data, unique, server):
    model = client.train(data, name=unique("m"), embedding=[server.slices[-1]]).result(120)
    assert model.slices == (server.slices[-1],)


def test_images_are_read_by_the_backbone_named(client, server, pictures, unique):
    images, labels = pictures(12)
    data = client.upload(images, labels, name=unique("d"), input_size=server.input_size)
    model = client.train(data, name=unique("m"), backbone=server.backbone).result(120)
    assert (model.space.backbone, model.space.cut) == (server.backbone, "input")
    assert model.space.input_size == server.input_size


def test_jobs_can_be_found_again(client, data, unique):
    job = client.train(data.reference, name=unique("m"))
    again = client.job(job.id)
    assert job.id in [one.id for one in client.jobs()]
    assert again.result(120).record.job_id == job.id
    assert again.status().spec.dataset == data.reference


def test_ended_job_cannot_be_cancelled(client, data, unique):
    job = client.train(data, name=unique("m"))
    job.result(120)
    with pytest.raises(trunkline.JobStateError):
        job.cancel()


def test_unknown_things(client, data, server):
    with pytest.raises(trunkline.NotFoundError):
        client.job("0" * 32)
    with pytest.raises(trunkline.NotFoundError):
        client.train("nobody", name="m")
    with pytest.raises(trunkline.NotFoundError, match="no_such_slice"):
        client.train(data, name="m", embedding=["no_such_slice"])
    with pytest.raises(trunkline.NotFoundError):
        client.model("nobody@2")


@pytest.mark.parametrize(
    "options",
    [
        {"name": "a/b"},
        {"solver": "magic"},
        {"head": "deep"},
        {"embedding": []},
        {"embedding": "best"},
        {"validation": 1.0},
        {"l2": -1.0},
        {"head": trunkline.MLP(hidden=())},
        {"head": trunkline.MLP(dropout=1.0)},
        {"head": "mlp", "solver": "lbfgs"},
        {"epochs": -1},
        {"backbone": "another_net"},
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(client, data, options):
    with pytest.raises(trunkline.InvalidArgumentError):
        client.train(data, **{"name": "m", **options})


def test_a_sweep_says_what_it_varies(client, data, unique):
    job = client.sweep(
        data.reference,
        name=unique("m"),
        l2=[0.05, 0.1],
        hidden=[(4,)],
        folds=2,
        embedding="pooled",
        head=trunkline.MLP(hidden=(8,), batch_norm=True),
        class_weights={"0": 3},
        label_smoothing=0.1,
        optimiser=trunkline.Optimiser(ema=0.9),
        epochs=2,
    )
    spec = job.status().spec
    assert spec.head.batch_norm and spec.head.hidden == (8,)
    assert spec.fit.loss.class_weights == (3.0, 1.0, 1.0) and spec.fit.loss.label_smoothing == 0.1
    assert (spec.fit.solver, spec.fit.optimiser.ema, spec.sweep.l2) == ("adamw", 0.9, (0.05, 0.1))


def test_a_sweep_of_what_means_nothing_to_the_head_is_refused_before_it_is_sent(client, data, unique):
    for wrong in ({"hidden": [(8,)]}, {"dropout": [0.1]}):
        with pytest.raises(trunkline.InvalidArgumentError, match="a prototype head has no hidden layers"):
            client.sweep(data, name=unique("m"), head="prototype", **wrong)
    with pytest.raises(trunkline.InvalidArgumentError, match="learnt by linear heads"):
        client.sweep(data, name=unique("m"), hidden=[(8,)], ordinal=True)
    with pytest.raises(trunkline.InvalidArgumentError, match="reads a map"):
        client.sweep(data, name=unique("m"), head="conv", embeddings=["pooled"])
