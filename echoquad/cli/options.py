"""Options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from echoquad.cli.declare import Argument, Option

if TYPE_CHECKING:
    from echoquad_runtime.frames.formats import ReadOptions

__all__ = [
    "BatchSize",
    "BundleFolder",
    "CudaGraphs",
    "Device",
    "DeviceName",
    "Every",
    "Flip",
    "FlipName",
    "Matrices",
    "Method",
    "MethodName",
    "Nhwc",
    "Precision",
    "PublicKey",
    "StreamName",
    "Threads",
    "TorchDevice",
    "TorchDeviceName",
    "TunedBatchSize",
    "TunedDevice",
    "Untuned",
    "reading_of",
]


class DeviceName(StrEnum):
    """Devices by the names that --device takes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    openvino = "openvino"


class TorchDeviceName(StrEnum):
    """Devices that torch computes on, by the names that --device takes where a model is trained."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class StreamName(StrEnum):
    """Ways to keep training frames, by the names that --stream takes."""

    auto = "auto"
    on = "on"
    off = "off"


class MethodName(StrEnum):
    """Vote rules by the names that --method takes."""

    majority = "majority"
    average = "average"
    weighted = "weighted"


class FlipName(StrEnum):
    """Ways to turn a matrix over, by the names that --flip takes."""

    none = "none"
    vertical = "vertical"
    horizontal = "horizontal"
    both = "both"


BundleFolder = Annotated[Path, Argument(metavar="BUNDLE", help="Folder that `echoquad export` wrote.")]
Device = Annotated[
    DeviceName,
    Option(
        "--device",
        help="Where to compute. auto takes CUDA where it works, says why if not, and never takes OpenVINO by itself.",
    ),
]
TorchDevice = Annotated[
    TorchDeviceName,
    Option("--device", help="Where to compute. auto takes CUDA where it works and says why if not."),
]
Method = Annotated[
    MethodName | None,
    Option(
        "--method", metavar="RULE", help="Vote rule: majority, average or weighted; the contract's where not given."
    ),
]
Precision = Annotated[
    str | None,
    Option(
        "--precision",
        metavar="NAME",
        help="Graph to run: fp32, fp16 or int8; bf16 is fp32 computed in bfloat16, on openvino "
        "alone, tf32 in TF32, on cuda alone. "
        "The bundle's default where not given.",
    ),
]
CudaGraphs = Annotated[
    bool, Option("--cuda-graphs", help="On CUDA, capture a batch's kernels once and replay them; see echoquad tune.")
]
Nhwc = Annotated[
    bool, Option("--nhwc", help="On CUDA, compute convolutions with the channels last in memory; see echoquad tune.")
]
BatchSize = Annotated[
    int, Option("--batch-size", metavar="N", min=1, help="Frames, of four quadrants each, at a time.")
]
# Of the commands that run as `echoquad tune` chose: there, not given is not the same as given with the default.
TunedDevice = Annotated[
    DeviceName | None,
    Option(
        "--device",
        help="Where to compute; auto where neither given nor tuned. auto takes CUDA where it works, says why if not, "
        "and never takes OpenVINO by itself.",
    ),
]
TunedBatchSize = Annotated[
    int | None,
    Option(
        "--batch-size",
        metavar="N",
        min=1,
        help="Frames, of four quadrants each, at a time; what suits the device where neither given nor tuned.",
    ),
]
Untuned = Annotated[
    bool, Option("--untuned", help="Ignore what `echoquad tune` chose here; else it fills in what is not given.")
]
Threads = Annotated[
    int | None,
    Option("--threads", metavar="N", min=1, help="CPU threads; what affinity and cgroup allow where not given."),
]
Matrices = Annotated[
    bool,
    Option(
        "--matrices", help="Also take the .txt, .csv, .tsv and .npy files in folders as frames: as numeric matrices."
    ),
]
Flip = Annotated[
    FlipName | None,
    Option(
        "--flip",
        help="Turn numeric matrices over: vertical swaps top and bottom, horizontal left and right. As in training "
        "where not given.",
    ),
]
Every = Annotated[
    int,
    Option("--every", metavar="N", min=1, help="Of clips, take the first and each N-th frame after it."),
]
PublicKey = Annotated[
    Path | None,
    Option(
        "--public-key",
        metavar="PEM",
        help="Use the bundle only if the key that belongs to this one has signed all of it; see echoquad sign.",
    ),
]


def reading_of(matrices: bool, flip: FlipName | None, every: int, trained: ReadOptions) -> ReadOptions:
    """Say how frames are read: as told, and where nothing is told of --flip, as those that the model was trained on."""
    from echoquad_runtime.frames.formats import ReadOptions

    return ReadOptions(matrices, flip.value if flip is not None else trained.flip, every)
