"""Ids of rows and digests of datasets: equal for equal content, and never otherwise."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from trunkline_wire.rows import ROW_ID_BYTES, content_digest, dataset_digest, number_groups, row_id
from trunkline_wire.specs import (
    IMAGES,
    FeatureSpace,
    Preprocessing,
    embedding_fingerprint,
    feature_fingerprint,
)

SPACE = FeatureSpace("net", "cut", 96, "f" * 64)


def test_content_is_bytes_or_dtype_shape_and_values() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    same = [array, array.copy(), np.asfortranarray(array), np.repeat(array, 2, axis=0)[::2]]
    assert len({content_digest(one) for one in same}) == 1
    other = [array.T, array.astype(np.float16), array.reshape(-1), array.view(np.int32), array.tobytes(), array[:0]]
    assert len({content_digest(one) for one in [array, *other]}) == 7
    assert len({content_digest(np.zeros(shape, np.uint8)) for shape in ((), (1,), (0,), (0, 3))}) >= 3


def test_ids_do_not_change_between_versions() -> None:
    # Clusters keep rows under these ids: another value here means that every client uploads everything again.
    array = np.arange(12, dtype="<f2").reshape(3, 4)
    expected = hashlib.sha256(b"array\0<f2\0(3, 4)\0" + array.tobytes()).digest()
    assert content_digest(array) == expected
    assert content_digest(b"x").hex() == hashlib.sha256(b"file\0x").hexdigest()
    assert row_id(SPACE, "float16", expected).hex() == (
        hashlib.sha256(b"row-v1\0" + b"f" * 64 + b"\0float16\0" + expected).hexdigest()
    )
    digest = dataset_digest([bytes(32), bytes(31) + b"\1"], ["cat", "dog"], [0, 1], None)
    assert digest == "af0213a996e8ad8e5868d1d35a06e2cb080d26f9dc7195b218157bb9690b7e85"
    more = [[b"\2" * 32, b"\3" * 32], [b"\4" * 32, b"\5" * 32]]
    expected = hashlib.sha256(b"dataset-inputs-v1\0" + bytes.fromhex(digest))
    for ids in more:
        expected.update((2).to_bytes(8, "little") + b"".join(ids))
    several = dataset_digest([bytes(32), bytes(31) + b"\1"], ["cat", "dog"], [0, 1], None, more)
    assert several == expected.hexdigest()


def test_a_row_depends_on_space_codec_and_content() -> None:
    content = content_digest(b"picture")
    ids = {
        row_id(SPACE, "float16", content),
        row_id(SPACE, "float32", content),
        row_id(SPACE, "int8", content),
        row_id(dataclasses.replace(SPACE, fingerprint="e" * 64), "float16", content),
        row_id(IMAGES, "images", content),
        row_id(SPACE, "float16", content_digest(b"another")),
    }
    assert len(ids) == 6
    assert {len(one) for one in ids} == {ROW_ID_BYTES}
    # The name of the backbone is for people; its fingerprint decides.
    assert row_id(dataclasses.replace(SPACE, backbone="alias"), "float16", content) in ids


def test_a_dataset_depends_on_everything_in_it_and_on_the_order() -> None:
    rows = [bytes([n]) * 32 for n in range(3)]
    targets = np.arange(6, dtype=np.float32).reshape(3, 2)
    digests = [
        dataset_digest(rows, ["a", "b"], [0, 1, 0], None),
        dataset_digest(rows[::-1], ["a", "b"], [0, 1, 0], None),
        dataset_digest(rows, ["b", "a"], [0, 1, 0], None),
        dataset_digest(rows, ["ab", ""], [0, 1, 0], None),
        dataset_digest(rows, ["a", "b"], [0, 1, 1], None),
        dataset_digest(rows[:2], ["a", "b"], [0, 1], None),
        dataset_digest(rows, [], [], targets),
        dataset_digest(rows, [], [], targets.reshape(3, 2) + 1),
        dataset_digest(rows, [], [], None),
        dataset_digest(rows, ["a", "b"], [], targets),
        dataset_digest(rows, ["a", "b"], [0, 1, 0], None, [rows]),
        dataset_digest(rows, ["a", "b"], [0, 1, 0], None, [rows[::-1]]),
        dataset_digest(rows, ["a", "b"], [0, 1, 0], None, [rows, rows[::-1]]),
        dataset_digest(rows, ["a", "b"], [0, 1, 0], None, [rows[::-1], rows]),
        dataset_digest(rows, ["a", "b"], [0, 1, 1], None, [rows]),
        dataset_digest(rows[::-1], ["a", "b"], [0, 1, 0], None, [rows]),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == dataset_digest(rows, ("a", "b"), np.array([0, 1, 0]), None)
    assert digests[0] == dataset_digest(rows, ["a", "b"], [0, 1, 0], None, [])
    assert digests[6] == dataset_digest(rows, [], [], np.asfortranarray(targets))


def test_fingerprints_depend_on_weights_cut_and_every_part_of_the_preprocessing() -> None:
    base = Preprocessing(224, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    variants = [
        dataclasses.replace(base, input_size=96),
        dataclasses.replace(base, crop_fraction=1.0),
        dataclasses.replace(base, interpolation="bilinear"),
        dataclasses.replace(base, mean=(0.5, 0.5, 0.4)),
        dataclasses.replace(base, std=(0.5, 0.5, 0.4)),
    ]
    prints = [feature_fingerprint("w", "cut", one) for one in [base, *variants]]
    prints += [feature_fingerprint("w", "other", base), feature_fingerprint("v", "cut", base)]
    prints += [embedding_fingerprint("w", one) for one in [base, *variants]]
    assert len(set(prints)) == len(prints)
    assert feature_fingerprint("w", "cut", dataclasses.replace(base)) == prints[0]


def test_groups_and_views_change_a_digest_only_where_there_are_any():
    ids = [bytes([number]) * 32 for number in range(4)]
    plain = dataset_digest(ids, ["a", "b"], [0, 0, 1, 1], None)
    assert dataset_digest(ids, ["a", "b"], [0, 0, 1, 1], None, groups=None, views=1) == plain
    arranged = [
        dataset_digest(ids, ["a", "b"], [0, 0, 1, 1], None, groups=groups, views=views)
        for groups in (None, np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]))
        for views in (1, 2)
    ]
    assert arranged[0] == plain
    assert len(set(arranged)) == 6


def test_groups_are_numbered_as_they_come():
    assert number_groups(np.array([9, 2, 9, 5, 2])).tolist() == [0, 1, 0, 2, 1]
    assert number_groups(np.array([9])).dtype == np.uint32
