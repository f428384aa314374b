"""The header of an ONNX file: its inputs, outputs, versions and metadata, read before onnxruntime sees the bytes.

An ONNX file is a protocol buffers message: fields, each with a number, a wire type and a value. This module walks them
once, front to back, to a fixed depth, and skips large fields (the data of a tensor) by their length. It trusts nothing
and builds only the few names and numbers that decide whether the file is a graph that EchoQuad has written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.errors import BundleError, ContractError

__all__ = [
    "CAM",
    "CONTRACT_HASH_KEY",
    "CONTRACT_KEY",
    "INPUT",
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "OUTPUTS",
    "GraphHeader",
    "TensorLocation",
    "ValueInfo",
    "cam_size",
    "check_graph",
    "has_typicality",
    "list_tensors",
    "read_graph_header",
]

INPUT: Final = "quadrants"
OUTPUTS: Final = ("logits", "probabilities")
CAM: Final = "cam"
"""An optional output, float32 [N, C, h, w]: class activation maps of a network that ends in a global average pooling
and one linear layer. The mean of a class's map plus the layer's bias is the logit of that class."""
TYPICALITY: Final = "typicality"
"""An optional output, float32 [N, 4]: how near a quadrant's features lie to those of the quadrants LA, RA, LV and RV of
the training frames. Positive, without a unit; higher is more typical."""
CONTRACT_KEY: Final = "echoquad.contract"
CONTRACT_HASH_KEY: Final = "echoquad.contract_sha256"

MAX_IR_VERSION: Final = 10
MAX_OPSET: Final = 18
"""The newest versions that this release writes. In newer ones a field or an operator may have another meaning."""

_ONNX_DOMAINS: Final = ("", "ai.onnx")  # two names of the same operator set
_MAX_CAM_SIDE: Final = 512  # a quarter of the largest input size
_MAX_FIELDS: Final = 1_000_000  # a ResNet-18 has 3000; the limit bounds the time
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_DTYPES: Final = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}


class ValueInfo(NamedTuple):
    """An input or output: its name, element type and shape, with ``"N"`` for a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class TensorLocation(NamedTuple):
    """A stored tensor: `length` bytes from `begin` on, in the file or in an external one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    length: int
    external: bool


_TYPICALITY: Final = ValueInfo(TYPICALITY, "float32", ("N", len(QUADRANTS)))


@dataclass(slots=True)
class GraphHeader:
    """What an ONNX file declares.

    Attributes
    ----------
    ir_version, opset
        The file's IR version and the version of ONNX's own operators; 0 if missing.
    metadata
        The metadata texts by key.
    inputs, outputs
        Inputs and outputs in the order of the file.
    """

    ir_version: int = 0
    opset: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    inputs: list[ValueInfo] = field(default_factory=list)
    outputs: list[ValueInfo] = field(default_factory=list)


def check_graph(model: bytes, contract: Contract, label: str) -> GraphHeader:
    """Read a graph's header and check that EchoQuad wrote it for the given contract.

    Parameters
    ----------
    model
        Bytes of the ONNX file.
    contract
        The contract in the bundle's manifest.
    label
        Beginning of error messages, such as ``"bundle: the fp32 graph"``.

    Raises
    ------
    BundleError
        As in `read_graph_header`, or if the file is newer than this release, has no contract, has another contract or
        encodes it differently, or has other inputs and outputs than the contract requires.
    """
    header = read_graph_header(model, label)
    versions = (("IR version", header.ir_version, MAX_IR_VERSION), ("opset", header.opset, MAX_OPSET))
    for name, version, newest in versions:
        if not 0 < version <= newest:
            raise BundleError(
                f"{label} has {name} {version or 'none'}; this EchoQuad reads up to {newest}; install the release that "
                "wrote it, or export it again"
            )
    _check_contract(header.metadata, contract, label)
    size, classes = contract.input_size, len(contract.classes)
    expected = [
        ValueInfo(INPUT, "uint8", ("N", 1, size, size)),
        *(ValueInfo(name, "float32", ("N", classes)) for name in OUTPUTS),
    ]
    values = [*header.inputs, *header.outputs]
    if has_typicality(header):
        expected.append(_TYPICALITY)
    if values[len(expected) :] and _is_cam(values[-1], classes):
        expected.append(values[-1])
    if values != expected:
        raise BundleError(
            f"{label} has the inputs and outputs {_format_values(values)}; expected {_format_values(expected)}; "
            "export it again"
        )
    return header


def has_typicality(header: GraphHeader) -> bool:
    """Return whether a graph computes the typicality score."""
    return _TYPICALITY in header.outputs


def cam_size(header: GraphHeader, label: str) -> tuple[int, int]:
    """Return height and width of a checked graph's class activation maps.

    Raises
    ------
    BundleError
        If it has none.
    """
    for value in header.outputs:
        if value.name == CAM:
            height, width = value.shape[2:]
            return int(height), int(width)
    raise BundleError(
        f"{label} has no class activation maps: its network does not end in a mean and one linear layer, or it was "
        "exported by an earlier release; leave out --cam, or export a single network such as resnet18 again"
    )


def _is_cam(value: ValueInfo, classes: int) -> bool:
    name, dtype, shape = value
    size = shape[2:]
    return (name, dtype, shape[:2]) == (CAM, "float32", ("N", classes)) and (
        len(size) == 2 and all(isinstance(side, int) and 0 < side <= _MAX_CAM_SIDE for side in size)
    )


def _check_contract(metadata: dict[str, str], contract: Contract, label: str) -> None:
    text = metadata.get(CONTRACT_KEY)
    if text is None:
        raise BundleError(f"{label} has no contract; expected one in its metadata ({CONTRACT_KEY}); export it again")
    try:
        actual = Contract.from_json(text).sha256
    except ContractError as error:
        raise BundleError(f"{label} has an invalid contract ({str(error)[:200]}); export it again") from error
    stated = metadata.get(CONTRACT_HASH_KEY, "")
    if {actual, stated} != {contract.sha256}:
        other = actual if actual != contract.sha256 else stated
        raise BundleError(
            f"{label} has contract {other[:12] or 'without a hash'}, the manifest has {contract.sha256[:12]}; expected "
            "the same contract; export it again"
        )
    if text != contract.to_json():
        raise BundleError(f"{label} does not encode its contract as canonical JSON; export it again")


def _format_values(values: list[ValueInfo]) -> str:
    texts = [f"{value.name[:40]} {value.dtype} [{', '.join(map(str, value.shape[:8]))}]" for value in values[:8]]
    return ", ".join([*texts, *(["..."] if len(values) > 8 else [])]) or "nothing"


def read_graph_header(model: bytes, label: str) -> GraphHeader:
    """Read the header of an ONNX file and reject whatever a graph of EchoQuad does not contain.

    The time is linear in the number of fields, which is limited; the depth is bounded.

    Parameters
    ----------
    model
        Bytes of the ONNX file.
    label
        Beginning of error messages.

    Raises
    ------
    BundleError
        If the bytes are not an ONNX file, or the graph has external tensors, operators that are not ONNX's own,
        functions, or subgraphs in its nodes.
    """
    if model[4:8] == b"ORTM":  # onnxruntime loads such bytes in its own format, whatever else they contain
        raise BundleError(f"{label} is in onnxruntime's own format; expected an ONNX file; export it again")
    try:
        return _OnnxReader(model, label).model()
    except _NotProtobufError as error:
        raise BundleError(f"{label} is not an ONNX file ({error}); export it again") from None


def list_tensors(model: bytes) -> list[TensorLocation]:
    """Return a graph's initializers that are stored as raw bytes, in the file or in an external one.

    Raises
    ------
    ValueError
        If the bytes are not an ONNX file.
    """
    reader = _OnnxReader(model, "")
    return [
        location
        for graph in reader.fields(reader.whole, {7: _BYTES})
        if graph.number == 7
        for part in reader.fields(graph, {5: _BYTES})
        if part.number == 5 and (location := reader.tensor_location(part)) is not None
    ]


class _NotProtobufError(ValueError):
    """The bytes are not a protocol buffers message."""


class _Field(NamedTuple):
    """A field of a message. `value` is the number of a varint, otherwise the offset of the field's bytes."""

    number: int
    wire_type: int
    value: int
    end: int


class _OnnxReader:
    """One pass over a file. Methods correspond to the messages of onnx.proto, and numbers to its field numbers."""

    def __init__(self, data: bytes, label: str) -> None:
        self._data, self._label, self._fields_left = data, label, _MAX_FIELDS
        self.whole = _Field(0, _BYTES, 0, len(data))

    def model(self) -> GraphHeader:
        header, graphs = GraphHeader(), 0
        for part in self.fields(self.whole, {1: _VARINT, 7: _BYTES, 8: _BYTES, 14: _BYTES}):
            if part.number == 1:
                header.ir_version = part.value
            elif part.number == 7:
                graphs += 1
                self._graph(part, header)
            elif part.number == 8:
                opset = self._last(part, {1: _BYTES, 2: _VARINT})
                if self._text(opset.get(1)) in _ONNX_DOMAINS and 2 in opset:
                    header.opset = max(header.opset, opset[2].value)
            elif part.number == 14:
                key, value = self._key_value(part)
                if key in header.metadata:  # readers differ in which of the two they use
                    raise self._error(f"has the metadata {key[:40]!r} twice", "each key once")
                header.metadata[key] = value
            elif part.number == 20:
                raise self._error("contains training steps", "inference only")
            elif part.number == 25:
                raise self._error("contains functions", "ONNX's operators only")
        if graphs != 1:
            raise _NotProtobufError(f"it holds {graphs} graphs, expected one")
        return header

    def _graph(self, graph: _Field, header: GraphHeader) -> None:
        handlers = {
            1: self._node,
            5: self._check_not_external,
            11: lambda part: header.inputs.append(self._value_info(part)),
            12: lambda part: header.outputs.append(self._value_info(part)),
            15: self._sparse_tensor,
        }
        self._walk(graph, handlers)

    def _node(self, node: _Field) -> None:
        operator, domains = "", [""]
        for part in self.fields(node, {4: _BYTES, 5: _BYTES, 7: _BYTES}):
            if part.number == 4:
                operator = self._text(part)
            elif part.number == 5:
                self._attribute(part)
            elif part.number == 7:
                domains.append(self._text(part))
        for domain in domains:
            if domain not in _ONNX_DOMAINS:
                name = f"{domain[:40]}.{operator[:40]}"
                raise self._error(f"uses the operator {name!r}, which is not one of ONNX", "ONNX's operators only")

    def _attribute(self, attribute: _Field) -> None:
        tensor, sparse, graph = self._check_not_external, self._sparse_tensor, self._subgraph
        self._walk(attribute, {5: tensor, 6: graph, 10: tensor, 11: graph, 22: sparse, 23: sparse})

    def _subgraph(self, _: _Field) -> None:
        raise self._error("has a subgraph in a node, as loops and branches do", "one graph")

    def _check_not_external(self, tensor: _Field) -> None:
        name, external = "", False
        for part in self.fields(tensor, {8: _BYTES, 13: _BYTES, 14: _VARINT}):
            if part.number == 8:
                name = self._text(part)
            elif part.number == 13 or (part.number == 14 and part.value != 0):
                external = True
        if external:
            raise self._error(f"keeps the tensor {name[:40]!r} outside its file", "all tensors in one file")

    def _sparse_tensor(self, sparse: _Field) -> None:
        self._walk(sparse, {1: self._check_not_external, 2: self._check_not_external})

    def tensor_location(self, tensor: _Field) -> TensorLocation | None:
        """Return where a tensor's bytes are; None if they are not stored as raw bytes."""
        name, dtype, shape = "", "", list[int]()
        raw: _Field | None = None
        external: dict[str, str] = {}
        for part in self.fields(tensor, {2: _VARINT, 8: _BYTES, 9: _BYTES, 13: _BYTES}):
            if part.number == 1 and part.wire_type == _VARINT:
                shape.append(part.value)
            elif part.number == 1:  # packed: several numbers in one field
                at = part.value
                while at < part.end:
                    side, at = self._varint(at, part.end)
                    shape.append(side)
            elif part.number == 2:
                dtype = _DTYPES.get(part.value, "")
            elif part.number == 8:
                name = self._text(part)
            elif part.number == 9:
                raw = part
            elif part.number == 13:
                external.update([self._key_value(part)])
        if external:
            begin, length = int(external.get("offset", "0")), int(external.get("length", "0"))
        elif raw is not None:
            begin, length = raw.value, raw.end - raw.value
        else:
            return None
        return TensorLocation(name, dtype, tuple(shape), begin, length, bool(external))

    def _key_value(self, entry: _Field) -> tuple[str, str]:
        parts = self._last(entry, {1: _BYTES, 2: _BYTES})
        return self._text(parts.get(1)), self._text(parts.get(2))

    def _value_info(self, value: _Field) -> ValueInfo:
        name, dtype = "", "no tensor"
        shape: list[int | str] = []
        for part in self.fields(value, {1: _BYTES, 2: _BYTES}):
            if part.number == 1:
                name = self._text(part)
            elif part.number == 2:
                for choice in self.fields(part, {1: _BYTES}):
                    if choice.number != 1:  # a sequence or a map, which is not a tensor
                        return ValueInfo(name, "no tensor", ())
                    dtype = self._tensor_type(choice, dtype, shape)
        return ValueInfo(name, dtype, tuple(shape))

    def _tensor_type(self, tensor: _Field, dtype: str, shape: list[int | str]) -> str:
        for part in self.fields(tensor, {1: _VARINT, 2: _BYTES}):
            if part.number == 1:
                dtype = _DTYPES.get(part.value, f"type {part.value}")
            elif part.number == 2:
                shape += [self._dimension(side) for side in self.fields(part, {1: _BYTES}) if side.number == 1]
        return dtype

    def _dimension(self, dimension: _Field) -> int | str:
        size: int | str = "N"
        for part in self.fields(dimension, {1: _VARINT, 2: _BYTES}):
            if part.number in (1, 2):  # a number or a name: the last one counts
                size = part.value if part.number == 1 else "N"
        return size

    def fields(self, message: _Field, wire_types: Mapping[int, int]) -> Iterator[_Field]:
        """Iterate over a message's fields; those with a number in `wire_types` must have that wire type."""
        at, end = message.value, message.end
        while at < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _NotProtobufError(f"it has more than {_MAX_FIELDS} fields")
            begin = at
            tag, at = self._varint(at, end)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == _VARINT:
                value, at = self._varint(at, end)
            elif wire_type == _BYTES:
                length, value = self._varint(at, end)
                at = value + length
            elif wire_type in (_FOUR_BYTES, _EIGHT_BYTES):
                value = at
                at += 4 if wire_type == _FOUR_BYTES else 8
            else:
                raise _NotProtobufError(f"byte {begin} begins no field")
            # protobuf's readers drop the upper bits of a longer tag, and would read another field.
            if not 8 <= tag < 1 << 32 or wire_types.get(number, wire_type) != wire_type or at > end:
                raise _NotProtobufError(f"the field at byte {begin} is damaged")
            yield _Field(number, wire_type, value, at)

    def _walk(self, message: _Field, handlers: Mapping[int, Callable[[_Field], None]]) -> None:
        """Call a handler for each field with its number; these fields must hold bytes."""
        for part in self.fields(message, dict.fromkeys(handlers, _BYTES)):
            if part.number in handlers:
                handlers[part.number](part)

    def _last(self, message: _Field, wire_types: Mapping[int, int]) -> dict[int, _Field]:
        """Return the last field of each number in `wire_types`, the one that protobuf's readers use."""
        return {part.number: part for part in self.fields(message, wire_types) if part.number in wire_types}

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Return a number, stored in groups of seven bits from the least significant on, and the offset behind it."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
        raise _NotProtobufError(f"the number before byte {at} does not end")

    def _text(self, part: _Field | None) -> str:
        return "" if part is None else self._data[part.value : part.end].decode("utf-8", "replace")

    def _error(self, found: str, expected: str) -> BundleError:
        return BundleError(f"{self._label} {found}; expected {expected}; export it again")
