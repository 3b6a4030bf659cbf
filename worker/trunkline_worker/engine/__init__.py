"""The engine: batcher, runtimes, multi-head stage. Torch and ONNX Runtime, no ray, grpc or protobuf."""
