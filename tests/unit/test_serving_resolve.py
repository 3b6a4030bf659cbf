"""What a job leaves to the cluster, and what is refused before it is queued: backbones, inputs, slices, taps."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import FineTuneConfig, LossConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import (
    IMAGES,
    INT8,
    BackboneSpec,
    CutSpec,
    FeatureSpace,
    Preprocessing,
    SliceSpec,
    bottleneck_fingerprint,
    local_space,
)
from trunkline_worker.serving.backends import Backends, TuningLimits
from trunkline_worker.serving.resolve import resolve
from trunkline_worker.store.records import BackboneChoice, DatasetRecord, DatasetSource, JobSpec

SENSOR, SCALE = local_space("sensor", "5" * 64), local_space("scale", "6" * 64)
CONV = HeadConfig("conv", channels=(8,))
SHA256 = "b" * 64


def describe(name: str, input_size: int) -> BackboneSpec:
    """A backbone whose stages end in maps but for the last; ``between`` is a map that ends no stage."""

    def cut(where: str, slices: tuple[str, ...], *, is_stage: bool = False, is_map: bool = True) -> CutSpec:
        return CutSpec(
            where,
            (4, 2, 2) if is_map else (4,),
            f"{name} {where} {input_size}",
            slices,
            is_stage=is_stage,
            int8_fingerprint=f"{name} {where} {input_size} quantised",
            map_shape=(4, 2, 2) if is_map else (),
        )

    names = ("one.mean", "two.mean", "pooled")
    cuts = (
        CutSpec("input", (input_size, input_size, 3), f"{name} input {input_size}", names, channel_axis=2),
        cut("one", names, is_stage=True),
        cut("between", names[1:]),
        cut("two", names[1:], is_stage=True),
        cut("vector", names[2:], is_stage=True, is_map=False),
    )
    return BackboneSpec(
        name=name,
        pretrained=True,
        weights="none",
        weights_sha256="w",
        num_parameters=0,
        preprocessing=Preprocessing(input_size, 1.0, "nearest", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        resizable=True,
        cuts=cuts,
        slices=tuple(SliceSpec(one, 4 * number, 4 * number + 4) for number, one in enumerate(names)),
        embedding_fingerprint=f"{name} {input_size}",
    )


class Engine:
    """Describes a backbone, and does nothing else."""

    def __init__(self, name: str, input_size: int) -> None:
        self.name = name
        self.input_size = input_size
        self.asked = 0

    async def describe(self, input_size: int = 0) -> BackboneSpec:
        self.asked += 1
        return describe(self.name, input_size or self.input_size)


def space(backbone: str, cut: str = "one", *, input_size: int = 0, bottleneck: str = "") -> FeatureSpace:
    """A space of features of one of the backbones below."""
    spec = describe(backbone, input_size or SIZES[backbone])
    found = spec.space(spec.cut(cut))
    if bottleneck:
        return replace(found, bottleneck=bottleneck, fingerprint=bottleneck_fingerprint(found.fingerprint, bottleneck))
    return found


SIZES = {"lib/first": 8, "second": 16, "third": 32}


def dataset(first: FeatureSpace, *more: FeatureSpace, **changes: Any) -> DatasetRecord:
    record = DatasetRecord("t", "d", 1, 4, "", first, ("a", "b"), 0, 0.0, "", tuple(DatasetSource(one) for one in more))
    return replace(record, **changes)


def run(record: DatasetRecord, **changes: Any) -> JobSpec:
    spec = JobSpec(**{"model": "m", "dataset": "d", "backbone": "", "input_size": 0, **changes})
    engines = {name: Engine(name, size) for name, size in SIZES.items()}
    return asyncio.run(resolve(spec, record, Backends(engines, None, None)))  # type: ignore[arg-type]


def refused(record: DatasetRecord, **changes: Any) -> tuple[ErrorCode, str]:
    with pytest.raises(WireError) as error:
        run(record, **changes)
    return error.value.code, error.value.message


def test_images_are_read_by_the_first_backbone_unless_told_otherwise() -> None:
    assert run(dataset(IMAGES)) == JobSpec("m", "d", "lib/first", 8)
    assert run(dataset(IMAGES), backbone="second", input_size=48) == JobSpec("m", "d", "second", 48)
    assert run(dataset(IMAGES, SENSOR)) == JobSpec("m", "d", "lib/first", 8)


def test_several_backbones_read_images_each_at_an_input_size_that_is_then_known() -> None:
    job = run(dataset(IMAGES, SENSOR), more_backbones=(BackboneChoice("second"), BackboneChoice("third", 64)))
    assert (job.backbone, job.input_size) == ("lib/first", 8)
    assert job.more_backbones == (BackboneChoice("second", 16), BackboneChoice("third", 64))


def test_features_beside_images_belong_to_the_dataset_not_to_the_job() -> None:
    job = run(dataset(IMAGES, space("third"), SENSOR), more_backbones=(BackboneChoice("second"),))
    assert (job.backbone, job.more_backbones) == ("lib/first", (BackboneChoice("second", 16),))


def test_features_are_read_by_their_own_backbones() -> None:
    record = dataset(space("second", "two", input_size=24), space("third"), SENSOR)
    assert run(record) == run(record, backbone="second", input_size=24) == JobSpec("m", "d", "second", 24)
    quantised = replace(space("second"), fingerprint=describe("second", 16).cut("one").int8_fingerprint)
    assert describe("second", 16).cut("one").precision_of(quantised.fingerprint) == INT8
    assert run(dataset(space("third"), quantised)).backbone == "third"


def test_codes_of_a_bottleneck_are_known_by_their_own_fingerprint_alone() -> None:
    codes = space("second", bottleneck=SHA256)
    assert run(dataset(codes)).backbone == "second"
    assert run(dataset(IMAGES, codes)).backbone == "lib/first"
    for wrong in (
        replace(codes, fingerprint=space("second").fingerprint),
        replace(codes, bottleneck=""),
        replace(codes, bottleneck="c" * 64),
        replace(codes, cut="two"),
    ):
        for record in (dataset(wrong), dataset(space("third"), wrong)):
            code, message = refused(record)
            assert code is ErrorCode.INCOMPATIBLE
            assert "other weights" in message


def test_features_of_a_stem_of_the_clients_own_are_read_at_its_cut() -> None:
    own = replace(space("second", "two"), local_model="stem", fingerprint="6" * 64)
    assert run(dataset(own, SENSOR)) == JobSpec("m", "d", "second", 16)
    assert run(dataset(IMAGES, own)).backbone == "lib/first"
    code, message = refused(dataset(replace(own, cut="gone")))
    assert code is ErrorCode.INCOMPATIBLE
    assert "second" in message


def test_local_features_alone_need_no_backbone() -> None:
    job = JobSpec("m", "d", "", 0)
    assert run(dataset(SENSOR, SCALE)) == job
    assert run(dataset(SENSOR), embedding="pooled") == replace(job, embedding="pooled")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"backbone": "second"}, "no backbone can read them"),
        ({"input_size": 16}, "no backbone can read them"),
        ({"more_backbones": (BackboneChoice("second"),)}, "no backbone can read them"),
        ({"head": CONV, "solver": "adamw"}, "needs a map"),
        ({"embedding": "slices", "slices": ("sensor",)}, "no slices to name"),
    ],
)
def test_what_local_features_alone_cannot_do(changes: dict[str, Any], what: str) -> None:
    code, message = refused(dataset(SENSOR, SCALE), **changes)
    assert code is ErrorCode.INVALID_ARGUMENT
    assert what in message


MANY = tuple(DatasetSource(local_space(f"m{number}", "5" * 64)) for number in range(7))


@pytest.mark.parametrize(
    ("record", "changes", "code", "what"),
    [
        (dataset(IMAGES, class_names=()), {}, ErrorCode.BAD_LABELS, "no labels"),
        (dataset(IMAGES), {"loss": LossConfig("huber"), "solver": "adamw"}, ErrorCode.INVALID_ARGUMENT, "'huber'"),
        (dataset(SENSOR), {"loss": LossConfig("huber"), "solver": "adamw"}, ErrorCode.INVALID_ARGUMENT, "'huber'"),
        (
            dataset(IMAGES, num_targets=2),
            {"loss": LossConfig("huber"), "solver": "adamw"},
            ErrorCode.INVALID_ARGUMENT,
            "'huber'",
        ),
        (dataset(IMAGES), {"backbone": "nobody"}, ErrorCode.NOT_FOUND, "no backbone 'nobody'"),
        (dataset(IMAGES), {"more_backbones": (BackboneChoice("nobody"),)}, ErrorCode.NOT_FOUND, "'nobody'"),
        (dataset(IMAGES), {"more_backbones": (BackboneChoice(""),)}, ErrorCode.NOT_FOUND, "no backbone ''"),
        (
            dataset(IMAGES),
            {"more_backbones": (BackboneChoice("lib/first", 16),)},
            ErrorCode.INVALID_ARGUMENT,
            "'lib/first' is named twice",
        ),
        (
            dataset(IMAGES),
            {"backbone": "second", "more_backbones": (BackboneChoice("third"), BackboneChoice("third"))},
            ErrorCode.INVALID_ARGUMENT,
            "'third' is named twice",
        ),
        (dataset(IMAGES, space("third")), {"backbone": "third"}, ErrorCode.INVALID_ARGUMENT, "'third' is named twice"),
        (
            dataset(IMAGES, local_space("second", "5" * 64)),
            {"more_backbones": (BackboneChoice("second"),)},
            ErrorCode.INVALID_ARGUMENT,
            "'second' is named twice",
        ),
        (
            dataset(IMAGES, more_inputs=MANY),
            {"more_backbones": (BackboneChoice("second"),)},
            ErrorCode.INVALID_ARGUMENT,
            "9 inputs; a model has at most 8",
        ),
        (dataset(space("second")), {"backbone": "third"}, ErrorCode.INCOMPATIBLE, "third at 16 cannot read them"),
        (dataset(space("second")), {"input_size": 32}, ErrorCode.INCOMPATIBLE, "second at 32 cannot read them"),
        (
            dataset(space("second")),
            {"more_backbones": (BackboneChoice("third"),)},
            ErrorCode.INVALID_ARGUMENT,
            "no other backbone can read",
        ),
        (dataset(FeatureSpace("nobody", "one", 8, "f")), {}, ErrorCode.NOT_FOUND, "no backbone 'nobody'"),
        (dataset(FeatureSpace("second", "one", 16, "f")), {}, ErrorCode.INCOMPATIBLE, "other weights"),
        (dataset(IMAGES, FeatureSpace("second", "one", 16, "f")), {}, ErrorCode.INCOMPATIBLE, "than second has now"),
        (dataset(space("third"), FeatureSpace("second", "gone", 16, "f")), {}, ErrorCode.INCOMPATIBLE, "second"),
    ],
)
def test_what_cannot_be_read(record: DatasetRecord, changes: dict[str, Any], code: ErrorCode, what: str) -> None:
    found, message = refused(record, **changes)
    assert found is code
    assert what in message


def test_huber_is_for_numbers() -> None:
    record = dataset(IMAGES, class_names=(), num_targets=2)
    assert run(record, loss=LossConfig("huber"), solver="adamw").loss.kind == "huber"


def test_a_slice_is_of_the_first_backbone_or_of_the_one_named() -> None:
    named = {"embedding": "slices", "slices": ("pooled", "lib/first:one.mean")}
    assert run(dataset(IMAGES, SENSOR), **named).slices == ("pooled", "one.mean")
    named["slices"] = ("second:two.mean", "pooled", "second:pooled")
    job = run(dataset(IMAGES), more_backbones=(BackboneChoice("second"),), **named)
    assert job.slices == named["slices"]
    assert run(dataset(IMAGES, space("second", "two")), **named).slices == named["slices"]


@pytest.mark.parametrize(
    ("slices", "code", "what"),
    [
        (("nope", "second:pooled"), ErrorCode.NOT_FOUND, "no slice 'nope' behind the cut 'input' of lib/first"),
        (("pooled", "second:one.mean"), ErrorCode.NOT_FOUND, "no slice 'one.mean' behind the cut 'two' of second"),
        (("pooled", "third:pooled"), ErrorCode.NOT_FOUND, "no backbone 'third' reads this dataset"),
        (("pooled", "sensor:sensor", "second:pooled"), ErrorCode.NOT_FOUND, "no backbone 'sensor'"),
        (("pooled", "second:"), ErrorCode.NOT_FOUND, "no slice ''"),
        (("one.map", "second:pooled"), ErrorCode.NOT_FOUND, "no slice 'one.map'"),
        (("pooled", "lib/first:pooled", "second:pooled"), ErrorCode.INVALID_ARGUMENT, "named twice"),
        (("pooled",), ErrorCode.INVALID_ARGUMENT, "no slice of second is named"),
        (("second:pooled",), ErrorCode.INVALID_ARGUMENT, "no slice of lib/first is named"),
    ],
)
def test_slices_that_are_not_there(slices: tuple[str, ...], code: ErrorCode, what: str) -> None:
    found, message = refused(dataset(IMAGES, space("second", "two"), SENSOR), embedding="slices", slices=slices)
    assert found is code
    assert what in message


@pytest.mark.parametrize(
    ("first", "tap", "expected"),
    [
        (IMAGES, "", "two"),
        (IMAGES, "one", "one"),
        (IMAGES, "between", "between"),
        (space("second"), "", "two"),
        (space("second", "between"), "between", "between"),
        (space("second", "two"), "", "two"),
        (space("second", "two", bottleneck=SHA256), "two", "two"),
    ],
)
@pytest.mark.parametrize("embedding", ["auto", "pooled"])
def test_a_convolutional_head_reads_the_last_map_or_the_one_named(
    first: FeatureSpace, tap: str, expected: str, embedding: str
) -> None:
    job = run(dataset(first, SENSOR), head=replace(CONV, tap=tap), solver="adamw", embedding=embedding)
    assert job.head == replace(CONV, tap=expected)
    assert (job.embedding, job.slices) == ("slices", (f"{expected}.map",))


@pytest.mark.parametrize(
    ("first", "tap", "code", "what"),
    [
        (IMAGES, "nowhere", ErrorCode.NOT_FOUND, "lib/first has no cut 'nowhere'"),
        (IMAGES, "vector", ErrorCode.INVALID_ARGUMENT, "'vector' of lib/first is no map; among those .* are one, two$"),
        (IMAGES, "input", ErrorCode.INVALID_ARGUMENT, "'input' of lib/first is no map"),
        (space("second", "two"), "one", ErrorCode.INVALID_ARGUMENT, "lies before the cut .* are two$"),
        (space("second", "vector"), "", ErrorCode.INVALID_ARGUMENT, "a head of another kind"),
        (space("second", "vector"), "two", ErrorCode.INVALID_ARGUMENT, "lies before the cut"),
    ],
)
def test_taps_that_are_no_map(first: FeatureSpace, tap: str, code: ErrorCode, what: str) -> None:
    with pytest.raises(WireError, match=what) as error:
        run(dataset(first), head=replace(CONV, tap=tap), solver="adamw")
    assert error.value.code is code


def test_beside_a_map_stands_the_last_layer_of_every_other_backbone() -> None:
    conv: dict[str, Any] = {"head": CONV, "solver": "adamw"}
    job = run(dataset(IMAGES, space("third"), SENSOR), more_backbones=(BackboneChoice("second"),), **conv)
    assert job.slices == ("two.map", "second:pooled", "third:pooled")
    assert run(dataset(space("second"), space("third")), **conv).slices == ("two.map", "third:pooled")


def test_a_convolutional_head_takes_no_slices() -> None:
    code, message = refused(dataset(IMAGES), head=CONV, solver="adamw", embedding="slices", slices=("pooled",))
    assert code is ErrorCode.INVALID_ARGUMENT
    assert "no slices" in message


@pytest.mark.parametrize(
    ("first", "cut", "expected"),
    [
        (IMAGES, "", "one"),
        (IMAGES, "two", "two"),
        (IMAGES, "between", "between"),
        (space("second", "between"), "", "two"),
    ],
)
def test_fine_tuning_begins_before_the_last_stage_or_where_it_is_told_to(
    first: FeatureSpace, cut: str, expected: str
) -> None:
    job = run(dataset(first), fine_tune=FineTuneConfig(cut=cut, lora_rank=4))
    assert job.fine_tune == FineTuneConfig(cut=expected, lora_rank=4)


@pytest.mark.parametrize(
    ("record", "changes", "code", "what"),
    [
        (dataset(IMAGES), {"cut": "nowhere"}, ErrorCode.NOT_FOUND, "no cut 'nowhere'"),
        (dataset(IMAGES), {"cut": "vector"}, ErrorCode.INVALID_ARGUMENT, "is no map"),
        (dataset(space("second", "two")), {"cut": "one"}, ErrorCode.INVALID_ARGUMENT, "lies before the cut"),
        (dataset(space("second", "vector")), {}, ErrorCode.INVALID_ARGUMENT, "name a cut"),
        (dataset(IMAGES, SENSOR), {}, ErrorCode.INVALID_ARGUMENT, "further inputs"),
        (dataset(SENSOR), {}, ErrorCode.INVALID_ARGUMENT, "no backbone whose blocks"),
        (dataset(IMAGES), {"max_workers": 2}, ErrorCode.INVALID_ARGUMENT, "at most 1 workers.*tuning_workers"),
        (dataset(IMAGES, num_rows=10**9), {}, ErrorCode.INVALID_ARGUMENT, "tuning_memory_mb"),
    ],
)
def test_what_cannot_be_fine_tuned(record: DatasetRecord, changes: dict[str, Any], code: ErrorCode, what: str) -> None:
    with pytest.raises(WireError, match=what) as error:
        run(record, fine_tune=FineTuneConfig(**changes))
    assert error.value.code is code


def test_fine_tuning_reads_no_slice_before_its_cut() -> None:
    with pytest.raises(WireError, match=r"'one.mean' lies before the cut 'two'"):
        run(dataset(IMAGES), embedding="slices", slices=("one.mean",), fine_tune=FineTuneConfig(cut="two"))


def test_a_cluster_need_not_fine_tune() -> None:
    engines = {name: Engine(name, size) for name, size in SIZES.items()}
    backends = Backends(engines, None, None, tuning=TuningLimits(max_workers=0))  # type: ignore[arg-type]
    with pytest.raises(WireError) as error:
        asyncio.run(resolve(JobSpec("m", "d", "", 0, fine_tune=FineTuneConfig()), dataset(IMAGES), backends))
    assert error.value.code is ErrorCode.UNSUPPORTED
