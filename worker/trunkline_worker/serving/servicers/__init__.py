"""One servicer per service: convert, call, convert. The only modules of the worker that know protobuf."""
