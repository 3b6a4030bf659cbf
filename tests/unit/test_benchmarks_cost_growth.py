"""What ``benchmarks/cost_growth.py`` puts into a cluster before it starts, and what it makes of the numbers."""

import importlib
from pathlib import Path

import pytest
from trunkline_wire.specs import INPUT_CUT, BackboneSpec, CutSpec, Preprocessing, SliceSpec
from trunkline_worker.heads.artefact import head_from_bytes, head_path
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cost_growth(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cost_growth")


def test_registered_heads_are_models_that_can_be_loaded(cost_growth, tmp_path):
    cut = CutSpec(INPUT_CUT, (8, 8, 3), "f" * 64, ("pooled",), channel_axis=2)
    spec = BackboneSpec(
        name=cost_growth.BACKBONE,
        pretrained=True,
        weights="w",
        weights_sha256="w",
        num_parameters=0,
        preprocessing=Preprocessing(8, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        resizable=True,
        cuts=(cut,),
        slices=(SliceSpec("pooled", 2, 8),),
        embedding_fingerprint="e" * 64,
    )
    database, blobs = Database(f"sqlite:///{tmp_path}/metadata.sqlite"), BlobStore(f"file://{tmp_path}/data")
    cost_growth.register_heads(database, blobs, spec, spec.space(cut), 3)
    store = MetadataStore(database)
    models = store.models.list("default")
    assert [one.reference for one in models] == ["head-0@1", "head-1@1", "head-2@1"]
    assert len({one.head_sha256 for one in models}) == 3
    assert all(job.state.has_ended for job in store.jobs.list("default"))
    for model in models:
        head = head_from_bytes(blobs.get_checked(head_path(model.head_sha256), model.head_sha256))
        assert (head.slices, head.more_width, head.num_outputs) == (model.slices, 0, model.num_outputs)
        assert head.num_features == 6
        assert (model.embedding_fingerprint, model.class_names) == ("e" * 64, head.class_names)
    database.close()


def test_ratios_are_taken_within_a_round(cost_growth):
    assert cost_growth.ratios([[10.0, 20.0, 5.0], [100.0, 300.0, 25.0]]) == [[1.0, 1.0], [2.0, 3.0], [0.5, 0.25]]


def test_no_point_of_an_axis_needs_more_callers_or_bytes_than_there_are(cost_growth):
    row_bytes = {cost_growth.PIXELS: 150_528, cost_growth.JPEG: 20_000}
    sizes = {**dict.fromkeys(cost_growth.PAYLOADS, 32_000), **row_bytes}
    for axis in cost_growth.axes(cost_growth.HEADS, sizes):
        assert len({value for value, _ in axis.points}) > 1
        for _, load in axis.points:
            assert load.callers <= cost_growth.MOST_CALLERS
            assert load.rows * sizes[load.payload] < cost_growth.MAX_MESSAGE_BYTES


def test_memory_of_this_process_is_found(cost_growth):
    import os

    assert 10**6 < cost_growth.resident_bytes(os.getpid()) < 10**11
