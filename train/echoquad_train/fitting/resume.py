"""Resume: lock and open a run folder, new or saved, and refuse one that does not match the options."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from echoquad_runtime.errors import DatasetError, EchoQuadError, RunError
from echoquad_runtime.storage.atomic import TEMPORARY_SUFFIX, make_folder, output_errors
from echoquad_runtime.storage.file_lock import FileLock, LockedError
from echoquad_train.networks.weight_files import first_line
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs.checkpoint import BEST, LAST, RECIPE, RUN
from echoquad_train.runs.history import Epoch

__all__ = [
    "LOCK",
    "locked_run_folder",
    "open_run_folder",
    "refuse_occupied",
    "remove_recipe_on_failure",
    "require_same_teacher",
    "saved_value",
    "state_errors",
]

_Value = TypeVar("_Value")

LOCK: Final = ".lock"
"""File in a run folder that the training process has locked."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Create a run folder, if it does not exist, and lock it: one process at a time trains into it.

    Temporary files of a killed process are removed. A folder that was created here and stays empty is removed as well.

    Raises
    ------
    RunError
        If another process trains into the folder, or it is a file.
    OutputError
        If the system refuses.
    """
    label = folder.as_posix()
    if folder.exists() and not folder.is_dir():
        refuse_occupied(folder)
    created = not folder.exists()
    make_folder(folder)
    with output_errors(folder):
        try:
            lock = FileLock(folder / LOCK)
        except LockedError as error:
            raise RunError(
                f"{label}: another process is training this run; wait until it ends, or choose another --out"
            ) from error
    if not lock.certain:
        logger.warning("%s: its file system has no locks; make sure that no other process trains this run", label)
    try:
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if _is_temporary(path):
                    path.unlink()
        yield
    finally:
        lock.release(remove=True)
        if created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def refuse_occupied(folder: Path) -> None:
    """Refuse a folder with content; what a process left that was killed before its first file does not count.

    Raises
    ------
    RunError
        If `folder` is a file, or holds something.
    """
    label = folder.as_posix()
    if not folder.exists():
        return
    if folder.is_dir() and all(path.name == LOCK or _is_temporary(path) for path in folder.iterdir()):
        return
    if _linear_kind(folder):
        raise RunError(
            f"{label}: holds a linear classifier, finished or not, which --resume cannot continue; remove the folder, "
            "or choose another --out"
        )
    raise RunError(f"{label}: exists and is not empty; continue it with --resume, or choose another --out")


def _linear_kind(folder: Path) -> str | None:
    """Return the kind of linear classifier that a run folder holds; None for a network, or for no run."""
    try:
        fit = checkpoint.read_info(folder).get("fit")
    except RunError:
        return None
    return str(fit.get("kind")) if isinstance(fit, dict) else None


def open_run_folder(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Return the state to resume from, None for a new run.

    Raises
    ------
    RunError
        If a new run would overwrite something, or there is no run of this recipe to resume, or a file of it is damaged.
    """
    if not resume:
        refuse_occupied(folder)
        return None
    label = folder.as_posix()
    if (kind := _linear_kind(folder)) is not None:
        raise RunError(
            f"{label}: holds a linear classifier ({kind}), which is fitted in one step; to fit it again, remove the "
            "folder and train without --resume"
        )
    if not (folder / LAST).exists():
        _check_restart(folder)
        return None
    state = checkpoint.load_last(folder)
    if not isinstance(state["recipe"], str) or not _is_history(state["history"]):
        raise RunError(f"{label}: {LAST} is not the state of a run; train again into another folder")
    if Recipe.from_toml(state["recipe"], f"{label}/{LAST}") != recipe:  # values: the text may lack newer fields
        raise RunError(f"{label}: the run began with another recipe; resume it with the options it began with")
    _check_best(folder, recipe, state)
    return state


def _check_restart(folder: Path) -> None:
    """Refuse to resume a folder without saved state, unless its run was killed in the first epoch and starts again."""
    label = folder.as_posix()
    if not (folder / RECIPE).is_file():
        if not (folder / RUN).exists():
            raise RunError(f"{label}: no run here ({RUN} is missing), so nothing to resume; train without --resume")
        checkpoint.read_info(folder)
        raise RunError(
            f"{label}: {RECIPE} is missing, so the run cannot be resumed; restore it, or remove the folder and train "
            "without --resume"
        )
    try:
        epochs = checkpoint.read_info(folder).get("epochs")
    except RunError:  # killed before run.json was written
        return
    if epochs:
        raise RunError(
            f"{label}: {LAST} is missing, so its {epochs} epochs cannot be continued; train into another folder"
        )


def _is_history(rows: object) -> bool:
    """Return whether rows are those of epochs 1, 2 and so on."""
    try:
        history = [Epoch(**row) for row in rows]  # type: ignore[attr-defined]
    except TypeError:
        return False
    return all(
        epoch.epoch == number
        and isinstance(epoch.phase, str)
        and all(type(value) in (int, float) for name, value in epoch.to_dict().items() if name != "phase")
        for number, epoch in enumerate(history, 1)
    )


def _check_best(folder: Path, recipe: Recipe, state: dict[str, Any]) -> None:
    """Refuse to resume with a ``best.safetensors`` other than the one that the run wrote."""
    expected = state.get("best_sha256")  # missing in runs of earlier releases
    if expected is None or not state["history"]:
        return
    found = checkpoint.load_best(folder, recipe)
    # Weights of a later epoch: the run was killed before it saved its state, and will repeat that epoch.
    if found.sha256 != expected and found.epoch <= len(state["history"]):
        raise RunError(
            f"{folder.as_posix()}: {BEST} was damaged or changed: its SHA-256 is {found.sha256[:12]}..., which is not "
            f"that of {LAST}; restore the file, or train again into another folder"
        )


@contextlib.contextmanager
def state_errors(folder: Path) -> Iterator[None]:
    """Raise whatever a saved state causes that does not fit the model, the optimizer or the scaler as a `RunError`."""
    try:
        yield
    except EchoQuadError:
        raise
    except Exception as error:  # torch raises many classes
        raise RunError(
            f"{folder.as_posix()}: {LAST} does not fit the run ({first_line(error)}); train again into another folder"
        ) from error


def require_same_teacher(folder: Path, state: dict[str, Any] | None, sha256: str | None, *, resume: bool) -> None:
    """Refuse to resume a run with another teacher than it began with.

    Parameters
    ----------
    folder
        The run folder.
    state
        The saved state, None before the first epoch was saved.
    sha256
        Hash of the teacher's weights, None without a teacher.
    resume
        Whether the run is resumed; a new run accepts any teacher.

    Raises
    ------
    RunError
        If the teachers differ, or only one of the two is there.
    """
    if not resume:
        return
    if state:
        saved = state.get("teacher")  # missing in runs of releases without distillation
    else:
        try:
            metadata = checkpoint.read_info(folder).get("teacher")
        except RunError:  # killed before run.json was written
            return
        saved = metadata.get("weights_sha256") if isinstance(metadata, dict) else None
    if saved == sha256:
        return
    label = folder.as_posix()
    if sha256 is None:
        raise RunError(f"{label}: the run began with a teacher; resume it with the same --teacher RUN")
    found = "another teacher" if saved else "no teacher"
    raise RunError(f"{label}: the run began with {found}; resume it with the options it began with")


@contextlib.contextmanager
def remove_recipe_on_failure(folder: Path, *, enabled: bool) -> Iterator[None]:
    """Remove the recipe of a new run if a `DatasetError` ends the block: nothing was trained."""
    try:
        yield
    except DatasetError:
        if enabled:
            with contextlib.suppress(OSError):
                (folder / RECIPE).unlink()
        raise


def saved_value(folder: Path, key: str, kind: type[_Value]) -> _Value | None:
    """Return a value from the ``run.json`` of a resumed run; None if it is missing or of another type."""
    try:
        value = checkpoint.read_info(folder).get(key)
    except RunError:  # killed before it was written
        return None
    return value if isinstance(value, kind) else None
