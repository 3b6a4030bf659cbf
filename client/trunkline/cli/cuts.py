"""``trunkline backbones show``: a backbone, and what each of its cuts costs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_wire.specs import INPUT_CUT

from trunkline.cli.output import columns, facts
from trunkline.errors import UnsupportedError

if TYPE_CHECKING:
    from trunkline_wire.specs import BackboneSpec, CutCost, CutSpec

    from trunkline._cut_table import CutRow
    from trunkline._jpeg import JpegSize
    from trunkline.client import Client

WIDTH = 120
"""Most columns of text."""

MAX_NAMES = 12
"""Most cuts that are named in one sentence."""

LEGEND = (
    "kB (1000 bytes) a picture in each codec before zstd; bfloat16 is as large as float16. HERE and THERE: shares of "
    "the multiply-adds, in the stem and on the cluster. STEM: its size in MB. UNDER THE JPEG: codecs that need fewer "
    "bytes; where the cut was measured, the smallest one within the error bound."
)


def show(
    client: Client,
    name: str,
    input_size: int | None,
    *,
    every: bool,
    cuts: Sequence[str],
    measure: bool,
    images: Path | None,
    max_error: float | None,
) -> tuple[dict[str, Any], str, str]:
    """Return what is known about a backbone as plain values and as text, and what to type next."""
    from trunkline._cut_table import cut_row
    from trunkline._jpeg import measure_jpeg
    from trunkline.progress import show_progress

    spec = client.describe(name, input_size=input_size)
    chosen = _chosen(client, spec, input_size, every=every, cuts=cuts)
    jpeg = measure_jpeg(images, spec.preprocessing) if images else _sample(client, spec, input_size)
    bound = MAX_CODEC_ERROR if max_error is None else max_error
    costs: dict[str, CutCost] = {}
    if cuts or measure:
        with show_progress("Measuring", len(chosen)) as bar:
            for cut in chosen:
                costs[cut.name] = client.cut_cost(name, cut.name, input_size=input_size)
                bar.advance()
    rows = [cut_row(spec, cut, cost=costs.get(cut.name), jpeg=jpeg, max_error=bound) for cut in chosen]
    data = {
        **asdict(spec),
        "jpeg": None if jpeg is None else asdict(jpeg),
        "max_error": bound,
        "table": [row.to_dict() for row in rows],
    }
    parts = [_head(spec, jpeg), _table(rows), *(_measured(row) for row in rows if row.cost and row.sizes)]
    parts.append(_conclusion(spec, rows, bound))
    return data, "\n\n".join(parts), _following(spec, rows)


def _chosen(
    client: Client, spec: BackboneSpec, input_size: int | None, *, every: bool, cuts: Sequence[str]
) -> list[CutSpec]:
    if not cuts:
        return [one for one in spec.cuts if every or one.is_stage or one.name == INPUT_CUT]
    found = []
    for name in cuts:
        cut = spec.cut(name)
        # The cluster says best what is near a name that is none.
        found.append(client.cut_cost(spec.name, name, input_size=input_size).cut if cut is None else cut)
    return found


def _sample(client: Client, spec: BackboneSpec, input_size: int | None) -> JpegSize | None:
    """Return the size of the cluster's sample pictures, or None if the cluster is too old to know."""
    from trunkline._jpeg import JpegSize

    try:
        cost = client.cut_cost(spec.name, INPUT_CUT, input_size=input_size)
    except UnsupportedError:
        return None
    return JpegSize(cost.jpeg_bytes_per_row, None, cost.sample)


def _head(spec: BackboneSpec, jpeg: JpegSize | None) -> str:
    pre = spec.preprocessing
    # A name and its width stay on one line.
    slices = ", ".join(f"{one.name}\N{NO-BREAK SPACE}{one.width}" for one in spec.slices)
    rows = [
        ("name", spec.name),
        ("weights", spec.weights if spec.pretrained else f"{spec.weights} (NOT pretrained)"),
        ("parameters", f"{spec.num_parameters:,}"),
        ("compute", f"{spec.macs / 1e6:,.4g} million multiply-adds a picture" if spec.macs else None),
        ("input", f"{pre.input_size} px, {pre.interpolation}, crop {pre.crop_fraction:g}"),
        ("resizable", "yes" if spec.resizable else "no"),
        ("runtime", f"{spec.runtime} on {spec.device}, relative error {spec.runtime_error:.2g}{_speed(spec)}"),
        ("slices", slices),
        ("jpeg", _jpeg(jpeg, pre.input_size)),
    ]
    indent = 2 + max(len(name) for name, _ in rows)
    return facts([(name, _indented(text, indent)) for name, text in rows if text]).replace("\N{NO-BREAK SPACE}", " ")


def _speed(spec: BackboneSpec) -> str:
    if not spec.rows_per_s:
        return ""
    return f", {spec.rows_per_s:.3g} rows/s in batches of {spec.batch_rows} when it was chosen"


def _jpeg(jpeg: JpegSize | None, input_size: int) -> str:
    from trunkline._jpeg import QUALITY

    if jpeg is None:
        return "not known: the cluster is too old to say; --images FOLDER measures yours"
    resized = f"{_kb(jpeg.resized)} kB a picture at {input_size} px and quality {QUALITY}"
    if jpeg.own is None:
        return f"{resized}, mean of {jpeg.source}; --images FOLDER measures yours"
    return f"{resized}, {_kb(jpeg.own)} kB as the files are, means of {jpeg.source}"


def _table(rows: Sequence[CutRow]) -> str:
    header = ("CUT", "FEATURES", "FLOAT32", "FLOAT16", "INT8", "INT4", "HERE", "THERE", "STEM", "UNDER THE JPEG")
    lines = [
        (
            row.cut.name,
            "x".join(map(str, row.cut.feature_shape)),
            *(_kb(dict(row.sizes)[codec]) if row.sizes else "-" for codec in ("float32", "float16", "int8", "int4")),
            _percent(row.local_share),
            _percent(None if row.local_share is None else 1 - row.local_share),
            f"{row.stem_bytes / 1e6:.2f}" if row.sizes else "-",
            _under_jpeg(row),
        )
        for row in rows
    ]
    table = columns(header, lines, right=range(2, 9))
    if max(map(len, table.splitlines())) > WIDTH:
        # Long names, which must stay whole, get lines of their own.
        figures = columns(header[1:], [line[1:] for line in lines], right=range(1, 8)).splitlines()
        names = [header[0], *(line[0] for line in lines)]
        table = "\n".join(f"{name}\n  {line}" for name, line in zip(names, figures, strict=True))
    return f"{_wrapped(LEGEND)}\n\n{table}"


def _under_jpeg(row: CutRow) -> str:
    if row.jpeg_is_better:
        return "send the JPEG"
    if row.smallest is not None and row.sizes:
        return f"{row.smallest.codec}, {_kb(row.smallest.bytes_per_row)} kB"
    if row.beats_jpeg is None:
        return "-"
    smaller = [codec for codec, size in row.sizes if row.jpeg_bytes is not None and size < row.jpeg_bytes]
    return "all" if len(smaller) == len(row.sizes) else ", ".join(one for one in smaller if one != "bfloat16")


def _measured(row: CutRow) -> str:
    """Return what the cluster measured at one cut."""
    from trunkline_wire.quantise import CODECS

    from trunkline._codecs import usable_codecs

    assert row.cost is not None
    int8 = row.cost.stem("int8")
    extra = int8.embedding_error if int8 is not None and not int8.refused else math.inf
    lines = [
        (
            one.codec,
            _kb(one.bytes_per_row),
            "-" if row.jpeg_bytes is None else f"{one.bytes_per_row / row.jpeg_bytes:.0%}",
            f"{one.embedding_error:.2g}",
            "-" if extra == math.inf else f"{one.embedding_error + extra:.2g}",
            _over(one.embedding_error, extra, row.max_error),
        )
        for one in usable_codecs(row.cost, CODECS)
    ]
    table = columns(("CODEC", "KB", "OF THE JPEG", "ERROR", "WITH INT8 STEM", ""), lines, right=range(1, 5))
    stems = [
        (
            f"stem {one.precision}",
            f"refused: {one.refused}"
            if one.refused
            else f"{one.size_bytes / 1e6:.2f} MB, error {one.embedding_error:.2g}",
        )
        for one in row.cost.stems
    ]
    return f"{row.cut.name}, measured on {row.cost.sample}\n\n{table}\n\n{facts(stems)}"


def _over(error: float, extra: float, bound: float) -> str:
    if error > bound:
        return f"over {bound:g}"
    return f"over {bound:g} with the int8 stem" if bound < error + extra < math.inf else ""


def _conclusion(spec: BackboneSpec, rows: Sequence[CutRow], bound: float) -> str:
    """Return in plain words what follows: where the JPEG is the better choice, and what needs the fewest bytes."""
    from trunkline._cut_table import judge

    verdict = judge(rows)
    shown = sum(row.cut.name != INPUT_CUT for row in rows)
    lines = []
    for names, which in (
        (verdict.worse_than_jpeg, f"every codec within the error bound {bound:g}"),
        (verdict.worse_before_zstd, "every codec before zstd"),
    ):
        if names:
            where = ", ".join(names[:MAX_NAMES])
            where += f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            lines.append(f"Send pictures rather than features of {where}: there the JPEG is smaller than {which}.")
    over = [row.cut.name for row in rows if row.cost is not None and row.sizes and row.smallest is None]
    if over:
        lines.append(f"No codec keeps within the error bound {bound:g} at {', '.join(over)}.")
    if verdict.best is not None:
        row, codec = verdict.best
        lines.append(
            f"Fewest bytes within the error bound {bound:g}: {row.cut.name} as {codec.codec}, "
            f"{_kb(codec.bytes_per_row)} kB, error {codec.embedding_error:.2g}"
            + ("; the JPEG needs fewer." if row.jpeg_is_better else ".")
        )
    if verdict.estimate is not None:
        row, name, size = verdict.estimate
        lines.append(
            f"Fewest bytes before zstd: {row.cut.name} as {name}, {_kb(size)} kB. Its error is not measured: "
            f"add --cut {row.cut.name}."
        )
    total = sum(one.name != INPUT_CUT for one in spec.cuts)
    if shown < total:
        lines.append(f"{shown} of {total} cuts are shown: --all shows every one.")
    return "\n".join(_wrapped(one) for one in lines)


def _following(spec: BackboneSpec, rows: Sequence[CutRow]) -> str:
    from trunkline._cut_table import judge

    verdict = judge(rows)
    if verdict.best is not None:
        row, codec = verdict.best
        if row.jpeg_is_better:
            return "trunkline upload NAME FOLDER"
        return f"trunkline upload NAME FOLDER --stem {spec.name}:{row.cut.name} --codec {codec.codec}"
    if verdict.estimate is not None:
        return f"trunkline backbones show {spec.name} --cut {verdict.estimate[0].cut.name}"
    return f"trunkline backbones show {spec.name} --all"


def _indented(text: str, indent: int) -> str:
    return _wrapped(text, WIDTH - indent).replace("\n", "\n" + indent * " ")


def _wrapped(text: str, width: int = WIDTH) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)


def _kb(num_bytes: float) -> str:
    return f"{num_bytes / 1e3:,.1f}" if num_bytes >= 950 else f"{num_bytes / 1e3:.2f}"


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"
