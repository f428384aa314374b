"""Export of a run or an ensemble to a bundle: complete and checked, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from echoquad_export.graph.activation_map import check_activation_maps
from echoquad_export.graph.build import IR_VERSION, OPSET, build_graph
from echoquad_export.graph.frame_graph import load_frames, make_frame_graph
from echoquad_export.graph.typicality import RANK, ReferenceEngine, fit_typicality
from echoquad_export.packing.manifest import new_manifest
from echoquad_export.packing.validation import measure_validation
from echoquad_export.parity.golden import PHANTOM, golden_source, pack_golden
from echoquad_export.parity.metrics import measure_run
from echoquad_export.parity.parity import Gate, Parity, measure_parity
from echoquad_export.precision.calibration_set import CALIBRATION_FRAMES, CalibrationSet, draw_calibration_set
from echoquad_export.precision.fp16 import to_fp16
from echoquad_export.precision.int8 import build_int8
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.code_table import read_code_table
from echoquad_runtime.bundle.manifest import (
    CODES,
    GOLDEN,
    MANIFEST,
    MODEL_CARD,
    PRECISIONS,
    SIGNATURE,
    VALIDATION,
    encode_manifest,
    frame_graph_file,
    model_file,
)
from echoquad_runtime.bundle.model_card import model_card
from echoquad_runtime.bundle.signing import check_private_key, sign_bundle
from echoquad_runtime.bundle.typicality import typicality_thresholds
from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import flatten, run_in_batches
from echoquad_runtime.errors import DatasetError, OutputError, RunError, UsageError, VerificationError
from echoquad_runtime.frames.formats import ReadOptions
from echoquad_runtime.storage.atomic import write_bytes
from echoquad_runtime.storage.atomic_folder import atomic_folder
from echoquad_runtime.verify.verify import Verification, verify
from echoquad_train.data.dataset import Split, load_quadrants, read_split
from echoquad_train.data.split_folders import split_folders
from echoquad_train.runs.checkpoint import Run
from echoquad_train.runs.ensemble_folder import Ensemble, load_trained

__all__ = ["Exported", "check_precisions", "export_run"]

REFERENCE_BATCH: Final = 8  # frames per batch of the training code
CAM_FRAMES: Final = 8  # frames on which class activation maps are compared with logits
TYPICAL_FRAMES: Final = 1000  # training frames that the typicality score is fitted to, at most

_FILE_MANAGERS: Final = (".DS_Store", "Thumbs.db", "desktop.ini")  # files of Finder and Explorer


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished bundle.

    Attributes
    ----------
    folder
        The bundle folder.
    parities
        One per precision.
    verification
        Result of replaying the golden frames, in the last precision.
    unreadable
        Number of validation frames that could not be read and were skipped.
    """

    folder: Path
    parities: tuple[Parity, ...]
    verification: Verification
    unreadable: int


def check_precisions(wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the precisions without duplicates.

    Raises
    ------
    UsageError
        If a precision is unknown, or none is given.
    """
    unknown = [name for name in wanted if name not in PRECISIONS]
    if unknown or not wanted:
        raise UsageError(
            f"--precision {','.join(wanted)!r}: expected some of {', '.join(PRECISIONS)}, separated by commas"
        )
    return tuple(dict.fromkeys(wanted))


def export_run(
    folder: Path,
    out: Path,
    *,
    precisions: Sequence[str] = ("fp32",),
    calibrate_data: Path | None = None,
    calibration_frames: int = CALIBRATION_FRAMES,
    parity_data: Path | None = None,
    golden: str = PHANTOM.name,
    gate: Gate | None = None,
    frame_graph: bool = False,
    sign_key: Path | None = None,
    codes: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export a run's best checkpoint, or an ensemble, to a bundle.

    The bundle is written beside `out` and takes its place only after parity and verification have passed. Until then,
    an older bundle at `out` stays unchanged.

    Parameters
    ----------
    folder
        A run that ``echoquad train`` wrote, or an ensemble.
    out
        The bundle folder to write.
    precisions
        Graphs to build; the first is the bundle's default.
    calibrate_data
        Data folder whose training frames calibrate int8 and the typicality score; None is the run's own. Without
        training frames the bundle has no such score.
    calibration_frames
        Number of calibration frames.
    parity_data
        Data folder whose validation frames prove parity; None is the run's own.
    golden
        Source of the golden frames: ``phantom``, ``validation`` or a folder of frames.
    gate
        Parity gate for all precisions; None is the default gate of each precision.
    frame_graph
        Whether to add the graphs from frame to decision.
    sign_key
        PEM file with the private key that signs the bundle; None leaves it unsigned.
    codes
        TOML file with the code table of structured reports; None leaves it out.
    progress
        Called with a phrase at the beginning of each step.

    Raises
    ------
    ParityError
        If a graph does not decide as the training code does, or its class activation maps contradict its logits.
    VerificationError
        If the finished bundle does not reproduce its golden answers.
    RunError, DatasetError, InputNotFoundError, UsageError, OutputError, ConfigError, MissingExtraError
        If the run, the data, the golden frames, the precisions, the target, the key or the codes cannot be used.
    """
    wanted = check_precisions(precisions)
    _check_target(out)
    if sign_key is not None:
        check_private_key(sign_key)
    progress("reading the run")
    run = load_trained(folder)
    table = None if codes is None else read_code_table(codes, run.contract.classes)
    split = _parity_split(run, parity_data)
    calibration = _calibration_set(run, calibrate_data, calibration_frames) if "int8" in wanted else None
    source = golden_source(golden, split.files())
    store = load_quadrants(split, run.contract)

    reference_engine = ReferenceEngine(run.model, run.contract)
    typicality = _fit_typicality(run, reference_engine, calibrate_data, parity_data, progress)
    progress(f"running {len(store.names)} validation frames through the training code")
    expected = run_in_batches(reference_engine, store.quadrants, REFERENCE_BATCH)

    with atomic_folder(out, replace=True) as unfinished:
        draft = _Draft(unfinished, new_manifest(run, wanted[0]))
        if table is not None:
            draft.manifest[CODES] = table.to_dict()
        draft.manifest["metrics"] = measure_run(run, flatten(expected)[1], store.labels, f"{split.name} split")

        def measure(precision: str, graph: bytes) -> Parity:
            """Measure parity through the bundle, from the bytes on disk, as deployment loads them."""
            draft.add_graph(precision, graph)
            return measure_parity(
                flatten(expected),
                draft.open_graph(precision),
                store.quadrants,
                f"{split.name} split",
                gate=gate,
                typicality=expected.typicality,
            )

        parities: list[Parity] = []
        single = build_graph(run.model, run.contract, reference_engine.typicality)
        for precision in wanted:
            progress(f"building the {precision} graph and measuring its parity")
            graph, parity, details = _convert(
                precision, single, run.contract, calibration, partial(measure, precision), progress
            )
            parities.append(parity)
            draft.manifest["parity"][precision] = parity.to_dict()
            draft.manifest["precisions"][precision] |= details
            if maps := check_activation_maps(graph, store.quadrants[:CAM_FRAMES]):
                draft.manifest["precisions"][precision]["cam"] = maps

        draft.manifest |= _typicality_entry(typicality, parities)
        progress("choosing golden frames")
        reduced = [draft.open_graph(precision) for precision in wanted if precision != "fp32"]
        packed, draft.manifest["golden"] = pack_golden(reference_engine, source, reduced)
        draft.write(GOLDEN, packed)
        draft.manifest |= _validation_entry(Bundle(draft.folder), split, run, progress)
        for precision in wanted if frame_graph else ():
            progress(f"building the {precision} frame graph and measuring its parity")
            frames = load_frames(split, run.contract)
            data, frame_parity = make_frame_graph(Bundle(draft.folder), precision, frames)
            draft.manifest.setdefault("frame_graphs", {})[precision] = frame_parity.to_dict()
            draft.write(frame_graph_file(precision), data)
        draft.write(MODEL_CARD, model_card(Bundle(draft.folder).manifest).markdown().encode())
        progress("replaying the golden frames")
        verification = [_replay(draft.folder, precision, out) for precision in wanted][-1]
        if sign_key is not None:
            progress("signing the bundle")
            sign_bundle(draft.folder, sign_key)
    return Exported(out, tuple(parities), verification, len(store.failures))


def _convert(
    precision: str,
    single: bytes,
    contract: Contract,
    calibration: CalibrationSet | None,
    measure: Callable[[bytes], Parity],
    progress: Callable[[str], None],
) -> tuple[bytes, Parity, dict[str, Any]]:
    """Convert a float32 graph to a precision; return it with its parity, which passed, and the manifest's details."""
    if precision == "int8":
        assert calibration is not None
        made = build_int8(single, contract, calibration, measure, progress)
        progress(f"int8 passed: {made}")
        return made.graph, made.parity, made.details
    graph = single if precision == "fp32" else to_fp16(single)
    parity = measure(graph)
    parity.require()
    return graph, parity, {}


class _Draft:
    """A bundle in progress: after each file, the manifest on disk describes the files in the folder."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    def write(self, name: str, data: bytes) -> None:
        """Write a file and update the manifest."""
        self.manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        write_bytes(self.folder / name, data)
        write_bytes(self.folder / MANIFEST, encode_manifest(self.manifest))

    def add_graph(self, precision: str, graph: bytes) -> None:
        """Write the graph of a precision; it replaces an earlier attempt."""
        self.manifest["precisions"].setdefault(precision, {"opset": OPSET, "ir_version": IR_VERSION})
        self.write(model_file(precision), graph)

    def open_graph(self, precision: str) -> OnnxEngine:
        """Open a graph as deployment does, on the CPU."""
        return OnnxEngine(Bundle(self.folder), precision=precision, device="cpu")


def _replay(folder: Path, precision: str, out: Path) -> Verification:
    """Replay the golden frames of the bundle in `folder`, which is to become `out`, on the CPU."""
    found = verify(folder, device="cpu", precision=precision)
    if not found.passed:
        raise VerificationError(
            f"{out.as_posix()}: the {precision} graph does not reproduce its golden answers "
            f"(worst: {found.worst_frame}, |dp| {found.max_abs_dprobability:.3g}); no bundle was written"
        )
    return found


def _check_target(out: Path) -> None:
    """Raise OutputError if `out` contains anything but a bundle: its content will be removed."""
    if not out.exists():
        return
    label = out.as_posix()
    found = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name}
    if found and not (out / MANIFEST).is_file():
        raise OutputError(f"{label}: it exists and is not a bundle; it is unchanged; choose another --out")
    graphs = {name(precision) for precision in PRECISIONS for name in (model_file, frame_graph_file)}
    others = sorted(found - {MANIFEST, GOLDEN, MODEL_CARD, SIGNATURE, *graphs, *_FILE_MANAGERS})
    if others:
        raise OutputError(
            f"{label}: it contains {', '.join(others[:6])} beside a bundle; it is unchanged; move these files away, or "
            "choose another --out"
        )


def _calibration_set(run: Run | Ensemble, data: Path | None, frames: int) -> CalibrationSet:
    try:
        return draw_calibration_set(
            data or _data_folder(run, "--calibrate"),
            run.contract,
            frames=frames,
            reading=ReadOptions.from_record(run.info.get("data")),
        )
    except DatasetError as error:
        if data is not None:
            raise
        raise RunError(
            f"{run.folder.as_posix()}: its training frames cannot calibrate int8 ({error}); name a data folder with "
            "--calibrate DATA"
        ) from error


def _fit_typicality(
    run: Run | Ensemble,
    engine: ReferenceEngine,
    calibrate_data: Path | None,
    parity_data: Path | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Fit the typicality score to training frames: of `calibrate_data`, else of the run's data, else of `parity_data`.

    Returns
    -------
    dict
        Facts for the manifest; empty if there are no training frames.
    """
    own = run.info.get("data", {}).get("folder")
    candidates = [calibrate_data] if calibrate_data else [*([Path(own)] if own else []), parity_data]
    folders = [folder for folder in candidates if folder is not None and folder.is_dir()]
    try:
        data = next((folder for folder in folders if "train" in split_folders(folder)), None)
        if data is None:
            raise DatasetError("its training frames are not available; name a data folder with --parity DATA")
        reading = ReadOptions.from_record(run.info.get("data"))
        frames = draw_calibration_set(data, run.contract, frames=TYPICAL_FRAMES, reading=reading)
        if len(frames.quadrants) < 2:
            raise DatasetError("there is one training frame; expected two or more")
    except DatasetError as error:
        progress(f"the bundle gets no typicality score: {error}")
        return {}
    progress(f"fitting the typicality score to {len(frames.quadrants)} training frames")
    fit_typicality(engine, frames.quadrants, REFERENCE_BATCH)
    return {"features": "mean of the map at 1/16 of the side", "rank": RANK, **frames.to_dict()}


def _typicality_entry(facts: dict[str, Any], parities: Sequence[Parity]) -> dict[str, Any]:
    """Return the manifest's entry, with the thresholds of each precision; empty without the score."""
    found = {parity.precision: parity.typicality for parity in parities if parity.typicality is not None}
    if not facts or not found:
        return {}
    thresholds = {precision: typicality_thresholds(scores) for precision, scores in found.items()}
    frames = len(next(iter(found.values())))
    return {"typicality": {**facts, "validation_frames": frames, "thresholds": thresholds}}


def _validation_entry(
    bundle: Bundle, split: Split, run: Run | Ensemble, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return the manifest's entry with the validation figures of each precision."""
    progress("measuring the validation figures")
    regex = run.info.get("patient_regex")
    found = {name: measure_validation(bundle, name, split, regex) for name in bundle.precisions}
    return {VALIDATION: {name: figures.to_dict() for name, figures in found.items() if figures is not None}}


def _data_folder(run: Run | Ensemble, option: str) -> Path:
    """Return the data folder that a run was trained on."""
    try:
        return Path(run.info["data"]["folder"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{run.folder.as_posix()}: run.json names no data folder; name one with {option} DATA"
        ) from error


def _parity_split(run: Run | Ensemble, parity_data: Path | None) -> Split:
    data = parity_data or _data_folder(run, "--parity")
    try:
        return read_split(data, "validation", run.contract.classes, ReadOptions.from_record(run.info.get("data")))
    except DatasetError as error:
        if parity_data is not None:
            raise
        raise RunError(
            f"{run.folder.as_posix()}: its validation frames are not available ({error}); name a data folder with "
            "--parity DATA"
        ) from error
