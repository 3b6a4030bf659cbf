"""Where should I cut? Accuracy, bytes and client time at the stages of efficientnet_lite0, beside sending the JPEG.

Writes the tables and plots of ``docs/where-to-cut.md``. Stems run as on a client, one thread of ONNX Runtime; the
engine is the cluster's own, in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from common import digits, machine
from PIL import Image
from plots import Series, scatter
from trunkline_wire.preprocess import preprocess_image
from trunkline_wire.quantise import CODECS, PackedRows, pack, row_bytes, unpack
from trunkline_wire.specs import BackboneSpec, CutCost, CutSpec
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import session_options
from trunkline_worker.backbones.samples import Samples
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, train_head

# Shape suffix legend: N, B = pictures, H = height, W = width, C = channels, D = embedding columns

BACKBONE = "efficientnet_lite0"
DOCUMENT = Path(__file__).parent.parent / "docs" / "where-to-cut.md"
PLOTS = DOCUMENT.parent / "images"
SMALL, OWN = 96, 224
PER_CLASS = 20
QUALITIES = (20, 50, 90)
BATCH = 64
CODEC_CUT = "blocks.2"
PLOTTED = ("float16", "int8", "int4")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Way:
    """One way to get a picture to the cluster."""

    name: str
    codec: str
    bytes_per_row: float
    client_ms: float
    embedding_error: float | None
    accuracy: float


class Bench:
    """The engine, and the stems as a client has them."""

    def __init__(self, engine: LocalEngine, blobs: BlobStore) -> None:
        self.engine = engine
        self._blobs = blobs

    async def stem(self, cut: str, size: int) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
        """Return a stem on one thread."""
        file = await self.engine.stem(cut, size)
        session = onnxruntime.InferenceSession(
            self._blobs.get(file.path), session_options(1), providers=["CPUExecutionProvider"]
        )
        return lambda pixels_BHWC: session.run(None, {session.get_inputs()[0].name: pixels_BHWC})[0]

    async def embed(
        self, spec: BackboneSpec, cut: CutSpec, rows: npt.NDArray[np.generic] | PackedRows | Sequence[bytes]
    ) -> npt.NDArray[np.float32]:
        """Send rows through the trunk."""
        parts = []
        for start in range(0, len(rows), BATCH):
            stop = start + BATCH
            part = rows.take(slice(start, stop)) if isinstance(rows, PackedRows) else rows[start:stop]
            parts.append((await self.engine.extract(spec.space(cut), part)).embedding_BD)
        return np.concatenate(parts)


def accuracy(
    embedding_ND: npt.NDArray[np.float32], spec: BackboneSpec, cut: CutSpec, labels: npt.NDArray[np.int64], draws: int
) -> float:
    """Train heads as a job does, on some pictures a class, and return the mean accuracy on all others."""
    behind = [one for one in spec.slices if one.name in cut.slices]
    first = behind[0].start
    slices = [type(one)(one.name, one.start - first, one.stop - first) for one in behind]
    job = JobSpec(model="m", dataset="d", backbone=BACKBONE, input_size=SMALL, embedding="auto")
    scores = []
    for draw in range(draws):
        random = np.random.default_rng(draw)
        chosen = np.concatenate([random.permutation(np.flatnonzero(labels == one))[:PER_CLASS] for one in range(10)])
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        names = tuple(map(str, range(10)))
        result = train_head(
            [Source(BACKBONE, embedding_ND[chosen], tuple(slices))],
            Labels(names, labels[chosen].astype(np.uint32), None),
            job,
            on_event=lambda event: None,
            should_stop=lambda: False,
        )
        wanted = [one for one in slices if one.name in result.head.slices]
        columns = np.concatenate([embedding_ND[rest, one.start : one.stop] for one in wanted], axis=1)
        outputs_BK = result.head.predict(torch.from_numpy(columns)).numpy()
        scores.append(float((outputs_BK.argmax(1) == labels[rest]).mean()))
    return statistics.mean(scores)


def jpeg(pixels_HWC: npt.NDArray[np.uint8], quality: int) -> bytes:
    """Encode a picture."""
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def ms_per_row(run: Callable[[], object], num_rows: int, rounds: int = 5) -> float:
    """Return the median milliseconds a row."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) / num_rows * 1e3)
    return statistics.median(times)


async def measure_digits(bench: Bench, draws: int) -> list[Way]:
    """Measure every way on digits of 96 px."""
    pictures, labels = digits()
    spec = await bench.engine.describe(SMALL)
    pixels = np.stack([preprocess_image(Image.fromarray(one).convert("RGB"), spec.preprocessing) for one in pictures])
    ways = []
    entry = spec.cuts[0]
    exact = await bench.embed(spec, entry, pixels)
    ways.append(Way("pixels", "uint8", SMALL * SMALL * 3, 0.0, 0.0, accuracy(exact, spec, entry, labels, draws)))
    for quality in QUALITIES:
        files = [jpeg(one, quality) for one in pixels]
        embedding = await bench.embed(spec, entry, files)
        client_ms = ms_per_row(lambda quality=quality: [jpeg(one, quality) for one in pixels[:BATCH]], BATCH)  # type: ignore[misc]
        ways.append(
            Way(
                f"JPEG, quality {quality}",
                "images",
                statistics.mean(map(len, files)),
                client_ms,
                None,
                accuracy(embedding, spec, entry, labels, draws),
            )
        )
    for cut in [one for one in spec.cuts if one.is_stage or one is spec.cuts[-1]]:
        stem = await bench.stem(cut.name, SMALL)
        features = np.concatenate([stem(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])
        stem_ms = ms_per_row(lambda stem=stem: stem(pixels[:BATCH]), BATCH)  # type: ignore[misc]
        cost = await bench.engine.cut_cost(cut.name, SMALL)
        for codec in CODECS if cut.name == CODEC_CUT else CODECS[1:]:
            rows = pack(features, codec, cut.channel_axis)
            pack_ms = ms_per_row(
                lambda codec=codec, cut=cut, features=features: pack(features[:BATCH], codec, cut.channel_axis),  # type: ignore[misc]
                BATCH,
            )
            embedding = await bench.embed(spec, cut, rows)
            found = cost.codec(codec)
            ways.append(
                Way(
                    cut.name,
                    codec,
                    row_bytes(cut.feature_shape, codec, cut.channel_axis),
                    stem_ms + pack_ms,
                    found.embedding_error if found else None,
                    accuracy(embedding, spec, cut, labels, draws),
                )
            )
            print(ways[-1], flush=True)
    return ways


def photographs(folder: Path) -> None:
    """Write crops of scikit-learn's two photographs as JPEG files."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    for number, photograph in enumerate(load_sample_images().images):
        height, width, _ = photograph.shape
        for index in range(16):
            side = int(random.integers(256, height))
            top, left = random.integers(0, height - side), random.integers(0, width - side)
            crop = Image.fromarray(photograph[top : top + side, left : left + side])
            crop.save(folder / f"{number}-{index}.jpg", quality=95)


async def measure_photographs(
    bench: Bench, samples: Samples
) -> tuple[BackboneSpec, list[tuple[CutCost, float, int]], float]:
    """Measure bytes, errors and client time on photographs of 224 px; and the milliseconds of a JPEG."""
    spec = await bench.engine.describe(OWN)
    pixels = samples.held_out(spec.preprocessing, 16)
    rows = []
    for cut in [one for one in spec.cuts if one.is_stage or one is spec.cuts[-1]]:
        cost = await bench.engine.cut_cost(cut.name, OWN)
        stem = await bench.stem(cut.name, OWN)
        client_ms = ms_per_row(lambda stem=stem: stem(pixels), len(pixels))  # type: ignore[misc]
        exact = cost.stem("float32")
        rows.append((cost, client_ms, exact.size_bytes if exact else 0))
        print(cut.name, client_ms, flush=True)
    return spec, rows, ms_per_row(lambda: [jpeg(one, 90) for one in pixels], len(pixels))


def codec_speed(spec: BackboneSpec, cut: CutSpec) -> dict[str, tuple[float, float]]:
    """Return MB of float32 features a second, packed and unpacked, for each codec."""
    random = np.random.default_rng(0)
    features = random.normal(size=(128, *cut.feature_shape)).astype(np.float32)
    speeds = {}
    for codec in CODECS:
        rows = pack(features, codec, cut.channel_axis)

        def back(rows: npt.NDArray[np.generic] | PackedRows = rows) -> object:
            return unpack(rows) if isinstance(rows, PackedRows) else rows.astype(np.float32)

        mega = features.nbytes / len(features) / 1e6
        encode_ms = ms_per_row(lambda codec=codec: pack(features, codec, cut.channel_axis), len(features))  # type: ignore[misc]
        speeds[codec] = (mega / encode_ms * 1e3, mega / ms_per_row(back, len(features)) * 1e3)
    return speeds


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table. The first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"


def write(lines: Sequence[str]) -> None:
    """Put the measured part into the guide."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


async def run(draws: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pictures").mkdir()
        photographs(Path(folder, "pictures"))
        samples = Samples.from_folder(Path(folder, "pictures"))
        backbone = load_backbone(BACKBONE, samples=f"{folder}/pictures")
        blobs = BlobStore(f"file://{folder}/blobs")
        engine = LocalEngine(backbone, blobs, clock=SystemClock())
        await engine.start()
        try:
            bench = Bench(engine, blobs)
            ways = await measure_digits(bench, draws)
            spec, costs, jpeg_ms = await measure_photographs(bench, samples)
        finally:
            await engine.close()
    speeds = codec_speed(spec, next(one for one in spec.cuts if one.name == CODEC_CUT))
    lines = [*photograph_lines(spec, costs, jpeg_ms), *digit_lines(ways, draws), *codec_lines(ways, costs, speeds)]
    write(
        [f"Machine: {machine()}; ONNX Runtime {onnxruntime.__version__}. Client times are of one thread.", "", *lines]
    )
    plot(ways, costs, jpeg_ms, draws)


def photograph_lines(spec: BackboneSpec, costs: Sequence[tuple[CutCost, float, int]], jpeg_ms: float) -> list[str]:
    header = ["cut", "shape", "client's share", "stem", "client ms", "float16", "int8", "int4", "int4+zstd"]
    rows = [header]
    for cost, client_ms, size in costs:
        cut = cost.cut
        cells = []
        for codec in ("float16", "int8", "int4", "int4+zstd"):
            one = cost.codec(codec)
            cells.append(f"{one.bytes_per_row / 1e3:.1f} kB, {number(one.embedding_error)}" if one else "")
        rows.append(
            [
                f"`{cut.name}`",
                "x".join(map(str, cut.feature_shape)),
                f"{cut.stem_macs / spec.macs:.0%}",
                f"{size / 1e6:.2f} MB",
                f"{client_ms:.1f}",
                *cells,
            ]
        )
    jpeg_bytes = costs[0][0].jpeg_bytes_per_row
    return [
        f"### Photographs at {OWN} px",
        "",
        "Bytes a picture and, after the comma, the largest relative error of the embedding behind the cut. "
        f"The same pictures as JPEG files of quality 90 have {jpeg_bytes / 1e3:.1f} kB and take {jpeg_ms:.1f} ms.",
        "",
        *table(rows),
        "",
        "![Bytes and client time at each cut](images/where_to_cut_photographs.svg)",
        "",
    ]


def digit_lines(ways: Sequence[Way], draws: int) -> list[str]:
    rows = [["way", "codec", "bytes", "client ms", "embedding error", "accuracy"]]
    rows += [
        [
            way.name if " " in way.name or way.name == "pixels" else f"`{way.name}`",
            way.codec,
            f"{way.bytes_per_row:.0f}",
            f"{way.client_ms:.2f}",
            number(way.embedding_error),
            f"{way.accuracy:.4f}",
        ]
        for way in ways
    ]
    return [
        f"### Digits at {SMALL} px",
        "",
        f'{PER_CLASS} labelled pictures a class, `embedding="auto"`, the mean accuracy of {draws} draws on all others. '
        "Embedding errors are those that the cluster measures on its sample pictures.",
        "",
        *table(rows),
        "",
        "![Accuracy against bytes](images/where_to_cut_digits.svg)",
        "",
    ]


def codec_lines(
    ways: Sequence[Way], costs: Sequence[tuple[CutCost, float, int]], speeds: dict[str, tuple[float, float]]
) -> list[str]:
    cost = next(one for one, _, _ in costs if one.cut.name == CODEC_CUT)
    rows = [
        ["codec", "bytes a row", "with zstd", "embedding error", "accuracy on digits", "encode MB/s", "decode MB/s"]
    ]
    for codec in CODECS:
        plain, packed = cost.codec(codec), cost.codec(f"{codec}+zstd")
        way = next((one for one in ways if (one.name, one.codec) == (CODEC_CUT, codec)), None)
        # float32 features are sent as they are.
        encode, decode = (f"{one:.0f}" for one in speeds[codec]) if codec != CODECS[0] else ("", "")
        rows.append(
            [
                codec,
                f"{plain.bytes_per_row:.0f}" if plain else "",
                f"{packed.bytes_per_row:.0f}" if packed else "",
                number(plain.embedding_error) if plain else "",
                f"{way.accuracy:.4f}" if way else "",
                encode,
                decode,
            ]
        )
    return [
        f"### Codecs at `{CODEC_CUT}`",
        "",
        f"Bytes and errors of photographs at {OWN} px, accuracy of digits at {SMALL} px, speed in MB of float32 "
        "features a second on one thread.",
        "",
        *table(rows),
    ]


def plot(ways: Sequence[Way], costs: Sequence[tuple[CutCost, float, int]], jpeg_ms: float, draws: int) -> None:
    jpegs = [(one.bytes_per_row, one.accuracy, f"q{one.name[-2:]}") for one in ways if one.codec == "images"]
    series = [Series("JPEG", jpegs)]
    for codec in PLOTTED:
        chosen = [one for one in ways if one.codec == codec]
        series.append(Series(codec, [(one.bytes_per_row, one.accuracy, short(one.name)) for one in chosen], line=False))
    scatter(
        PLOTS / "where_to_cut_digits.svg",
        f"Digits at {SMALL} px: accuracy against bytes. N: cut at blocks.N",
        "bytes a picture",
        f"accuracy, mean of {draws} draws",
        series,
    )
    series = [Series("JPEG", [(costs[0][0].jpeg_bytes_per_row, jpeg_ms, "q90")], line=False)]
    for codec in PLOTTED:
        found = [(cost.codec(codec), client_ms, short(cost.cut.name)) for cost, client_ms, _ in costs]
        series.append(Series(codec, [(one.bytes_per_row, ms, name) for one, ms, name in found if one], line=False))
    scatter(
        PLOTS / "where_to_cut_photographs.svg",
        f"Photographs at {OWN} px: client time against bytes. N: cut at blocks.N",
        "bytes a picture",
        "milliseconds a picture, one thread",
        series,
    )


def short(cut: str) -> str:
    return "pool" if cut == "global_pool" else cut.removeprefix("blocks.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5)
    asyncio.run(run(parser.parse_args().draws))


if __name__ == "__main__":
    main()
