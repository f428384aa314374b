"""Patients: whom a frame is of, told from its name, so that nobody's frames are on two sides of a split.

Frames of one patient, or of one series where no more is known, are nearly the same picture. A model that has seen one
of them knows the others, and an interval that counts each for itself is too narrow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

from echoquad_runtime.errors import ConfigError
from echoquad_train.data.dataset import LabelledFrame

__all__ = ["patient_id", "patient_of", "patient_pattern", "patients_of"]

_PATIENT: Final = re.compile(r"(?i)(?:patient|subject|subj|sub|case|pat)[-_ ]?\d+")
"""``patient0001_4CH``: the patient by name, wherever it stands."""
_SERIES: Final = re.compile(r"(.*[^-_ .])[-_ .]+(?:frame)?\d+")
"""``ASD3-101``, ``NORMS-39``: a series, then the frame's number."""


def patient_pattern(text: str | None) -> re.Pattern[str] | None:
    """Read ``--patient-regex``; None is the default rule.

    Raises
    ------
    ConfigError
        If it is no regular expression.
    """
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"--patient-regex {text!r}: no regular expression ({error}); expected one such as 'patient\\d+'"
        ) from error


def patient_of(name: str, pattern: re.Pattern[str] | None = None) -> str | None:
    r"""Tell whom a frame is of.

    Parameters
    ----------
    name
        The frame's path within its class's folder, with forward slashes; ``#12`` at its end is a clip's frame.
    pattern
        Searched for in `name` without its ending; its first group is the patient, all of it where there is none.
        None: ``patient12`` (also subject, subj, sub, case, pat) wherever it stands; else the series before a frame's
        number, as in ``ASD3-101``, within the folders that hold it; else those folders; else a clip's name.

    Returns
    -------
    str or None
        The patient or series; None where the name does not tell.
    """
    path, mark, _ = name.rpartition("#") if re.search(r"#\d+$", name) else (name, "", "")
    place = PurePosixPath(path)
    stem = place.with_suffix("").as_posix()
    if pattern is not None:
        found = pattern.search(stem)
        return (found[1] if pattern.groups else found[0]) or None if found else None
    if known := _PATIENT.search(stem):
        return re.sub(r"[-_ ]", "", known[0]).lower()
    folders = place.parent.as_posix()
    prefix = "" if folders == "." else f"{folders}/"
    if series := _SERIES.fullmatch(PurePosixPath(stem).name):
        return prefix + series[1]
    return prefix.rstrip("/") or (place.name if mark else None)


def patient_id(name: str, pattern: re.Pattern[str] | None = None) -> str:
    """Tell whom a frame called ``SPLIT/CLASS/...`` is of; one whose name does not tell is somebody by itself."""
    return patient_of(name.split("/", 2)[2], pattern) or name


def patients_of(frames: Iterable[LabelledFrame], pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
    """Tell whom each frame of a split is of; see `patient_id`.

    Parameters
    ----------
    frames
        Named ``SPLIT/CLASS/...``, as `echoquad_train.data.dataset.read_split` gives them.
    pattern
        See `patient_of`.
    """
    return tuple(patient_id(frame.name, pattern) for frame in frames)
