"""Options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from echoquad_runtime.contract import VoteMethod
from echoquad_runtime.frames.formats import Flip as FlipName

if TYPE_CHECKING:
    from echoquad_runtime.frames.formats import ReadOptions

__all__ = [
    "MAX_FRAMES",
    "BatchSize",
    "BundleFolder",
    "CudaGraphs",
    "Device",
    "DeviceName",
    "Every",
    "Flip",
    "FlipName",
    "FrameInputs",
    "JsonFile",
    "Matrices",
    "MaxP99",
    "Method",
    "MethodName",
    "Nhwc",
    "PatientRegex",
    "Precision",
    "PublicKey",
    "QuadrantLayout",
    "Threads",
    "TorchDevice",
    "TorchDeviceName",
    "TunedBatchSize",
    "TunedDevice",
    "Untuned",
    "read_options",
]

MAX_FRAMES: Final = 256
"""Frames that bench and tune keep in memory, as file bytes; more would only repeat them."""

DeviceName = Literal["auto", "cpu", "cuda", "openvino"]
TorchDeviceName = Literal["auto", "cpu", "cuda"]
MethodName = VoteMethod

_AUTO = "auto takes CUDA if it works, reports why if it does not"
_BATCH = "Frames per batch, each of four quadrants"

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `echoquad export` wrote.")]
FrameInputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="INPUT", help="Frame files, folders or patterns. Default: the golden frames of the bundle."),
]
Device = Annotated[
    DeviceName, typer.Option("--device", help=f"Device to compute on. {_AUTO}, and never takes OpenVINO.")
]
TorchDevice = Annotated[TorchDeviceName, typer.Option("--device", help=f"Device to compute on. {_AUTO}.")]
Method = Annotated[
    MethodName | None,
    typer.Option(
        "--method", metavar="RULE", help="Vote rule: majority, average or weighted. Default: the rule of the contract."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="Graph to run: fp32, fp16 or int8. bf16 is fp32 computed in bfloat16, on openvino only; tf32 is fp32 "
        "computed in TF32, on cuda only. Default: the default of the bundle.",
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="On CUDA, capture the kernels of a batch once and replay them; see echoquad tune."
    ),
]
Nhwc = Annotated[
    bool, typer.Option("--nhwc", help="On CUDA, compute convolutions with channels last in memory; see echoquad tune.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help=f"{_BATCH}.")]
# For the commands that use the settings of `echoquad tune`: None differs from giving the default explicitly.
TunedDevice = Annotated[
    DeviceName | None,
    typer.Option(
        "--device", help=f"Device to compute on. Default: the tuned device, or auto. {_AUTO}, and never takes OpenVINO."
    ),
]
TunedBatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", metavar="N", min=1, help=f"{_BATCH}. Default: the tuned size, or one that suits the device."
    ),
]
Untuned = Annotated[
    bool,
    typer.Option("--untuned", help="Ignore the settings of `echoquad tune`, which are the default for other options."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, help="CPU threads. Default: the CPUs that affinity and cgroup allow."
    ),
]
Matrices = Annotated[
    bool,
    typer.Option("--matrices", help="Read .txt, .csv, .tsv and .npy files in folders as frames: numeric matrices."),
]
Flip = Annotated[
    FlipName | None,
    typer.Option(
        "--flip",
        help="Flip numeric matrices: vertical swaps top and bottom, horizontal left and right. Default: as in "
        "training.",
    ),
]
Every = Annotated[
    int, typer.Option("--every", metavar="N", min=1, help="Of a multi-frame file, take the first and every N-th frame.")
]
PatientRegex = Annotated[
    str | None,
    typer.Option(
        "--patient-regex",
        metavar="REGEX",
        help="Regular expression that finds the patient in a frame's path below its class: the first group, or the "
        "whole match. Default: names such as patient0001_4CH, ASD3-101 and NORMS-39, and folders such as P001/clip1; "
        "echoquad data audit shows what was read.",
    ),
]
QuadrantLayout = Annotated[
    str | None,
    typer.Option(
        "--quadrant-layout",
        metavar="NAME|NAMES",
        help="Which quadrant is where: reference (LA RA above LV RV), apex-up (RV LV above RA LA), or four names in "
        "the order top left, top right, bottom left, bottom right, such as LV,RV,LA,RA. Default: reference.",
    ),
]
PublicKey = Annotated[
    Path | None,
    typer.Option(
        "--public-key",
        metavar="PEM",
        help="Use the bundle only if all of it is signed by the private key of this public key; see echoquad sign.",
    ),
]
MaxP99 = Annotated[
    float | None,
    typer.Option("--max-p99-ms", metavar="MS", min=0, help="Highest p99 latency allowed; otherwise exit with code 3."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]


def read_options(matrices: bool, flip: FlipName | None, every: int, trained: ReadOptions | None = None) -> ReadOptions:
    """Build the options for reading frames; the default of --flip is that of the training data, if there is any."""
    from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions

    return ReadOptions(matrices, flip or (trained or DEFAULT_READ_OPTIONS).flip, every)
