from dataclasses import replace

import numpy as np
import pytest
import torch
from trunkline_worker.store.evaluations import LabelSuspect
from trunkline_worker.training.trust.doubts import Evidence, warnings

# N = rows, D = columns

NAMES = ("cat", "dog")
TRAINING, HELD = np.arange(0, 200), np.arange(200, 400)


def evidence() -> Evidence:
    """Return what raises no doubt."""
    return Evidence(
        embedding_ND=torch.from_numpy(np.random.default_rng(0).normal(size=(400, 20))).float(),
        training_index=TRAINING,
        validation_index=HELD,
        row_ids=[b"row %d" % one for one in range(400)],
        class_names=NAMES,
        classes_N=np.arange(400) % 2,
        num_right=180,
    )


def with_rows(changes: dict[int, int]) -> torch.Tensor:
    """Return an embedding in which some rows are copies of others."""
    copied = evidence().embedding_ND.clone()
    for to, source in changes.items():
        copied[to] = copied[source]
    return copied


def with_ids(changes: dict[int, int]) -> list[bytes]:
    ids = list(evidence().row_ids)
    for to, source in changes.items():
        ids[to] = ids[source]
    return ids


def only(changed: Evidence) -> str:
    """Return the one warning."""
    (text,) = warnings(changed)
    assert text[0].islower() or text[0].isdigit()
    assert "; " in text  # what is wrong; what to do
    assert ". " not in text
    return text


def test_good_data_raise_no_doubt() -> None:
    assert warnings(evidence()) == []


def test_less_is_known_of_some_data() -> None:
    bare = Evidence(evidence().embedding_ND, TRAINING, HELD)
    assert warnings(bare) == []
    assert warnings(replace(bare, validation_index=HELD[:0])) == []


# --- leakage ----------------------------------------------------------------------------------------------------------


def test_the_same_content_on_both_sides() -> None:
    text = only(replace(evidence(), row_ids=with_ids({201: 1, 203: 1, 205: 5})))
    assert text.startswith("3 of 200 held-out rows have the same content as a training row")
    assert "upload each row once" in text


def test_the_same_embedding_on_both_sides() -> None:
    text = only(replace(evidence(), embedding_ND=with_rows({201: 1})))
    assert text.startswith("1 held-out rows of 200 have exactly the embedding of a training row")
    assert text == only(replace(evidence(), embedding_ND=with_rows({201: 1}), row_ids=()))


def test_a_row_is_counted_once_and_others_besides() -> None:
    both = replace(evidence(), embedding_ND=with_rows({201: 1, 203: 3}), row_ids=with_ids({201: 1}))
    first, second = warnings(both)
    assert first.startswith("1 of 200 held-out rows have the same content")
    assert second.startswith("1 other held-out rows")
    assert len(warnings(replace(both, row_ids=with_ids({201: 1, 203: 3})))) == 1


def test_copies_on_one_side_are_fine_and_so_is_almost_the_same() -> None:
    assert warnings(replace(evidence(), row_ids=with_ids({3: 1, 203: 201}))) == []
    assert warnings(replace(evidence(), embedding_ND=with_rows({3: 1, 203: 201}))) == []
    near = with_rows({201: 1})
    near[201, 0] += 1e-4
    assert warnings(replace(evidence(), embedding_ND=near)) == []


def test_both_zeros_are_one() -> None:
    zeros = evidence().embedding_ND.clone()
    zeros[1], zeros[201] = 0.0, -0.0
    assert "exactly the embedding" in only(replace(evidence(), embedding_ND=zeros))


# --- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["row_ids", "embedding_ND"])
def test_one_content_with_two_labels(by: str) -> None:
    copies = {4: 1, 6: 1, 9: 1, 20: 10}  # 20 and 10 agree
    changed = replace(evidence(), **{by: with_ids(copies) if by == "row_ids" else with_rows(copies)})
    text = only(changed)
    assert text.startswith("4 rows have the same content as another row but another label")
    assert "rows 1 and 4, 'dog' and 'cat'" in text
    assert "decide which label is right" in text


def test_the_first_contradiction_is_named_however_it_was_found() -> None:
    changed = replace(evidence(), row_ids=with_ids({30: 31, 20: 21}), embedding_ND=with_rows({8: 7}))
    text = only(changed)
    assert text.startswith("6 rows")
    assert "rows 7 and 8" in text
    assert "rows 20 and 21" in only(replace(changed, embedding_ND=evidence().embedding_ND))


def test_labels_contradict_each_other_numbers_do_not() -> None:
    labels = np.eye(2)[np.arange(400) % 2]
    several = replace(evidence(), classes_N=None, labels_NK=labels, num_right=None, row_ids=with_ids({4: 1}))
    assert "rows 1 and 4)" in only(several)
    assert warnings(replace(several, labels_NK=np.ones((400, 2)))) == []
    assert warnings(replace(several, labels_NK=None, class_names=())) == []


# --- labels, rows and classes -----------------------------------------------------------------------------------------


def test_more_suspects_than_one_in_a_hundred() -> None:
    suspects = [LabelSuspect(9 + one, 1, 0, 0.5) for one in range(5)]
    text = only(replace(evidence(), suspects=suspects))
    assert text.startswith(
        "5 of 400 labels (1.2 %) look wrong (the first is row 9, given 'dog', which looks like 'cat')"
    )
    assert warnings(replace(evidence(), suspects=suspects[:4])) == []
    assert only(replace(evidence(), suspects=suspects[:4], num_examined=200)).startswith("4 of 200 labels (2.0 %)")


@pytest.mark.parametrize(("num_held", "num_right", "doubtful"), [(50, 40, True), (70, 56, False), (10, 10, True)])
def test_too_few_rows_for_what_is_claimed(num_held: int, num_right: int, doubtful: bool) -> None:
    changed = replace(evidence(), validation_index=HELD[:num_held], num_right=num_right)
    if not doubtful:
        assert warnings(changed) == []
        return
    text = only(changed)
    assert f"measured on {num_held} rows" in text
    assert "hold more rows out" in text
    assert warnings(replace(changed, num_right=None)) == []


def test_nothing_held_out() -> None:
    assert only(replace(evidence(), validation_index=HELD[:0], num_right=0)).startswith("no rows were held out")


def test_a_class_with_a_tenth_of_the_rows() -> None:
    few = np.zeros(400, dtype=np.int64)
    few[:36] = 1
    text = only(replace(evidence(), classes_N=few))
    assert text.startswith("class 'dog' has 36 rows and class 'cat' 364 rows")
    assert "class_weights='balanced'" in text
    few[:37] = 1
    assert warnings(replace(evidence(), classes_N=few)) == []
    few[1:] = 0
    assert "has 1 row and" in only(replace(evidence(), classes_N=few))


def test_long_names_are_cut() -> None:
    few = np.zeros(400, dtype=np.int64)
    few[0] = 1
    text = only(replace(evidence(), classes_N=few, class_names=("cat", "d" * 500)))
    assert "d" * 80 in text
    assert "d" * 81 not in text


# --- columns ----------------------------------------------------------------------------------------------------------


def test_constant_columns() -> None:
    flat = evidence().embedding_ND.clone()
    flat[TRAINING, 8:] = 7.0
    flat[TRAINING, 5] = 1e5 + 0.01 * (torch.arange(200) % 2)  # rounding
    text = only(replace(evidence(), embedding_ND=flat))
    assert text.startswith("13 of 20 columns of the embedding are constant over the training rows")
    flat[0, 8:], flat[0, 5] = 7.1, 1e5 + 100
    assert warnings(replace(evidence(), embedding_ND=flat)) == []


def test_columns_that_are_dead_behind_a_relu_are_nothing_unusual() -> None:
    wide = torch.from_numpy(np.random.default_rng(0).normal(size=(400, 300))).float()
    wide[:, :150] = 0.0
    assert warnings(replace(evidence(), embedding_ND=wide)) == []
    wide[:, 150] = 0.0
    assert only(replace(evidence(), embedding_ND=wide)).startswith("151 of 300 columns")


def test_large_embeddings_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = with_rows({390: 1})
    flat[:, 8:] = 7.0
    whole = warnings(replace(evidence(), embedding_ND=flat))
    monkeypatch.setattr("trunkline_worker.training.trust.doubts._CHUNK_VALUES", 50)
    assert warnings(replace(evidence(), embedding_ND=flat)) == whole
    assert len(whole) == 3


def test_the_gravest_doubt_comes_first() -> None:
    few = np.zeros(400, dtype=np.int64)
    few[1] = 1
    flat = with_rows({201: 1})
    flat[:, 8:] = 7.0
    everything = replace(
        evidence(),
        embedding_ND=flat,
        row_ids=with_ids({202: 2, 3: 1}),
        classes_N=few,
        validation_index=HELD[:20],
        num_right=15,
        suspects=[LabelSuspect(one, 0, 1, 0.5) for one in range(50)],
    )
    words = ["same content as a", "exactly", "another label", "look wrong", "accuracy", "class 'dog'", "constant"]
    for text, word in zip(warnings(everything), words, strict=True):
        assert word in text
