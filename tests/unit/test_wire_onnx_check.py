"""The check of ONNX files that reads protobuf by itself, against the onnx package: the same verdict on any bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from trunkline_wire import onnx_check
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.onnx_check import MAX_DEPTH, MAX_FIELDS, STANDARD_DOMAINS, check_onnx_file
from trunkline_worker.backbones.onnx_safety import check_onnx

MAX_BYTES = 2**26
PACKAGE_FILES = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").rglob("*.onnx"))

STRICTER = ("wire type 3", "wire type 4", "messages within messages", "parts")
"""Of what the onnx package reads, these are refused beside: groups, great depth and very many fields."""


def verdict(data: bytes) -> tuple[ErrorCode | None, str]:
    """Return the code that a file is refused with, None for none, and the message."""
    try:
        check_onnx_file(data, MAX_BYTES)
    except WireError as error:
        return error.code, error.message
    return None, ""


def expected(data: bytes) -> ErrorCode | None:
    """Return the verdict by the onnx package's parser and a walk over what it built."""
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return ErrorCode.CORRUPT_DATA
    graphs = list(_graphs(model.graph))
    domains = [_domain(opset) for opset in model.opset_import]
    domains += [_domain(node) for graph in graphs for node in graph.node]
    if not model.graph.node:
        return ErrorCode.CORRUPT_DATA
    external = any(
        tensor.data_location == TensorProto.EXTERNAL or tensor.external_data
        for graph in graphs
        for tensor in _tensors(graph)
    )
    if not set(domains) <= STANDARD_DOMAINS or model.functions or model.training_info or external:
        return ErrorCode.UNSUPPORTED
    return None


def _domain(message: onnx.NodeProto | onnx.OperatorSetIdProto) -> str | bytes:
    try:
        return message.domain  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return b"\xff"


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _graphs(inner)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
    for one in sparse:
        yield one.values
        yield one.indices


def agree(data: bytes) -> None:
    code, message = verdict(data)
    if any(reason in message for reason in STRICTER):
        return
    assert code == expected(data), message


# Wire format, written by hand: what no serialiser would write.


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def part(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def model_of(*attribute_fields: bytes) -> bytes:
    """Return a model of one operator with one attribute, from the attribute's encoded fields."""
    node = part(4, b"Constant") + part(5, b"".join(attribute_fields))
    return part(7, part(1, node))


HERE, EXTERNAL, UNLISTED = b"\x70\x00", b"\x70\x01", b"\x70\x4d"


domains = st.sampled_from(["", "", "", "ai.onnx", "ai.onnx", "ai.onnx.ml", "com.microsoft", "AI.ONNX", "ai.onnx\0"])
rarely = st.integers(0, 7).map(lambda number: number == 0)


@st.composite
def tensors(draw: st.DrawFn) -> TensorProto:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=draw(st.lists(st.integers(-1, 2**40), max_size=3)))
    tensor.raw_data = draw(st.binary(max_size=8))
    tensor.float_data.extend(draw(st.lists(st.floats(width=32), max_size=2)))
    tensor.int64_data.extend(draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2)))
    if draw(rarely):
        tensor.data_location = draw(st.sampled_from([TensorProto.DEFAULT, TensorProto.EXTERNAL]))
    if draw(rarely):
        tensor.external_data.add(key="location", value="../secret")
    return tensor


@st.composite
def graphs(draw: st.DrawFn, depth: int = 0) -> GraphProto:
    graph = GraphProto(name="g", initializer=draw(st.lists(tensors(), max_size=2)))
    if draw(rarely):
        graph.sparse_initializer.add(values=draw(tensors()), indices=draw(tensors()))
    for _ in range(draw(st.integers(0 if draw(rarely) else 1, 2))):
        node = graph.node.add(op_type="Op", domain=draw(domains), input=["x"])
        attribute = AttributeProto(name="a", ints=[1, -1], floats=[0.5], strings=[b"s"])
        if draw(rarely):
            attribute.t.CopyFrom(draw(tensors()))
        if draw(rarely):
            attribute.sparse_tensor.values.CopyFrom(draw(tensors()))
        attribute.tensors.extend(draw(st.lists(tensors(), max_size=1)))
        if depth < 3 and draw(rarely):
            attribute.g.CopyFrom(draw(graphs(depth + 1)))
        if depth < 3:
            attribute.graphs.extend(draw(st.lists(graphs(depth + 1), max_size=1)))
        node.attribute.append(attribute)
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3]))
    return graph


@st.composite
def models(draw: st.DrawFn) -> ModelProto:
    model = ModelProto(ir_version=10, producer_name="p", graph=draw(graphs()))
    for domain in draw(st.lists(domains, max_size=2)):
        model.opset_import.add(domain=domain, version=20)
    if draw(rarely):
        model.functions.add(name="F", domain="d")
    if draw(rarely):
        model.training_info.add()
    return model


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: path.parent.name)
def test_the_models_of_the_onnx_package(path: Path) -> None:
    data = path.read_bytes()
    assert verdict(data)[0] == expected(data)


def test_there_are_models_of_both_verdicts_in_the_onnx_package() -> None:
    assert {verdict(path.read_bytes())[0] for path in PACKAGE_FILES} == {None, ErrorCode.UNSUPPORTED}


@given(models())
def test_generated_models(model: ModelProto) -> None:
    data = model.SerializeToString()
    assert verdict(data)[0] == expected(data)


@given(models(), models())
def test_models_in_pieces_are_put_together_as_protobuf_does(first: ModelProto, second: ModelProto) -> None:
    joined = first.SerializeToString() + second.SerializeToString()
    assert verdict(joined)[0] == expected(joined)
    # Two graphs where there may be one: their operators come together.
    graphs_apart = part(7, first.graph.SerializeToString()) + b"\x08\x05" + part(7, second.graph.SerializeToString())
    assert verdict(graphs_apart)[0] == expected(graphs_apart)


@given(
    st.lists(st.sampled_from([HERE, EXTERNAL, UNLISTED, b"\x70\x81\x80\x80\x80\x10", b"\x72\x01\x01"]), max_size=4),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([5, 10]),
)
def test_where_data_lies_is_what_the_last_piece_says(fields: list[bytes], cuts: list[int], number: int) -> None:
    # 5 is one tensor in pieces, 10 a list of tensors.
    edges = [0, *sorted(cuts), len(fields)]
    pieces = [b"".join(fields[start:stop]) for start, stop in pairwise(edges)]
    data = model_of(*(part(number, piece) for piece in pieces))
    assert verdict(data)[0] == expected(data)
    sparse = model_of(*(part(22, part(1, piece)) for piece in pieces))
    assert verdict(sparse)[0] == expected(sparse)


def test_of_several_domains_the_last_counts() -> None:
    for domains in ([b"evil", b""], [b"", b"evil"], [b"evil", b"ai.onnx"], [b"a", b"b"]):
        fields = b"".join(part(7, domain) for domain in domains)
        data = part(7, part(1, fields))
        assert verdict(data)[0] == expected(data)
        opset = part(7, part(1, b"")) + part(8, b"".join(part(1, domain) for domain in domains))
        assert verdict(opset)[0] == expected(opset)
    assert verdict(part(7, part(1, part(7, b"evil") + part(7, b""))))[0] is None


def test_operators_elsewhere_are_not_those_of_the_graph() -> None:
    for elsewhere in (part(20, part(1, part(1, b""))), part(25, part(7, b""))):
        for data in (elsewhere, part(7, b"") + elsewhere, part(7, part(1, b"")) + elsewhere):
            assert verdict(data)[0] == expected(data)
    assert verdict(part(20, part(1, part(1, b""))))[0] is ErrorCode.CORRUPT_DATA


def test_a_location_that_a_later_piece_takes_back() -> None:
    assert verdict(model_of(part(5, HERE), part(5, EXTERNAL)))[0] is ErrorCode.UNSUPPORTED
    assert verdict(model_of(part(5, EXTERNAL), part(5, UNLISTED)))[0] is ErrorCode.UNSUPPORTED
    assert verdict(model_of(part(5, EXTERNAL), part(5, HERE)))[0] is None
    assert verdict(model_of(part(10, EXTERNAL), part(10, HERE)))[0] is ErrorCode.UNSUPPORTED


@settings(max_examples=400)
@given(models(), st.data())
def test_mutated_models(model: ModelProto, data: st.DataObject) -> None:
    mutant = bytearray(model.SerializeToString(deterministic=True))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(mutant)))
        stop = data.draw(st.integers(start, min(len(mutant), start + 12)))
        kind = data.draw(st.sampled_from(["flip", "replace", "cut off", "repeat"]))
        if kind == "flip" and start < len(mutant):
            mutant[start] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "replace":
            mutant[start:stop] = data.draw(st.binary(max_size=6))
        elif kind == "cut off":
            del mutant[start:]
        else:
            mutant[start:start] = mutant[start:stop]
    agree(bytes(mutant))


@settings(max_examples=300)
@given(path=st.sampled_from([path for path in PACKAGE_FILES if path.stat().st_size < 4000]), data=st.data())
def test_mutated_models_of_the_onnx_package(path: Path, data: st.DataObject) -> None:
    mutant = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(mutant) - 1), min_size=1, max_size=4)):
        mutant[position] = data.draw(st.integers(0, 255))
    agree(bytes(mutant))


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    agree(data)
    agree(model_of(data))
    agree(part(7, part(1, b"") + part(5, data) + part(11, data) + part(15, data)))


@pytest.mark.parametrize(
    "number",
    [
        b"\x80",
        b"\x80" * 10 + b"\x01",
        b"\x80" * 9 + b"\x7f",
        b"\x80" * 9 + b"\x80",
        b"\xff" * 9 + b"\x01",
        b"\x81\x00",
        b"\x88\x80\x80\x80\x00",
        b"\x88\x80\x80\x80\x80\x00",
        b"\xf8\xff\xff\xff\x0f",
        b"\xf8\xff\xff\xff\x1f",
        b"\xf8\xff\xff\xff\x7f",
        b"",
    ],
    ids=bytes.hex,
)
def test_numbers_of_odd_lengths(number: bytes) -> None:
    node = part(1, part(4, b"Op"))
    for data in (
        part(7, node) + b"\x08" + number,  # a number
        part(7, node) + b"\xf8\x7f" + number,  # of a field that is not known
        part(7, node + part(5, part(1, number))),  # a list of numbers
        part(7, node + part(5, part(7, number + b"\x01"))),
        part(7, node) + number + b"\x01",  # a field's number
        part(7, node) + b"\x12" + number,  # a length
        part(7, node + part(5, part(4, number))),  # a list of numbers of 4 bytes
        part(7, node + part(5, part(10, number))),  # and of 8
    ):
        agree(data)


def test_groups_are_refused_though_protobuf_skips_them() -> None:
    group = part(7, part(1, b"")) + b"\xab\x06" + b"\xac\x06"
    assert expected(group) is None
    assert verdict(group)[0] is ErrorCode.CORRUPT_DATA


def nested(levels: int) -> bytes:
    graph = part(1, part(4, b"If"))
    for _ in range(levels):
        graph = part(1, part(5, part(6, graph)))
    return part(7, graph)


def test_depth_is_bounded() -> None:
    allowed = (MAX_DEPTH - 3) // 3
    assert verdict(nested(allowed))[0] is None
    assert verdict(nested(allowed + 1))[0] is ErrorCode.UNSUPPORTED
    # Far below what either side's parser or this interpreter's stack allows, and checked on the way down.
    assert expected(nested(allowed)) is None
    assert verdict(nested(20 * sys.getrecursionlimit()))[0] is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    "data",
    [
        part(7, part(1, b"") * (MAX_FIELDS + 10)),
        part(7, b"") * (MAX_FIELDS + 10),
        part(7, part(1, b"")) + b"\x08\x01" * (MAX_FIELDS + 10),
        part(7, part(1, part(5, b"\x40\x01" * (MAX_FIELDS + 10)))),
    ],
    ids=["operators", "pieces", "numbers", "inner numbers"],
)
def test_the_number_of_parts_is_bounded(data: bytes) -> None:
    code, message = verdict(data)
    assert code is ErrorCode.UNSUPPORTED
    assert "parts" in message


def test_the_size_is_checked_first() -> None:
    with pytest.raises(WireError, match="of 11 bytes; at most 10") as caught:
        check_onnx_file(b"\xff" * 11, 10)
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.opset_import.add(domain="com.microsoft"), "other domains: 'com.microsoft'"),
        (lambda model: model.graph.node.add(domain="evil\nops\x1b[0m"), r"other domains: 'evil\\nops\\x1b\[0m'"),
        (lambda model: model.graph.node.add(domain="x" * 10**6), "other domains: 'x{200}'$"),
        (lambda model: model.functions.add(), "functions"),
        (lambda model: model.training_info.add(), "training graph"),
        (lambda model: model.graph.initializer.add(data_location=TensorProto.EXTERNAL), "in other files"),
    ],
)
def test_the_message_says_what_is_refused(change, message: str) -> None:
    model = helper.make_model(GraphProto(node=[NodeProto(op_type="Relu")]))
    assert verdict(model.SerializeToString()) == (None, "")
    change(model)
    with pytest.raises(WireError, match=message) as caught:
        check_onnx_file(model.SerializeToString(), MAX_BYTES)
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_weights_are_skipped_and_not_walked() -> None:
    # Bytes of weights that would be a foreign operator if they were read as a message.
    weights = part(1, part(7, b"evil.ops")) * 1000
    tensor = helper.make_tensor("w", TensorProto.UINT8, [len(weights)], np.frombuffer(weights, np.uint8), raw=True)
    model = helper.make_model(GraphProto(node=[NodeProto(op_type="Relu")], initializer=[tensor]))
    assert verdict(model.SerializeToString())[0] is None


def test_the_worker_gives_the_same_verdict_and_the_parsed_file() -> None:
    for path in PACKAGE_FILES:
        data = path.read_bytes()
        try:
            assert check_onnx(data) == onnx.load_model_from_string(data)
            code = None
        except WireError as error:
            code = error.code
        assert code == verdict(data)[0]


def is_repeated(one: FieldDescriptor) -> bool:
    # Older protobuf does not have the property, newer warns of the label.
    return one.is_repeated if hasattr(one, "is_repeated") else one.label == one.LABEL_REPEATED


def test_every_message_of_the_schema_is_known() -> None:
    seen: set[str] = set()

    def compare(descriptor: Descriptor, kind: str) -> None:
        if (descriptor.full_name, kind) in visited:
            return
        visited.add((descriptor.full_name, kind))
        seen.add(kind)
        for one in descriptor.fields:
            inner = onnx_check._SCHEMA.get(kind, {}).get(one.number)
            if one.type == FieldDescriptor.TYPE_MESSAGE:
                assert isinstance(inner, onnx_check._Inner), one.full_name
                assert inner.repeated == is_repeated(one), one.full_name
                compare(one.message_type, inner.kind)
            elif is_repeated(one) and one.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
                fixed = {FieldDescriptor.TYPE_FLOAT: 4, FieldDescriptor.TYPE_DOUBLE: 8}
                assert inner == onnx_check._Packed(fixed.get(one.type, 0)), one.full_name
            else:
                assert inner is None, one.full_name

    visited: set[tuple[str, str]] = set()
    compare(ModelProto.DESCRIPTOR, "Model")
    assert set(onnx_check._SCHEMA) <= seen
    numbers = {field.name: field.number for field in TensorProto.DESCRIPTOR.fields}
    assert (numbers["external_data"], numbers["data_location"]) == (13, 14)
    assert NodeProto.DESCRIPTOR.fields_by_name["domain"].number == 7
    assert onnx.OperatorSetIdProto.DESCRIPTOR.fields_by_name["domain"].number == 1
