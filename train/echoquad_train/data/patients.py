"""Patient identifiers, parsed from frame names.

Frames of one patient, or of one series where the patient is unknown, are nearly the same picture. Splits, bootstrap
intervals and cross-fitting therefore keep the frames of a patient together. Where a name can be read in two ways, the
rule prefers to join frames: patients that are joined by mistake make a split coarser, a patient that is divided makes
figures too good.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from echoquad_runtime.errors import ConfigError
from echoquad_train.data.dataset import LabelledFrame
from echoquad_train.data.split_folders import canonical_split, normalize_name

__all__ = ["PatientReading", "patient_id", "patient_of", "patient_pattern", "patients_of", "read_patient"]

_PATIENT: Final = re.compile(r"(?i)(?:patient|subject|subj|sub|case|pat)[-_ ]?\d+")
"""``patient0001_4CH``: a named patient, anywhere in the path."""
_SERIES: Final = re.compile(r"(.*[^-_ .])[-_ .]+(?:frame)?\d+")
"""``ASD3-101``, ``NORMS-39``: a series followed by a frame number."""

_EXAM_WORDS: Final = "exam|examination|study|stu|std|st|echo|tte|tee|scan|visit|session|ses"
_PART_WORDS: Final = (
    "clips?|cine|loops?|videos?|vid|movie|file|frames?|fr|img|images?|im|picture|still|slice|seq|sequence|series|ser|se"
    "|acq|acquisition|run|rep|beat|cycle"
)
_VIEW_WORDS: Final = (
    "views?|phase|ed|es|diastole|systole|diastolic|systolic|baseline|followup|date"
    "|a[2345]c|ap[24]|[2345]ch|[24]c|plax|psax|sax|lax|apical|subcostal|parasternal"
)
_SOURCE_WORDS: Final = "site|center|centre|hospital|clinic|group|cohort|batch|part|set"
_OTHER_WORDS: Final = (
    "vendor|machine|scanner|device|fold|data|dataset|raw|export|cropped|dicom|dcm|png|jpe?g|bmp|tiff?|avi|mp4"
)
_COMMON: Final = re.compile(
    rf"(?:{_EXAM_WORDS}|{_PART_WORDS}|{_VIEW_WORDS}|{_SOURCE_WORDS}|{_OTHER_WORDS})(?P<number>\d*)", re.IGNORECASE
)
_LETTERED: Final = re.compile(rf"(?:{_SOURCE_WORDS})[a-z]", re.IGNORECASE)
"""``siteA``."""
_EXAM: Final = re.compile(rf"(?:{_EXAM_WORDS})[-_ ]?\d+", re.IGNORECASE)
_DATE: Final = re.compile(
    r"(?<![0-9A-Za-z])(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?:[-_T]?\d{6})?(?!\d)"
)
_TOKEN: Final = re.compile(r"[^-_ ]+")


class PatientReading(NamedTuple):
    """How the patient of a frame was found.

    Attributes
    ----------
    patient
        The patient; None if the name tells none.
    rule
        What named the patient, in words.
    folder
        The folders below the class down to the one that names the patient; empty for another rule.
    """

    patient: str | None
    rule: str
    folder: str = ""


def patient_pattern(text: str | None) -> re.Pattern[str] | None:
    """Compile ``--patient-regex``; None selects the default rule of `read_patient`.

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


def read_patient(name: str, pattern: re.Pattern[str] | None = None) -> PatientReading:
    r"""Find the patient or series in a frame's name.

    Names are compared in Unicode's composed form.

    Parameters
    ----------
    name
        The frame's path within its class folder, with forward slashes; a trailing ``#12`` selects a frame of a clip.
    pattern
        Searched for in `name` without its extension. The patient is the first group, or the whole match if there is no
        group. None applies the default rule, the first of these that matches:

        1. ``patient12`` (also subject, subj, sub, case, pat) anywhere;
        2. the outermost folder that is an identifier: it has a digit, as ``P001`` has; one of digits alone counts
           only if no folder that is a name contains it;
        3. an identifier with letters and digits in the file's name: the series before a frame number, as in
           ``ASD3-101``, or what precedes words of views and phases, as in ``P001_A4C``;
        4. the other series, together with its folders, as ``NORMS`` in ``NORMS-39``;
        5. the outermost folder that is a name;
        6. the exam, as ``exam7``; otherwise all folders;
        7. the file name of a clip.

        Words for views, phases, clips, exams, sites and files (``A4C``, ``ED``, ``clip1``, ``site2``), dates and the
        names of splits are never a patient, and neither are they part of one: ``P001_A4C_clip2`` is ``P001``.
    """
    path, mark, _ = name.rpartition("#") if re.search(r"#\d+$", name) else (name, "", "")
    file = PurePosixPath(normalize_name(path))
    stem = file.with_suffix("").as_posix()
    if pattern is not None:
        match = pattern.search(stem)
        return PatientReading((match[1] if pattern.groups else match[0]) or None if match else None, "--patient-regex")
    if match := _PATIENT.search(stem):
        return PatientReading(re.sub(r"[-_ ]", "", match[0]).lower(), "a name such as patient12")
    base = PurePosixPath(stem).name
    if folders := file.parent.parts:
        return _read_nested(folders, base)
    if series := _SERIES.fullmatch(base):
        return PatientReading(_identifier(series[1]) or series[1], "the file name")
    if _is_code(found := _identifier(base)) and found != base:
        return PatientReading(found, "the file name")
    return PatientReading(file.name, "the file of a clip") if mark else PatientReading(None, "nothing")


def _read_nested(folders: Sequence[str], base: str) -> PatientReading:
    """Find the patient of a file without the extension in folders below its class: rules 2 to 6 of `read_patient`."""
    identifiers = [_folder_identifier(folder) for folder in folders]
    outermost = next(filter(None, identifiers), "")
    numbered = [found for found in identifiers if _has_digit(found) and (_is_code(found) or found == outermost)]
    if numbered:
        return _of_folder(folders, identifiers.index(numbered[0]), numbered[0])
    series = _SERIES.fullmatch(base)
    found = _identifier(series[1] if series else base)
    if found != base and (_is_code(found) or (series and _has_digit(found) and not outermost)):
        return PatientReading(found, "the file name")
    if series and found and not _has_digit(found):
        return PatientReading("/".join([*folders, found]), "the file name")
    if outermost:
        return _of_folder(folders, identifiers.index(outermost), outermost)
    for index, folder in enumerate(folders):
        if _EXAM.fullmatch(folder):
            return _of_folder(folders, index, folder)
    return _of_folder(folders, len(folders) - 1, "/".join(folders))


def _of_folder(folders: Sequence[str], index: int, patient: str) -> PatientReading:
    return PatientReading(patient, "a folder", "/".join(folders[: index + 1]))


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))


def _is_code(text: str) -> bool:
    """Return whether a text has letters and digits, as the codes of patients have."""
    return _has_digit(text) and any(map(str.isalpha, text))


def _folder_identifier(name: str) -> str:
    """Return the `_identifier` of a folder's name, without numbers that follow it: ``P001_2`` is ``P001``."""
    found = _identifier(name)
    first, _, rest = found.replace("-", "_").replace(" ", "_").partition("_")
    numbered = _is_code(first) and rest.replace("_", "").isdigit()
    return first if numbered else found


def _identifier(name: str) -> str:
    """Return a name without common words at its ends and with dates replaced; empty if nothing else is left."""
    if canonical_split(name):
        return ""
    text = _DATE.sub("date", name)
    begin = end = -1
    follows = False  # whether the previous token is a common word without its number
    for token in _TOKEN.finditer(text):
        word = _COMMON.fullmatch(token[0])
        if word or _LETTERED.fullmatch(token[0]):
            follows = word is not None and not word["number"]
        elif follows and (token[0].isdigit() or len(token[0]) == 1):
            follows = False
        else:
            begin = token.start() if begin < 0 else begin
            end, follows = token.end(), False
    return text[begin:end] if begin >= 0 else ""


def patient_of(name: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """Return the patient in a frame's name by the rule of `read_patient`, or None if the name tells none."""
    return read_patient(name, pattern).patient


def patient_id(name: str, pattern: re.Pattern[str] | None = None) -> str:
    """Return the patient of a frame called ``SPLIT/CLASS/...``, or the frame's name if the patient is unknown."""
    return patient_of(name.split("/", 2)[2], pattern) or name


def patients_of(frames: Iterable[LabelledFrame], pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
    """Return the `patient_id` of each frame."""
    return tuple(patient_id(frame.name, pattern) for frame in frames)
