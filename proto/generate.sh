#!/bin/sh
# Regenerate the committed protobuf code. Usage: proto/generate.sh PYTHON, where PYTHON has the pinned grpcio-tools.
set -eu
cd "$(dirname "$0")"
rm -f trunkline_wire/v1/*_pb2.py trunkline_wire/v1/*_pb2.pyi trunkline_wire/v1/*_pb2_grpc.py
"$1" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. trunkline_wire/v1/*.proto
