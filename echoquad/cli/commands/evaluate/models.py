"""Open what ``echoquad evaluate`` measures: a run or ensemble with torch, a bundle with onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from echoquad.cli.framework.console import print_status
from echoquad.cli.framework.options import DeviceName, FlipName, MethodName, TorchDeviceName, read_options

if TYPE_CHECKING:
    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_runtime.predict.predictor import Predictor

__all__ = ["evaluation_read_options", "open_model"]


def open_model(
    folder: Path,
    device: DeviceName,
    precision: str | None,
    threads: int | None,
    method: MethodName | None,
    batch_size: int,
    abstain_below: float | None,
) -> Predictor:
    """Return a predictor for a run, an ensemble or a bundle; print a note about it.

    Raises
    ------
    RunError
        If the folder is none of them.
    UsageError
        If torch cannot run it with these options.
    """
    from echoquad_runtime.bundle.manifest import MANIFEST
    from echoquad_runtime.predict.predictor import Predictor

    if (folder / MANIFEST).exists():
        bundled = Predictor(
            folder,
            device=device,
            precision=precision,
            threads=threads,
            method=method,
            batch_size=batch_size,
            abstain_below=abstain_below,
        )
        print_status(bundled.engine.note or f"bundle {folder.as_posix()}")
        return bundled

    from echoquad_runtime.errors import RunError, UsageError
    from echoquad_train.networks.device import choose_device
    from echoquad_train.networks.torch_engine import TorchEngine
    from echoquad_train.runs.checkpoint import RUN
    from echoquad_train.runs.ensemble_folder import Ensemble, load_trained

    if not (folder / RUN).exists():
        raise RunError(f"{folder.as_posix()}: neither a run ({RUN}) nor a bundle ({MANIFEST}) is here; check the path")
    if precision not in (None, TorchEngine.precision):
        raise UsageError(
            f"--precision {precision}: a run is evaluated in {TorchEngine.precision}; export it for other precisions"
        )
    if device == "openvino":
        raise UsageError("--device openvino: torch evaluates a run on cpu or cuda; export it for openvino")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    run = load_trained(folder)
    if isinstance(run, Ensemble) and run.trained_in_folds:
        print_status(
            f"most members were trained on train and validation frames, so figures on them are optimistic; see the "
            f"out-of-fold figures in {RUN}"
        )
    torch_device: TorchDeviceName = device
    engine = TorchEngine(run.model, run.contract, choose_device(torch_device))
    return Predictor(engine, method=method, batch_size=batch_size, abstain_below=abstain_below)


def evaluation_read_options(folder: Path, matrices: bool, flip: FlipName | None, every: int) -> ReadOptions:
    """Return the options for reading frames; those of the model's training data are the default."""
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.bundle.manifest import MANIFEST
    from echoquad_runtime.frames.formats import ReadOptions

    if (folder / MANIFEST).exists():
        trained = ReadOptions.from_record(Bundle(folder).manifest["training"])
    else:
        from echoquad_train.runs.checkpoint import read_info

        trained = ReadOptions.from_record(read_info(folder).get("data"))
    return read_options(matrices or trained.matrices, flip, every, trained)
