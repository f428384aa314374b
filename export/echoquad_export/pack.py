"""Packing: from a run to a bundle in its place, or to nothing at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from echoquad_export.card import model_card
from echoquad_export.golden import make_golden
from echoquad_export.graph import IR_VERSION, OPSET, build_graph
from echoquad_export.parity import Gate, Parity, infer_all, measure_parity, summary
from echoquad_runtime.bundle import (
    GOLDEN,
    INTENDED_USE,
    MANIFEST,
    MODEL_CARD,
    PRECISIONS,
    SCHEMA,
    Bundle,
    encode_golden,
    encode_manifest,
    model_file,
)
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError, OutputError, RunError, UsageError, VerificationError
from echoquad_runtime.files import make_folder, output_errors, write_bytes
from echoquad_runtime.session import OnnxEngine
from echoquad_runtime.verify import Verification, verify
from echoquad_train.checkpoint import Run, load_run
from echoquad_train.dataset import Split, load_quadrants, read_split
from echoquad_train.engine import TorchEngine
from echoquad_train.record import versions

__all__ = ["BUILT_PRECISIONS", "Exported", "check_precisions", "export_run"]

BUILT_PRECISIONS: Final = ("fp32",)
REFERENCE_BATCH: Final = 8  # frames that the training code judges at a time

_FILE_MANAGERS: Final = (".DS_Store", "Thumbs.db", "desktop.ini")  # what these leave wherever they look


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle in its place: folder, parity by precision, and what its golden frames showed here."""

    folder: Path
    parities: tuple[Parity, ...]
    verification: Verification
    unreadable: int


def check_precisions(wanted: Sequence[str]) -> tuple[str, ...]:
    """Refuse precisions that are unknown or not built by this release.

    Raises
    ------
    UsageError
        If there is one, or none is asked for.
    """
    unknown = [name for name in wanted if name not in PRECISIONS]
    if unknown or not wanted:
        raise UsageError(
            f"--precision {','.join(wanted)!r}: expected some of {', '.join(PRECISIONS)}, separated by commas"
        )
    later = [name for name in wanted if name not in BUILT_PRECISIONS]
    if later:
        raise UsageError(
            f"--precision {','.join(later)}: not built by this release; expected {', '.join(BUILT_PRECISIONS)}"
        )
    return tuple(dict.fromkeys(wanted))


def export_run(
    folder: Path,
    out: Path,
    *,
    precisions: Sequence[str] = ("fp32",),
    parity_data: Path | None = None,
    gate: Gate | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export a run's best checkpoint to a bundle.

    Everything is written beside `out` and takes its name only when parity and verification have passed. A
    bundle that `out` held before is there, unchanged, until then.

    Parameters
    ----------
    folder
        The run.
    out
        The bundle's folder: new, empty, or an older bundle with nothing else in it.
    precisions
        Graphs to build.
    parity_data
        The data folder whose ``validation`` frames parity is measured on; None is the one that the run was trained on.
    gate
        Other parity bounds than the precision's own.
    progress
        Called with a phrase as each step begins.

    Raises
    ------
    ParityError
        If a graph does not decide as the training code does; nothing is left of it.
    VerificationError
        If the finished bundle does not give its own golden answers.
    RunError, DatasetError, UsageError, OutputError
        If the run, the data, the precisions or the target stand in the way.
    """
    wanted = check_precisions(precisions)
    _check_target(out)
    progress("reading the run")
    run = load_run(folder)
    split = _parity_split(run, parity_data)
    store = load_quadrants(split, run.contract)

    progress(f"judging {len(store.names)} validation frames with the training code")
    reference_engine = TorchEngine(run.model, run.contract)
    reference = infer_all(reference_engine, store.quadrants, REFERENCE_BATCH)
    golden = make_golden(reference_engine)

    target = out.resolve()  # a link stays a link, and "." has a name
    with _beside(target) as partial:
        files: dict[str, bytes] = {GOLDEN: encode_golden(golden)}
        for precision in wanted:
            progress(f"building the {precision} graph")
            files[model_file(precision)] = build_graph(run.model, run.contract)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        training = _provenance(run)
        draft = _manifest(run.contract, files, wanted, training, {}, created)
        for name, data in {**files, MANIFEST: draft}.items():
            write_bytes(partial / name, data)

        # Parity is taken through the bundle reader, on the bytes as they lie on the disk: what a cart will do.
        bundle = Bundle(partial)
        parities = []
        for precision in wanted:
            progress(f"measuring parity of the {precision} graph")
            engine = OnnxEngine(bundle, precision=precision, device="cpu")
            parity = measure_parity(reference, engine, store.quadrants, f"{split.name} split", gate=gate)
            parity.require()
            parities.append(parity)

        figures = summary(parities)
        files[MODEL_CARD] = model_card(run.contract, training, figures, created).encode()
        final = _manifest(run.contract, files, wanted, training, figures, created)
        write_bytes(partial / MODEL_CARD, files[MODEL_CARD])
        write_bytes(partial / MANIFEST, final)
        progress("replaying the golden frames")
        for precision in wanted:
            verification = verify(partial, device="cpu", precision=precision)
            if not verification.passed:
                raise VerificationError(
                    f"{out.as_posix()}: the {precision} graph misses its golden frames "
                    f"(worst: {verification.worst_frame}, |dp| {verification.max_abs_dprobability:.3g}); "
                    "no bundle was written"
                )
        _move_into_place(partial, target)
    return Exported(out, tuple(parities), verification, len(store.failures))


def _check_target(out: Path) -> None:
    """Refuse a target that holds anything but an older bundle: what lies in it is removed with it."""
    if not out.exists():
        return
    label = out.as_posix()
    found = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name}
    if found and not (out / MANIFEST).is_file():
        raise OutputError(f"{label}: is there and is no bundle; it is left as it is; choose another --out")
    others = sorted(found - {MANIFEST, GOLDEN, MODEL_CARD, *map(model_file, PRECISIONS), *_FILE_MANAGERS})
    if others:
        raise OutputError(
            f"{label}: holds {', '.join(others[:6])} beside a bundle; it is left as it is; move that away, or choose "
            "another --out"
        )


def _parity_split(run: Run, parity_data: Path | None) -> Split:
    try:
        data = parity_data or Path(run.info["data"]["folder"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{run.folder.as_posix()}: run.json names no data folder; name one with --parity DATA"
        ) from error
    try:
        return read_split(data, "validation", run.contract.classes)
    except DatasetError as error:
        if parity_data is not None:
            raise
        raise RunError(
            f"{run.folder.as_posix()}: the frames it was validated on are gone ({error}); "
            "name a data folder with --parity DATA"
        ) from error


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Make a hidden folder beside `out`, removed when the block ends, however it ends."""
    make_folder(out.parent)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with output_errors(partial):
        partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, out: Path) -> None:
    """Rename over an older bundle. No system renames over a full folder, so the old one steps aside first."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    with output_errors(out):
        held = out.exists()
        if held:
            out.rename(aside)
        try:
            partial.rename(out)
        except BaseException:
            if held and not out.exists():
                aside.rename(out)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def _manifest(
    contract: Contract,
    files: dict[str, bytes],
    precisions: Sequence[str],
    training: dict[str, Any],
    parity: dict[str, Any],
    created: str,
) -> bytes:
    return encode_manifest(
        {
            "schema": SCHEMA,
            "created": created,
            "contract": contract.to_dict(),
            "contract_sha256": contract.sha256,
            "files": {
                name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
            },
            "precisions": {name: {"opset": OPSET, "ir_version": IR_VERSION} for name in precisions},
            "default_precision": precisions[0],
            "parity": parity,
            "training": training,
            "versions": versions(),
            "intended_use": INTENDED_USE,
        }
    )


def _provenance(run: Run) -> dict[str, Any]:
    """Give what a bundle says of its training. Folders and file names stay behind: they can name patients."""
    info, recipe = run.info, run.recipe
    if recipe.weights not in ("imagenet", "none"):
        recipe = recipe.replace(weights="file")
    try:
        kept = {
            key: info[key]
            for key in (
                "created",
                "backbone",
                "seed",
                "device",
                "precision",
                "epochs",
                "best",
                "versions",
                "git_commit",
            )
        }
        data = info["data"]
        return {
            **kept,
            "frames": data["frames"],
            "unreadable": len(data["unreadable"]),
            "recipe": recipe.to_toml(),
        }
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.folder.as_posix()}: run.json lacks {error}; train again") from error
