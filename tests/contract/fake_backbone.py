"""A backbone small enough to check by hand: features are 2x2 means of the pixels, the embedding their means."""

import functools
import hashlib

import numpy as np
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import decode_image, preprocess_image
from trunkline_wire.specs import (
    BackboneSpec,
    CutSpec,
    Preprocessing,
    SliceSpec,
    embedding_fingerprint,
    feature_fingerprint,
)

NAME = "fake_net"
CUT = "half"
INPUT_SIZE = 8
SLICES = (SliceSpec("grid", 0, 12), SliceSpec("pooled", 12, 15))
WEIGHTS = hashlib.sha256(b"fake weights").hexdigest()


def spec(input_size=0, weights=WEIGHTS):
    """Describe the backbone at an input size."""
    size = input_size or INPUT_SIZE
    if size % 4 or size > 256:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"input size {size}: a multiple of 4, 256 at most, is needed")
    preprocessing = Preprocessing(size, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    names = tuple(one.name for one in SLICES)
    shapes = {"input": (size, size, 3), CUT: (3, size // 2, size // 2)}
    return BackboneSpec(
        name=NAME,
        pretrained=True,
        weights="made up",
        weights_sha256=weights,
        num_parameters=0,
        preprocessing=preprocessing,
        resizable=True,
        cuts=tuple(
            CutSpec(name, shape, feature_fingerprint(weights, name, preprocessing), names)
            for name, shape in shapes.items()
        ),
        slices=SLICES,
        embedding_fingerprint=embedding_fingerprint(weights, preprocessing),
        runtime="numpy",
        device="cpu",
    )


def stem_features(pixels_BHWC):
    """Compute the features at the cut from preprocessed pixels."""
    b, h, w, _ = pixels_BHWC.shape
    x = pixels_BHWC.astype(np.float32).transpose(0, 3, 1, 2).reshape(b, 3, h // 2, 2, w // 2, 2)
    return x.mean(axis=(3, 5)) / np.float32(255)


def stem_onnx(size):
    """Export the stem: uint8 (B, H, W, 3) to float32 (B, 3, H/2, W/2)."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Div", ["means", "scale"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "stem",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", size, size, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 3, size // 2, size // 2])],
        [numpy_helper.from_array(np.array(255, np.float32), "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def embed(space, rows):
    """Run the trunk. Returns the embedding and the rows that failed."""
    described = spec(space.input_size)
    cut = described.cut(space.cut)
    if space.backbone != NAME:
        raise WireError(ErrorCode.NOT_FOUND, f"there is no backbone {space.backbone!r}")
    if cut is None:
        raise WireError(ErrorCode.NOT_FOUND, f"{NAME} has no cut {space.cut!r}")
    if cut.fingerprint != space.fingerprint:
        raise WireError(ErrorCode.INCOMPATIBLE, "these features were made with other weights")
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
    if (rows.dtype == np.uint8) != space.is_input:
        raise WireError(ErrorCode.DTYPE_MISMATCH, f"rows of {rows.dtype} at the cut {space.cut!r}")
    x = stem_features(rows) if space.is_input else rows.astype(np.float32)
    b, c, h, w = x.shape
    grid = x.reshape(b, c, 2, h // 2, 2, w // 2).mean(axis=(3, 5)).reshape(b, -1)
    embedding = np.concatenate([grid, x.mean(axis=(2, 3))], axis=1)
    for row in errors:
        embedding[row] = np.nan
    return embedding.astype(np.float32), errors


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


def fit(x, indices, targets, num_classes):
    """Train a head: nearest class mean, or least squares. Returns it and its metrics."""
    if targets is None:
        indices = np.asarray(indices)
        means = np.stack([x[indices == k].mean(axis=0) for k in range(num_classes)])
        head = functools.partial(_nearest_mean, means)
        return head, {"accuracy": float((head(x).argmax(axis=1) == indices).mean())}
    weights = np.linalg.lstsq(_with_ones(x), targets, rcond=None)[0]
    return functools.partial(_linear, weights), {"r2": 1.0}


def _nearest_mean(means, x):
    distance = ((x[:, None, :] - means[None]) ** 2).sum(axis=2)
    scores = np.exp(-50 * (distance - distance.min(axis=1, keepdims=True)))
    return scores / scores.sum(axis=1, keepdims=True)


def _linear(weights, x):
    return _with_ones(x) @ weights


def _with_ones(x):
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
