"""What is wrong with the data, or with what is claimed of the model, in sentences that say what to do."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trunkline_worker.store.evaluations import LabelSuspect
from trunkline_worker.training.split import Indices
from trunkline_worker.training.trust.bootstrap import share_interval
from trunkline_worker.training.trust.checks import as_tensor

# Shape suffix legend: N = rows, D = columns, K = labels

_MAX_IMBALANCE = 10
"""Rows of the largest class per row of the smallest one."""

_MAX_WIDTH = 0.2
"""Of the interval of the accuracy."""

_MAX_CONSTANT = 0.5
"""Share of the columns. Behind a ReLU some are always zero on pictures of one kind, and do no harm."""

_MAX_SUSPECTS = 0.01
"""Share of the labels."""

_LEAST_GROUPS = 10
"""Held-out groups. Rows of one group are alike, and intervals count them as if they were not."""

_CHUNK_VALUES = 2**24


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a dataset and a head trained on it.

    Attributes:
        embedding_ND: All rows, as they came.
        training_index: Numbers of the rows that the head was trained on.
        validation_index: Numbers of the rows that it was measured on; empty if none was held out.
        row_ids: What each row was made from; of a row with several inputs, their ids one behind the other. Empty if not
            known.
        class_names: In the order of the classes or labels; empty for regression.
        classes_N: Class of each row; None if rows have several labels, or numbers.
        labels_NK: 1 where a row has a label, else 0; None otherwise.
        num_right: Held-out rows whose class was said right; None where no accuracy is claimed.
        suspects: Rows whose label is doubtful.
        num_examined: Rows whose labels were examined for that; 0: all.
        groups_N: Group of each row; None: they are not grouped.
    """

    embedding_ND: Tensor
    training_index: Indices
    validation_index: Indices
    row_ids: Sequence[bytes] = ()
    class_names: Sequence[str] = ()
    classes_N: Indices | None = None
    labels_NK: npt.NDArray[np.generic] | None = None
    num_right: int | None = None
    suspects: Sequence[LabelSuspect] = ()
    num_examined: int = 0
    groups_N: Indices | None = None


def warnings(evidence: Evidence) -> list[str]:
    """Return a sentence for each doubt, the gravest first; empty where there is none."""
    digests = _row_digests(evidence.embedding_ND)
    return [
        *_leakage(evidence, digests),
        *_contradictions(evidence, digests),
        *_suspects(evidence),
        *_too_few_rows(evidence),
        *_too_few_groups(evidence),
        *_imbalance(evidence),
        *_constant_columns(evidence),
    ]


def _leakage(evidence: Evidence, digests: Sequence[bytes]) -> Iterable[str]:
    num_held = len(evidence.validation_index)
    by_content = _on_both_sides(evidence, evidence.row_ids)
    by_embedding = _on_both_sides(evidence, digests) - by_content
    flatter = "so the scores are better than they would be on new rows"
    grouped = evidence.groups_N is not None
    if by_content:
        apart, once = (", in another group", "give copies one group") if grouped else ("", "upload each row once")
        yield (
            f"{len(by_content)} of {num_held} held-out rows have the same content as a training row{apart}, {flatter}; "
            f"{once}, and train again"
        )
    if by_embedding:
        others = "other " if by_content else ""
        apart, once = (" in another group", "give them one group") if grouped else ("", "keep one of each")
        yield (
            f"{len(by_embedding)} {others}held-out rows of {num_held} have exactly the embedding of a training row"
            f"{apart}, {flatter}; look for copies that were saved anew, {once}, and train again"
        )


def _on_both_sides(evidence: Evidence, keys: Sequence[bytes]) -> set[int]:
    """Return the held-out rows that share a key with a training row."""
    if not keys:
        return set()
    trained = {keys[row] for row in evidence.training_index.tolist()}
    return {row for row in evidence.validation_index.tolist() if keys[row] in trained}


def _contradictions(evidence: Evidence, digests: Sequence[bytes]) -> Iterable[str]:
    truth = evidence.classes_N if evidence.classes_N is not None else evidence.labels_NK
    if truth is None:
        return  # Measured twice, a number may well differ.
    if len(set(evidence.row_ids)) == len(evidence.row_ids) and len(set(digests)) == len(digests):
        return
    labels = [one.tobytes() for one in np.ascontiguousarray(truth)]
    groups = []
    for keys in (evidence.row_ids, digests):
        for rows in _grouped(keys):
            if len({labels[row] for row in rows}) > 1:
                groups.append(rows)
    if not groups:
        return
    first = min(groups)
    other = next(row for row in first if labels[row] != labels[first[0]])
    named = f"rows {first[0]} and {other}"
    if evidence.classes_N is not None:
        said, unlike = (_name(evidence, int(evidence.classes_N[row])) for row in (first[0], other))
        named += f", {said} and {unlike}"
    yield (
        f"{len({row for rows in groups for row in rows})} rows have the same content as another row but another label "
        f"(the first are {named}); decide which label is right and leave the others out"
    )


def _suspects(evidence: Evidence) -> Iterable[str]:
    examined = evidence.num_examined or evidence.embedding_ND.shape[0]
    count = len(evidence.suspects)
    if count <= _MAX_SUSPECTS * examined:
        return
    first = evidence.suspects[0]
    yield (
        f"{count} of {examined} labels ({100 * count / examined:.1f} %) look wrong (the first is row {first.row}, "
        f"given {_name(evidence, first.given)}, which looks like {_name(evidence, first.suggested)}); look the "
        "suspects through and mend those that are wrong"
    )


def _too_few_rows(evidence: Evidence) -> Iterable[str]:
    if evidence.num_right is None:
        return
    num_held = len(evidence.validation_index)
    if num_held == 0:
        yield "no rows were held out, so how good the model is on new rows is not known; hold some out to measure it"
        return
    low, high = share_interval(evidence.num_right, num_held)
    if high - low > _MAX_WIDTH:
        yield (
            f"the accuracy of {evidence.num_right / num_held:.3f} is measured on {num_held} rows and may lie anywhere "
            f"from {low:.2f} to {high:.2f} (95 %); hold more rows out before comparing it with anything"
        )


def _too_few_groups(evidence: Evidence) -> Iterable[str]:
    if evidence.groups_N is None or not len(evidence.validation_index):
        return
    count = len(np.unique(evidence.groups_N[evidence.validation_index]))
    if count < _LEAST_GROUPS:
        held = "1 group" if count == 1 else f"{count} groups"
        yield (
            f"the {_rows(len(evidence.validation_index))} held out are of {held} only, so how the scores would be on "
            "rows of new groups is known less well than their intervals say; add groups, or hold more out"
        )


def _imbalance(evidence: Evidence) -> Iterable[str]:
    if evidence.classes_N is None or not len(evidence.classes_N):
        return
    present, counts = np.unique(evidence.classes_N, return_counts=True)
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] * _MAX_IMBALANCE < counts[most]:
        rare, common = (_name(evidence, int(present[one])) for one in (least, most))
        yield (
            f"class {rare} has {_rows(int(counts[least]))} and class {common} {_rows(int(counts[most]))}, so the model "
            f"will rarely say {rare}; add rows of it, or train with class_weights='balanced'"
        )


def _constant_columns(evidence: Evidence) -> Iterable[str]:
    num_columns = evidence.embedding_ND.shape[1]
    if len(evidence.training_index) < 2:
        return
    count = _num_constant(evidence.embedding_ND, as_tensor(evidence.training_index))
    if count > _MAX_CONSTANT * num_columns:
        yield (
            f"{count} of {num_columns} columns of the embedding are constant over the training rows, so they tell "
            "nothing apart; check that the rows differ as they should, or train on other slices"
        )


def _num_constant(x_ND: Tensor, index: Tensor) -> int:
    low_D = high_D = x_ND[int(index[0])]
    for part in index.split(max(1, _CHUNK_VALUES // max(1, x_ND.shape[1]))):
        rows_BD = x_ND[part.to(x_ND.device)]
        low_D, high_D = torch.minimum(low_D, rows_BD.amin(dim=0)), torch.maximum(high_D, rows_BD.amax(dim=0))
    # As in `standardise`: so little is rounding.
    size_D = torch.maximum(low_D.abs(), high_D.abs()).double()
    return int((high_D.double() - low_D.double() <= 1e-6 * size_D + 1e-12).sum())


def _row_digests(x_ND: Tensor) -> list[bytes]:
    """Return a short hash of each row's values."""
    digests = []
    for part_BD in x_ND.split(max(1, _CHUNK_VALUES // max(1, x_ND.shape[1]))):
        # Adding 0 makes one zero of the two.
        for row_D in (part_BD.float() + 0.0).cpu().numpy():
            digests.append(hashlib.blake2b(row_D.tobytes(), digest_size=16).digest())
    return digests


def _grouped(keys: Sequence[bytes]) -> Iterable[list[int]]:
    """Return the rows of each key, keys as they first come."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    return groups.values()


def _name(evidence: Evidence, number: int) -> str:
    return repr(evidence.class_names[number][:80]) if number < len(evidence.class_names) else str(number)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
