"""Patient identifiers, parsed from frame names.

Frames of one patient, or of one series where the patient is unknown, are nearly the same picture. Splits, bootstrap
intervals and cross-fitting therefore keep the frames of a patient together.
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
"""``patient0001_4CH``: a named patient, anywhere in the path."""
_SERIES: Final = re.compile(r"(.*[^-_ .])[-_ .]+(?:frame)?\d+")
"""``ASD3-101``, ``NORMS-39``: a series followed by a frame number."""


def patient_pattern(text: str | None) -> re.Pattern[str] | None:
    """Compile ``--patient-regex``; None selects the default rule of `patient_of`.

    Raises
    ------
    ConfigError
        If `text` is not a valid regular expression.
    """
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"--patient-regex {text!r}: invalid regular expression ({error}); expected one such as 'patient\\d+'"
        ) from error


def patient_of(name: str, pattern: re.Pattern[str] | None = None) -> str | None:
    r"""Return the patient or series in a frame's name, or None if the name contains neither.

    Parameters
    ----------
    name
        The frame's path within its class folder, with forward slashes; a trailing ``#12`` selects a frame of a clip.
    pattern
        Searched for in `name` without its extension. The patient is the first group, or the whole match if there is no
        group. None applies the default rule, the first of these that matches: ``patient12`` (also subject, subj, sub,
        case, pat) anywhere; the series before a frame number, as in ``ASD3-101``, together with its folders; the
        folders; the file name of a clip.
    """
    path, mark, _ = name.rpartition("#") if re.search(r"#\d+$", name) else (name, "", "")
    file = PurePosixPath(path)
    stem = file.with_suffix("").as_posix()
    if pattern is not None:
        match = pattern.search(stem)
        return (match[1] if pattern.groups else match[0]) or None if match else None
    if match := _PATIENT.search(stem):
        return re.sub(r"[-_ ]", "", match[0]).lower()
    folders = file.parent.as_posix()
    prefix = "" if folders == "." else f"{folders}/"
    if series := _SERIES.fullmatch(PurePosixPath(stem).name):
        return prefix + series[1]
    return prefix.rstrip("/") or (file.name if mark else None)


def patient_id(name: str, pattern: re.Pattern[str] | None = None) -> str:
    """Return the patient of a frame called ``SPLIT/CLASS/...``, or the frame's name if the patient is unknown."""
    return patient_of(name.split("/", 2)[2], pattern) or name


def patients_of(frames: Iterable[LabelledFrame], pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
    """Return the `patient_id` of each frame."""
    return tuple(patient_id(frame.name, pattern) for frame in frames)
