"""Records of the store to messages and back: nothing is lost, and what is not said takes the default."""

from dataclasses import replace

import pytest
from google.protobuf.message import Message
from trunkline_wire import messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig, OptimiserConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import IMAGES, FeatureSpace, local_space
from trunkline_wire.v1 import registry_pb2
from trunkline_wire.v1 import training_pb2 as pb
from trunkline_worker.serving.servicers import records
from trunkline_worker.store.records import (
    BackboneChoice,
    DatasetRecord,
    DatasetSource,
    JobSpec,
    ModelInput,
    ModelRecord,
)

SPACE = FeatureSpace("net", "mid", 8, "f" * 64, bottleneck="b" * 64)
LOCAL = local_space("sensor", "5" * 64)
HEADS = [
    HeadConfig(),
    HeadConfig(fuse="add", fuse_width=16),
    HeadConfig("mlp", (64, 32), "gelu", batch_norm=True, dropout=0.25, fuse="gate"),
    HeadConfig("conv", (8,), channels=(16, 4), tap="layer3"),
    HeadConfig("prototype"),
]
HUBER = pb.FitConfig(loss=pb.LOSS_HUBER)


def through_bytes(message: Message) -> Message:
    return type(message).FromString(message.SerializeToString())


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_a_head_survives_the_wire(head: HeadConfig) -> None:
    assert records.head_from_proto(through_bytes(records.head_to_proto(head))) == head


def test_what_a_head_does_not_say() -> None:
    assert records.head_from_proto(pb.HeadConfig()) == HeadConfig()
    assert records.head_from_proto(pb.HeadConfig(kind=pb.HEAD_KIND_MLP)) == HeadConfig("mlp", (256,))
    conv = pb.HeadConfig(kind=pb.HEAD_KIND_CONV, channels=[8])
    assert records.head_from_proto(conv) == HeadConfig("conv", channels=(8,))


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (pb.HeadConfig(kind=99), ErrorCode.UNSUPPORTED),
        (pb.HeadConfig(activation=99), ErrorCode.UNSUPPORTED),
        (pb.HeadConfig(fuse=99), ErrorCode.UNSUPPORTED),
        (pb.HeadConfig(hidden=[4]), ErrorCode.INVALID_ARGUMENT),
        (pb.HeadConfig(tap="layer3"), ErrorCode.INVALID_ARGUMENT),
        (pb.HeadConfig(fuse_width=8), ErrorCode.INVALID_ARGUMENT),
        (pb.HeadConfig(kind=pb.HEAD_KIND_CONV), ErrorCode.INVALID_ARGUMENT),
        (pb.HeadConfig(kind=pb.HEAD_KIND_MLP, hidden=[0]), ErrorCode.INVALID_ARGUMENT),
        (pb.HeadConfig(kind=pb.HEAD_KIND_MLP, dropout=float("nan")), ErrorCode.INVALID_ARGUMENT),
        (pb.HeadConfig(kind=pb.HEAD_KIND_PROTOTYPE, fuse=pb.FUSION_ADD), ErrorCode.INVALID_ARGUMENT),
    ],
)
def test_heads_that_cannot_be(message: pb.HeadConfig, code: ErrorCode) -> None:
    with pytest.raises(WireError) as error:
        records.head_from_proto(message)
    assert error.value.code is code


def test_a_job_survives_the_wire() -> None:
    spec = JobSpec(
        model="m",
        dataset="d@2",
        backbone="net",
        input_size=8,
        embedding="slices",
        slices=("pooled", "second:pooled"),
        head=HEADS[2],
        solver="adamw",
        epochs=3,
        batch_size=16,
        learning_rate=0.5,
        l2=0.25,
        validation_fraction=0.125,
        refit=False,
        seed=-7,
        loss=LossConfig("huber", 1.5, 0.25, 0.0, 0.125, (1.0, 2.0), class_order=()),
        optimiser=OptimiserConfig(0.25, 0.0, 0.5, "bfloat16", 7),
        select_by="rmse",
        calibrate=False,
        more_backbones=(BackboneChoice("second", 16), BackboneChoice("third")),
    )
    assert records.spec_from_proto(through_bytes(records.spec_to_proto(spec))) == spec


def test_what_a_job_does_not_say() -> None:
    spec = records.spec_from_proto(pb.JobSpec())
    assert (spec.embedding, spec.loss, spec.optimiser) == ("auto", LossConfig(), OptimiserConfig())
    assert (spec.select_by, spec.calibrate, spec.more_backbones) == ("", True, ())
    with pytest.raises(WireError) as error:
        records.spec_from_proto(pb.JobSpec(fit=pb.FitConfig(loss=99)))
    assert error.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    ("head", "fit", "solver"),
    [
        (pb.HeadConfig(), pb.FitConfig(), "lbfgs"),
        (pb.HeadConfig(fuse=pb.FUSION_CONCAT), pb.FitConfig(loss=pb.LOSS_MSE), "lbfgs"),
        (pb.HeadConfig(kind=pb.HEAD_KIND_PROTOTYPE), pb.FitConfig(), "lbfgs"),
        (pb.HeadConfig(fuse=pb.FUSION_ADD), pb.FitConfig(), "adamw"),
        (pb.HeadConfig(fuse=pb.FUSION_GATE), pb.FitConfig(), "adamw"),
        (pb.HeadConfig(), HUBER, "adamw"),
        (pb.HeadConfig(kind=pb.HEAD_KIND_MLP), pb.FitConfig(), "adamw"),
        (pb.HeadConfig(kind=pb.HEAD_KIND_CONV, channels=[8]), pb.FitConfig(), "adamw"),
        (pb.HeadConfig(fuse=pb.FUSION_ADD), pb.FitConfig(solver=pb.SOLVER_LBFGS), "lbfgs"),
        (pb.HeadConfig(), pb.FitConfig(solver=pb.SOLVER_ADAM), "adamw"),
    ],
)
def test_the_solver_follows_from_the_head_unless_it_is_named(
    head: pb.HeadConfig, fit: pb.FitConfig, solver: str
) -> None:
    assert records.spec_from_proto(pb.JobSpec(head=head, fit=fit)).solver == solver


def test_a_dataset_shows_all_of_its_inputs() -> None:
    sources = (DatasetSource(SPACE, "int8"), DatasetSource(LOCAL, "float32"))
    record = DatasetRecord("t", "d", 1, 4, "e" * 64, IMAGES, ("a", "b"), 2, 1.0, "images", sources)
    message = through_bytes(records.dataset_to_proto(record))
    found = [(messages.space_from_proto(one.space), one.codec) for one in message.more_inputs]
    assert found == [(SPACE, "int8"), (LOCAL, "float32")]
    assert (list(message.class_names), message.num_targets) == (["a", "b"], 2)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("classification", registry_pb2.TASK_CLASSIFICATION),
        ("multi_label", registry_pb2.TASK_MULTI_LABEL),
        ("regression", registry_pb2.TASK_REGRESSION),
    ],
)
def test_a_model_shows_its_task_its_head_and_all_of_its_inputs(task: str, expected: int) -> None:
    inputs = (
        ModelInput(SPACE, "e" * 64, ("one", "two"), 6, "int8", 0.25),
        ModelInput(LOCAL, "", ("sensor",), 3, "float32"),
    )
    record = ModelRecord(
        "t",
        "m",
        1,
        task,
        (),
        2,
        FeatureSpace("first", "mid", 8, "1" * 64),
        "2" * 64,
        ("pooled",),
        {},
        "d@1",
        "3" * 64,
        "4" * 64,
        {},
        "job",
        1.0,
        more_inputs=inputs,
        head=HEADS[2],
    )
    message = through_bytes(records.model_to_proto(record))
    assert message.task == expected and not message.has_outlier_scores
    assert records.model_to_proto(replace(record, outliers_sha256="5" * 64)).has_outlier_scores
    assert records.head_from_proto(message.head) == HEADS[2]
    found = tuple(
        ModelInput(
            messages.space_from_proto(one.space),
            one.embedding_fingerprint,
            tuple(one.slices),
            one.width,
            one.codec,
            one.codec_error,
        )
        for one in message.more_inputs
    )
    assert found == inputs


def test_rows_that_are_mixed_are_learnt_in_minibatches_unless_something_else_is_said() -> None:
    mixed = records.spec_from_proto(pb.JobSpec(fit=pb.FitConfig(mixup=0.25)))
    assert (mixed.solver, mixed.optimiser) == ("adamw", OptimiserConfig(warmup=0.05, mixup=0.25))
    assert records.spec_from_proto(through_bytes(records.spec_to_proto(mixed))) == mixed
    said = records.spec_from_proto(pb.JobSpec(fit=pb.FitConfig(mixup=0.25, solver=pb.SOLVER_LBFGS)))
    assert said.solver == "lbfgs"
    assert records.spec_from_proto(pb.JobSpec()).solver == "lbfgs"


def test_a_dataset_says_how_its_rows_belong_together() -> None:
    record = DatasetRecord("t", "d", 1, 12, "0" * 64, IMAGES, ("a", "b"), 0, 1.0, num_groups=3, views=4)
    message = through_bytes(records.dataset_to_proto(record))
    assert (message.num_groups, message.views, message.num_rows) == (3, 4, 12)
