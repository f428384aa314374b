"""The typicality score: how near a quadrant's features lie to those of the training frames, as an output of the graph.

The features are the mean over the feature map at 1/16 of the input's side (of a transformer, over its patches three
quarters through the blocks), scaled to length 1. For each quadrant, LA, RA, LV and RV, export fits one Gaussian to the
features of the training frames, without the classes. The score of a quadrant is

    typicality = 1 / d2,    d2 = (f - m)' C^-1 (f - m) / D

with the features f, their mean m and covariance C, and their number D. It is positive and has no unit; higher is more
typical. It is about 1 for training frames, about 0 for a picture of another thing, and at most 100. The score of a
frame is the harmonic mean of its four quadrants, each under its own Gaussian: one over the mean distance.

K. Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
arXiv:1807.03888, use the distance, with one Gaussian per class, in several layers. M. Mueller and M. Hein,
"Mahalanobis++", arXiv:2505.18032, scale the features to length 1. Gaussians per quadrant separate mirrored and turned
frames and other ultrasound, which resemble *some* quadrant of the training frames. The last layer of a small network
does not separate other views. ``docs/explanation/typicality.md`` compares layers and scores.

The covariance is shrunk to a multiple of the identity (O. Ledoit and M. Wolf, "A well-conditioned estimator for
large-dimensional covariance matrices", 2004). Then its `RANK` largest eigenvalues are kept and the others replaced by
their mean, as in probabilistic principal component analysis (M. E. Tipping and C. M. Bishop, 1999), so that the score
adds little to the size of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import onnx
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor, nn

from echoquad_runtime.bundle.onnx_header import OUTPUTS, TYPICALITY
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.engine.io_binding import FloatArray, InferenceOutput, own_position
from echoquad_train.networks.backbone_parts import Backbone
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.ensemble_classifier import EnsembleClassifier
from echoquad_train.networks.torch_engine import TorchEngine

__all__ = [
    "RANK",
    "FeatureTap",
    "QuadrantGaussians",
    "ReferenceEngine",
    "Typicality",
    "fit_typicality",
    "typicality_branch",
]

RANK: Final = 32
"""Principal components of each Gaussian; 16 to 512 give the same figures on CAMUS."""

_SMALLEST: Final = 1e-12  # bounds lengths from below
_SMALLEST_DISTANCE: Final = 1e-2  # d2 of training frames is about 1; less than this is rounding of the features

# The smallest variance of features of length 1, and the smallest as a share of the mean: below them the rounding of the
# features would count. An untrained network may have the same features for all frames.
_SMALLEST_VARIANCE: Final = 1e-8
_SMALLEST_SHARE: Final = 1e-4


class QuadrantGaussians(nn.Module):
    """One Gaussian of a network's features for each of LA, RA, LV and RV.

    Parameters
    ----------
    features
        float [F, 4, D], features of the training frames, F at least 2.
    """

    mean: Tensor
    axes: Tensor
    scale: Tensor
    rest: Tensor

    def __init__(self, features: npt.NDArray[np.floating]) -> None:
        super().__init__()
        features = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), _SMALLEST)
        fits = [_principal_components(features[:, position].astype(np.float64)) for position in range(len(QUADRANTS))]
        mean, axes, scale, rest = (torch.from_numpy(np.stack(part)).float() for part in zip(*fits, strict=True))
        self.register_buffer("mean", mean[:, None])  # [4, 1, D]
        self.register_buffer("axes", axes)  # [4, D, K]
        self.register_buffer("scale", scale[:, None])  # [4, 1, K]
        self.register_buffer("rest", rest[:, None])  # [4, 1]

    def forward(self, features: Tensor) -> Tensor:
        """Return d2, float32 [N, 4], the squared distance per feature to each Gaussian, for features [N, D]."""
        features = features.float()
        features = features / features.square().sum(1, keepdim=True).sqrt().clamp(min=_SMALLEST)
        centred = features - self.mean
        along = centred @ self.axes
        across = centred - along @ self.axes.transpose(1, 2)
        squares = (along * self.scale).square().sum(2) + across.square().sum(2) * self.rest
        return squares.T / features.shape[1]


def _principal_components(features: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Return mean [D], axes [D, K], 1 / standard deviation along each [K], and 1 / variance across them."""
    count, size = features.shape
    mean = features.mean(axis=0)
    centred = features - mean
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    shrinkage = ledoit_wolf_shrinkage(centred, assume_centered=True)
    variances = np.zeros(size)
    variances[: len(singular)] = singular**2 / count
    variances = (1 - shrinkage) * variances + shrinkage * variances.mean()
    variances = np.maximum(variances, max(_SMALLEST_VARIANCE, _SMALLEST_SHARE * float(variances.mean())))
    rank = min(RANK, len(singular), size - 1)
    return mean, axes[:rank].T, variances[:rank] ** -0.5, 1 / variances[rank:].mean()


class Typicality(nn.Module):
    """The score of a model: of an ensemble, one over the mean distance of its members.

    Parameters
    ----------
    features
        For each member, float [F, 4, D], its features of the training frames.
    """

    def __init__(self, features: Sequence[npt.NDArray[np.floating]]) -> None:
        super().__init__()
        self.members = nn.ModuleList(QuadrantGaussians(of_member) for of_member in features)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the typicality as LA, RA, LV and RV, float32 [N, 4], for each member's features [N, D]."""
        distances: Tensor = sum(member(part) for member, part in zip(self.members, features, strict=True))
        return len(self.members) / distances.clamp(min=len(self.members) * _SMALLEST_DISTANCE)


class FeatureTap:
    """Collects a network's features whenever it runs, as a context manager.

    Parameters
    ----------
    backbone
        The network.
    parts
        Names its stages; the features are those of the last module of ``layer3``.

    Attributes
    ----------
    features
        The features of the last run, float [N, D].
    """

    features: Tensor

    def __init__(self, backbone: nn.Module, parts: Backbone) -> None:
        self._module = backbone.get_submodule(parts.layer3[-1])
        self._sides = (1, 2) if parts.channels_last else (2, 3)

    def __enter__(self) -> Self:
        self._handle = self._module.register_forward_hook(self._collect)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _collect(self, _: nn.Module, __: object, output: Tensor) -> None:
        # Feature maps [N, D, h, w] or [N, h, w, D], or the patches of a transformer [N, T, D].
        self.features = output.float().mean(self._sides if output.ndim == 4 else 1)


class ReferenceEngine(TorchEngine):
    """The training code in float32, with the features of its networks, and their typicality once it is fitted.

    Attributes
    ----------
    typicality
        The fitted score; None computes none.
    """

    def __init__(self, model: QuadrantClassifier | EnsembleClassifier, contract: Contract) -> None:
        super().__init__(model, contract)
        ensemble = model if isinstance(model, EnsembleClassifier) else None
        members = [model] if ensemble is None else list(ensemble.members)
        self._members = [member for member in members if isinstance(member, QuadrantClassifier)]
        self.typicality: Typicality | None = None

    def open_slot(self, _: int) -> ReferenceEngine:
        """Return an inference slot: the engine itself."""
        return self

    def run(self, batch: npt.NDArray[np.uint8], frames: int) -> InferenceOutput:
        """Run the first `frames` frames of a batch; see `echoquad_runtime.engine.io_binding.InferenceSlot`."""
        (logits, probabilities), features = self._infer(batch[:frames].reshape(-1, *batch.shape[2:]))
        shape = (frames, len(QUADRANTS), -1)
        scores = None
        if self.typicality is not None:
            with torch.inference_mode():
                scores = own_position(self.typicality(features).numpy())
        return InferenceOutput(logits.reshape(shape), probabilities.reshape(shape), None, scores)

    def features(self, quadrants: npt.NDArray[np.uint8], batch_size: int) -> list[FloatArray]:
        """Return each member's features, float32 [F, 4, D], of quadrants, uint8 [F, 4, S, S]."""
        parts = [
            self._infer(quadrants[start : start + batch_size].reshape(-1, 1, *quadrants.shape[2:]))[1]
            for start in range(0, len(quadrants), batch_size)
        ]
        return [
            torch.cat(list(of_member)).numpy().reshape(len(quadrants), len(QUADRANTS), -1)
            for of_member in zip(*parts, strict=True)
        ]

    def _infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[tuple[FloatArray, FloatArray], list[Tensor]]:
        """Return the answers, and each member's features, [N, D]; of flipped views there are none."""
        with ExitStack() as stack:
            taps = [stack.enter_context(FeatureTap(member.backbone, member.parts)) for member in self._members]
            answers = self.infer(quadrants)
        # The first rows are the views as they are; see `echoquad_train.networks.ensemble_classifier.views_of`.
        return answers, [tap.features[: len(quadrants)] for tap in taps]


def fit_typicality(engine: ReferenceEngine, quadrants: npt.NDArray[np.uint8], batch_size: int) -> None:
    """Fit the score of an engine to training frames, uint8 [F, 4, S, S], F at least 2."""
    engine.typicality = Typicality(engine.features(quadrants, batch_size))


def typicality_branch(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that only the typicality depends on; the nodes must be sorted topologically."""
    return set(_ancestors(graph, TYPICALITY)) - set(_ancestors(graph, OUTPUTS[0]))


def _ancestors(graph: onnx.GraphProto, output: str) -> Iterator[str]:
    """Yield the tensors that nodes compute for `output`, and `output` itself if a node computes it."""
    wanted = {output}
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            yield from node.output
