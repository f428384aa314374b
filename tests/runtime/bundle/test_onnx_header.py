"""The header of an ONNX file, compared with what the ``onnx`` package reads in the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echoquad_runtime.bundle import onnx_header
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import (
    CONTRACT_HASH_KEY,
    CONTRACT_KEY,
    MAX_IR_VERSION,
    MAX_OPSET,
    cam_size,
    check_graph,
    read_graph_header,
)
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices import session_factory as devices
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import BundleError, BundleTamperedError

onnx = pytest.importorskip("onnx")
helper, kinds = onnx.helper, onnx.TensorProto

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)
Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def tiny(make_tiny_graph: Callable[..., bytes]) -> bytes:
    return make_tiny_graph(CONTRACT)


def changed(graph: bytes, change: Change) -> bytes:
    model = onnx.load_from_string(graph)
    change(model)
    return bytes(model.SerializeToString(deterministic=True))


def refused(graph: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        check_graph(graph, CONTRACT, "bundle: the fp32 graph")
    assert not isinstance(caught.value, BundleTamperedError)
    text = str(caught.value)
    assert text.startswith("bundle: the fp32 graph ")
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_class_activation_maps_are_an_optional_output(make_tiny_graph: Callable[..., bytes], tiny: bytes) -> None:
    graph = make_tiny_graph(CONTRACT, cam=True)
    assert cam_size(check_graph(graph, CONTRACT, "it"), "it") == (30, 30)
    with pytest.raises(BundleError, match=r"it has no class activation maps: .*--cam"):
        cam_size(check_graph(tiny, CONTRACT, "it"), "it")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cam", ["N", 3, 30, 30]), ("cam", ["N", 2, 30]), ("cam", ["N", 2, "H", "W"]), ("heat", ["N", 2, 30, 30]),
     ("cam", ["N", 2, 30, 100_000]), ("cam", [1, 2, 30, 30])],
)  # fmt: skip
def test_other_additional_outputs_are_refused(
    make_tiny_graph: Callable[..., bytes], name: str, shape: list[int | str]
) -> None:
    def change(model: Any) -> None:
        del model.graph.output[-1]
        model.graph.output.append(helper.make_tensor_value_info(name, kinds.FLOAT, shape))

    assert "has the inputs and outputs" in refused(changed(make_tiny_graph(CONTRACT, cam=True), change))


def constant(*values: float) -> Any:
    return onnx.numpy_helper.from_array(np.array(values, np.float32), "values")


# ---------------------------------------------------------------------------------------------- accepted graphs


@pytest.mark.parametrize("classes", [("ASD", "NORM"), ("A", "B", "Ç"), tuple("ABCDEFGHIJ")], ids=len)
@pytest.mark.parametrize("size", [8, 32, 300])
def test_header_agrees_with_the_onnx_package(
    classes: tuple[str, ...], size: int, make_tiny_graph: Callable[..., bytes]
) -> None:
    contract = Contract(classes=classes, input_size=size, temperature=1.5)
    graph = make_tiny_graph(contract)
    assert_agrees(graph)
    check_graph(graph, contract, "it")
    with pytest.raises(BundleError, match=r"has contract .*, the manifest has "):
        check_graph(graph, CONTRACT if contract.classes != CONTRACT.classes else Contract(classes), "it")


def assert_agrees(graph: bytes) -> None:
    """Compare an accepted header with the package's model: nothing relevant may have been overlooked."""
    found, model = read_graph_header(graph, "it"), onnx.load_from_string(graph)
    assert found.ir_version == model.ir_version & 2**64 - 1
    imported = [entry.version & 2**64 - 1 for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    assert found.opset == max(imported, default=0)
    for port, value in zip([*found.inputs, *found.outputs], [*model.graph.input, *model.graph.output], strict=True):
        assert port.name.encode() == value.name.encode("utf-8", "replace")
        tensor = value.type.tensor_type
        if port.dtype == "no tensor":
            assert value.type.WhichOneof("value") != "tensor_type" or not tensor.elem_type or value.type.denotation
            continue
        assert {"uint8": 2, "float32": 1}.get(port.dtype, tensor.elem_type) == tensor.elem_type
        sides = [side.dim_value & 2**64 - 1 if side.HasField("dim_value") else "N" for side in tensor.shape.dim]
        assert list(port.shape) == sides
    assert found.metadata.keys() == {entry.key for entry in model.metadata_props}
    assert not model.functions
    assert not model.training_info
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        assert node.domain in ("", "ai.onnx")
        for attribute in node.attribute:
            assert not attribute.HasField("g")
            assert not attribute.graphs
            tensors += [attribute.t, *attribute.tensors]
    assert all(tensor.data_location == 0 and not tensor.external_data for tensor in tensors)


@settings(max_examples=250)
@given(data=st.data())
def test_changed_bytes_hide_nothing(data: st.DataObject, tiny: bytes) -> None:
    graph = bytearray(tiny)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(graph) - 1))
        what = data.draw(st.sampled_from(["set", "insert", "delete", "repeat"]))
        if what == "set":
            graph[at] = data.draw(st.integers(0, 255))
        elif what == "insert":
            graph[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        else:
            end = at + data.draw(st.integers(1, 60))
            graph[at:end] = b"" if what == "delete" else graph[at:end] * 2
    try:
        read_graph_header(bytes(graph), "it")
        model = onnx.load_from_string(bytes(graph))
    except BundleError:
        return
    except Exception:  # a full reader refuses bytes that the header reader skips
        return
    assert model is not None
    assert_agrees(bytes(graph))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_in_one_line(data: bytes) -> None:
    refused(data)


def test_truncated_graph_is_refused(tiny: bytes) -> None:
    for end in range(len(tiny)):
        refused(tiny[:end])
    check_graph(tiny, CONTRACT, "it")


def test_tensor_data_is_skipped(tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    large = onnx.numpy_helper.from_array(np.zeros(10_000_000, np.float32), "large")
    graph = changed(tiny, lambda model: model.graph.initializer.append(large))
    assert len(graph) > 40_000_000
    monkeypatch.setattr(onnx_header, "_MAX_FIELDS", 200)
    check_graph(graph, CONTRACT, "it")


@pytest.mark.parametrize(
    "field", ["metadata_props", "graph.node", "graph.node.0.input", "graph.initializer.0.float_data"]
)
def test_too_many_fields_are_refused(field: str, tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two bytes per field, in every kind of message that is walked: the time is linear and limited.
    bytes_of = {
        "metadata_props": b"\x08\x01" * 5000,
        "graph.node": b"\x3a" + varint(10_000) + b"\x0a\x00" * 5000,
        "graph.node.0.input": b"\x3a" + varint(10_003) + b"\x0a" + varint(10_000) + b"\x0a\x00" * 5000,
        "graph.initializer.0.float_data": b"\x3a" + varint(25_004) + b"\x2a" + varint(25_000) + b"\x25abcd" * 5000,
    }
    monkeypatch.setattr(onnx_header, "_MAX_FIELDS", 4000)
    assert "it has more than 4000 fields" in refused(bytes_of[field])


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


# ---------------------------------------------------------------------------------------------- refused graphs


def external(tensor: Any) -> Any:
    tensor.data_location = kinds.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../secrets.bin"
    return tensor


def located(tensor: Any) -> Any:
    tensor.data_location = kinds.EXTERNAL
    return tensor


def listed(tensor: Any) -> Any:
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    return tensor


def sparse(values: Any, indices: Any) -> Any:
    found = onnx.SparseTensorProto(dims=[4])
    found.values.CopyFrom(values)
    found.indices.CopyFrom(indices)
    return found


def indices() -> Any:
    return onnx.numpy_helper.from_array(np.array([1], np.int64), "values")


def in_a_node(**attributes: Any) -> Change:
    return lambda model: model.graph.node.append(helper.make_node("Constant", [], ["constant"], **attributes))


OUTSIDE: dict[str, Change] = {
    "initializer": lambda model: external(model.graph.initializer[3]),
    "location alone": lambda model: located(model.graph.initializer[3]),
    "entry alone": lambda model: listed(model.graph.initializer[3]),
    "constant": in_a_node(value=external(constant(1))),
    "list of constants": in_a_node(values=[constant(1), external(constant(2))]),
    "sparse values": lambda model: model.graph.sparse_initializer.append(sparse(external(constant(1)), indices())),
    "sparse indices": lambda model: model.graph.sparse_initializer.append(sparse(constant(1), external(indices()))),
    "sparse constant": in_a_node(sparse_value=sparse(external(constant(1)), indices())),
    "sparse constants": in_a_node(values=[sparse(external(constant(1)), indices())]),
}


@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_external_tensors_are_refused(change: Change, tiny: bytes) -> None:
    text = refused(changed(tiny, change))
    assert "outside its file; expected all tensors in one file; export it again" in text
    assert "'convolution'" in text or "'values'" in text


def set_domain(model: Any, domain: str) -> None:
    model.graph.node[5].domain = domain
    model.opset_import.append(helper.make_opsetid(domain, 1))


@pytest.mark.parametrize(
    "domain", ["com.microsoft", "ai.onnx.ml", "ai.onnx.preview.training", "custom", " ", "ai.onnx\0"]
)
def test_operators_of_another_domain_are_refused(domain: str, tiny: bytes) -> None:
    text = refused(changed(tiny, lambda model: set_domain(model, domain)))
    assert f"uses the operator {f'{domain}.Relu'!r}, which is not one of ONNX" in text


def test_both_names_of_the_onnx_domain_are_accepted(tiny: bytes) -> None:
    def rename(model: Any) -> None:
        model.opset_import[0].domain = "ai.onnx"
        for node in model.graph.node:
            node.domain = "ai.onnx"

    check_graph(changed(tiny, rename), CONTRACT, "it")
    # Quantizers import a domain even if they do not use it.
    unused = helper.make_opsetid("com.microsoft", 1)
    check_graph(changed(tiny, lambda model: model.opset_import.append(unused)), CONTRACT, "it")


def add_function(model: Any) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("local", "Relu", ["x"], ["y"], [node], [helper.make_opsetid("", 18)]))


def add_branch(model: Any) -> None:
    output = helper.make_tensor_value_info("y", kinds.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Constant", [], ["y"], value=constant(1))], "branch", [], [output])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))


def add_graphs(model: Any) -> None:
    attribute = model.graph.node[0].attribute.add()
    attribute.name, attribute.type = "graphs", onnx.AttributeProto.GRAPHS
    attribute.graphs.add().name = "one of many"


FOREIGN: dict[str, tuple[Change, str]] = {
    "functions": (add_function, "contains functions; expected ONNX's operators only"),
    "training": (lambda model: model.training_info.add(), "contains training steps; expected inference only"),
    "branch": (add_branch, "has a subgraph in a node, as loops and branches do; expected one graph"),
    "graphs": (add_graphs, "has a subgraph in a node, as loops and branches do; expected one graph"),
    "IR": (
        lambda model: setattr(model, "ir_version", MAX_IR_VERSION + 1),
        "has IR version 11; this EchoQuad reads up to 10; install the release that wrote it",
    ),
    "no IR": (lambda model: model.ClearField("ir_version"), "has IR version none; this EchoQuad reads up to 10"),
    "negative IR": (lambda model: setattr(model, "ir_version", -1), "has IR version 18446744073709551615; this"),
    "opset": (lambda model: setattr(model.opset_import[0], "version", MAX_OPSET + 1), "has opset 19; this EchoQuad"),
    "no opset": (lambda model: model.ClearField("opset_import"), "has opset none; this EchoQuad reads up to 18"),
    "two opsets": (lambda model: model.opset_import.append(helper.make_opsetid("ai.onnx", 25)), "has opset 25; this"),
    "no graph": (lambda model: model.ClearField("graph"), "is not an ONNX file (it holds 0 graphs, expected one)"),
    "no metadata": (lambda model: model.ClearField("metadata_props"), "has no contract; expected one in its meta"),
}


@pytest.mark.parametrize(("change", "words"), FOREIGN.values(), ids=FOREIGN.keys())
def test_unsupported_content_is_refused(change: Change, words: str, tiny: bytes) -> None:
    text = refused(changed(tiny, change))
    assert words in text
    assert "export it again" in text


def add_input(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", kinds.FLOAT, [1]))


def port_of(name: str, kind: int, *shape: int | str | None) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def replace_input(port: Any) -> Change:
    return lambda model: model.graph.input[0].CopyFrom(port)


PORTS: dict[str, tuple[Change, str]] = {
    "no input": (
        lambda model: model.graph.ClearField("input"),
        "has the inputs and outputs logits float32 [N, 2], probab",
    ),
    "nothing": (
        lambda model: (model.graph.ClearField("input"), model.graph.ClearField("output")),
        "outputs nothing; exp",
    ),
    "more inputs": (add_input, "quadrants uint8 [N, 1, 32, 32], more float32 [1], logits"),
    "an output": (lambda model: model.graph.output.pop(), "[N, 1, 32, 32], logits float32 [N, 2]; expected"),
    "order": (
        lambda model: model.graph.output.insert(0, model.graph.output.pop()),
        "probabilities float32 [N, 2], log",
    ),
    "float": (
        replace_input(port_of("quadrants", kinds.FLOAT, "N", 1, 32, 32)),
        "outputs quadrants float32 [N, 1, 32, 32]",
    ),
    "double": (
        replace_input(port_of("quadrants", kinds.DOUBLE, "N", 1, 32, 32)),
        "outputs quadrants type 11 [N, 1, 32",
    ),
    "any shape": (
        lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
        "outputs quadrants uint8 []",
    ),
    "no type": (lambda model: model.graph.input[0].ClearField("type"), "outputs quadrants no tensor []"),
    "rank": (
        replace_input(port_of("quadrants", kinds.UINT8, "N", 32, 32)),
        "outputs quadrants uint8 [N, 32, 32], logits",
    ),
    "sequence": (
        replace_input(helper.make_tensor_sequence_value_info("quadrants", kinds.UINT8, ["N", 1, 32, 32])),
        "outputs quadrants no tensor []",
    ),
    "open": (replace_input(port_of("quadrants", kinds.UINT8, None, None, None, None)), "quadrants uint8 [N, N, N, N]"),
}


@pytest.mark.parametrize(("change", "words"), PORTS.values(), ids=PORTS.keys())
def test_other_inputs_and_outputs_are_refused(change: Change, words: str, tiny: bytes) -> None:
    text = refused(changed(tiny, change))
    assert words in text
    assert "expected quadrants uint8 [N, 1, 32, 32], logits float32 [N, 2], probabilities float32 [N, 2]; exp" in text


# -------------------------------------------------------------------------------- the contract in the metadata


def with_metadata(graph: bytes, **texts: str | None) -> bytes:
    names = {"contract": CONTRACT_KEY, "sha256": CONTRACT_HASH_KEY}
    metadata = {CONTRACT_KEY: CONTRACT.to_json(), CONTRACT_HASH_KEY: CONTRACT.sha256}
    metadata |= {names[key]: text for key, text in texts.items()}
    kept = {key: text for key, text in metadata.items() if text is not None}
    return changed(graph, lambda model: (model.ClearField("metadata_props"), helper.set_model_props(model, kept)))


OTHER = Contract(classes=("ASD", "NORM"), input_size=32, keep=0.8)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"contract": None}, "has no contract; expected one in its metadata (echoquad.contract); export it again"),
        ({"contract": "{"}, "has an invalid contract (contract: not JSON"),
        ({"contract": "[" * 100_000}, "has an invalid contract (contract: not JSON"),
        ({"contract": "{}"}, "has an invalid contract (contract: it lacks "),
        ({"contract": ""}, "has an invalid contract"),
        (
            {"contract": CONTRACT.to_json().replace('"positive":"ASD"', f'"positive":"{"A" * 5000}"')},
            "has an invalid contract (contract: positive",
        ),
        (
            {"contract": OTHER.to_json()},
            f"has contract {OTHER.sha256[:12]}, the manifest has {CONTRACT.sha256[:12]};",
        ),
        ({"sha256": OTHER.sha256}, f"has contract {OTHER.sha256[:12]}, the manifest has {CONTRACT.sha256[:12]};"),
        ({"sha256": None}, f"has contract without a hash, the manifest has {CONTRACT.sha256[:12]};"),
        ({"contract": json.dumps(CONTRACT.to_dict())}, "does not encode its contract as canonical JSON"),
        ({"contract": CONTRACT.to_json() + "\n"}, "does not encode its contract as canonical JSON"),
        (
            {"contract": CONTRACT.to_json().replace("1.0", "1.00")},
            "does not encode its contract as canonical JSON; export",
        ),
    ],
    ids=["none", "cut", "deep", "{}", "empty", "long", "other", "hash", "no hash", "blanks", "line feed", "number"],
)
def test_contract_other_than_the_manifests_is_refused(texts: dict[str, str | None], words: str, tiny: bytes) -> None:
    assert words in refused(with_metadata(tiny, **texts))


def test_repeated_contract_is_refused(tiny: bytes) -> None:
    twice = changed(tiny, lambda model: model.metadata_props.add(key=CONTRACT_KEY, value=OTHER.to_json()))
    assert "has the metadata 'echoquad.contract' twice; expected each key once" in refused(twice)


# ---------------------------------------------------------------------------------------------- ambiguous encodings


def test_ort_format_is_refused(tiny: bytes) -> None:
    # onnxruntime looks for these four letters first; here they are in a field that every reader skips.
    both = b"\xfa\x7f" + varint(9) + b"\x00" + b"ORTM" + b"\x00" * 4 + tiny
    assert both[4:8] == b"ORTM"
    assert onnx.load_from_string(both).graph.name == "tiny"
    assert "is in onnxruntime's own format; expected an ONNX file; export it again" in refused(both)


def test_concatenated_files_are_refused(tiny: bytes) -> None:
    assert len(onnx.load_from_string(tiny + tiny).graph.node) == 22
    more = onnx.ModelProto()
    more.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    assert "is not an ONNX file (it holds 2 graphs, expected one)" in refused(tiny + more.SerializeToString())
    functions = onnx.ModelProto()
    add_function(functions)
    assert "contains functions" in refused(tiny + functions.SerializeToString())
    assert "has IR version 12" in refused(tiny + onnx.ModelProto(ir_version=12).SerializeToString())


def test_repeated_domain_is_refused(tiny: bytes) -> None:
    # Readers use the last one; every one must be valid.
    node = b"\x22\x04Relu\x3a\x06custom\x3a\x00"
    assert onnx.NodeProto.FromString(node).domain == ""
    graph = b"\x0a" + varint(len(node)) + node
    assert "uses the operator 'custom.Relu'" in refused(tiny + b"\x3a" + varint(len(graph)) + graph)


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (b"\x00\x00", "damaged"),  # field 0
        (b"\x03\x04", "begins no field"),  # a group
        (b"\xfb\x01", "begins no field"),
        (b"\xff\x01", "begins no field"),  # wire type 7
        (b"\x0a\xff\xff\xff\xff\x0f", "damaged"),  # longer than the file
        (b"\x08" + b"\xff" * 10, "does not end"),
        (b"\x08", "does not end"),
        (b"\xca\x81\x80\x80\x10\x00", "damaged"),  # field 25, for readers that drop the bits above the 32nd
        (b"\x3d\x00\x00\x00\x00", "damaged"),  # the graph as four bytes
        (b"\x3d\x00", "damaged"),
        (b"\x09\x00\x00", "damaged"),
    ],
)
def test_ambiguous_bytes_are_refused(tail: bytes, why: str, tiny: bytes) -> None:
    text = refused(tiny + tail)
    assert "is not an ONNX file (" in text
    assert why in text


def test_graph_is_refused_before_onnxruntime_reads_it(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path], tiny: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("onnxruntime was given the graph")

    for name in ("create_session", "create_cached_session"):
        monkeypatch.setattr(devices, name, opened)
    folder = make_tiny_bundle(tmp_path, graphs={"fp32": changed(tiny, OUTSIDE["initializer"])})
    with pytest.raises(BundleError, match=f"{folder.name}: the fp32 graph keeps the tensor 'convolution' outside"):
        OnnxEngine(Bundle(folder), device="cpu")


# ---------------------------------------------------------------------------------------------- failing outputs


def lying(model: Any) -> None:
    """Return another output shape than declared, which onnxruntime accepts."""
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.output[0] = "two"
    shape = onnx.numpy_helper.from_array(np.array([-1, 1, 2, 1], np.int64), "shape")
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("Reshape", ["two", "shape"], ["probabilities"]))


def test_output_of_undeclared_shape_raises_bundle_error(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path], tiny: bytes
) -> None:
    graph = changed(tiny, lying)
    check_graph(graph, CONTRACT, "it")
    engine = OnnxEngine(Bundle(make_tiny_bundle(tmp_path, graphs={"fp32": graph})), device="cpu")
    with pytest.raises(BundleError, match=r"the fp32 graph fails on cpu with 4 quadrants \(.*output: probabilities"):
        engine.infer(np.zeros((4, 1, 32, 32), np.uint8))


def failing(model: Any) -> None:
    """Add a reshape that fails for every number of quadrants but two."""
    node = next(node for node in model.graph.node if node.op_type == "Flatten")
    node.output[0] = "flat"
    shape = onnx.numpy_helper.from_array(np.array([2, 6], np.int64), "shape")
    model.graph.initializer.append(shape)
    model.graph.node.insert(8, helper.make_node("Reshape", ["flat", "shape"], ["vector"]))


def test_graph_that_fails_at_run_time_raises_bundle_error(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path], tiny: bytes
) -> None:
    engine = OnnxEngine(Bundle(make_tiny_bundle(tmp_path, graphs={"fp32": changed(tiny, failing)})), device="cpu")
    with pytest.raises(
        BundleError, match=r"the fp32 graph fails on cpu with 4 quadrants \(.*; try a smaller"
    ) as caught:
        engine.infer(np.zeros((4, 1, 32, 32), np.uint8))
    assert "\n" not in str(caught.value)
