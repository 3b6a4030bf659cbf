"""Rows a second over a slow link, by cut and codec, beside sending the JPEG file or the pixels.

The cluster and the client each live in a network namespace of their own, with a link of 40 ms and 50 Mbit/s between
them (``link.py``). Features are ready before a timing starts, so what is timed is the way: encoding, link, gateway and
trunk. Bytes are those that the kernel counted at the client's end of the link. A plain TCP transfer over the same link,
in the same run, says what the link can carry; and the same calls without the link say what this machine can do.

Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trunkline
from common import embedded_cluster, report
from link import FAR, LinkSpec, enter, missing, passed_bytes, slow_link
from PIL import Image
from plots import Series, scatter
from trunkline_wire.codecs import encode_rows, encoded_size
from trunkline_wire.preprocess import preprocess_image
from trunkline_wire.quantise import PackedRows, pack, parse_codec

# Shape suffix legend: B = pictures, H = height, W = width, C = channels

BACKBONE = "efficientnet_lite0"
PLOT = Path(__file__).parent.parent / "docs" / "images" / "slow_link.svg"
JPEG, INPUT = "JPEG", "input"
CUTS = tuple(f"blocks.{index}" for index in range(6))
CODECS = ("float16", "float16+zstd", "int8", "int8+zstd", "int4", "int4+zstd")
PICTURES = 64  # as many as travel together: no picture is twice in a batch, or zstd would find the other one
QUALITY = 90
CALL_LIMIT_S = 120.0
RUN_LIMIT_S = 900
SAMPLE_S = 0.01
TARGET = 0.9


@dataclass(frozen=True)
class Way:
    """A way to get a picture to the cluster: what is sent, and how."""

    cut: str
    codec: str

    @property
    def name(self) -> str:
        """Return it in words."""
        return f"{self.cut} {self.codec}"


@dataclass(frozen=True)
class Run:
    """One timed call.

    Attributes:
        num_rows: Rows.
        seconds: From its start to its last answer.
        sent: Bytes that the link took; 0 where there was none.
        received: Bytes that came back.
        sending_s: Seconds from the first to the last byte of the rows.
    """

    num_rows: int
    seconds: float
    sent: int = 0
    received: int = 0
    sending_s: float = 0.0

    @property
    def rows_per_s(self) -> float:
        """Return rows a second."""
        return self.num_rows / self.seconds

    @property
    def bytes_per_row(self) -> float:
        """Return the bytes that went out for each row."""
        return self.sent / self.num_rows


@dataclass(frozen=True)
class Result:
    """What was found of one way. ``here`` is without the link, ``stem_rows_per_s`` None where no stem runs."""

    way: Way
    over_link: Run
    here: Run
    stem_rows_per_s: float | None

    def share(self, capacity: float) -> float:
        """Return the part of the link's bytes a second that was used."""
        return self.over_link.sent / self.over_link.seconds / capacity

    def share_while_sending(self, capacity: float) -> float:
        """Return the same for the time in which there was something to send."""
        return self.over_link.sent / max(self.over_link.sending_s, 1e-9) / capacity

    def is_bound_by_link(self, capacity: float) -> bool:
        """Whether client and cluster without the link do half as many rows again as it can carry, or more."""
        return 1.5 * capacity / self.over_link.bytes_per_row <= self.here.rows_per_s


def sending_seconds(samples: Sequence[tuple[float, int]]) -> float:
    """Return how long rows were being sent: what goes out after them acknowledges answers, half a percent at most.

    Args:
        samples: Times in seconds and bytes sent until then, in order.
    """
    first, last = samples[0][1], samples[-1][1]
    start = next((when for when, sent in reversed(samples) if sent - first <= 0.005 * (last - first)), samples[0][0])
    end = next(when for when, sent in samples if sent - first >= 0.995 * (last - first))
    return max(0.0, end - start)


def rows_for(seconds: float, rows_per_s: float, batch: int) -> int:
    """Return how many rows take about that long; whole batches, three at least, so that some are under way together."""
    return max(3, round(seconds * rows_per_s / batch)) * batch


def photographs(count: int) -> list[Image.Image]:
    """Return different crops of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    found = []
    for index in range(count):
        photograph = load_sample_images().images[index % 2]
        height, width, _ = photograph.shape
        side = int(random.integers(224, height))
        top, left = random.integers(0, height - side), random.integers(0, width - side)
        found.append(Image.fromarray(photograph[top : top + side, left : left + side]))
    return found


def jpeg_file(picture: Image.Image) -> bytes:
    """Return a picture as a file of the size that the network reads."""
    file = io.BytesIO()
    picture.resize((224, 224), Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


class Side:
    """A client in a process of its own, at one end of the link or beside the cluster, and what it has ready to send."""

    def __init__(self, namespace: str, address: str, has_link: bool) -> None:
        """Go there and connect."""
        enter(namespace)
        self._has_link = has_link
        self.client = trunkline.connect(address, insecure=True)
        self.spec = self.client.describe(BACKBONE)
        self.files = [jpeg_file(one) for one in photographs(PICTURES)]
        self.pixels_BHWC = np.stack(
            [
                preprocess_image(Image.open(io.BytesIO(one)).convert("RGB"), self.spec.preprocessing)
                for one in self.files
            ]
        )
        self._cut = ""
        self._features: npt.NDArray[np.floating[Any]] = np.zeros(0)
        self.stem_rows_per_s: float | None = None
        self.way = Way("", "")
        self.rows: npt.NDArray[np.generic] | PackedRows | list[bytes] = self.files

    def prepare(self, way: Way) -> tuple[int, int, float | None]:
        """Make the rows of a way. Returns bytes of a row, rows that travel together, and the stem's rows a second."""
        self.way = way
        if way.cut == JPEG:
            self.rows = self.files
            # Pictures travel together as if they were pixels, so that a batch of either fits a message.
            batch = 2 * 2**20 // self.pixels_BHWC[0].nbytes
            return round(statistics.mean(map(len, self.files))), batch, None
        if way.cut == INPUT:
            self.rows = self.pixels_BHWC
            return self.pixels_BHWC[0].nbytes, 2 * 2**20 // self.pixels_BHWC[0].nbytes, None
        if way.cut != self._cut:
            self._compute(way.cut)
        found = self.spec.cut(way.cut)
        assert found is not None
        choice = parse_codec(way.codec)
        self.rows = pack(self._features, choice.codec, found.channel_axis)
        plain = encoded_size(encode_rows(self.rows)) // PICTURES
        batch = max(1, min(PICTURES, 2 * 2**20 // plain))
        some = self.rows.take(slice(0, batch)) if isinstance(self.rows, PackedRows) else self.rows[:batch]
        return encoded_size(encode_rows(some, compress=choice.zstd)) // batch, batch, self.stem_rows_per_s

    def extract(self, num_rows: int) -> Run:
        """Send rows of the way that is ready and wait for what the trunk makes of them."""
        rows = self._repeated(num_rows)
        if self.way.cut == JPEG:
            return self._timed(
                num_rows, lambda: self.client.extract(rows, slices=["pooled"], timeout_s=CALL_LIMIT_S, progress=False)
            )
        space = self._space()
        codec = None if self.way.cut == INPUT else self.way.codec
        return self._timed(
            num_rows,
            lambda: self.client.extract_features(
                rows, space=space, codec=codec, slices=["pooled"], timeout_s=CALL_LIMIT_S, progress=False
            ),
        )

    def upload(self, num_rows: int, name: str, seed: int) -> Run:
        """Make a dataset of rows of the way that is ready. Each is made different from all that were sent before."""
        labels = np.arange(num_rows) % 2
        random = np.random.default_rng(seed)
        if self.way.cut == JPEG:
            # What follows the picture's end in a file is no part of it, and makes another file of it.
            files = [self.files[index % PICTURES] + random.bytes(16) for index in range(num_rows)]
            return self._timed(num_rows, lambda: self.client.upload(files, labels, name=name, progress=False))
        rows = (self.pixels_BHWC if self.way.cut == INPUT else self._features)[np.arange(num_rows) % PICTURES]
        first = rows.reshape(num_rows, -1)[:, :8]
        first[:] = random.integers(0, 256, first.shape) if self.way.cut == INPUT else random.random(first.shape)
        space, codec = self._space(), None if self.way.cut == INPUT else self.way.codec
        return self._timed(
            num_rows,
            lambda: self.client.upload_features(rows, labels, name=name, space=space, codec=codec, progress=False),
        )

    def _compute(self, cut: str) -> None:
        stem = self.client.stem(BACKBONE, cut=cut, codec="float32", threads=1, progress=False)
        # Once for all codecs of this cut: the first one who asks for its costs waits for them to be measured.
        self.client.cut_cost(BACKBONE, cut)
        half = PICTURES // 2
        self._features = np.concatenate([stem.run_pixels(self.pixels_BHWC[:half])] * 2)
        started = time.perf_counter()
        self._features[half:] = stem.run_pixels(self.pixels_BHWC[half:])
        self.stem_rows_per_s = half / (time.perf_counter() - started)
        self._cut = cut

    def _space(self) -> Any:
        found = self.spec.cut(self.way.cut)
        assert found is not None
        return self.spec.space(found)

    def _repeated(self, num_rows: int) -> Any:
        numbers = np.arange(num_rows) % PICTURES
        if isinstance(self.rows, list):
            return [self.rows[number] for number in numbers]
        return self.rows.take(numbers) if isinstance(self.rows, PackedRows) else self.rows[numbers]

    def _timed(self, num_rows: int, call: Callable[[], object]) -> Run:
        with Counted(self._has_link) as counted:
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
        sent, received = counted.passed
        return Run(num_rows, seconds, sent, received, sending_seconds(counted.samples))


class Counted:
    """Reads the link's counters while something is going on."""

    def __init__(self, has_link: bool) -> None:
        """Prepare."""
        self._read = passed_bytes if has_link else lambda: (0, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._start = self._end = (0, 0)
        self.samples: list[tuple[float, int]] = []

    @property
    def passed(self) -> tuple[int, int]:
        """Bytes that went out and came in."""
        return self._end[0] - self._start[0], self._end[1] - self._start[1]

    def __enter__(self) -> Counted:
        """Begin to read."""
        self._start = self._read()
        self.samples.append((time.perf_counter(), self._start[0]))
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        """Read for the last time."""
        self._done.set()
        self._thread.join()
        self._end = self._read()
        self.samples.append((time.perf_counter(), self._end[0]))

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.samples.append((time.perf_counter(), self._read()[0]))


_side: list[Any] = []


def _enter_side(namespace: str, address: str, has_link: bool) -> None:
    _side[:] = [Side(namespace, address, has_link)]


def _on_side(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_side[0], method)(*arguments)


class Remote:
    """A ``Side`` in a process of its own."""

    def __init__(self, pool: Any) -> None:
        """Keep the pool of one process."""
        self._pool = pool

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Call a method there, for a bounded time."""
        return self._pool.apply_async(_on_side, (method, arguments)).get(2 * CALL_LIMIT_S)


@contextmanager
def remote(namespace: str, address: str, *, has_link: bool) -> Iterator[Remote]:
    """Start a side; it is ended at the end, whatever it does."""
    with multiprocessing.get_context("spawn").Pool(1, _enter_side, (namespace, address, has_link)) as pool:
        yield Remote(pool)


@contextmanager
def sink() -> Iterator[int]:
    """Take whatever is sent to a port of this end."""
    with socket.create_server((FAR, 0)) as server:

        def run() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                with connection:
                    while connection.recv(1 << 18):
                        pass

        threading.Thread(target=run, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def bulk(namespace: str, port: int, seconds: float) -> tuple[float, float]:
    """Send zeros over plain TCP, in a process of its own.

    Returns:
        Seconds of connecting; bytes a second on the link, without the first half second, in which TCP finds the rate.
    """
    enter(namespace)
    started = time.perf_counter()
    with socket.create_connection((FAR, port), timeout=CALL_LIMIT_S) as connection:
        connected = time.perf_counter()
        piece = bytes(1 << 16)
        _send_until(connection, piece, connected + 0.5)
        settled, before = time.perf_counter(), passed_bytes()[0]
        _send_until(connection, piece, settled + seconds)
        return connected - started, (passed_bytes()[0] - before) / (time.perf_counter() - settled)


def _send_until(connection: socket.socket, piece: bytes, end: float) -> None:
    while time.perf_counter() < end:
        connection.sendall(piece)


def in_new_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call something in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(call, arguments).get(CALL_LIMIT_S)


def measure(near: Remote, here: Remote, way: Way, seconds: float, capacity: float) -> Result:
    """Measure one way, first without the link."""
    row_bytes, batch, _ = here("prepare", way)
    _, _, stem_rows_per_s = near("prepare", way)
    warm = here("extract", 3 * batch)
    alone = here("extract", rows_for(seconds / 3, warm.rows_per_s, batch))
    near("extract", batch)
    over_link = near("extract", rows_for(seconds, min(alone.rows_per_s, capacity / row_bytes), batch))
    result = Result(way, over_link, alone, stem_rows_per_s)
    print(way.name, over_link, f"share {result.share(capacity):.3f}", f"alone {alone.rows_per_s:.1f}", flush=True)
    return result


def measure_upload(near: Remote, here: Remote, way: Way, seconds: float, capacity: float, seed: int) -> Result:
    """Measure an upload: no trunk takes part."""
    row_bytes, batch, _ = here("prepare", way)
    near("prepare", way)
    num_rows = rows_for(seconds, capacity / row_bytes, batch)
    name = f"slow-link-{seed}"
    alone = here("upload", num_rows, name, seed)
    over_link = near("upload", num_rows, name, seed + num_rows)
    result = Result(way, over_link, alone, None)
    print("upload", way.name, over_link, f"share {result.share(capacity):.3f}", flush=True)
    return result


def line(result: Result, capacity: float, jpeg_rows_per_s: float, *, upload: bool = False) -> tuple[str, ...]:
    """Return a row of the table."""
    run = result.over_link
    return (
        f"upload, {result.way.cut}" if upload else result.way.cut,
        result.way.codec,
        f"{run.bytes_per_row:.0f}",
        f"{run.rows_per_s:.1f}",
        "" if upload else f"{run.rows_per_s / jpeg_rows_per_s:.2f}",
        f"{result.share(capacity):.2f}",
        f"{result.share_while_sending(capacity):.2f}",
        f"{result.here.rows_per_s:.1f}",
        "link" if result.is_bound_by_link(capacity) else "both or the cluster",
        "" if result.stem_rows_per_s is None else f"{result.stem_rows_per_s:.0f}",
    )


def plot(results: Sequence[Result], spec: LinkSpec) -> None:
    def points(chosen: Callable[[Result], bool]) -> list[tuple[float, float, str]]:
        return [
            (one.over_link.bytes_per_row, one.over_link.rows_per_s, one.way.cut.removeprefix("blocks."))
            for one in results
            if chosen(one)
        ]

    series = [
        Series("JPEG", points(lambda one: one.way.cut == JPEG), line=False, named=False),
        Series("pixels", points(lambda one: one.way.cut == INPUT), line=False, named=False),
    ]
    for codec in ("float16", "int8", "int4"):
        series.append(Series(codec, points(lambda one, codec=codec: one.way.codec == codec), line=False))  # type: ignore[misc]
    zstd = points(lambda one: one.way.codec.endswith("+zstd"))
    series.append(Series("with zstd", zstd, line=False, named=False))
    scatter(
        PLOT,
        f"{spec.bits_per_s / 1e6:.0f} Mbit/s, {spec.rtt_s * 1e3:.0f} ms: rows a second against bytes. N: blocks.N",
        "bytes a picture on the link",
        "rows a second",
        [one for one in series if one.points],
    )


def run(spec: LinkSpec, cuts: Sequence[str], codecs: Sequence[str], seconds: float) -> None:
    capacities, connects = [], []

    def probe(near: str, port: int) -> None:
        connect_s, capacity = in_new_process(bulk, near, port, seconds)
        capacities.append(capacity)
        connects.append(connect_s)

    with slow_link(spec) as link:
        enter(link.far)
        with sink() as port, embedded_cluster(host=FAR, insecure="true") as cluster:
            address = json.loads((cluster.state_dir / "cluster.json").read_text())["address"]
            probe(link.near, port)
            results, uploads = [], []
            with (
                remote(link.near, address, has_link=True) as near,
                remote(link.far, address, has_link=False) as here,
            ):
                ways = [Way(JPEG, f"quality {QUALITY}"), Way(INPUT, "uint8")]
                ways += [Way(cut, codec) for cut in cuts for codec in codecs]
                for index, way in enumerate(ways):
                    results.append(measure(near, here, way, seconds, capacities[0]))
                    if index == len(ways) // 2:
                        probe(link.near, port)
                for index, way in enumerate([*ways[:2], *(Way(cuts[-1], one) for one in ("float16", "int8"))]):
                    uploads.append(measure_upload(near, here, way, seconds, capacities[0], 1_000_000 * (index + 1)))
            probe(link.near, port)
    capacity = statistics.median(capacities)
    jpeg_rows_per_s = results[0].over_link.rows_per_s
    bound = [one for one in (*results, *uploads) if one.is_bound_by_link(capacity)]
    shares = [one.share(capacity) for one in bound]
    sending = [one.share_while_sending(capacity) for one in bound]
    least = min(bound, key=lambda one: one.share(capacity), default=None)
    report(
        "slow_link",
        f"Over a link of {spec.bits_per_s / 1e6:.0f} Mbit/s and {spec.rtt_s * 1e3:.0f} ms",
        [
            (
                "sent",
                "codec",
                "bytes/row",
                "rows/s",
                "over JPEG",
                "share of the link",
                "while sending",
                "rows/s without the link",
                "bound by",
                "stem rows/s",
            ),
            *(line(one, capacity, jpeg_rows_per_s) for one in results),
            *(line(one, capacity, jpeg_rows_per_s, upload=True) for one in uploads),
        ],
        [
            f"{BACKBONE} at 224 px, crops of two photographs; `client.extract` and `extract_features` as they come, "
            "uploads with `client.upload` and `upload_features`.",
            f"The link: packets of {spec.mtu} bytes, a queue of {spec.queue_s * 1e3:.0f} ms; connecting took "
            f"{statistics.median(connects) * 1e3:.1f} ms; a plain TCP transfer ({congestion_control()}) put "
            f"{capacity * 8 / 1e6:.1f} Mbit/s on it once it had found the rate (several times: "
            f"{', '.join(f'{one * 8 / 1e6:.1f}' for one in capacities)}). That is the capacity.",
            "Bytes are the kernel's count at the client's end, headers and repetitions included; the share is these "
            "bytes over the capacity times the whole time of the call, from its start to its last answer.",
            "The share while sending leaves out the time before the rows' first byte, when the client hashes rows, and "
            "that after their last byte, when the last batch is computed.",
            f"Where the link is what bounds ({len(bound)} ways), the share is {span(shares)}, "
            f"while sending {span(sending)}"
            + (
                f"; least for {'the upload of ' * (least in uploads)}{least.way.name}."
                if least and min(shares) < TARGET
                else "."
            ),
            "Without the link, client and cluster share this machine's cores. Stems ran before, on one thread.",
        ],
    )
    plot(results, spec)


def span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "unknown"


def congestion_control() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def _leave(number: int, frame: object) -> None:
    raise SystemExit(f"slow_link: ended by {signal.Signals(number).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=50.0, help="Rate of the link, Mbit/s.")
    parser.add_argument("--rtt-ms", type=float, default=40.0, help="Round trip, milliseconds.")
    parser.add_argument("--seconds", type=float, default=3.5, help="About how long each way is measured.")
    parser.add_argument("--quick", action="store_true", help="A few ways, briefly: to see that it works.")
    arguments = parser.parse_args()
    lacking = missing()
    if lacking:
        print(f"slow_link: {lacking}", file=sys.stderr)
        raise SystemExit(2)
    # However it ends, the cluster is taken down on the way out.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGALRM, _leave)
    signal.alarm(RUN_LIMIT_S)
    spec = LinkSpec(arguments.rtt_ms / 1e3, arguments.mbit * 1e6)
    if arguments.quick:
        run(spec, ("blocks.0", "blocks.4"), ("int8", "int4+zstd"), 0.7)
    else:
        run(spec, CUTS, CODECS, arguments.seconds)


if __name__ == "__main__":
    main()
