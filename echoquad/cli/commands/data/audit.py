"""``echoquad data audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoquad.cli.framework.console import (
    Progress,
    describe_failure,
    format_table,
    print_result,
    print_skipped,
    print_status,
)
from echoquad.cli.framework.extras import require_extra
from echoquad.cli.framework.options import Every, Flip, Matrices, PatientRegex, read_options

if TYPE_CHECKING:
    from echoquad_train.curation.audit import Audit
    from echoquad_train.curation.leaks import DuplicateGroup

__all__ = ["audit"]

MAX_LISTED = 12
"""Findings of a kind that are printed; ``audit.json`` has them all."""


def audit(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with {train,validation,test}/CLASS/**.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for audit.json and contact-sheet.png.")
    ] = None,
    patient_regex: PatientRegex = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 if a patient or a picture is in more than one split.")
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Seed of the folds that measure shortcuts.")
    ] = 0,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
) -> None:
    """Check a data set: leaks between splits, duplicates, unreadable files, features that predict the class."""
    from echoquad_runtime.errors import DatasetError
    from echoquad_runtime.storage.atomic import make_folder, write_json
    from echoquad_train.data.patients import patient_pattern

    require_extra("train")
    pattern = patient_pattern(patient_regex)
    from echoquad_train.curation import audit as auditing

    if out is not None:
        make_folder(out)  # reject a wrong folder before the work
    with Progress("reading") as progress:
        found = auditing.audit(
            data, pattern, reading=read_options(matrices, flip, every), seed=seed, progress=progress.update
        )
    print_result(_summarize(found))
    print_skipped(found.skipped)
    for failure in found.failures:
        print_status(describe_failure(failure))
    if out is not None:
        from echoquad_train.curation.contact_sheet import write_contact_sheet

        paths = out / "audit.json", out / "contact-sheet.png"
        write_json(paths[0], found.to_dict())
        write_contact_sheet(found, paths[1])
        print_status(f"wrote {', '.join(path.as_posix() for path in paths)}")
    if strict and found.leaks.found:
        raise DatasetError(
            f"{data.as_posix()}: {found.leaks.summary.removesuffix('; see `echoquad data audit`')}; --strict allows "
            "none; divide the frames again with `echoquad data split`"
        )


def _summarize(found: Audit) -> str:
    blocks = [_counts(found), _figures(found), "\n".join(_findings(found))]
    return "\n\n".join(block for block in blocks if block)


def _counts(found: Audit) -> str:
    rows = [
        [f"{split}/{name}", *(str(cell[key]) for key in ("frames", "patients", "unreadable"))]
        for split, by_class in found.counts.items()
        for name, cell in by_class.items()
    ]
    return format_table(["split/class", "frames", "patients", "unreadable"], rows)


def _figures(found: Audit) -> str:
    def spread(figures: dict[str, float]) -> str:
        return f"{figures['median']:.0f} ({figures['p5']:.0f}-{figures['p95']:.0f})"

    rows = [
        [
            name,
            *(spread(figures[key]) for key in ("width", "height", "brightness", "file_bytes")),
            ", ".join(f"{kind} {count}" for kind, count in figures["kinds"].items()),
        ]
        for name, figures in found.classes.items()
    ]
    return format_table(["median (5-95 %)", "width", "height", "brightness", "file bytes", "format"], rows)


def _findings(found: Audit) -> list[str]:
    from echoquad_runtime.storage.row_names import display_name
    from echoquad_train.curation.shortcut_features import KINDS

    leaks = found.leaks
    lines = [f"note: {display_name(text)}" for text in found.notes]
    lines += _patients(found)
    lines.append(f"unreadable files: {len(found.failures) or 'none'}")
    lines.append(f"patients in more than one split: {len(leaks.patients) or 'none'}")
    lines += _shorten([f"  LEAK {display_name(who)}: {', '.join(splits)}" for who, splits in leaks.patients.items()])
    lines.append(f"exact duplicates: {len(leaks.exact) or 'none'}")
    lines += _shorten([_duplicates(group) for group in leaks.exact])
    lines.append(f"near duplicates: {len(leaks.near) or 'none'}")
    lines += _shorten([_duplicates(group) for group in leaks.near])
    if leaks.unchecked:
        lines.append(f"  {leaks.unchecked} more pairs of similar frames were not compared")
    lines.append(f"shortcuts: {len(found.flagged) or 'none'}")
    for shortcut in found.shortcuts:
        feature = f"{display_name(shortcut.class_name)} from {KINDS[shortcut.kind]}"
        if shortcut.auc is None:
            lines.append(f"  {feature}: not measured, too few patients")
        else:
            lines.append(
                f"  {'SHORTCUT ' if shortcut.flagged else ''}{feature}: AUC {shortcut.auc:.3f} by patient "
                f"(chance is below {shortcut.chance:.3f} in 99 of 100)"
            )
    return lines


def _patients(found: Audit) -> list[str]:
    """Return how patients were read, so that a person can say whether it is right."""
    from echoquad_runtime.storage.row_names import display_name

    reading = found.patient_reading
    lines = [f"patients in the names: {f'{reading.patients}, {reading.frames_each}' if reading.patients else 'none'}"]
    lines += [f"  {frames} frames name it by {rule}" for rule, frames in reading.rules.items()]
    lines += [f"  {display_name(patient)} from {display_name(name)}" for name, patient in reading.examples]
    lines += [f"  DOUBT {display_name(text)}" for text in reading.doubts]
    if reading.without:
        lines.append(f"  {reading.without} frames have names without a patient; each counts as one")
    return [*lines, "  is this right? if not, use --patient-regex"]


def _duplicates(group: DuplicateGroup) -> str:
    from echoquad_runtime.storage.row_names import display_name

    kind = {"file": "same file", "pixels": "same pixels", "near": f"similarity {group.similarity:.3f}"}[group.kind]
    patients = "" if len(set(group.patients)) == 1 else ", of different patients"
    conflict = ", IN TWO CLASSES" if group.conflict else ""
    names = " = ".join(map(display_name, group.names[:4]))
    return f"  {'LEAK ' if group.leak else ''}{names} ({kind}{patients}{conflict})"


def _shorten(lines: list[str]) -> list[str]:
    return lines[:MAX_LISTED] + ([f"  and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else [])
