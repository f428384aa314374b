"""Resume: open a run folder, new or saved, and refuse one that does not match the options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from echoquad_runtime.errors import DatasetError, RunError
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint

__all__ = ["open_run_folder", "refuse_occupied", "remove_folder_on_failure", "require_same_teacher", "saved_text"]


def refuse_occupied(folder: Path) -> None:
    """Raise `RunError` if there is something at `folder` other than an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder.as_posix()}: exists and is not empty; continue it with --resume, or choose another --out"
        )


def open_run_folder(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Return the state to resume from, None for a new run.

    Raises
    ------
    RunError
        If a new run would overwrite something, or there is no run of this recipe to resume.
    """
    if not resume:
        refuse_occupied(folder)
        return None
    if not (folder / checkpoint.LAST).exists():
        # A run that was killed in its first epoch starts again; a folder without a run is refused.
        if not (folder / checkpoint.RECIPE).is_file():
            checkpoint.read_info(folder)
        return None
    state = checkpoint.load_last(folder)
    if Recipe.from_toml(state["recipe"]) != recipe:  # compare values: the saved text may lack newer fields
        raise RunError(
            f"{folder.as_posix()}: the run began with another recipe; resume it with the options it began with"
        )
    return state


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
def remove_folder_on_failure(folder: Path, *, enabled: bool) -> Iterator[None]:
    """Remove a run folder that holds only its recipe if a `DatasetError` ends the block: nothing was trained."""
    try:
        yield
    except DatasetError:
        if enabled:
            with contextlib.suppress(OSError):
                (folder / checkpoint.RECIPE).unlink()
                folder.rmdir()
        raise


def saved_text(folder: Path, key: Literal["created", "patient_regex"]) -> str | None:
    """Return a text from the ``run.json`` of a resumed run; None if it is missing."""
    try:
        value = checkpoint.read_info(folder).get(key)
    except RunError:  # killed before it was written
        return None
    return value if isinstance(value, str) else None
