"""Outlier scores beside predictions: in the same pass, for those who asked, from a file of their own."""

import asyncio
import dataclasses
import functools
import hashlib
import io

import engines
import numpy as np
import pytest
import torch
from PIL import Image
from small_backbones import SIZE, small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import local_space
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead
from trunkline_worker.heads.outliers import detector_from_bytes, detector_to_bytes, outliers_path
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.records import ModelInput, ModelRecord
from trunkline_worker.training.trust.outliers import fit_detector

CUT = "norm"
LOCAL = local_space("edge", "ab" * 32)
MORE = (ModelInput(LOCAL, "", ("edge",), 4, "float32"),)
OWN = HeadInput(("edge",), (4,))

with_engine = functools.partial(engines.with_engine, patience_s=120)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture(scope="module")
def spec(backbone):
    return backbone.describe(SIZE)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(f"file://{tmp_path}/store")


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 255, size=(7, SIZE, SIZE, 3), dtype=np.uint8)


def keep(blobs, path, data):
    sha256 = hashlib.sha256(data).hexdigest()
    blobs.put(path(sha256), data)
    return sha256


class Published:
    """A model whose head and detector are in storage."""

    def __init__(self, blobs, spec, inputs, *, seed=0, more=(), local=False):
        width = sum(one.num_columns for one in inputs)
        module = Head(HeadConfig(), inputs, 3)
        module.reset_parameters(torch.Generator().manual_seed(seed))
        self.head = TrainedHead(module.eval(), "classification", ("a", "b", "c"))
        rows_ND = torch.from_numpy(np.random.default_rng(seed).normal(size=(50, width)).astype(np.float32))
        self.detector = fit_detector(rows_ND[:30], None, rows_ND[30:], inputs, 0)
        self.record = ModelRecord(
            tenant="me",
            name=f"m{seed}",
            version=1,
            task="classification",
            class_names=self.head.class_names,
            num_outputs=3,
            space=LOCAL if local else spec.space(spec.cut("input")),
            embedding_fingerprint="" if local else spec.embedding_fingerprint,
            slices=inputs[0].slices,
            metrics={},
            dataset="d@1",
            dataset_digest="",
            head_sha256=keep(blobs, head_path, head_to_bytes(self.head)),
            versions={},
            job_id="job",
            create_time=0.0,
            codec="float32" if local else "images",
            more_inputs=more,
            outliers_sha256=keep(blobs, outliers_path, detector_to_bytes(self.detector)),
        )

    def expected(self, columns):
        x_BD = torch.from_numpy(np.ascontiguousarray(columns))
        return self.head.predict(x_BD).numpy(), self.detector.predict(x_BD).numpy()

    def check(self, answer, columns):
        outputs, outliers = self.expected(columns)
        np.testing.assert_allclose(answer.outputs_BK, outputs, atol=1e-5)
        np.testing.assert_allclose(answer.outliers_B2, outliers, rtol=1e-3, atol=1e-4)
        assert answer.outliers_B2.dtype == np.float32


def pooled(spec):
    return HeadInput(("pooled",), (spec.slice_width("pooled"),))


def images(spec):
    return spec.space(spec.cut("input"))


async def refused(call, code, *parts):
    with pytest.raises(WireError) as caught:
        await call
    assert caught.value.code is code, caught.value
    for part in parts:
        assert part in caught.value.message


def test_of_one_pass_some_get_scores_and_some_do_not(backbone, blobs, spec, pictures):
    """Rows of several models, with and without, in one batch of the trunk."""
    models = [Published(blobs, spec, [pooled(spec)], seed=seed) for seed in range(3)]
    space = images(spec)

    async def test(engine):
        embedding = (await engine.extract(space, pictures, ("pooled",))).embedding_BD
        before = await engine.stats()
        await engine.predict(space, pictures, models[0].record)
        assert not engine._detectors.num_loads  # nobody has asked
        asked = [(0, True), (1, False), (2, True), (0, False), (0, True)]
        answers = await asyncio.gather(
            *(engine.predict(space, pictures, models[one].record, outliers=wanted) for one, wanted in asked)
        )
        for answer, (one, wanted) in zip(answers, asked, strict=True):
            if wanted:
                models[one].check(answer, embedding)
            else:
                assert answer.outliers_B2 is None
                np.testing.assert_allclose(answer.outputs_BK, models[one].expected(embedding)[0], atol=1e-5)
        assert engine._detectors.num_loads == 2
        return (await engine.stats()).trunk_rows - before.trunk_rows

    async def counted(engine):
        assert await test(engine) == 6 * len(pictures)

    with_engine(backbone, blobs, counted)


def test_no_row_goes_through_the_trunk_twice_and_no_head_is_run_more(backbone, blobs, spec, pictures):
    model = Published(blobs, spec, [pooled(spec)])

    async def test(engine):
        counts = []
        for outliers in (False, True):
            before = await engine.stats()
            await engine.predict(images(spec), pictures, model.record, outliers=outliers)
            after = await engine.stats()
            counts.append((after.trunk_calls - before.trunk_calls, after.head_calls - before.head_calls))
        assert counts == [(1, 1), (1, 1)]

    with_engine(backbone, blobs, test)


def test_requests_larger_than_a_batch_and_other_inputs(backbone, blobs, spec, pictures):
    model = Published(blobs, spec, [pooled(spec), OWN], more=MORE)
    own = np.random.default_rng(1).normal(size=(21, 4)).astype(np.float32)
    many = np.concatenate([pictures] * 3)

    async def test(engine):
        embedding = (await engine.extract(images(spec), many, ("pooled",))).embedding_BD
        answer = await engine.predict(images(spec), many, model.record, more_BE=own, outliers=True)
        model.check(answer, np.concatenate([embedding, own], axis=1))

    with_engine(backbone, blobs, test, max_rows=4)


def test_a_picture_that_cannot_be_read_has_no_score_and_the_others_keep_theirs(backbone, blobs, spec, pictures):
    model = Published(blobs, spec, [pooled(spec)])

    def png(one):
        file = io.BytesIO()
        Image.fromarray(one).save(file, "PNG")
        return file.getvalue()

    files = [png(one) for one in pictures]
    files[2] = b"no picture"

    async def test(engine):
        answer = await engine.predict(images(spec), files, model.record, outliers=True)
        assert set(answer.row_errors) == {2} and np.isnan(answer.outliers_B2[2]).all()
        good = [0, 1, 3, 4, 5, 6]
        embedding = (await engine.extract(images(spec), pictures[good], ("pooled",))).embedding_BD
        np.testing.assert_allclose(answer.outliers_B2[good], model.expected(embedding)[1], rtol=1e-3, atol=1e-4)

    with_engine(backbone, blobs, test, max_rows=4)


def test_local_features_alone(backbone, blobs, spec):
    model = Published(blobs, spec, [OWN], local=True)
    own = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)

    async def test(engine):
        model.check(await engine.predict(LOCAL, own, model.record, outliers=True), own)
        huge = await engine.predict(LOCAL, own * 1e30, model.record, outliers=True)
        assert np.isfinite(huge.outliers_B2).all() or huge.row_errors
        assert (await engine.stats()).trunk_rows == 0

    with_engine(backbone, blobs, test)


def test_models_that_have_none_are_told_what_to_do(backbone, blobs, spec, pictures):
    model = Published(blobs, spec, [pooled(spec)])
    old = dataclasses.replace(model.record, outliers_sha256="")
    conv = dataclasses.replace(old, head=HeadConfig("conv", channels=(4,), tap="norm"))

    async def test(engine):
        def ask(record):
            return engine.predict(images(spec), pictures, record, outliers=True)

        await refused(ask(old), ErrorCode.UNSUPPORTED, "m0@1", "Train it again")
        await refused(ask(conv), ErrorCode.UNSUPPORTED, "reads a map")
        assert (await engine.stats()).trunk_rows == 0
        assert (await engine.predict(images(spec), pictures, old)).outliers_B2 is None

    with_engine(backbone, blobs, test)


def test_a_file_that_is_damaged_or_of_another_model_fails_those_who_asked(backbone, blobs, spec, pictures):
    model, other = Published(blobs, spec, [pooled(spec)]), Published(blobs, spec, [OWN], seed=1, local=True)
    sha256 = keep(blobs, outliers_path, b"nonsense")
    swapped = dataclasses.replace(model.record, outliers_sha256=other.record.outliers_sha256)
    broken = dataclasses.replace(model.record, outliers_sha256=sha256)
    gone = dataclasses.replace(model.record, outliers_sha256="0" * 64)

    async def test(engine):
        space = images(spec)
        for record, code in ((swapped, "CORRUPT_DATA"), (broken, "CORRUPT_DATA"), (gone, "NOT_FOUND")):
            call = engine.predict(space, pictures, record, outliers=True)
            await refused(call, ErrorCode[code])
            assert len((await engine.predict(space, pictures, record)).outputs_BK) == len(pictures)
        assert (await engine.stats()).queued_rows == 0

    with_engine(backbone, blobs, test)


def test_what_fails_in_a_detector_fails_its_own_rows_only(backbone, blobs, spec, pictures, monkeypatch):
    good, bad = Published(blobs, spec, [pooled(spec)]), Published(blobs, spec, [pooled(spec)], seed=1)

    def load(data):
        detector = detector_from_bytes(data)
        if data == detector_to_bytes(bad.detector):
            monkeypatch.setattr(type(detector), "predict", fail_for(detector, type(detector).predict))
        return detector

    def fail_for(culprit, predict):
        def run(self, x_BD):
            if self is culprit:
                raise RuntimeError("secret")
            return predict(self, x_BD)

        return run

    async def test(engine):
        engine._detectors._load_head = load
        space = images(spec)
        answers = await asyncio.gather(
            engine.predict(space, pictures, good.record, outliers=True),
            engine.predict(space, pictures, bad.record, outliers=True),
            return_exceptions=True,
        )
        assert np.isfinite(answers[0].outliers_B2).all()
        assert answers[1].code is ErrorCode.INTERNAL and "secret" not in answers[1].message

    with_engine(backbone, blobs, test)
