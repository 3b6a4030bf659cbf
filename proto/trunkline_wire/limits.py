"""Bounds that client and worker share: checked before a message is sent, and again when it arrives."""

MAX_MESSAGE_BYTES = 32 * 2**20
"""Largest gRPC message in either direction."""

MAX_PAYLOAD_BYTES = MAX_MESSAGE_BYTES - 2**20
"""Largest tensor inside a message: the rest is room for ids, names and framing."""

MAX_BATCH_ROWS = 4096
"""Most rows in one message."""

CHUNK_BYTES = 2 * 2**20
"""What the client aims at for one chunk of an upload or one batch of a stream."""

STEM_CHUNK_BYTES = 2**20
"""Size of one piece of a stem's file."""

MAX_STEM_BYTES = 512 * 2**20
"""Largest stem that a client fetches."""

MAX_DATASET_ROWS = 500_000
"""Most rows in one dataset: their ids must fit one message."""

MAX_FIND_ROWS = 100_000
"""Most row ids in one question about what the cluster lacks."""

MAX_INPUTS = 8
"""Most inputs of a dataset or a model, the first included."""

MAX_VIEWS = 64
"""Most views of one picture, the picture itself included."""

MAX_LOCAL_WIDTH = 65_536
"""Most numbers in a row of local features."""

MAX_CLASSES = 100_000
"""Most classes in one dataset."""

MAX_ANSWERS = 2**30
"""Most rows times classes of a training: 4 GiB of float32, of which there are several at a time."""

MAX_RANK = 8
"""Most dimensions of a tensor."""

MAX_IMAGE_BYTES = 16 * 2**20
"""Largest encoded image."""

MAX_IMAGE_PIXELS = 40_000_000
"""Most pixels of an encoded image, read from its header before it is decoded."""

MAX_CONCURRENT_STREAMS = 100
"""HTTP/2 streams per connection. Without it one connection can starve the others by opening and resetting streams."""

MAX_NAME_LENGTH = 128
"""Longest name a user may give."""

MAX_CODEC_ERROR = 0.05
"""Largest embedding error, codec and stem together, that ``codec="auto"`` keeps to unless told otherwise, and up to
which a model takes features of another codec than it was trained on. See ``CodecUse`` in inference.proto."""
