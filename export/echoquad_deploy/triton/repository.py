"""Write a bundle's frame graph into a model repository of Triton Inference Server.

::

    REPOSITORY/NAME/
      config.pbtxt        for the CPU
      configs/gpu.pbtxt   for CUDA: tritonserver --model-config-name=gpu
      labels.txt          class names, one a line
      1/model.onnx        the frame graph, unchanged
      warmup/000.raw ...  golden frames, grey levels
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from echoquad_deploy.triton.graph_check import (
    FRAMES,
    SCORES,
    FrameGraph,
    batches_agree,
    check_decisions,
    check_frame_graph,
)
from echoquad_deploy.triton.model_config import LABELS, MODEL_FILE, VERSION, ModelConfig, WarmUp, encode_config
from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.manifest import FP32_DEVICES, frame_graph_file
from echoquad_runtime.bundle.typicality import typicality_threshold
from echoquad_runtime.errors import BundleError, OutputError, UsageError
from echoquad_runtime.storage.atomic import make_folder, write_bytes
from echoquad_runtime.storage.atomic_folder import atomic_folder

if TYPE_CHECKING:
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.quadrants import Grey

__all__ = ["MAX_BATCH", "TritonModel", "check_target", "model_name", "write_triton_model"]

MAX_BATCH: Final = 16
"""Frames of a batch: the resize holds some tens of megabytes for each large frame."""

_CONFIG: Final = "config.pbtxt"
_CONFIGS: Final = "configs"
_WARM_UP: Final = "warmup"
_PARTS: Final = frozenset({_CONFIG, _CONFIGS, LABELS, str(VERSION), _WARM_UP})
_MARK: Final = "# Written by EchoQuad "
_WARM_UPS: Final = 8  # frames of different sizes that are run before the model is ready


@dataclass(frozen=True, slots=True)
class TritonModel:
    """A model that was written.

    Attributes
    ----------
    folder
        Its folder in the repository.
    name
        Its name.
    precision
        The precision of its graph.
    max_batch_size
        Frames of a batch; 0 if batches have other answers than single frames, so that Triton forms none.
    frames
        Number of golden frames whose decisions were compared with the predictor's.
    gpu
        Whether there is a configuration for CUDA.
    """

    folder: Path
    name: str
    precision: str
    max_batch_size: int
    frames: int
    gpu: bool


def model_name(bundle: Path) -> str:
    """Return the name of a bundle's model: that of its folder, in the characters that are safe in a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", bundle.resolve().name).strip("-.") or "echoquad"


def check_target(repository: Path, name: str) -> Path:
    """Return the folder of a model, after checking that nothing but an earlier export is in its place.

    Raises
    ------
    OutputError
        If anything else is there.
    """
    folder = repository / name
    if repository.exists() and not repository.is_dir():
        raise OutputError(f"{repository.as_posix()}: is a file; expected a folder; choose another --triton")
    if not folder.exists():
        return folder
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {folder.name}
    config = folder / _CONFIG
    if found and not (found <= _PARTS and config.is_file() and config.read_bytes().startswith(_MARK.encode())):
        raise OutputError(
            f"{folder.as_posix()}: it exists and is no model that EchoQuad wrote; it is unchanged; move it away, or "
            "choose another --triton"
        )
    return folder


def write_triton_model(bundle: Bundle, repository: Path, precision: str | None = None) -> TritonModel:
    """Write the frame graph of a bundle into a model repository, as a whole or not at all.

    On this machine, the graph first decides the golden frames as the predictor does, and it is measured whether a batch
    has the answers of single frames. An earlier model of the same name is replaced; other models stay.

    Parameters
    ----------
    bundle
        A bundle with a frame graph.
    repository
        The model repository; created if it does not exist.
    precision
        The precision of the graph; None is the default of the bundle.

    Raises
    ------
    UsageError
        If the precision has no graph of its own.
    BundleError
        If the bundle has no frame graph of that precision, or it is damaged.
    ParityError
        If the graph does not decide as the predictor does.
    OutputError
        If something else is in the place of the model, or it cannot be written.
    """
    from echoquad_runtime.devices.session_factory import open_session
    from echoquad_runtime.predict.predictor import Predictor

    precision = bundle.choose_precision(precision)
    if precision in FP32_DEVICES:
        raise UsageError(f"{precision} has no graph of its own; expected {', '.join(bundle.precisions)}")
    name = model_name(bundle.folder)
    folder = check_target(repository, name)
    label = f"{bundle.folder.as_posix()}: {frame_graph_file(precision)}"
    graph = _read_frame_graph(bundle, precision)
    header = check_frame_graph(graph, bundle.contract, label)
    golden = bundle.read_golden()

    session = open_session(graph, device="cpu").session
    names = [output.name for output in header.outputs]

    def run(frames: Any) -> dict[str, Any]:
        return dict(zip(names, session.run(names, {FRAMES: frames}), strict=True))

    predictor = Predictor(bundle, device="cpu", precision=precision)
    check_decisions(run, golden.frames, [predictor(frame) for frame in golden.frames], bundle.contract, label)
    samples = _distinct_sizes(golden.frames)
    max_batch = _max_batch_size(run, samples)
    config = ModelConfig(
        name,
        f"{_MARK[2:]}{__version__} from the bundle {bundle.manifest['manifest_sha256'][:12]}. Research use only.",
        header.inputs,
        header.outputs,
        SCORES,
        max_batch,
        _warm_ups(samples, max_batch),
        _parameters(bundle, precision),
    )
    gpu = precision in bundle.precisions_on("cuda")
    make_folder(repository)
    with atomic_folder(folder, replace=True) as unfinished:
        _write(unfinished, config, graph, bundle.contract.classes, samples, gpu=gpu)
    return TritonModel(folder, name, precision, max_batch, len(golden.frames), gpu)


def _read_frame_graph(bundle: Bundle, precision: str) -> bytes:
    file = frame_graph_file(precision)
    if file not in bundle.manifest["files"]:
        raise BundleError(
            f"{bundle.folder.as_posix()}: it has no {file}; expected a bundle with a frame graph; export it again with "
            "--frame-graph"
        )
    return bundle.read(file)


def _max_batch_size(run: FrameGraph, frames: Sequence[Grey]) -> int:
    return MAX_BATCH if batches_agree(run, frames, MAX_BATCH) else 0


def _distinct_sizes(frames: Sequence[Grey]) -> list[Grey]:
    """Return frames of different sizes, the largest first."""
    by_size: dict[tuple[int, ...], Grey] = {}
    for frame in frames:
        by_size.setdefault(frame.shape, frame)
    return sorted(by_size.values(), key=lambda frame: frame.size, reverse=True)[:_WARM_UPS]


def _warm_ups(frames: Sequence[Grey], max_batch: int) -> list[WarmUp]:
    """Return one sample per frame; the first, the largest frame, also as a full batch, which takes the most memory."""
    samples = [
        WarmUp(f"golden-{index:03d}", _raw_file(index), (frame.shape[0], frame.shape[1]))
        for index, frame in enumerate(frames)
    ]
    if max_batch:
        samples.append(WarmUp(f"golden-000-batch-{max_batch}", samples[0].file, samples[0].shape, max_batch))
    return samples


def _raw_file(index: int) -> str:
    return f"{index:03d}.raw"


def _parameters(bundle: Bundle, precision: str) -> dict[str, str]:
    """Return what a client needs to know where the answers come from, and to interpret them."""
    contract, files = bundle.contract, bundle.manifest["files"]
    facts = {
        "bundle_sha256": bundle.manifest["manifest_sha256"],
        "contract_sha256": contract.sha256,
        "graph_sha256": files[frame_graph_file(precision)]["sha256"],
        "precision": precision,
        "vote": contract.vote,
        "version": __version__,
        "intended_use": bundle.manifest["intended_use"],
    }
    if (threshold := typicality_threshold(bundle.manifest, precision)) is not None:
        facts["typicality_threshold"] = repr(threshold)
    return {f"echoquad.{key}": str(value) for key, value in facts.items()}


def _write(
    folder: Path, config: ModelConfig, graph: bytes, classes: Sequence[str], frames: Sequence[Grey], *, gpu: bool
) -> None:
    for name in (str(VERSION), _WARM_UP, *([_CONFIGS] if gpu else [])):
        (folder / name).mkdir()
    # A label is a line: a line break in the name of a class would shift all that follow.
    labels = [" ".join(name.splitlines()) for name in classes]
    write_bytes(folder / LABELS, "".join(f"{name}\n" for name in labels).encode())
    write_bytes(folder / str(VERSION) / MODEL_FILE, graph)
    for index, frame in enumerate(frames):
        write_bytes(folder / _WARM_UP / _raw_file(index), frame.tobytes())
    write_bytes(folder / _CONFIG, encode_config(config, "cpu").encode("ascii"))
    if gpu:
        write_bytes(folder / _CONFIGS / "gpu.pbtxt", encode_config(config, "gpu").encode("ascii"))
