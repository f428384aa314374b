"""Run folders at their beginning: a new one, one to go on with, and what stands in the way of either."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from echoquad_runtime.errors import DatasetError, RunError
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.training.distillation import Teacher

__all__ = ["abandoned_on_failure", "begun", "open_folder", "require_same_teacher"]


def open_folder(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Give the state to resume from, None for a new run; refuse to train over another run."""
    label = folder.as_posix()
    held = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if not resume:
        if held:
            raise RunError(f"{label}: is there and not empty; go on with it by --resume, or choose another --out")
        return None
    if not (folder / checkpoint.LAST).exists():
        # A run that was killed before its first epoch was done begins again; where there is no run, that is refused.
        if not (folder / checkpoint.RECIPE).is_file():
            checkpoint.read_info(folder)
        return None
    state = checkpoint.load_last(folder)
    if Recipe.from_toml(state["recipe"]) != recipe:  # as text, it may lack fields that have come since
        raise RunError(f"{label}: the run was begun with another recipe; resume it with the options it was begun with")
    return state


def require_same_teacher(folder: Path, state: dict[str, Any] | None, teacher: Teacher | None, *, resume: bool) -> None:
    """Refuse to go on with a run under another teacher than it was begun with, without it, or with a first one."""
    if not resume:
        return
    if state:
        begun = state.get("teacher")  # not there in a run of a release that knew none
    else:
        try:
            facts = checkpoint.read_info(folder).get("teacher")
        except RunError:  # killed before it was written
            return
        begun = facts.get("weights_sha256") if isinstance(facts, dict) else None
    label = folder.as_posix()
    if begun and teacher is None:
        raise RunError(f"{label}: the run was begun with a teacher; resume it with the same --teacher RUN")
    if teacher and begun != teacher.facts["weights_sha256"]:
        found = "another teacher" if begun else "no teacher"
        raise RunError(f"{label}: the run was begun with {found}; resume it with the options it was begun with")


@contextlib.contextmanager
def abandoned_on_failure(folder: Path, *, unless: bool) -> Iterator[None]:
    """Take back a run folder that holds no more than its recipe: nothing was trained, so nothing is to be resumed."""
    try:
        yield
    except DatasetError:
        if not unless:
            with contextlib.suppress(OSError):
                (folder / checkpoint.RECIPE).unlink()
                folder.rmdir()
        raise


def begun(folder: Path, key: Literal["created", "patient_regex"]) -> str | None:
    """Find when a run that is resumed was begun, or by what regular expression it knows its patients."""
    try:
        value = checkpoint.read_info(folder).get(key)
    except RunError:  # killed before it was written
        return None
    return value if isinstance(value, str) else None
