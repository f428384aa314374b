from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn

from echoquad_runtime.contract import Contract
from echoquad_train.backbones import BACKBONES, build_body
from echoquad_train.model import QuadrantClassifier, load_pretrained, set_trained
from echoquad_train.recipe import Recipe
from echoquad_train.schedule import Course, Phase

CONTRACT = Contract(("a", "b", "c"), input_size=64)
FEATURES = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "mobilenet_v3_small": 1024, "efficientnet_b0": 1280}
# One of each family: what follows from a record is the same for its other sizes.
FAMILIES = ("resnet18", "mobilenet_v3_small", "efficientnet_b0")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Take the threads' waiting for each other out of networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_torchvisions_without_its_end(name: str) -> None:
    """Its features are what torchvision's network gives its last linear layer, in evaluation mode."""
    body, features = build_body(name)
    whole = torchvision.models.get_model(name, weights=None)
    missing = whole.load_state_dict(body.state_dict(), strict=False)
    end = BACKBONES[name].end
    assert set(missing.missing_keys) == {f"{end}.weight", f"{end}.bias"} and missing.unexpected_keys == []
    seen: list[torch.Tensor] = []
    whole.get_submodule(end).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole.eval()(images)
        found = body.eval()(images)
    assert features == FEATURES[name] and found.shape == (2, features)
    assert torch.equal(found, seen[0])


@pytest.mark.parametrize("name", BACKBONES)
def test_no_dropout_but_the_recipes_stands_before_the_head(name: str) -> None:
    body, _ = build_body(name)
    assert not [module for module in body.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("name", BACKBONES)
def test_batch_statistics_follow_within_an_epoch_of_ten_batches(name: str) -> None:
    """What validation sees after ten batches is by more than half what those batches were."""
    body, _ = build_body(name)
    momenta = {module.momentum for module in body.modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(momentum is not None and 1 - (1 - momentum) ** 10 > 0.5 for momentum in momenta) and momenta


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_work_at_the_scale_that_a_resnets_do(name: str) -> None:
    """layer3 ends on maps of 1/16 of the input's side, layer4 begins on them and ends on 1/32."""
    body, _ = build_body(name)
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
        body.eval()(torch.zeros(1, 3, 128, 128))
    third, fourth = ([sides[part] for part in names if part in sides] for names in (parts.layer3, parts.layer4))
    assert third[0] == (16, 8) and all(side == (8, 8) for side in third[1:])
    assert fourth[0] == (8, 4) and all(side == (4, 4) for side in fourth[1:])


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_leave_nothing_between_them_and_the_head(name: str) -> None:
    """From the first module of layer3 on, every parameter belongs to a stage; before it, none does."""
    body, _ = build_body(name)
    stages = tuple(f"{part}." for part in (*BACKBONES[name].layer3, *BACKBONES[name].layer4))
    inside = [parameter.startswith(stages) for parameter, _ in body.named_parameters()]
    first = inside.index(True)
    assert first > 0 and all(inside[first:])


@pytest.mark.parametrize("layers", [("head",), ("head", "layer4"), ("head", "layer4", "layer3")])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_frozen_layers_stay_bit_for_bit(name: str, layers: tuple[str, ...]) -> None:
    """Batch statistics among them: a frozen stage is in evaluation mode."""
    torch.manual_seed(0)
    model = QuadrantClassifier(name, CONTRACT, dropout=0.2)
    parts = {"layer4": BACKBONES[name].layer4, "layer3": BACKBONES[name].layer3}
    moving = ("head.", *(f"backbone.{part}." for layer in layers for part in parts.get(layer, ())))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rates = dict.fromkeys(layers, 0.1)
    course = Course(set_trained(model, rates), Recipe(optimizer="sgd"), Phase("x", 1, 1, rates), 1)
    frozen = [module for key, module in model.named_modules() if key and not f"{key}.".startswith(moving)]
    leaves = [module for module in frozen if not list(module.children())]
    assert leaves and not any(module.training for module in leaves)
    batch = torch.randint(0, 256, (4, 1, 64, 64), generator=torch.Generator().manual_seed(2))
    course.step(model(batch).square().sum(), torch.amp.GradScaler("cpu", enabled=False))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(moving) for key in changed)
    for layer in layers:
        expected = ("head.",) if layer == "head" else tuple(f"backbone.{part}." for part in parts[layer])
        assert any(key.startswith(expected) for key in changed), layer


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_imagenets_end_is_left_out_of_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    monkeypatch.setattr("echoquad_train.model._read_weights", lambda _: state)
    body, _ = build_body(name)
    load_pretrained(body, name, "weights.pth")
    for key, value in body.state_dict().items():
        assert torch.equal(value, state[key]), key
