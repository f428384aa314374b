"""The quadrant classifier: head, normalisation, weights from files, runs and downloads, devices."""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError, DeviceUnavailableError
from echoquad_train.networks.backbones import BACKBONES
from echoquad_train.networks.classifier import QuadrantClassifier, build_model
from echoquad_train.networks.device import autocast_dtype, choose_device
from echoquad_train.networks.pretrained import load_pretrained
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe

TWO = Contract(("a", "b"), input_size=32)


def line(error: pytest.ExceptionInfo[Any]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# The classifier


@pytest.mark.parametrize("backbone", BACKBONES)
def test_head_has_number_of_classes_of_contract(backbone: str) -> None:
    contract = Contract(("a", "b", "c"), input_size=64)
    with torch.device("meta"):  # shapes are enough: drawing a hundred million weights takes seconds
        model = QuadrantClassifier(backbone, contract, dropout=0.25)
    dropout, linear = model.head
    assert isinstance(dropout, nn.Dropout) and dropout.p == 0.25
    assert isinstance(linear, nn.Linear) and linear.out_features == 3
    with torch.inference_mode():
        assert model.eval()(torch.zeros(2, 1, 64, 64, dtype=torch.uint8, device="meta")).shape == (2, 3)


def test_model_normalises_grey_levels(thin: None) -> None:
    contract = Contract(("a", "b"), input_size=32, mean=0.4, std=0.2)
    model = QuadrantClassifier("resnet18", contract).eval()
    grey = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        logits = model(grey)
        assert logits.shape == (5, 2) and logits.dtype == torch.float32
        assert torch.equal(logits, model(grey.float()))
        replicated = ((grey.double() / 255 - 0.4) / 0.2).float().repeat(1, 3, 1, 1)
        torch.testing.assert_close(logits, model.head(model.backbone(replicated)), atol=1e-5, rtol=0)


def test_torch_engine_returns_outputs_of_model(thin: None) -> None:
    contract = Contract(("a", "b", "c"), input_size=32, temperature=2.5)
    model = QuadrantClassifier("resnet18", contract, dropout=0.5).train()
    engine = TorchEngine(model, contract)
    assert (engine.device, engine.precision, engine.contract) == ("cpu", "fp32", contract)
    quadrants = np.random.default_rng(0).integers(0, 256, (6, 1, 32, 32), np.uint8)
    logits, probabilities = engine.infer(quadrants)
    assert logits.dtype == probabilities.dtype == np.float32 and logits.shape == (6, 3)
    assert not model.training  # no dropout, and no influence of batch statistics
    single = np.concatenate([engine.infer(quadrants[i : i + 1])[0] for i in range(6)])
    np.testing.assert_allclose(single, logits, atol=1e-5)
    scaled = np.exp(logits.astype(np.float64) / 2.5)
    np.testing.assert_allclose(probabilities, scaled / scaled.sum(axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("name", ["squeeze", "", "mri"])
def test_unknown_backbone_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuadrantClassifier(name, TWO)
    assert (
        line(error)
        == f"backbone {name!r} found; expected one of {', '.join(BACKBONES)}, or timm:NAME with a network of timm"
    )


# Weights from a file


@pytest.fixture
def source(thin: None) -> nn.Module:
    torch.manual_seed(11)
    return torchvision.models.get_model("resnet18", weights=None)


def saved(source: nn.Module, path: Path, kind: str) -> Path:
    state = source.state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if kind == "pth":
        torch.save(state, path.with_suffix(".pth"))
    elif kind == "legacy":
        torch.save(state, path.with_suffix(".pth"), _use_new_zipfile_serialization=False)
    elif kind == "parameters":
        torch.save(dict(source.named_parameters()) | dict(source.named_buffers()), path.with_suffix(".pth"))
    elif kind == "headless":
        torch.save({name: value for name, value in state.items() if "fc" not in name}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy", "parameters", "headless"])
def test_weights_load_from_file(tmp_path: Path, source: nn.Module, kind: str) -> None:
    path = saved(source, tmp_path / "weights", kind)
    model = build_model(Recipe(weights=str(path), input_size=32), Contract(("a", "b", "c"), input_size=32))
    source.fc = nn.Identity()
    assert states_equal(model.backbone, source)


def test_weights_load_from_run(thin: None, trained: Any) -> None:
    """The head of the run is not loaded, whatever its number of classes."""
    best = trained.folder / "best.safetensors"
    model = build_model(Recipe(weights=str(best), input_size=32), Contract(("a", "b", "c"), input_size=32))
    state = safetensors.torch.load_file(best)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in model.backbone.state_dict().items())
    assert model.head[1].out_features == 3


def test_weights_of_other_network_are_refused() -> None:
    body = torchvision.models.get_model("resnet18", weights=None)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        other = torchvision.models.get_model("resnet34", weights=None).state_dict()
        patch.setattr("echoquad_train.networks.pretrained._read_file", lambda _: (other, ""))
        with pytest.raises(ConfigError) as error:
            load_pretrained(body, "resnet18", "other.pth")
    assert "weights other.pth: " in line(error) and "expected weights of a resnet18" in line(error)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


@pytest.mark.parametrize("change", ["lacks", "shape", "extra"])
def test_mismatched_weights_are_refused(tmp_path: Path, source: nn.Module, change: str) -> None:
    source.fc = nn.Identity()
    state = source.state_dict()
    if change == "lacks":
        del state["layer2.0.conv1.weight"]
    elif change == "shape":
        state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"][:1]
    else:
        state["layer2.0.conv1.weight2"] = torch.zeros(1)
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(ConfigError) as error:
        load_pretrained(source, "resnet18", str(path))
    assert "1 of " in line(error) and "(first: layer2.0.conv1.weight" in line(error)


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "in a state dict"])
def test_code_in_weights_file_is_not_run(tmp_path: Path, source: nn.Module, how: str) -> None:
    path, proof = tmp_path / "weights.pt", tmp_path / "code-was-run"
    code = Code(proof)
    if how == "pickle":
        path.write_bytes(pickle.dumps(code))
    else:
        content = {**source.state_dict(), "conv1.weight": code} if how == "in a state dict" else code
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(ConfigError) as error:
        load_pretrained(source, "resnet18", str(path))
    assert not proof.exists()
    message = line(error)
    assert "cannot be read as tensors (it holds more than tensors)" in message and "trust" not in message
    # A reader that is less careful does run the code.
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.pt", None, "no such file; expected imagenet, none, or a file"),
        ("none.safetensors", None, "no such file"),
        ("empty.pt", b"", "cannot be read as tensors"),
        ("empty.safetensors", b"", "damaged or not a safetensors file"),
        ("text.pt", b"not a pickle at all", "cannot be read as tensors"),
        ("zip.pth", b"PK\x03\x04" + bytes(60), "cannot be read as tensors"),
        ("text.safetensors", b"\xff" * 100, "damaged or not a safetensors file"),
    ],
)
def test_file_without_weights_is_refused(
    tmp_path: Path, source: nn.Module, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_pretrained(source, "resnet18", str(tmp_path / name))
    assert f"{name}: {words}" in line(error)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model": {"a": torch.zeros(1)}}, {"epoch": 3}, torch.zeros(1)])
def test_file_without_state_dict_is_refused(tmp_path: Path, source: nn.Module, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="no state dict found; expected a mapping"):
        load_pretrained(source, "resnet18", str(tmp_path / "x.pt"))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_weights_file_is_refused(tmp_path: Path, source: nn.Module, share: float) -> None:
    for kind in ("safetensors", "pth", "legacy"):
        path = saved(source, tmp_path / kind, kind)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ConfigError):
            load_pretrained(source, "resnet18", str(path))


# ImageNet weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty torch cache and block the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*_: object, **__: object) -> None:
        raise URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (URLError("timed out"), "timed out"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (IncompleteRead(b"x", 10), "IncompleteRead"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError('invalid hash value (expected "f37072fd", got "00")'), "invalid hash value"),
    ],
)
def test_failed_download_is_one_line(
    hub: Path, monkeypatch: pytest.MonkeyPatch, thin: None, error: Exception, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ConfigError) as raised:
        build_model(Recipe(), TWO)
    message = line(raised)
    assert raised.value.exit_code == 1 and words in message
    assert message.startswith("weights imagenet: the resnet18 weights cannot be downloaded (")
    assert "--weights FILE" in message and "--recipe scratch" in message


def test_train_without_network_exits_with_one_line(
    hub: Path, tmp_path: Path, flat_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from echoquad.cli.framework.main import main

    monkeypatch.setattr(sys, "argv", ["echoquad", "train", str(flat_data), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and out == ""
    (message,) = [text for text in err.splitlines() if not text.startswith("Downloading")]
    assert message.startswith("error[E_CONFIG]: weights imagenet: ") and "[Errno -3] Temp" in message
    assert not (tmp_path / "run").exists()  # the next attempt can use the folder


def test_cached_weights_need_no_network(hub: Path, thin: None, source: nn.Module) -> None:
    hub.mkdir(parents=True)
    (cached := hub / "resnet18-f37072fd.pth").write_bytes(b"half a file")
    with pytest.raises(ConfigError, match="weights imagenet: the resnet18 weights cannot be downloaded"):
        build_model(Recipe(), TWO)
    torch.save(source.state_dict(), cached)
    model = build_model(Recipe(), TWO)
    source.fc = nn.Identity()
    assert states_equal(model.backbone, source)


def test_code_in_cached_weights_is_not_run(hub: Path, tmp_path: Path, thin: None) -> None:
    hub.mkdir(parents=True)
    torch.save(Code(tmp_path / "code-was-run"), hub / "resnet18-f37072fd.pth")
    with pytest.raises(ConfigError):
        build_model(Recipe(), TWO)
    assert not (tmp_path / "code-was-run").exists()


# Devices


@pytest.mark.parametrize(("built", "cause"), [(None, "built without CUDA"), ("12.8", "finds no working CUDA driver")])
def test_unavailable_cuda_exits_4_with_cause(monkeypatch: pytest.MonkeyPatch, built: str | None, cause: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(DeviceUnavailableError) as error:
        choose_device("cuda")
    assert error.value.exit_code == 4 and cause in line(error) and "echoquad doctor" in line(error)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"


def test_available_cuda_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_mixed_precision_dtype_is_native_on_gpu(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, expected: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert autocast_dtype(torch.device("cuda")) is expected


def test_mixed_precision_on_cpu_is_bfloat16_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert autocast_dtype(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert autocast_dtype(torch.device("cpu")) is torch.bfloat16


def test_tensor_of_other_dtype_is_cast(tmp_path: Path, source: nn.Module) -> None:
    halves = {name: value.half() if value.is_floating_point() else value for name, value in source.state_dict().items()}
    stream = io.BytesIO()
    torch.save(halves, stream)
    (tmp_path / "half.pt").write_bytes(stream.getvalue())
    body = torchvision.models.get_model("resnet18", weights=None)
    body.fc = nn.Identity()
    load_pretrained(body, "resnet18", str(tmp_path / "half.pt"))
    weight: Tensor = body.state_dict()["conv1.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, halves["conv1.weight"].float())
