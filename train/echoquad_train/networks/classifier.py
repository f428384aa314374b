"""The quadrant classifier: a backbone with a linear head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from echoquad_runtime.contract import Contract
from echoquad_train.networks.backbones import backbone_parts, build_backbone, check_backbone
from echoquad_train.networks.pretrained import WeightsOrigin, load_pretrained
from echoquad_train.recipe import Recipe

__all__ = ["QuadrantClassifier", "build_model", "set_trainable"]


class QuadrantClassifier(nn.Module):
    """A backbone and a linear head, with grey levels as input.

    Parameters
    ----------
    backbone
        A name that `echoquad_train.networks.backbones.backbone_parts` accepts.
    contract
        Defines the number of classes, the input size, the mean and the standard deviation.
    dropout
        Before the head's linear layer.

    Attributes
    ----------
    name, parts
        The name and the properties of the backbone.
    pretrained
        Where the initial weights come from, once `build_model` has loaded them; None for random ones.

    Raises
    ------
    ConfigError
        If the backbone is unknown or does not accept the input size.
    """

    def __init__(self, backbone: str, contract: Contract, dropout: float = 0.0) -> None:
        super().__init__()
        check_backbone(backbone, contract.input_size)
        self.backbone, features = build_backbone(backbone, contract.input_size)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, len(contract.classes)))
        self.mean, self.std = contract.mean, contract.std
        self.name, self.parts = backbone, backbone_parts(backbone)
        self.pretrained: WeightsOrigin | None = None

    def forward(self, quadrants: Tensor) -> Tensor:
        """Return logits, float [N, C], for grey levels 0 to 255, uint8 or float [N, 1, S, S]."""
        x = (quadrants.float() / 255 - self.mean) / self.std
        logits: Tensor = self.head(self.backbone(x.expand(-1, 3, -1, -1)))
        return logits


def build_model(recipe: Recipe, contract: Contract) -> QuadrantClassifier:
    """Build the recipe's model with its initial weights.

    Raises
    ------
    ConfigError
        If the backbone is unknown or does not accept the input size, or the weights cannot be loaded.
    """
    model = QuadrantClassifier(recipe.backbone, contract, recipe.dropout)
    if recipe.weights != "none":
        model.pretrained = load_pretrained(model.backbone, recipe.backbone, recipe.weights)
    return model


def set_trainable(model: QuadrantClassifier, layers: Mapping[str, float]) -> list[dict[str, object]]:
    """Freeze all but the named layers and return the optimizer's parameter groups.

    Parameters
    ----------
    model
        The model. Its frozen layers are set to evaluation mode, so that their batch statistics do not change.
    layers
        Learning rate by layer: ``head``, ``layer4``, ``layer3``, or ``all``; `echoquad_train.networks.backbones`
        defines the numbered ones for each network.
    """
    model.requires_grad_(False).eval()
    groups: list[dict[str, object]] = []
    stages = {"layer4": model.parts.layer4, "layer3": model.parts.layer3}
    for name, rate in layers.items():
        modules = [model.backbone.get_submodule(part) for part in stages.get(name, ())]
        modules = modules or [{"all": model, "head": model.head}[name]]
        for module in modules:
            module.requires_grad_(True).train()
        groups.append({"params": [weight for module in modules for weight in module.parameters()], "lr": rate})
    return groups
