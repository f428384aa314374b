"""Class activation maps are exact in each precision, and exist only for suitable networks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from echoquad_export.graph.activation_map import add_activation_maps, check_activation_maps, last_pooling
from echoquad_export.graph.build import build_graph
from echoquad_export.precision.calibration_set import Ranges
from echoquad_export.precision.fp16 import to_fp16
from echoquad_export.precision.quantize import activation_tensors, prepare, quantize
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.errors import ParityError
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.networks.classifier import QuadrantClassifier

CONTRACT = Contract(classes=("A", "B", "C"), input_size=64, temperature=1.7)


def answers(graph: bytes, quadrants: np.ndarray) -> list[np.ndarray]:
    session = load_onnxruntime().InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {"quadrants": quadrants})


def noise(size: int, count: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 1, size, size), np.uint8)


def bias_of(model: QuadrantClassifier) -> np.ndarray:
    layer = model.head[-1]
    assert isinstance(layer, nn.Linear)
    return layer.bias.detach().numpy()


@pytest.mark.parametrize("convert", [lambda graph: graph, to_fp16], ids=["fp32", "fp16"])
def test_mean_of_map_plus_bias_is_the_logit(
    thin_model: Callable[[Contract], QuadrantClassifier],
    thin_graph: Callable[[Contract], bytes],
    convert: Callable[[bytes], bytes],
) -> None:
    model = thin_model(CONTRACT)
    logits, _, maps = answers(convert(thin_graph(CONTRACT)), noise(64))
    assert maps.shape == (8, 3, 2, 2) and maps.dtype == np.float32
    np.testing.assert_allclose(maps.mean(axis=(2, 3)) + bias_of(model), logits, atol=2e-5)
    assert np.ptp(maps, axis=(2, 3)).min() > 1e-3  # flat maps would prove nothing


def test_map_is_the_linear_layer_at_each_position(
    thin_model: Callable[[Contract], QuadrantClassifier], thin_graph: Callable[[Contract], bytes]
) -> None:
    """The reference is the training code's feature map, captured before the pooling."""
    model = thin_model(CONTRACT)
    seen: list[torch.Tensor] = []
    pooling = model.backbone.get_submodule("avgpool")
    hook = pooling.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    quadrants = noise(64)
    with torch.no_grad():
        model(torch.from_numpy(quadrants))
    hook.remove()
    layer = model.head[-1]
    assert isinstance(layer, nn.Linear)
    expected = torch.einsum("nfhw,cf->nchw", seen[0], layer.weight).detach().numpy()
    np.testing.assert_allclose(answers(thin_graph(CONTRACT), quadrants)[2], expected, atol=2e-5)


def quantized(graph: bytes) -> bytes:
    model = prepare(graph, CONTRACT)
    return quantize(model, Ranges(model, noise(64, 16).reshape(4, 4, 64, 64), activation_tensors(model)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_predictor_returns_maps_with_unchanged_decisions(
    thin_model: Callable[[Contract], QuadrantClassifier],
    thin_graph: Callable[[Contract], bytes],
    make_tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    precision: str,
) -> None:
    model = thin_model(CONTRACT)
    single = thin_graph(CONTRACT)
    graphs = {"fp32": single, "int8": quantized(single)}
    gate = {"max_abs_dprobability": 1.0, "max_frame_flip_fraction": 1.0}  # its golden answers belong to another network
    parity = {name: {"gate": gate} for name in graphs}
    folder = make_tiny_bundle(
        tmp_path / "bundle", contract=CONTRACT, precisions=("fp32", "int8"), graphs=graphs, manifest={"parity": parity}
    )
    frames = [np.random.default_rng(index).integers(0, 256, (90, 120), np.uint8) for index in range(5)]
    plain = list(Predictor(folder, precision=precision, threads=2).predict_frames(frames))
    predictor = Predictor(folder, precision=precision, threads=2, cam=True)
    found = list(predictor.predict_frames(frames))
    assert plain == found
    for prediction in (*found, predictor(frames[3])):
        assert isinstance(prediction, Prediction) and prediction.cam is not None
        logits = prediction.cam.mean(axis=(2, 3)) + bias_of(model)
        softmax = np.exp(logits / CONTRACT.temperature)
        softmax /= softmax.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(softmax, prediction.quadrant_probabilities, atol=1e-5)
    assert all(one.cam is None for one in plain if isinstance(one, Prediction))
    assert len({one.cam.tobytes() for one in found}) == len(found)  # no two share a buffer


def test_check_activation_maps_raises_parity_error_on_deviation(
    thin_graph: Callable[[Contract], bytes],
) -> None:
    single = thin_graph(CONTRACT)
    frames = noise(64, 16).reshape(4, 4, 64, 64)
    for graph in (single, to_fp16(single), quantized(single)):
        found = check_activation_maps(graph, frames)
        assert found is not None and found["sides"] == [2, 2] and 0 < found["max_abs_difference"] < 2e-5

    def shifted(model: onnx.ModelProto) -> bytes:
        weight = next(item for item in model.graph.initializer if item.name == "cam.weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.1, "cam.weight"))
        return model.SerializeToString()

    with pytest.raises(ParityError, match=r"class activation maps: .*expected at most 0\.001"):
        check_activation_maps(shifted(onnx.load_from_string(single)), frames)


def test_head_with_two_layers_has_no_maps(thin_model: Callable[[Contract], QuadrantClassifier]) -> None:
    model = thin_model(CONTRACT)
    layer = model.head[-1]
    assert isinstance(layer, nn.Linear)
    model.head = nn.Sequential(nn.Linear(layer.in_features, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = onnx.load_from_string(build_graph(model.eval(), CONTRACT))
    assert [output.name for output in graph.graph.output] == ["logits", "probabilities"]
    assert last_pooling(graph.graph) is None and not add_activation_maps(graph.graph)
    assert check_activation_maps(graph.SerializeToString(), noise(64, 4).reshape(1, 4, 64, 64)) is None


def test_maps_need_a_pooling_over_the_whole_feature_map() -> None:
    helper = onnx.helper
    for kernel, found in (([4, 4], True), ([2, 2], False)):
        nodes = [
            helper.make_node("Relu", ["x"], ["map"], name="map"),
            helper.make_node("AveragePool", ["map"], ["mean"], name="mean", kernel_shape=kernel, strides=kernel),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["logits"]),
        ]
        side = 4 // kernel[0]
        weight = onnx.numpy_helper.from_array(np.zeros((5 * side * side, 2), np.float32), "w")
        kinds = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", kinds, ["N", 5, 4, 4])],
            [helper.make_tensor_value_info("logits", kinds, ["N", 2])],
            [weight],
            value_info=[helper.make_tensor_value_info("map", kinds, ["N", 5, 4, 4])],
        )
        assert add_activation_maps(graph) is found
