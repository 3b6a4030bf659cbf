"""Backbones small enough to check by hand: features are means of squares of pixels, the embedding their means.

There are two; the other one's embedding counts channels backwards. The quantised stem counts features in steps. At the
cut ``quarter`` these are so coarse that the stem is refused.
"""

import functools
import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from trunkline_wire import quantise
from trunkline_wire.codecs import encode_rows, encoded_size
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_wire.preprocess import decode_image, preprocess_image
from trunkline_wire.quantise import PackedRows
from trunkline_wire.specs import (
    FLOAT32,
    INT8,
    BackboneSpec,
    CodecCost,
    CodecUse,
    CutCost,
    CutSpec,
    Preprocessing,
    RuntimeResult,
    RuntimeSpeed,
    SliceSpec,
    StemCost,
    Tuning,
    embedding_fingerprint,
    feature_fingerprint,
    int8_fingerprint,
    map_tap,
)

NAME = "fake_net"
OTHER_NAME = "other_net"
NAMES = (NAME, OTHER_NAME)
CUT = "half"
COARSE_CUT = "quarter"
SIDES = {CUT: 2, COARSE_CUT: 4}
"""Side of the squares whose means are the features of a cut, in pixels."""

STEPS = {CUT: 4.0, COARSE_CUT: 120.0}
"""Steps in which the quantised stem counts, on the scale 0 to 255."""

INPUT_SIZE = 8
SLICES = (SliceSpec("grid", 0, 12), SliceSpec("pooled", 12, 15))
WEIGHTS = {name: hashlib.sha256(f"weights of {name}".encode()).hexdigest() for name in NAMES}
CALIBRATION = hashlib.sha256(b"fake pictures").hexdigest()
SAMPLE = "16 pictures made up"
SAMPLE_ROWS = 16


def spec(input_size=0, name=NAME):
    """Describe a backbone at an input size."""
    if name not in NAMES:
        raise WireError(ErrorCode.NOT_FOUND, f"there is no backbone {name[:80]!r}; there is {', '.join(NAMES)}")
    weights = WEIGHTS[name]
    size = input_size or INPUT_SIZE
    if size % 8 or size > 256:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"input size {size}: a multiple of 8, 256 at most, is needed")
    preprocessing = Preprocessing(size, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    slices = tuple(one.name for one in SLICES)
    return BackboneSpec(
        name=name,
        pretrained=True,
        weights="made up",
        weights_sha256=weights,
        num_parameters=0,
        preprocessing=preprocessing,
        resizable=True,
        cuts=(
            CutSpec(
                "input", (size, size, 3), feature_fingerprint(weights, "input", preprocessing), slices, channel_axis=2
            ),
            *(_cut(cut, size, weights, preprocessing, slices) for cut in SIDES),
        ),
        slices=SLICES,
        embedding_fingerprint=embedding_fingerprint(weights, preprocessing),
        runtime="numpy",
        device="cpu",
        macs=10 * size * size,
    )


def _cut(name, size, weights, preprocessing, slices):
    fingerprint = feature_fingerprint(weights, name, preprocessing)
    side = size // SIDES[name]
    return CutSpec(
        name,
        (3, side, side),
        fingerprint,
        slices,
        is_stage=name == CUT,
        stem_macs=3 * size * size,
        int8_fingerprint=int8_fingerprint(fingerprint, CALIBRATION),
        map_shape=(3, side, side),
    )


def find_cut(described, name):
    """Return a cut, or raise NOT_FOUND, naming those there are."""
    found = described.cut(name)
    if found is None:
        names = ", ".join(repr(one.name) for one in described.cuts)
        raise WireError(ErrorCode.NOT_FOUND, f"{described.name} has no cut {name!r}; the cuts near it are {names}")
    return found


def stem_features(pixels_BHWC, cut=CUT, precision=FLOAT32):
    """Compute the features at a cut from preprocessed pixels."""
    b, h, w, _ = pixels_BHWC.shape
    side = SIDES[cut]
    x = pixels_BHWC.astype(np.float32).transpose(0, 3, 1, 2).reshape(b, 3, h // side, side, w // side, side)
    means = x.mean(axis=(3, 5))
    if precision == INT8:
        means = np.round(means / np.float32(STEPS[cut])) * np.float32(STEPS[cut])
    return means / np.float32(255)


@dataclass(frozen=True)
class Stem:
    """A stem's file and what it does to the embedding."""

    space: object
    cut: CutSpec
    data: bytes
    embedding_error: float


def stem(cut, input_size=0, precision=FLOAT32, name=NAME):
    """Export a stem, or say why there is none."""
    described = spec(input_size, name)
    found = find_cut(described, cut)
    if cut == "input":
        raise WireError(ErrorCode.NOT_FOUND, "there is no stem before the input")
    offered = {one.precision: one for one in cost(cut, input_size, name).stems}
    if precision not in offered:
        raise WireError(ErrorCode.UNSUPPORTED, f"no stem of precision {precision!r}; there is {', '.join(offered)}")
    if offered[precision].refused:
        raise WireError(ErrorCode.UNSUPPORTED, f"the {precision} stem at {cut}: {offered[precision].refused}")
    data = stem_onnx(described.preprocessing.input_size, cut, precision)
    return Stem(described.space(found, precision), found, data, offered[precision].embedding_error)


def stem_onnx(size, cut=CUT, precision=FLOAT32):
    """Write a stem: uint8 (B, H, W, 3) to float32 (B, 3, H / side, W / side)."""
    from onnx import TensorProto, helper, numpy_helper

    side = SIDES[cut]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[side, side], strides=[side, side]),
    ]
    constants = [numpy_helper.from_array(np.array(255, np.float32), "scale")]
    if precision == INT8:
        constants.append(numpy_helper.from_array(np.array(STEPS[cut], np.float32), "step"))
        nodes += [
            helper.make_node("Div", ["means", "step"], ["steps"]),
            helper.make_node("Round", ["steps"], ["rounded"]),
            helper.make_node("Mul", ["rounded", "step"], ["counted"]),
        ]
    nodes.append(helper.make_node("Div", ["means" if precision == FLOAT32 else "counted", "scale"], ["features"]))
    graph = helper.make_graph(
        nodes,
        "stem",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", size, size, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 3, size // side, size // side])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def _sample(size):
    """Make pictures with large areas and some texture."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(30, 226, (SAMPLE_ROWS, size // 4, size // 4, 3))
    fine = generator.integers(-20, 21, (SAMPLE_ROWS, size, size, 3))
    return np.clip(coarse.repeat(4, axis=1).repeat(4, axis=2) + fine, 0, 255).astype(np.uint8)


@functools.lru_cache
def tuning(cut, input_size=0, again=False, name=NAME):
    """Say which runtime was chosen behind a cut; what is slow to make counts only where it is measured again."""
    described = spec(input_size, name or NAME)
    found = find_cut(described, cut or "input")
    slow = RuntimeResult("torch-compile-fp32", 1e-5, (RuntimeSpeed(8, 90.0),), 30.0)
    return Tuning(
        backbone=described.name,
        cut=found.name,
        input_size=described.preprocessing.input_size,
        device="cpu",
        num_threads=1,
        runtimes=(
            RuntimeResult("torch-fp32", 0.0, (RuntimeSpeed(1, 40.0), RuntimeSpeed(8, 50.0)), 0.1),
            RuntimeResult("torch-bf16", float("inf"), (), 0.1, "its embedding differs from float32 torch by inf"),
            slow if again else RuntimeResult(slow.runtime, refused="not tried at start"),
        ),
        chosen=slow.runtime if again else "torch-fp32",
        batch_rows=8,
        libraries=(("torch", "2"),),
    )


def cost(cut, input_size=0, name=NAME):
    """Measure what every codec and stem costs at a cut."""
    described = spec(input_size, name)
    found = find_cut(described, cut)
    size = described.preprocessing.input_size
    pixels = _sample(size)
    jpeg = float(np.mean([_jpeg_bytes(one) for one in pixels]))
    if cut == "input":
        return CutCost(found, (CodecCost(quantise.IMAGES, jpeg, 0.0),), (), jpeg, SAMPLE)
    exact = stem_features(pixels, cut)
    expected = _trunk(exact)
    codecs = []
    for codec in quantise.CODECS:
        rows = quantise.pack(exact, codec, found.channel_axis)
        error = _relative_error(_trunk(_floats(rows)), expected)
        for suffix in ("", quantise.ZSTD):
            num_bytes = encoded_size(encode_rows(rows, compress=bool(suffix)))
            codecs.append(CodecCost(codec + suffix, num_bytes / SAMPLE_ROWS, error))
    coarse = _relative_error(_trunk(stem_features(pixels, cut, INT8)), expected)
    refused = f"its error {coarse:.2g} is over the bound {MAX_CODEC_ERROR:g}" if coarse > MAX_CODEC_ERROR else ""
    stems = (
        StemCost(FLOAT32, len(stem_onnx(size, cut)), 0.0),
        StemCost(INT8, len(stem_onnx(size, cut, INT8)), coarse, refused),
    )
    return CutCost(found, tuple(codecs), stems, jpeg, SAMPLE)


def _jpeg_bytes(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.tell()


def _relative_error(got, expected):
    """Return the largest relative difference over the slices."""
    pairs = [(got[:, one.start : one.stop], expected[:, one.start : one.stop]) for one in SLICES]
    return float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs))


def _floats(rows):
    return quantise.unpack(rows) if isinstance(rows, PackedRows) else rows.astype(np.float32)


def _trunk(x_BCHW, name=NAME):
    x_BCHW = x_BCHW if name == NAME else x_BCHW[:, ::-1]
    b, c, h, w = x_BCHW.shape
    grid = x_BCHW.reshape(b, c, 2, h // 2, 2, w // 2).mean(axis=(3, 5)).reshape(b, -1)
    return np.concatenate([grid, x_BCHW.mean(axis=(2, 3))], axis=1).astype(np.float32)


def label(space, rows):
    """Return how rows were made and sent: ``float16``, ``int8@int8``, ``images``. Refuses rows of other weights."""
    precision = find_cut(spec(space.input_size, space.backbone), space.cut).precision_in(space)
    if precision is None:
        raise WireError(ErrorCode.INCOMPATIBLE, "these features were made with other weights")
    codec = quantise.codec_of(rows)
    return codec if precision == FLOAT32 else f"{codec}@{precision}"


def use(space, codec_label):
    """Return what a way to make and send rows does to the embedding."""
    codec, _, precision = codec_label.partition("@")
    if space.cut == "input":
        return CodecUse(codec_label, 0.0)
    measured = cost(space.cut, space.input_size, space.backbone)
    stem_error = measured.stem(precision or FLOAT32).embedding_error
    return CodecUse(codec_label, measured.codec(codec).embedding_error + stem_error)


def check_use(space, rows, trained_codec, trained_error):
    """Return how rows were sent, checked against how those were that a model was trained on."""
    found = use(space, label(space, rows))
    if found.codec != trained_codec and trained_error + found.embedding_error > MAX_CODEC_ERROR:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the model was trained on {trained_codec} with error {trained_error:.2g}; these rows are {found.codec} "
            f"with error {found.embedding_error:.2g}; together at most {MAX_CODEC_ERROR:g} is allowed",
        )
    return CodecUse(found.codec, found.embedding_error, trained_codec, trained_error)


def features(space, rows):
    """Check rows at a cut. Returns them as features, at the first cut those of images, and the rows that failed."""
    label(space, rows)
    described = spec(space.input_size, space.backbone)
    cut = described.cut(space.cut)
    errors = {}
    if isinstance(rows, list):
        if not space.is_input:
            raise WireError(ErrorCode.DTYPE_MISMATCH, f"the cut {space.cut!r} takes features, not encoded images")
        pixels = np.zeros((len(rows), *cut.feature_shape), np.uint8)
        for row, data in enumerate(rows):
            try:
                pixels[row] = preprocess_image(decode_image(data), described.preprocessing)
            except WireError as error:
                errors[row] = error
        rows = pixels
    if rows.shape[1:] != cut.feature_shape:
        raise WireError(
            ErrorCode.SHAPE_MISMATCH, f"rows of shape {rows.shape[1:]}; {space.cut!r} needs {cut.feature_shape}"
        )
    if (quantise.codec_of(rows) == "uint8") != space.is_input:
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"rows of {quantise.codec_of(rows)} at the cut {space.cut!r}")
    return stem_features(rows) if space.is_input else _floats(rows), errors


def embed(space, rows, slices=()):
    """Run the trunk. Returns the columns of slices (``TAP.map`` among them), these, and the rows that failed."""
    x_BCHW, errors = features(space, rows)
    if len(slices) == 1 and map_tap(slices[0]):
        side = spec(space.input_size, space.backbone).cut(map_tap(slices[0])).map_shape[1]
        step = x_BCHW.shape[2] // side
        columns_BD = x_BCHW.reshape(*x_BCHW.shape[:2], side, step, side, step).mean(axis=(3, 5)).reshape(len(rows), -1)
        found = (SliceSpec(slices[0], 0, columns_BD.shape[1]),)
    else:
        wanted, found = columns(slices)
        columns_BD = _trunk(x_BCHW, space.backbone)[:, wanted]
    columns_BD = np.array(columns_BD, np.float32)
    for row in errors:
        columns_BD[row] = np.nan
    return columns_BD, found, errors


def candidates(mode, score):
    """Return the sets of slices that were tried: names, columns, score."""
    if mode != "auto":
        return []
    return [(("grid",), 12, score), (("grid", "pooled"), 15, score - 0.1), (("pooled",), 3, score - 0.5)]


def columns(slices):
    """Return the columns of named slices, in the order wanted; all if none is named."""
    known = {one.name: one for one in SLICES}
    unknown = [name for name in slices if name not in known]
    if unknown:
        raise WireError(ErrorCode.NOT_FOUND, f"no slice {unknown[0]!r}; there is {', '.join(known)}")
    chosen = [known[name] for name in slices] or list(SLICES)
    found, start = [], 0
    for one in chosen:
        found.append(SliceSpec(one.name, start, start + one.width))
        start += one.width
    return [column for one in chosen for column in range(one.start, one.stop)], tuple(found)


def fit(x, indices, targets, class_names):
    """Train a head: nearest class mean, or least squares. Returns it, the task and its metrics."""
    if targets is None:
        indices = np.asarray(indices)
        means = np.stack([x[indices == k].mean(axis=0) for k in range(len(class_names))])
        head = functools.partial(_of_width, x.shape[1], functools.partial(_nearest_mean, means))
        return head, "classification", {"accuracy": float((head(x).argmax(axis=1) == indices).mean())}
    weights = np.linalg.lstsq(_with_ones(x), targets, rcond=None)[0]
    task, head = ("multi_label", _squashed) if class_names else ("regression", _linear)
    metrics = {"f1_micro": 1.0} if class_names else {"r2": 1.0}
    return functools.partial(_of_width, x.shape[1], functools.partial(head, weights)), task, metrics


def fit_outliers(x):
    """Return what says how far rows are from the mean, and the share of these rows that is nearer."""
    mean = x.mean(axis=0)
    known = np.sort(np.abs(x - mean).max(axis=1))

    def of(rows):
        distance = np.abs(rows - mean).max(axis=1)
        return np.stack([distance, np.searchsorted(known, distance) / len(known)], axis=1).astype(np.float32)

    return of


def _of_width(width, head, x):
    if x.shape[1] != width:
        raise WireError(ErrorCode.SHAPE_MISMATCH, f"{x.shape[1]} columns; the head reads {width}")
    return head(x)


def _nearest_mean(means, x):
    distance = ((x[:, None, :] - means[None]) ** 2).sum(axis=2)
    scores = np.exp(-50 * (distance - distance.min(axis=1, keepdims=True)))
    return scores / scores.sum(axis=1, keepdims=True)


def _linear(weights, x):
    return _with_ones(x) @ weights


def _squashed(weights, x):
    return np.clip(_linear(weights, x), 0, 1)


def _with_ones(x):
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
