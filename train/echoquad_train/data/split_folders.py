"""The folders of a data set: splits, classes, and what to do where they are named otherwise or nested otherwise.

``DATA/SPLIT/CLASS/**`` is the layout. A split is recognised by its name alone, in any of the usual spellings, directly
below the data folder and nowhere else: every command takes it from `split_folders`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from echoquad_runtime.errors import DatasetError
from echoquad_runtime.frames.discovery import walk
from echoquad_runtime.storage.system_files import SkippedEntries, is_system_name

__all__ = [
    "EXPECTED_FOLDERS",
    "SPLITS",
    "canonical_split",
    "class_folders",
    "class_name_warnings",
    "listed_splits",
    "normalize_name",
    "patient_class_folders",
    "refuse_patient_folders",
    "split_folder",
    "split_folders",
]

SPLITS: Final = ("train", "validation", "test")
EXPECTED_FOLDERS: Final = f"expected {'/, '.join(SPLITS)}/ with one folder per class"

_SPELLINGS: Final = re.compile(
    r"(?P<train>train|training)|(?P<validation>validation|valid|val)|(?P<test>test|testing)", re.IGNORECASE
)
_SPLIT_SUFFIX: Final = re.compile(r"[-_ ]?(set|split|data)$", re.IGNORECASE)
"""``train_set``, ``TestData``."""
_PATIENT_FOLDER: Final = re.compile(r"(?i)(?:patient|subject|subj|sub|case|pat|pt|p|s|id)[-_ ]?\d+")
_SHOWN: Final = 6  # folders that a message names

_MISSING_VALUES: Final = frozenset(
    {"#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na", "null", "nan"}
    | {"none"}
)
"""What pandas reads as a missing value, in lower case."""


def canonical_split(folder: str) -> str | None:
    """Return ``train``, ``validation`` or ``test`` for a folder of that name, None for another one.

    The spellings are train, training; validation, valid, val; test, testing; in upper or lower case, with or without
    ``set``, ``split`` or ``data`` at the end. ``dev`` is none: it means training to some, validation to others.
    """
    if folder in SPLITS:
        return folder
    match = _SPELLINGS.fullmatch(_SPLIT_SUFFIX.sub("", folder))
    return match.lastgroup if match else None


def split_folders(data: Path) -> dict[str, str]:
    """Return the name on disk of each split folder in `data` by its canonical name, in the order of `SPLITS`.

    Raises
    ------
    DatasetError
        If `data` is not a folder, or two of its folders are spellings of one split.
    """
    if not data.is_dir():
        raise DatasetError(f"{data.as_posix()}: no such folder; {EXPECTED_FOLDERS}")
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry in data.iterdir():
        split = canonical_split(entry.name)
        if split is not None and entry.is_dir():
            found[split].append(entry.name)
    for split, names in found.items():
        if len(names) > 1:
            raise DatasetError(
                f"{data.as_posix()}: {' and '.join(sorted(names))} are both the {split} split; expected one folder for "
                "each split; merge them, or move one out of the data folder"
            )
    return {split: names[0] for split, names in found.items() if names}


def split_folder(data: Path, split: str) -> Path:
    """Return the folder of a split of `data`; another name than that of a split is a folder's own name.

    Raises
    ------
    DatasetError
        If it is missing.
    """
    folders = split_folders(data)
    folder = data / folders.get(canonical_split(split) or "", split)
    if not folder.is_dir():
        found = ", ".join(sorted(e.name for e in data.iterdir() if not is_system_name(e.name))[:_SHOWN]) or "nothing"
        hint = "" if folders else "; make splits with `echoquad data split`"
        raise DatasetError(f"{data.as_posix()}: no {split}/ folder, only {found}; {EXPECTED_FOLDERS}{hint}")
    return folder


def listed_splits(data: Path, *, strict: bool = False) -> tuple[dict[str, str], list[str]]:
    """Return the `split_folders` of `data`, and its other folders with frames, which are not read.

    No split folder at all means that `data` has class folders, or nothing.

    Parameters
    ----------
    data
        The data folder.
    strict
        Refuse other folders with frames. Without it they are refused only if there is no training split: ``ASD``,
        ``NORM`` and ``test`` may be three classes.

    Raises
    ------
    DatasetError
        If `data` is not a folder, has two spellings of one split, or split folders beside others as described.
    """
    folders = split_folders(data)
    if not folders:
        return {}, []
    splits = set(folders.values())
    others = sorted(
        name for name in _names_on_disk(data) if name not in splits and next(walk(data / name), None) is not None
    )
    if others and (strict or "train" not in folders):
        raise DatasetError(
            f"{data.as_posix()}: {', '.join(sorted(splits))} {'are' if len(splits) > 1 else 'is'} named as a split is, "
            f"{', '.join(others[:_SHOWN])} {'are' if len(others) > 1 else 'is'} not; expected only split folders or "
            "only class folders; rename a class that is called as a split, or move the other folders away"
        )
    return folders, others


def normalize_name(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): macOS stores "é" as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def class_folders(folder: Path, skipped: SkippedEntries | None = None) -> dict[str, list[str]]:
    """Return the class folders in `folder`: the names on disk of each class, by class name in sorted order.

    Composed and decomposed spellings of a name (`normalize_name`) are one class. Hidden and system folders, and names
    that begin with two underscores, are no classes; hidden and system entries are counted in `skipped`.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(entry.name for entry in folder.iterdir() if _is_class(entry, skipped)):
        found.setdefault(normalize_name(name), []).append(name)
    return dict(sorted(found.items()))


def _names_on_disk(folder: Path) -> list[str]:
    return [name for names in class_folders(folder).values() for name in names]


def _is_class(entry: Path, skipped: SkippedEntries | None) -> bool:
    if is_system_name(entry.name):
        if skipped is not None:
            skipped.add(entry.name)
        return False
    return entry.is_dir() and not entry.name.startswith("__")


def refuse_patient_folders(folder: Path) -> None:
    """Refuse a folder ``PATIENT/CLASS/**``; see `patient_class_folders`.

    Raises
    ------
    DatasetError
        If patients have class folders where classes have patient folders.
    """
    if classes := patient_class_folders(folder):
        patients = ", ".join(_names_on_disk(folder)[:3])
        raise DatasetError(
            f"{folder.as_posix()}: {patients} are named as patients are and hold {', '.join(classes[:6])}; expected "
            "folders named after classes, with the patients inside; `echoquad data split` writes them so"
        )


def patient_class_folders(folder: Path) -> list[str]:
    """Return the classes of a folder ``PATIENT/CLASS/**``, sorted; nothing of a folder of classes.

    A folder is one of patients if all folders in it are named as patients are, such as ``P001`` or ``patient12``, and
    hold two or more names in all, fewer than there are patients, none of which is named so.
    """
    patients = _names_on_disk(folder)
    if len(patients) < 3 or not all(map(_PATIENT_FOLDER.fullmatch, patients)):
        return []
    inner = {name for patient in patients for name in class_folders(folder / patient)}
    named_so = any(map(_PATIENT_FOLDER.fullmatch, inner)) or any(map(canonical_split, inner))
    return sorted(inner) if 2 <= len(inner) < len(patients) and not named_so else []


def class_name_warnings(classes: Iterable[str]) -> list[str]:
    """Return a sentence for each class whose name other programs read as something else in a table."""
    return [
        f"class {name!r}: pandas and spreadsheets read this name as {meaning}, not as text; rename the folder, for "
        f"example to class-{name}"
        for name in classes
        if (meaning := _misread_as(name))
    ]


def _misread_as(name: str) -> str:
    text = name.strip().casefold()
    if text in _MISSING_VALUES:
        return "a missing value"
    if text in ("true", "false"):
        return "a truth value"
    try:
        float(text.replace("_", "x"))  # Python alone reads 1_000 as a number
    except ValueError:
        return ""
    return "a number"
