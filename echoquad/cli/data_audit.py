"""``echoquad data audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoquad.cli.console import Progress, failure_line, note, say, table
from echoquad.cli.extras import require_extra
from echoquad.cli.options import Every, Flip, Matrices, reading_of

if TYPE_CHECKING:
    from echoquad_train.curation.audit import Audit
    from echoquad_train.curation.leaks import DuplicateGroup

__all__ = ["PatientRegex", "audit", "summarize"]

SHOWN = 12
"""Findings of a kind that are printed; ``audit.json`` has them all."""

PatientRegex = Annotated[
    str | None,
    typer.Option(
        "--patient-regex",
        metavar="RE",
        help="Searched for in a frame's path below its class; its first group, or all of it, is the patient. "
        "Knows patient0001_4CH, ASD3-101 and NORMS-39 where not given.",
    ),
]


def audit(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with {train,validation,test}/CLASS/**.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for audit.json and contact-sheet.png.")
    ] = None,
    patient_regex: PatientRegex = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where a patient or a picture is in more than one split.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the shortcuts' folds.")] = 0,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
) -> None:
    """Look for what spoils a data set: leaks between splits, duplicates, unreadable files, shortcuts to the class."""
    from echoquad_runtime.errors import DatasetError
    from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS
    from echoquad_runtime.storage.atomic import make_folder, write_json
    from echoquad_train.data.patients import patient_pattern

    require_extra("train")
    pattern, reading = patient_pattern(patient_regex), reading_of(matrices, flip, every, DEFAULT_READ_OPTIONS)
    from echoquad_train.curation import audit as auditing

    if out is not None:
        make_folder(out)  # told now, and not after all the work
    with Progress("reading") as progress:
        found = auditing.audit(data, pattern, reading=reading, seed=seed, progress=progress.update)
    say(summarize(found))
    for failure in found.failures:
        note(failure_line(failure).removeprefix("error: "))
    if out is not None:
        from echoquad_train.curation.contact_sheet import write_contact_sheet

        paths = out / "audit.json", out / "contact-sheet.png"
        write_json(paths[0], found.to_dict())
        write_contact_sheet(found, paths[1])
        note(f"wrote {', '.join(path.as_posix() for path in paths)}")
    if strict and found.leaks.found:
        raise DatasetError(
            f"{data.as_posix()}: {found.leaks.summary.removesuffix('; see `echoquad data audit`')}; expected none with "
            "--strict; make the splits anew with `echoquad data split`"
        )


def summarize(found: Audit) -> str:
    """Lay out an audit for a terminal."""
    blocks = [_counts(found), _figures(found), "\n".join(_findings(found))]
    return "\n\n".join(block for block in blocks if block)


def _counts(found: Audit) -> str:
    from echoquad_runtime.storage.row_names import display_name

    rows = [
        [f"{split}/{display_name(name)}", *(str(cell[key]) for key in ("frames", "patients", "unreadable"))]
        for split, by_class in found.counts.items()
        for name, cell in by_class.items()
    ]
    return table(["split/class", "frames", "patients", "unreadable"], rows)


def _figures(found: Audit) -> str:
    from echoquad_runtime.storage.row_names import display_name

    def span(figures: dict[str, float]) -> str:
        return f"{figures['median']:.0f} ({figures['p5']:.0f}-{figures['p95']:.0f})"

    rows = [
        [
            display_name(name),
            *(span(figures[key]) for key in ("width", "height", "brightness", "file_bytes")),
            ", ".join(f"{kind} {count}" for kind, count in figures["kinds"].items()),
        ]
        for name, figures in found.classes.items()
    ]
    header = ["median (5-95 %)", "width", "height", "brightness", "file bytes", "kind"]
    return table(header, rows)


def _findings(found: Audit) -> list[str]:
    from echoquad_runtime.storage.row_names import display_name
    from echoquad_train.curation.shortcut_features import KINDS

    leaks = found.leaks
    lines = [f"note: {text}" for text in found.notes]
    lines.append(f"unreadable files: {len(found.failures) or 'none'}")
    lines.append(f"patients in more than one split: {len(leaks.patients) or 'none'}")
    lines += _listed([f"  LEAK {display_name(who)}: {', '.join(splits)}" for who, splits in leaks.patients.items()])
    lines.append(f"exact duplicates: {len(leaks.exact) or 'none'}")
    lines += _listed([_twins(twins) for twins in leaks.exact])
    lines.append(f"near duplicates: {len(leaks.near) or 'none'}")
    lines += _listed([_twins(twins) for twins in leaks.near])
    if leaks.unchecked:
        lines.append(f"  {leaks.unchecked} more pairs of similar frames were not looked at closely")
    if found.frames_without_patient:
        lines.append(f"frames without a patient in their name: {found.frames_without_patient}; set --patient-regex")
    lines.append(f"shortcuts: {len(found.flagged) or 'none'}")
    for shortcut in found.shortcuts:
        what = f"{display_name(shortcut.class_name)} from {KINDS[shortcut.kind]}"
        if shortcut.auc is None:
            lines.append(f"  {what}: not measured, too few patients")
        else:
            lines.append(
                f"  {'SHORTCUT ' if shortcut.flagged else ''}{what}: AUC {shortcut.auc:.3f} by patient "
                f"(chance is below {shortcut.chance:.3f} in 99 of 100)"
            )
    return lines


def _twins(twins: DuplicateGroup) -> str:
    from echoquad_runtime.storage.row_names import display_name

    kind = {"file": "same file", "pixels": "same pixels", "near": f"similarity {twins.similarity:.3f}"}[twins.kind]
    people = "" if len(set(twins.patients)) == 1 else ", of different patients"
    people += ", IN TWO CLASSES" if twins.conflict else ""
    return f"  {'LEAK ' if twins.leak else ''}{' = '.join(map(display_name, twins.names[:4]))} ({kind}{people})"


def _listed(lines: list[str]) -> list[str]:
    return lines[:SHOWN] + ([f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
