"""Corruptions of a bundle's folder, one per number: damage by bad disks and careless hands, and forgeries.

Damage leaves the hashes in the manifest unchanged, so that any change of a listed byte must be detected. A forgery
corrects all hashes, as only an attacker does: what remains to detect it are the graph's structure, the contract in the
graph, and the golden answers. An attacker who changes those as well is detected by signatures only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from echoquad_runtime.bundle.manifest import GOLDEN, MANIFEST, SIGNATURE, encode_manifest, model_file
from echoquad_runtime.contract import canonical_json

POSIX = os.name == "posix"
Rng = random.Random


@dataclass(frozen=True)
class Corruption:
    """A corruption: its family, its file, a description, and whether the hashes in the manifest were corrected."""

    family: str
    file: str
    what: str
    forged: bool


def corrupt(folder: Path, seed: int) -> Corruption:
    """Corrupt a bundle's folder in the way that `seed` identifies."""
    family, forged, damage = FAMILIES[seed % len(FAMILIES)]
    file, _, what = damage(folder, random.Random(seed)).partition(": ")
    return Corruption(family, file, what, forged)


# ---------------------------------------------------------------------------------------------- bytes


def damage_bytes(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """Return the changed bytes of a file, and a description."""
    size = len(data)
    at, length = rng.randrange(size), rng.choice([1, 2, 3, 7, 16, 64, 300])
    to = rng.randrange(size)
    operations: dict[str, Callable[[], bytes]] = {
        "bit flipped": lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "byte set": lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        "bytes inserted": lambda: data[:at] + rng.randbytes(length) + data[at:],
        "bytes deleted": lambda: data[:at] + data[at + length :],
        "cut": lambda: data[:at],
        "beginning lost": lambda: data[at:],
        "zeroed": lambda: data[:at] + bytes(len(data[at : at + length])) + data[at + length :],
        "block doubled": lambda: data[: at + length] + data[at:],
        "block copied": lambda: data[:to] + data[at : at + length] + data[to:],
        "blocks swapped": lambda: swap_blocks(data, min(at, to), max(at, to), length),
        "garbage at the end": lambda: data + rng.randbytes(length),
        "itself at the end": lambda: data + data,
        "noise": lambda: rng.randbytes(size),
    }
    what = rng.choice(list(operations))
    return operations[what](), f"{what} at {at}"


def swap_blocks(data: bytes, low: int, high: int, length: int) -> bytes:
    length = min(length, high - low, len(data) - high)
    parts = (data[:low], data[high : high + length], data[low + length : high], data[low : low + length])
    return b"".join(parts) + data[high + length :]


def any_file(folder: Path, rng: Rng) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def damage_a_file(folder: Path, rng: Rng) -> str:
    path = any_file(folder, rng)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data, what = damage_bytes(path.read_bytes() or b"\0", rng)
        path.write_bytes(data)
    return f"{path.name}: {what}"


# ---------------------------------------------------------------------------------------------- files


def replace_a_file(folder: Path, rng: Rng) -> str:
    path, other = rng.sample(sorted(folder.iterdir()), 2)
    operations: dict[str, Callable[[], object]] = {
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "a full folder": lambda: (path.unlink(), path.mkdir(), (path / "file").write_bytes(b"x")),
        "swapped with another": lambda: (path.rename(folder / ".x"), other.rename(path), (folder / ".x").rename(other)),
        "a copy of another": lambda: path.write_bytes(other.read_bytes()),
        "renamed": lambda: path.rename(folder / rng.choice([f"{path.name}.bak", path.name.upper(), f" {path.name}"])),
        "an extra file": (folder / rng.choice(["notes.txt", ".hidden", "model.fp16.onnx", "x" * 200])).touch,
        "an extra folder": (folder / "more").mkdir,
    }
    if POSIX:
        operations |= {
            "sparse and huge": lambda: os.truncate(path, 1 << 36),
            "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
            "a link to a device": lambda: (path.unlink(), path.symlink_to(rng.choice(["/dev/zero", "/dev/null"]))),
            "a link to nothing": lambda: (path.unlink(), path.symlink_to("nothing")),
            "a link to itself": lambda: (path.unlink(), path.symlink_to(path.name)),
            "a link to another": lambda: (path.unlink(), path.symlink_to(other.name)),
            "a link out of the folder": lambda: (path.unlink(), path.symlink_to("/etc/passwd")),
            "another mode": lambda: path.chmod(rng.choice([0, stat.S_IRUSR, 0o777])),
        }
    what = rng.choice(list(operations))
    operations[what]()
    return f"{path.name}: {what}"


# ---------------------------------------------------------------------------------------------- the manifest


def odd_value(rng: Rng) -> Any:
    values: list[Any] = [
        None, True, False, 0, 1, 2, -1, 7, 1e-9, 1e308, -0.0, 10**400, 10**4000, -(10**30), 2**63, "", "x", "é", "\0",
        "\u202e", "\ud800", "../x", "/etc/passwd", "C:\\x", "nul", "a" * 5000, "\x1b[2J\n",
        [], {}, [[]], [1, 2], {"a": {}},
        ["NORM", "ASD"], ["ASD", "NORM", "VSD"], "fp32", "int8", "0" * 64, float("nan"), float("inf"),
    ]  # fmt: skip
    return nest(rng.choice([3, 50, 300])) if rng.random() < 0.05 else rng.choice(values)


def nest(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return container and key of everything inside a JSON value."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        return [place for key in keys for place in [(value, key), *places(value[key])]]
    return []


def change_json(value: dict[str, Any], rng: Rng) -> str:
    """Change a JSON object at a random key and return a description."""
    container, key = rng.choice(places(value))
    what = rng.choice(["another value", "another value", "another value", "deleted", "renamed", "a new key", "wrapped"])
    if what == "deleted":
        del container[key]
    elif what == "wrapped":
        container[key] = rng.choice([[container[key]], {"a": container[key]}, json.dumps(container[key])])
    elif what == "another value" or not isinstance(container, dict):
        old = container[key]
        number = isinstance(old, int | float) and rng.random() < 0.5
        container[key] = old * rng.choice([0, 2, 0.5, -1]) if number else odd_value(rng)
    elif what == "renamed":
        container[rng.choice([f"{key}x", key.upper(), key[:-1]])] = container.pop(key)
    else:
        container[rng.choice(["new", "../x", "schema", "é", key + " "])] = odd_value(rng)
    return f"{what} at {str(key)[:40]!r}"


def read_manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_bytes()))


def change_manifest(folder: Path, rng: Rng) -> str:
    """Change the values of the manifest, or its JSON encoding."""
    data, manifest = (folder / MANIFEST).read_bytes(), read_manifest(folder)
    what = rng.choice(["value", "value", "value", "key twice", "compact", "unsorted", "BOM", "CRLF", "UTF-16", "deep"])
    lines = data.splitlines(keepends=True)
    line = rng.randrange(1, len(lines) - 1)
    if what == "value":
        what = change_json(manifest, rng)
        data = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=rng.random() < 0.5).encode(
            "utf-8", "replace"
        )
    elif what == "key twice":
        data = b"".join([*lines[:line], lines[line].rstrip(b",\n") + b",\n", *lines[line:]])
    else:
        shuffled = dict(rng.sample(sorted(manifest.items()), len(manifest)))
        data = {
            "compact": json.dumps(manifest, sort_keys=True).encode(),
            "unsorted": json.dumps(shuffled, indent=2).encode() + b"\n",
            "BOM": b"\xef\xbb\xbf" + data,
            "CRLF": data.replace(b"\n", b"\r\n"),
            "UTF-16": data.decode().encode("utf-16"),
            "deep": data.replace(b"null", b"[" * 9999 + b"]" * 9999) if b"null" in data else b"[" * 99_999,
        }[what]
    (folder / MANIFEST).write_bytes(data)
    return f"{MANIFEST}: {what}"


def forge(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Write the manifest with the hashes and sizes of the files as they are now."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    change(manifest)
    try:
        data = encode_manifest(manifest)
    except ValueError:  # NaN or infinity, which encode_manifest refuses
        data = json.dumps(manifest, indent=2, sort_keys=True).encode()
    (folder / MANIFEST).write_bytes(data)


def forge_manifest(folder: Path, rng: Rng) -> str:
    """Change the values of the manifest, often correcting the hash of the contract."""
    descriptions = []

    def change(manifest: dict[str, Any]) -> None:
        if rng.random() < 0.25:
            listed = manifest["files"]
            name = rng.choice(list(listed))
            trick = rng.choice(
                ["../bundle.json", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:x", "\0", "é", "nul", "//"]
            )
            listed[trick] = listed.pop(name) if rng.random() < 0.5 else dict(listed[name])
            descriptions.append(f"{name} listed as {trick!r}")
            return
        part = rng.choice(
            [manifest, manifest["contract"], manifest["files"], manifest["parity"], manifest["precisions"]]
        )
        descriptions.append(change_json(part, rng))
        if rng.random() < 0.7:
            with contextlib.suppress(ValueError, KeyError):
                manifest["contract_sha256"] = hashlib.sha256(canonical_json(manifest["contract"]).encode()).hexdigest()

    forge(folder, change)
    return f"{MANIFEST}: {descriptions[0]}"


# ---------------------------------------------------------------------------------------------- the graph


def change_graph(model: Any, rng: Rng) -> str:
    """Change the structure of a graph and return a description."""
    graph = model.graph
    node, tensor = rng.choice(list(graph.node)), rng.choice(list(graph.initializer))
    port = rng.choice([*graph.input, *graph.output])
    values = onnx.numpy_helper.to_array(tensor)
    shape = port.type.tensor_type.shape
    names = [name for each in graph.node for name in (*each.input, *each.output)]
    domain = rng.choice(["com.microsoft", "custom", "ai.onnx.ml", "ai.onnx"])
    operator = rng.choice(["Relu", "Tanh", "Abs", "Identity", "Nothing", ""])
    other_shape = rng.choice([(1,), (2, 3), (6, 1, 3, 3), (0,), (9, 9)])
    entry = rng.choice(list(model.metadata_props))

    def set_values(changed: Any) -> None:
        with np.errstate(invalid="ignore"):  # values that int8 cannot hold become arbitrary
            cast_back = np.ascontiguousarray(changed, values.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(cast_back, tensor.name))

    def outside() -> None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        location = rng.choice(["weights.bin", "/etc/passwd", "../../x", "bundle.json", ""])
        tensor.external_data.add(key="location", value=location)
        tensor.ClearField("raw_data")

    def cast(kind: int) -> None:
        port.type.tensor_type.elem_type = kind

    def insert(kind: str, **attributes: Any) -> None:
        name = node.output[0]
        node.output[0] = "inserted"
        after = list(graph.node).index(node) + 1
        graph.node.insert(after, onnx.helper.make_node(kind, ["inserted"], [name], **attributes))

    def odd_dimension() -> None:
        side = rng.choice(list(shape.dim))
        side.dim_value = rng.choice([0, 1, 2, 3, 7, 64, -1, 2**31, 2**62])

    operations: dict[str, Callable[[], object]] = {
        "operator renamed": lambda: setattr(node, "op_type", operator),
        "domain": lambda: (setattr(node, "domain", domain), model.opset_import.add(domain=domain, version=1)),
        "node removed": lambda: graph.node.remove(node),
        "node twice": lambda: graph.node.append(node),
        "nodes reversed": lambda: graph.node.reverse() if hasattr(graph.node, "reverse") else None,
        "input of a node": lambda: node.input.__setitem__(0, rng.choice(names)),
        "output of a node": lambda: node.output.__setitem__(0, rng.choice(names)),
        "no inputs": lambda: node.ClearField("input"),
        "attributes lost": lambda: node.ClearField("attribute"),
        "attribute": lambda: node.attribute.append(onnx.helper.make_attribute("axis", rng.choice([-9, 0, 1, 9]))),
        "negated": lambda: insert("Neg"),
        "absolute": lambda: insert("Abs"),
        "clipped": lambda: insert("Relu"),
        "softmax": lambda: insert("Softmax", axis=0),
        "squeezed": lambda: insert("Squeeze"),
        "shape": lambda: insert("Shape"),
        "values zeroed": lambda: set_values(values * 0),
        "values NaN": lambda: set_values(np.full(values.shape, np.nan if values.dtype.kind == "f" else 0)),
        "values infinite": lambda: set_values(np.full(values.shape, np.inf if values.dtype.kind == "f" else 1)),
        "values negated": lambda: set_values(-values.astype(np.float64)),
        "values scaled": lambda: set_values(values * rng.choice([0.5, 0.99, 1.01, 2, 1e9])),
        "values mixed": lambda: set_values(np.roll(values, 1)),
        "values of another shape": lambda: set_values(np.resize(values, other_shape)),
        "tensor removed": lambda: graph.initializer.remove(tensor),
        "tensor twice": lambda: graph.initializer.append(tensor),
        "tensor renamed": lambda: setattr(tensor, "name", "renamed"),
        "tensor's type": lambda: setattr(tensor, "data_type", rng.choice([0, 2, 3, 6, 7, 8, 10, 11, 16, 17, 21, 99])),
        "tensor's dimensions": lambda: tensor.dims.append(rng.choice([0, 2, -1, 2**31, 2**62])),
        "tensor cut": lambda: setattr(tensor, "raw_data", tensor.raw_data[:-1]),
        "tensor outside": outside,
        "segment": lambda: setattr(tensor.segment, "begin", rng.choice([0, 1, 2**40])),
        "element type": lambda: cast(rng.choice([0, 1, 2, 7, 8, 11, 99])),
        "dimension": odd_dimension,
        "shape lost": lambda: port.type.tensor_type.ClearField("shape"),
        "port renamed": lambda: setattr(port, "name", rng.choice(["renamed", "", "logits"])),
        "port lost": lambda: (graph.input if port in graph.input else graph.output).remove(port),
        "port added": lambda: rng.choice([graph.input, graph.output]).append(port),
        "outputs reversed": lambda: graph.output.append(graph.output.pop(0)),
        "opset": lambda: setattr(model.opset_import[0], "version", rng.choice([0, 1, 7, 13, 17, 19, 25, 2**40])),
        "no opset": lambda: model.ClearField("opset_import"),
        "IR version": lambda: setattr(model, "ir_version", rng.choice([0, 1, 3, 9, 11, 99, 2**40])),
        "metadata lost": lambda: model.ClearField("metadata_props"),
        "metadata": lambda: setattr(entry, "value", rng.choice(["", "{}", "x" * 9999])),
        "metadata twice": lambda: model.metadata_props.append(model.metadata_props[0]),
        "a function": lambda: model.functions.add(name="Relu", domain=rng.choice(["", "local"])),
        "another producer": lambda: setattr(model, "producer_name", "somebody"),
        "a note": lambda: setattr(graph, "doc_string", "x" * 9999),
        "a branch": lambda: node.attribute.append(onnx.helper.make_attribute("then_branch", onnx.GraphProto(name="g"))),
    }  # fmt: skip
    what = rng.choice(list(operations))
    operations[what]()
    return f"{what} ({node.op_type} {tensor.name} {port.name})"


def any_graph(folder: Path, rng: Rng) -> Path:
    return rng.choice([folder / model_file(name) for name in read_manifest(folder)["precisions"]])


def forge_graph_bytes(folder: Path, rng: Rng) -> str:
    path = any_graph(folder, rng)
    data, what = damage_bytes(path.read_bytes(), rng)
    path.write_bytes(data)
    forge(folder)
    return f"{path.name}: {what}"


def forge_graph(folder: Path, rng: Rng) -> str:
    path = any_graph(folder, rng)
    model = onnx.load_from_string(path.read_bytes())
    what = change_graph(model, rng)
    path.write_bytes(model.SerializeToString(deterministic=True))
    forge(folder)
    return f"{path.name}: {what}"


# ---------------------------------------------------------------------------------------------- the golden answers


def forge_golden(folder: Path, rng: Rng) -> str:
    path = folder / GOLDEN
    if rng.random() < 0.3:
        data, what = damage_bytes(path.read_bytes(), rng)
    else:
        with np.load(path) as arrays:
            content = {name: arrays[name] for name in arrays.files}
        what = change_arrays(content, rng)
        stream = io.BytesIO()
        np.savez_compressed(stream, **content)
        data = stream.getvalue()
    path.write_bytes(data)
    forge(folder)
    return f"{GOLDEN}: {what}"


def change_arrays(content: dict[str, Any], rng: Rng) -> str:
    name = rng.choice(list(content))
    array = content[name]
    number = array.dtype.kind in "fu"
    operations: dict[str, Callable[[], Any]] = {
        "lost": lambda: None,
        "zeroed": lambda: np.zeros_like(array),
        "NaN": lambda: np.full(array.shape, np.nan, array.dtype if array.dtype.kind == "f" else np.float32),
        "one value changed": lambda: np.where(np.arange(array.size).reshape(array.shape) == 0, array[-1:], array),
        "shifted": lambda: (array + 1).astype(array.dtype) if number else array,
        "as text": lambda: array.astype(str),
        "as float64": lambda: array.astype(np.float64) if number else array[:-1],
        "as int": lambda: array.astype(np.int64) if number else array[:0],
        "as complex": lambda: array.astype(np.complex64) if number else array.reshape(1, -1),
        "as objects": lambda: np.array([None, {}], object),
        "shorter": lambda: array[:-1],
        "longer": lambda: np.concatenate([array, array]),
        "empty": lambda: array[:0],
        "a number": lambda: np.array(1),
        "transposed": lambda: array.T,
        "one more axis": lambda: array[None],
        "reversed": lambda: array[::-1],
        "one pixel": lambda: array.reshape(-1)[:1].reshape((1,) * max(array.ndim, 1)),
        "large": lambda: np.zeros((4000, 4000), np.uint8),
        "structured": lambda: np.zeros(array.shape, [("a", np.float32)]),
    }
    what = rng.choice(list(operations))
    changed = operations[what]()
    if changed is None:
        del content[name]
    else:
        content[name] = changed
    return f"{name} {what}"


def forge_swapped_files(folder: Path, rng: Rng) -> str:
    """Swap files, or replace the bytes of a file, and correct the hashes."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, SIGNATURE))
    name, other = rng.sample(names, 2)
    contents = {each: (folder / each).read_bytes() for each in (name, other)}
    what = rng.choice(["swapped with", "a copy of", "empty, beside", "text, beside", "followed by", "gone, beside"])
    changed = {
        "swapped with": contents[other],
        "a copy of": contents[other],
        "empty, beside": b"",
        "text, beside": b"not what it says",
        "followed by": contents[name] + contents[other],
        "gone, beside": b"",
    }[what]
    (folder / name).write_bytes(changed)
    if what == "swapped with":
        (folder / other).write_bytes(contents[name])
    forge(folder, lambda manifest: manifest["files"].pop(name) if what.startswith("gone") else None)
    return f"{name}: {what} {other}"


FAMILIES: tuple[tuple[str, bool, Callable[[Path, Rng], str]], ...] = (
    ("bytes", False, damage_a_file),
    ("file", False, replace_a_file),
    ("manifest", False, change_manifest),
    ("bytes", False, damage_a_file),
    ("forged manifest", True, forge_manifest),
    ("forged graph, bytes", True, forge_graph_bytes),
    ("forged graph", True, forge_graph),
    ("forged golden", True, forge_golden),
    ("forged graph", True, forge_graph),
    ("forged and swapped", True, forge_swapped_files),
)
