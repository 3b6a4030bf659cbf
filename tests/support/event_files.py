"""Reads TensorBoard's event files back: records of a length, a checksum, an event, a checksum."""

import struct

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData


def _masked(data):
    crc = crc32c(data) & 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(path):
    """Yield the events of a file, in its order; every checksum must be right."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        head = data[at : at + 8]
        (size,) = struct.unpack("<Q", head)
        assert struct.unpack("<I", data[at + 8 : at + 12])[0] == _masked(head)
        body = data[at + 12 : at + 12 + size]
        assert struct.unpack("<I", data[at + 12 + size : at + 16 + size])[0] == _masked(body)
        yield Event.FromString(body)
        at += 16 + size


class Run:
    """What the event files of one folder hold."""

    def __init__(self, folder):
        """Read them, oldest first."""
        self.scalars, self.texts, self.settings, self.num_starts = {}, {}, {}, 0
        self.files = sorted(folder.glob("events.out.tfevents.*"), key=lambda one: one.stat().st_mtime_ns)
        for event in (one for path in self.files for one in events(path)):
            self.num_starts += event.HasField("session_log")
            for value in event.summary.value:
                self._take(event, value)

    def _take(self, event, value):
        if value.HasField("simple_value"):
            self.scalars.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
        elif value.tag.endswith("/text_summary"):
            self.texts[value.tag.removesuffix("/text_summary")] = value.tensor.string_val[0].decode()
        elif value.tag == "_hparams_/session_start_info":
            found = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info.hparams
            self.settings = {name: getattr(one, one.WhichOneof("kind")) for name, one in found.items()}

    def values(self, name):
        """Return steps and values of a scalar."""
        return [(step, round(value, 5)) for step, value, _ in self.scalars[name]]
