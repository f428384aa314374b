"""What an ONNX file holds, read off its bytes before onnxruntime sees them.

The file is protocol buffers: fields, each a number, a kind and a value. Here they are walked once, front to back,
to a fixed depth, and what is large (a tensor's data) is stepped over by its length. Nothing is trusted and
nothing is built but the few names and numbers that decide whether this is a graph as EchoQuad writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import BundleError, ContractError

__all__ = [
    "CAM",
    "CONTRACT_HASH_KEY",
    "CONTRACT_KEY",
    "INPUT",
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "OUTPUTS",
    "Graph",
    "Port",
    "Tensor",
    "cam_sides",
    "check_graph",
    "list_tensors",
    "scan_graph",
]

INPUT: Final = "quadrants"
OUTPUTS: Final = ("logits", "probabilities")
CAM: Final = "cam"
"""A further output, float32 [N, C, h, w], of graphs whose network ends in a mean over its feature map and one linear
layer: a map for each class, whose mean plus the layer's bias is its logit."""
CONTRACT_KEY: Final = "echoquad.contract"
CONTRACT_HASH_KEY: Final = "echoquad.contract_sha256"

MAX_IR_VERSION: Final = 10
MAX_OPSET: Final = 18
"""The newest that this release writes. Beyond them a field or an operator can mean what is not known here."""

_ONNX_DOMAINS: Final = ("", "ai.onnx")  # two names of the same
MAX_CAM_SIDE: Final = 512  # a quarter of the largest input
_MAX_FIELDS: Final = 1_000_000  # a ResNet-18 has 3000; what is above would only take time
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_ELEMENTS: Final = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}


class Port(NamedTuple):
    """An input or an output: its name, the type of its elements, and its shape, ``"N"`` where a side is open."""

    name: str
    elements: str
    shape: tuple[int | str, ...]


class Tensor(NamedTuple):
    """A tensor that a graph holds: its bytes are `length` from `begin` on, in the file or in one outside it."""

    name: str
    elements: str
    shape: tuple[int, ...]
    begin: int
    length: int
    outside: bool


@dataclass(slots=True)
class Graph:
    """What was found in a file.

    Attributes
    ----------
    ir_version, opset
        Of the file and of ONNX's own operators; 0 where it states none.
    metadata
        Its texts by key.
    inputs, outputs
        In their order.
    """

    ir_version: int = 0
    opset: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)


def check_graph(model: bytes, contract: Contract, what: str) -> Graph:
    """Read what a graph says of itself; refuse one that is not the contract's, or not of the kind that EchoQuad writes.

    Parameters
    ----------
    model
        The file's bytes.
    contract
        What the bundle says the graph keeps.
    what
        How errors begin: ``"bundle: the fp32 graph"``.

    Raises
    ------
    BundleError
        As `scan_graph`; or if the file is newer than this release, carries no contract, another one or one that is
        written otherwise, or takes and gives other tensors than the contract's.
    """
    graph = scan_graph(model, what)
    for name, found, newest in (("IR version", graph.ir_version, MAX_IR_VERSION), ("opset", graph.opset, MAX_OPSET)):
        if not 0 < found <= newest:
            raise BundleError(
                f"{what} has {name} {found or 'none'}; this EchoQuad reads up to {newest}; install the release that "
                "wrote it, or export it again"
            )
    _check_contract(graph.metadata, contract, what)
    size, classes = contract.input_size, len(contract.classes)
    expected = [
        Port(INPUT, "uint8", ("N", 1, size, size)),
        *(Port(name, "float32", ("N", classes)) for name in OUTPUTS),
    ]
    found_ports = [*graph.inputs, *graph.outputs]
    if found_ports[len(expected) :] and _is_cam(found_ports[-1], classes):
        expected.append(found_ports[-1])
    if found_ports != expected:
        raise BundleError(f"{what} takes and gives {_show(found_ports)}; expected {_show(expected)}; export it again")
    return graph


def cam_sides(graph: Graph, what: str) -> tuple[int, int]:
    """Give height and width of a checked graph's class activation maps.

    Raises
    ------
    BundleError
        If it has none.
    """
    for port in graph.outputs:
        if port.name == CAM:
            height, width = port.shape[2:]
            return int(height), int(width)
    raise BundleError(
        f"{what} gives no class activation maps: its network does not end in a mean and one linear layer, or it was "
        "exported by an earlier release; leave out --cam, or export a single network such as resnet18 again"
    )


def _is_cam(port: Port, classes: int) -> bool:
    name, elements, shape = port
    sides = shape[2:]
    return (name, elements, shape[:2]) == (CAM, "float32", ("N", classes)) and (
        len(sides) == 2 and all(isinstance(side, int) and 0 < side <= MAX_CAM_SIDE for side in sides)
    )


def _check_contract(metadata: dict[str, str], contract: Contract, what: str) -> None:
    carried = metadata.get(CONTRACT_KEY)
    if carried is None:
        raise BundleError(f"{what} carries no contract; expected one in its metadata ({CONTRACT_KEY}); export it again")
    try:
        inside = Contract.from_json(carried).sha256
    except ContractError as error:
        raise BundleError(f"{what} carries what is no contract ({str(error)[:200]}); export it again") from error
    stated = metadata.get(CONTRACT_HASH_KEY, "")
    if {inside, stated} != {contract.sha256}:
        other = inside if inside != contract.sha256 else stated
        raise BundleError(
            f"{what} carries contract {other[:12] or 'without a hash'}, the manifest {contract.sha256[:12]}; they do "
            "not belong together; export it again"
        )
    if carried != contract.to_json():
        raise BundleError(f"{what} carries its contract in another form than the canonical JSON; export it again")


def _show(ports: list[Port]) -> str:
    shown = [f"{port.name[:40]} {port.elements} [{', '.join(map(str, port.shape[:8]))}]" for port in ports[:8]]
    return ", ".join([*shown, *(["..."] if len(ports) > 8 else [])]) or "nothing"


def scan_graph(model: bytes, what: str) -> Graph:
    """Read what a file holds, and refuse what no graph of EchoQuad has.

    Linear in the number of fields, of which there is a limit, and bounded in depth.

    Parameters
    ----------
    model
        The file's bytes.
    what
        How errors begin.

    Raises
    ------
    BundleError
        If the bytes are no ONNX file, or if the graph keeps tensors outside its file, uses operators that are not
        ONNX's own, brings functions, or holds further graphs in its nodes.
    """
    if model[4:8] == b"ORTM":  # onnxruntime takes such bytes for a file of its own kind, whatever else they are
        raise BundleError(f"{what} is in onnxruntime's own format; expected an ONNX file; export it again")
    try:
        return _Scan(model, what).model()
    except _NotProtobufError as error:
        raise BundleError(f"{what} is not an ONNX file ({error}); export it again") from None


def list_tensors(model: bytes) -> list[Tensor]:
    """List a graph's tensors that are kept as plain bytes, be it in the file or outside it; others are left out.

    Raises
    ------
    ValueError
        If the bytes are no ONNX file.
    """
    scan = _Scan(model, "")
    whole = _Field(0, _BYTES, 0, len(model))
    return [
        tensor
        for graph in scan.fields(whole, {7: _BYTES})
        if graph.number == 7
        for part in scan.fields(graph, {5: _BYTES})
        if part.number == 5 and (tensor := scan.place(part)) is not None
    ]


class _NotProtobufError(ValueError):
    """The bytes cannot be walked."""


class _Field(NamedTuple):
    """A field of a message. `value` is the number of a varint, and of all others where their bytes begin."""

    number: int
    kind: int
    value: int
    end: int


class _Scan:
    """One walk over a file. The methods are the messages of onnx.proto, and the numbers its fields' numbers."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what, self._left = data, what, _MAX_FIELDS

    def model(self) -> Graph:
        found, graphs = Graph(), 0
        whole = _Field(0, _BYTES, 0, len(self._data))
        for part in self.fields(whole, {1: _VARINT, 7: _BYTES, 8: _BYTES, 14: _BYTES}):
            if part.number == 1:
                found.ir_version = part.value
            elif part.number == 7:
                graphs += 1
                self._graph(part, found)
            elif part.number == 8:
                self._opset(part, found)
            elif part.number == 14:
                key, value = self._entry(part)
                if key in found.metadata:  # readers differ on which of the two counts
                    raise self._refusal(f"has the metadata {key[:40]!r} twice", "each key once")
                found.metadata[key] = value
            elif part.number == 20:
                raise self._refusal("brings training steps", "inference alone")
            elif part.number == 25:
                raise self._refusal("brings functions of its own", "ONNX's operators alone")
        if graphs != 1:
            raise _NotProtobufError(f"it holds {graphs} graphs, expected one")
        return found

    def _graph(self, graph: _Field, found: Graph) -> None:
        for part in self.fields(graph, {1: _BYTES, 5: _BYTES, 11: _BYTES, 12: _BYTES, 15: _BYTES}):
            if part.number == 1:
                self._node(part)
            elif part.number == 5:
                self._tensor(part)
            elif part.number == 11:
                found.inputs.append(self._port(part))
            elif part.number == 12:
                found.outputs.append(self._port(part))
            elif part.number == 15:
                self._sparse(part)

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
                raise self._refusal(f"uses the operator {name!r}, which is not one of ONNX", "ONNX's operators alone")

    def _attribute(self, attribute: _Field) -> None:
        kinds = {5: _BYTES, 6: _BYTES, 10: _BYTES, 11: _BYTES, 22: _BYTES, 23: _BYTES}
        for part in self.fields(attribute, kinds):
            if part.number in (5, 10):
                self._tensor(part)
            elif part.number in (6, 11):
                raise self._refusal("holds a further graph in a node, as loops and branches do", "one graph")
            elif part.number in (22, 23):
                self._sparse(part)

    def _tensor(self, tensor: _Field) -> None:
        name, outside = "", False
        for part in self.fields(tensor, {8: _BYTES, 13: _BYTES, 14: _VARINT}):
            if part.number == 8:
                name = self._text(part)
            elif part.number == 13 or (part.number == 14 and part.value != 0):
                outside = True
        if outside:
            raise self._refusal(f"keeps the tensor {name[:40]!r} outside its file", "all of it in one file")

    def place(self, tensor: _Field) -> Tensor | None:
        """Say where a tensor's bytes lie; None where they are not kept as such."""
        name, elements, shape = "", 0, list[int]()
        raw: _Field | None = None
        outside: dict[str, str] = {}
        for part in self.fields(tensor, {2: _VARINT, 8: _BYTES, 9: _BYTES, 13: _BYTES}):
            if part.number == 1 and part.kind == _VARINT:
                shape.append(part.value)
            elif part.number == 1:  # several in one field
                at = part.value
                while at < part.end:
                    side, at = self._varint(at, part.end)
                    shape.append(side)
            elif part.number == 2:
                elements = part.value
            elif part.number == 8:
                name = self._text(part)
            elif part.number == 9:
                raw = part
            elif part.number == 13:
                outside.update([self._entry(part)])
        if outside:
            begin, length = int(outside.get("offset", "0")), int(outside.get("length", "0"))
        elif raw is not None:
            begin, length = raw.value, raw.end - raw.value
        else:
            return None
        return Tensor(name, _ELEMENTS.get(elements, ""), tuple(shape), begin, length, bool(outside))

    def _sparse(self, sparse: _Field) -> None:
        for part in self.fields(sparse, {1: _BYTES, 2: _BYTES}):
            if part.number in (1, 2):
                self._tensor(part)

    def _opset(self, opset: _Field, found: Graph) -> None:
        domain, version = "", 0
        for part in self.fields(opset, {1: _BYTES, 2: _VARINT}):
            if part.number == 1:
                domain = self._text(part)
            elif part.number == 2:
                version = part.value
        if domain in _ONNX_DOMAINS:
            found.opset = max(found.opset, version)

    def _entry(self, entry: _Field) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for part in self.fields(entry, {1: _BYTES, 2: _BYTES}):
            if part.number in texts:
                texts[part.number] = self._text(part)
        return texts[1], texts[2]

    def _port(self, port: _Field) -> Port:
        name, elements = "", "no tensor"
        shape: list[int | str] = []
        for part in self.fields(port, {1: _BYTES, 2: _BYTES}):
            if part.number == 1:
                name = self._text(part)
            elif part.number == 2:
                for kind in self.fields(part, {1: _BYTES}):
                    if kind.number != 1:  # a sequence, a map: whatever it says of its elements, it is no tensor
                        return Port(name, "no tensor", ())
                    elements = self._tensor_type(kind, elements, shape)
        return Port(name, elements, tuple(shape))

    def _tensor_type(self, tensor: _Field, elements: str, shape: list[int | str]) -> str:
        for part in self.fields(tensor, {1: _VARINT, 2: _BYTES}):
            if part.number == 1:
                elements = _ELEMENTS.get(part.value, f"type {part.value}")
            elif part.number == 2:
                shape += [self._side(side) for side in self.fields(part, {1: _BYTES}) if side.number == 1]
        return elements

    def _side(self, side: _Field) -> int | str:
        size: int | str = "N"
        for part in self.fields(side, {1: _VARINT, 2: _BYTES}):
            if part.number in (1, 2):  # the last one counts
                size = part.value if part.number == 1 else "N"
        return size

    def fields(self, message: _Field, kinds: Mapping[int, int]) -> Iterator[_Field]:
        """Walk a message; of the numbers in `kinds` each must be of that kind."""
        at, end = message.value, message.end
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise _NotProtobufError(f"it has more than {_MAX_FIELDS} fields")
            begin = at
            tag, at = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                value, at = self._varint(at, end)
            elif kind == _BYTES:
                length, value = self._varint(at, end)
                at = value + length
            elif kind in (_FOUR_BYTES, _EIGHT_BYTES):
                value = at
                at += 4 if kind == _FOUR_BYTES else 8
            else:
                raise _NotProtobufError(f"byte {begin} begins no field")
            # Of a longer tag protobuf's readers drop the upper bits: to them it would be another field.
            if not 8 <= tag < 1 << 32 or kinds.get(number, kind) != kind or at > end:
                raise _NotProtobufError(f"the field at byte {begin} is damaged")
            yield _Field(number, kind, value, at)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Read a number, least significant seven bits first; gives it and where it ends."""
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

    def _text(self, part: _Field) -> str:
        return self._data[part.value : part.end].decode("utf-8", "replace")

    def _refusal(self, found: str, expected: str) -> BundleError:
        return BundleError(f"{self._what} {found}; expected {expected}; export it again")
