"""Backbones: structure, stages, input sizes, frozen layers and conversion of ImageNet checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError
from echoquad_train.networks.backbones import BACKBONES, build_backbone, check_backbone
from echoquad_train.networks.classifier import QuadrantClassifier, set_trainable
from echoquad_train.networks.pretrained import load_pretrained
from echoquad_train.recipe import Recipe
from echoquad_train.training.optimizer_schedule import OptimizerSchedule, Phase

CONTRACT = Contract(("a", "b", "c"), input_size=64)
FEATURES = {
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "mobilenet_v3_large": 1280,
    "efficientnet_b0": 1280,
    "efficientnet_v2_s": 1280,
    "densenet121": 1024,
    "vgg16": 4096,
    "alexnet": 4096,
    "googlenet": 1024,
    "convnext_tiny": 768,
    "vit_b_16": 768,
}
POSITIONS = "encoder.pos_embedding"
NO_BATCH_STATISTICS = {"vgg16", "alexnet", "convnext_tiny", "vit_b_16"}
# A training step of these takes seconds; the others are one of each family.
HEAVY = ("resnet50", "vgg16", "alexnet", "vit_b_16")
LIGHT = ("resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet")
STEPPED = [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]


def outlined(name: str, size: int = 64) -> nn.Module:
    """Return a backbone on the meta device, because drawing a hundred million weights takes seconds."""
    with torch.device("meta"):
        return build_backbone(name, size)[0]


def drawn(name: str, size: int) -> nn.Module:
    """Return torchvision's complete network with random weights."""
    options = {**BACKBONES[name].options, **({"image_size": size} if BACKBONES[name].patch_size else {})}
    with torch.device("meta"):
        whole = torchvision.models.get_model(name, weights=None, **options)
    whole.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in whole.parameters():
            weight.normal_(0, (2 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 0.3, generator=generator)
        for buffer in whole.buffers():
            buffer.fill_(1)
    return whole.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: synchronisation dominates in networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_equals_torchvision_network_without_classifier(name: str) -> None:
    """Its features are the inputs of torchvision's last linear layer, in evaluation mode."""
    with torch.device("meta"):
        body, features = build_backbone(name, 64)
    whole, end = drawn(name, 64), BACKBONES[name].classifier
    state = whole.state_dict()
    assert set(state) - set(body.state_dict()) == {f"{end}.weight", f"{end}.bias"}
    body.load_state_dict({key: state[key] for key in body.state_dict()}, assign=True)
    seen: list[torch.Tensor] = []
    whole.get_submodule(end).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole(images)
        found = body.eval()(images)
    assert features == FEATURES[name] and found.shape == (2, features)
    assert torch.equal(found, seen[0]) and found.std() > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_has_no_dropout_before_head(name: str) -> None:
    """Dropout between hidden linear layers belongs to the network, but is not its last module."""
    body = outlined(name)
    active = [key for key, module in body.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    hidden = {"vgg16": ["classifier.2"], "alexnet": ["classifier.0", "classifier.3"]}
    assert active == hidden.get(name, []) and not isinstance(list(body.modules())[-1], nn.Dropout)


@pytest.mark.parametrize("name", BACKBONES)
def test_batch_statistics_follow_within_ten_batches(name: str) -> None:
    """After ten batches, they contribute more than half of the running statistics."""
    momenta = {module.momentum for module in outlined(name).modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(momentum is not None and 1 - (1 - momentum) ** 10 > 0.5 for momentum in momenta)
    assert bool(momenta) is (name not in NO_BATCH_STATISTICS)


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - {"vit_b_16"}))
def test_stages_work_at_scales_of_resnet_stages(name: str) -> None:
    """layer3 reduces maps from 1/8 to 1/16 of the input's side, layer4 from 1/16 to 1/32."""
    body = outlined(name)
    sides: dict[str, tuple[int, int]] = {}

    def keep(part: str) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if output.ndim == 4:
                sides[part] = (inputs[0].shape[-1], output.shape[-1])

        return hook

    parts = BACKBONES[name]
    for part in (*parts.layer3, *parts.layer4):
        body.get_submodule(part).register_forward_hook(keep(part))
    with torch.inference_mode():
        body.eval()(torch.zeros(1, 3, 128, 128, device="meta"))
    third, fourth = ([sides[part] for part in names if part in sides] for names in (parts.layer3, parts.layer4))
    # AlexNet's first layers pad less than those of other networks.
    begin, middle, end = (15, 7, 3) if name == "alexnet" else (16, 8, 4)
    for found, first, last in ((third, begin, middle), (fourth, middle, end)):
        assert found[0][0] == first and found[-1][1] == last
        assert {side for pair in found for side in pair} == {first, last}


def test_stages_of_transformer_are_its_last_blocks() -> None:
    body, parts = outlined("vit_b_16"), BACKBONES["vit_b_16"]
    blocks = list(dict(body.get_submodule("encoder.layers").named_children()))
    assert [f"encoder.layers.{block}" for block in blocks[6:]] == [*parts.layer3, *parts.layer4[:-1]]
    assert parts.layer4[-1] == "encoder.ln"


@pytest.mark.parametrize("name", BACKBONES)
def test_no_layer_lies_between_last_stage_and_head(name: str) -> None:
    """Every parameter from the first module of layer3 on belongs to a stage, and none before it."""
    stages = tuple(f"{part}." for part in (*BACKBONES[name].layer3, *BACKBONES[name].layer4))
    inside = [parameter.startswith(stages) for parameter, _ in outlined(name).named_parameters()]
    first = inside.index(True)
    assert first > 0 and all(inside[first:])


@pytest.mark.parametrize("name", BACKBONES)
def test_min_input_size_is_smallest_accepted(name: str) -> None:
    smallest, patch = BACKBONES[name].min_input_size, BACKBONES[name].patch_size
    check_backbone(name, smallest)
    with torch.inference_mode():
        outlined(name, smallest).eval()(torch.zeros(1, 3, smallest, smallest, device="meta"))
    if smallest > Contract(("a", "b"), input_size=8).input_size:
        with pytest.raises(ConfigError, match=f"backbone {name}: input size {smallest - 1} found; expected"):
            check_backbone(name, smallest - 1)
    if smallest > 8 and not patch:
        body = outlined(name, smallest).eval()
        with torch.inference_mode(), pytest.raises(RuntimeError):
            body(torch.zeros(1, 3, smallest - 1, smallest - 1, device="meta"))


def test_input_size_must_be_multiple_of_patch_size() -> None:
    with pytest.raises(ConfigError) as error:
        QuadrantClassifier("vit_b_16", Contract(("a", "b"), input_size=100))
    assert str(error.value) == (
        "backbone vit_b_16: input size 100 found; expected a multiple of its patch size 16; do: --input-size 96 or 112"
    )
    with pytest.raises(ConfigError, match="--input-size 16 or 32"):
        check_backbone("vit_b_16", 9)


@pytest.mark.parametrize(("wrong", "meant"), [("resnet-18", "resnet18"), ("VGG16", "vgg16"), ("vit_b16", "vit_b_16")])
def test_unknown_backbone_is_refused_with_suggestion(wrong: str, meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuadrantClassifier(wrong, CONTRACT)
    assert str(error.value) == (
        f"backbone {wrong!r} found; did you mean {meant}? expected one of {', '.join(BACKBONES)}, or timm:NAME with a "
        "network of timm"
    )


@pytest.mark.parametrize("layers", [("head",), ("head", "layer4"), ("head", "layer4", "layer3")])
@pytest.mark.parametrize("name", STEPPED)
def test_frozen_layers_do_not_change(name: str, layers: tuple[str, ...]) -> None:
    """This includes batch statistics: a frozen stage is in evaluation mode."""
    torch.manual_seed(0)
    model = QuadrantClassifier(name, CONTRACT, dropout=0.2)
    parts = {"layer4": BACKBONES[name].layer4, "layer3": BACKBONES[name].layer3}
    moving = ("head.", *(f"backbone.{part}." for layer in layers for part in parts.get(layer, ())))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rates = dict.fromkeys(layers, 0.1)
    optimizer = OptimizerSchedule(set_trainable(model, rates), Recipe(optimizer="sgd"), Phase("x", 1, 1, rates), 1)
    frozen = [module for key, module in model.named_modules() if key and not f"{key}.".startswith(moving)]
    leaves = [module for module in frozen if not list(module.children())]
    assert leaves and not any(module.training for module in leaves)
    batch = torch.randint(0, 256, (4, 1, 64, 64), generator=torch.Generator().manual_seed(2))
    optimizer.step(model(batch).square().sum(), torch.amp.GradScaler("cpu", enabled=False))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(moving) for key in changed)
    for layer in layers:
        expected = ("head.",) if layer == "head" else tuple(f"backbone.{part}." for part in parts[layer])
        assert any(key.startswith(expected) for key in changed), layer


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_imagenet_classifier_is_not_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = drawn(name, 64).state_dict()
    assert_loads(name, state, state, monkeypatch)


def assert_loads(name: str, file: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echoquad_train.networks.pretrained._read_file", lambda _: (file, ""))
    body, _ = build_backbone(name, 64)
    load_pretrained(body, name, "weights.pth")
    for key, value in body.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_former_tensor_names_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """DenseNet's weights come from torch 0.3, which allowed dots in module names and did not count batches."""
    now = drawn("densenet121", 64).state_dict()
    then = {
        re.sub(r"(denselayer\d+\.)(norm|conv)([12])\.", r"\1\2.\3.", key): value
        for key, value in now.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in then
    counts = {key: torch.tensor(0) for key in now if key.endswith("num_batches_tracked")}
    assert_loads("densenet121", then, {**now, **counts}, monkeypatch)


def test_auxiliary_heads_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = drawn("googlenet", 64).state_dict()
    heads = {f"aux{index}.conv.conv.weight": torch.ones(128, 512, 1, 1) for index in (1, 2)}
    assert_loads("googlenet", {**now, **heads}, now, monkeypatch)


def small_transformer(name: str, weights: object = None, image_size: int = 224) -> VisionTransformer:
    torch.manual_seed(image_size)
    body = VisionTransformer(image_size, 16, num_layers=12, num_heads=2, hidden_dim=8, mlp_dim=8)
    nn.init.normal_(body.encoder.pos_embedding)
    return body


def test_position_embeddings_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear map of embeddings stays linear, corners stay corners, and the class token does not change."""
    monkeypatch.setattr(torchvision.models, "get_model", small_transformer)
    state = small_transformer("vit_b_16").state_dict()
    ramp = torch.linspace(0, 1, 14)
    state["encoder.pos_embedding"][0, 1:] = (ramp[:, None] + 3 * ramp).reshape(-1, 1)
    monkeypatch.setattr("echoquad_train.networks.pretrained._read_file", lambda _: (state, ""))
    body, _ = build_backbone("vit_b_16", 64)
    load_pretrained(body, "vit_b_16", "weights.pth")
    found = body.state_dict()["encoder.pos_embedding"]
    assert found.shape == (1, 17, 8) and torch.equal(found[0, 0], state["encoder.pos_embedding"][0, 0])
    ramp = torch.linspace(0, 1, 4)
    expected = (ramp[:, None] + 3 * ramp).reshape(-1, 1).expand(-1, 8)
    torch.testing.assert_close(found[0, [1, 4, 13, 16]], expected[[0, 3, 12, 15]])  # both grids contain the corners
    torch.testing.assert_close(found[0, 1:], expected, atol=0.1, rtol=0)


def test_former_transformer_names_and_invalid_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", small_transformer)
    state = small_transformer("vit_b_16", image_size=64).state_dict()
    then = {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v for key, v in state.items()
    }
    assert set(then) != set(state)
    assert_loads("vit_b_16", then, state, monkeypatch)
    for places in (torch.zeros(1, 20, 8), torch.zeros(2, 17, 8), torch.zeros(1, 10, 9), torch.zeros(17, 8)):
        monkeypatch.setattr(
            "echoquad_train.networks.pretrained._read_file", lambda _, it=places: ({**state, POSITIONS: it}, "")
        )
        with pytest.raises(ConfigError, match="pos_embedding"):
            load_pretrained(build_backbone("vit_b_16", 64)[0], "vit_b_16", "weights.pth")
