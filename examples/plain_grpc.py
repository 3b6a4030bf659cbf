"""Use a cluster through plain gRPC: the generated stubs and nothing else of Trunkline.

Lists the backbones, then sends pictures as they are, PNG files, to a trained model. In another language the same is
done with stubs generated from `proto/trunkline_wire/v1`, or without any through reflection: see docs/plain-grpc.md.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from trunkline_wire.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    tensor_pb2,
)

TIMEOUT_S = 60.0


def main() -> int:
    """List backbones and models, predict some digits, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--address", default=os.environ.get("TRUNKLINE_ADDRESS", "127.0.0.1:50051"))
    parser.add_argument("--token-file", type=Path, help="file whose first word is the token")
    parser.add_argument("--ca-file", type=Path, help="PEM file to trust; without it the connection is not encrypted")
    parser.add_argument("--model", default="digits-head", help="name, or name@version")
    arguments = parser.parse_args()

    token = (
        arguments.token_file.read_text().split()[0] if arguments.token_file else os.environ.get("TRUNKLINE_TOKEN", "")
    )
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        with _channel(arguments.address, arguments.ca_file) as channel:
            show_backbones(channel, metadata)
            predict_digits(channel, metadata, arguments.model)
    except grpc.RpcError as error:
        # The details are always "[CODE] message (request ID)".
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


def _channel(address: str, ca_file: Path | None) -> grpc.Channel:
    if ca_file is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca_file.read_bytes()))


def show_backbones(channel: grpc.Channel, metadata: list[tuple[str, str]]) -> None:
    """Print every backbone with its cuts."""
    catalog = catalog_pb2_grpc.CatalogServiceStub(channel)
    answer = catalog.ListBackbones(catalog_pb2.ListBackbonesRequest(), metadata=metadata, timeout=TIMEOUT_S)
    for backbone in answer.backbones:
        print(f"{backbone.name}: {backbone.weights}; {backbone.runtime} on {backbone.device}")
        for cut in backbone.cuts:
            print(f"  {cut.name}: {list(cut.feature_shape)}, fingerprint {cut.fingerprint[:12]}...")


def predict_digits(channel: grpc.Channel, metadata: list[tuple[str, str]], name: str) -> None:
    """Send ten pictures to a model and print what it says."""
    registry = registry_pb2_grpc.RegistryServiceStub(channel)
    model = registry.GetModel(registry_pb2.GetModelRequest(model=name), metadata=metadata, timeout=TIMEOUT_S).model

    # A model may be fed at any cut of its backbone. At the cut `input` the rows are pictures.
    catalog = catalog_pb2_grpc.CatalogServiceStub(channel)
    backbone = catalog.DescribeBackbone(
        catalog_pb2.DescribeBackboneRequest(backbone=model.space.backbone, input_size=model.space.input_size),
        metadata=metadata,
        timeout=TIMEOUT_S,
    ).backbone
    (cut,) = (one for one in backbone.cuts if one.name == "input")
    space = tensor_pb2.FeatureSpace(
        backbone=backbone.name, cut="input", input_size=model.space.input_size, fingerprint=cut.fingerprint
    )

    digits = load_digits()
    files = [_png(picture) for picture in digits.images[-10:]]
    features = tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_UINT8,
        codec=tensor_pb2.CODEC_ENCODED_IMAGES,
        compression=tensor_pb2.COMPRESSION_NONE,
        shape=[len(files)],
        encoded=files,
    )
    answer = inference_pb2_grpc.InferenceServiceStub(channel).Predict(
        inference_pb2.PredictRequest(space=space, features=features, model=name, timeout_s=TIMEOUT_S),
        metadata=metadata,
        timeout=TIMEOUT_S,
    )
    print(f"{answer.model} says: {' '.join(answer.labels)}")
    print(f"right would be: {' '.join(str(one) for one in digits.target[-10:])}")
    for error in answer.row_errors:
        print(f"row {error.row} failed: {error.error.message}", file=sys.stderr)


def _png(picture_HW: npt.NDArray[np.float64]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((picture_HW * 15.9375).astype("uint8")).save(buffer, format="PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
