"""Packing: from a run to a bundle in its place, or to nothing at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from echoquad_export.graph.activation_map import check_activation_maps
from echoquad_export.graph.build import IR_VERSION, OPSET, build_graph
from echoquad_export.graph.frame_graph import make_frame_graph, whole_frames
from echoquad_export.packing.manifest import make_manifest, provenance
from echoquad_export.packing.place import beside, check_target, move_into_place
from echoquad_export.parity.golden import PHANTOM, golden_source, pack_golden
from echoquad_export.parity.metrics import measure_run
from echoquad_export.parity.parity import Gate, Parity, measure_parity, summary
from echoquad_export.precision.calibration_set import CALIBRATION_FRAMES, CalibrationSet, draw_calibration_set
from echoquad_export.precision.fp16 import to_fp16
from echoquad_export.precision.int8 import build_int8
from echoquad_runtime.bundle.bundle import (
    GOLDEN,
    MANIFEST,
    MODEL_CARD,
    PRECISIONS,
    Bundle,
    frame_file,
    model_file,
)
from echoquad_runtime.bundle.model_card import model_card
from echoquad_runtime.bundle.signature import check_private_key, sign_bundle
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import infer_all
from echoquad_runtime.errors import DatasetError, RunError, UsageError, VerificationError
from echoquad_runtime.frames.formats import ReadOptions
from echoquad_runtime.storage.atomic import write_bytes
from echoquad_runtime.verify.verify import Verification, verify
from echoquad_train.data.dataset import Split, load_quadrants, read_split
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.runs.checkpoint import Run
from echoquad_train.runs.ensemble_folder import Ensemble, load_trained

__all__ = ["Exported", "check_precisions", "export_run"]

REFERENCE_BATCH: Final = 8  # frames that the training code judges at a time
CAM_FRAMES: Final = 8  # on which class activation maps are held against logits


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle in its place.

    Attributes
    ----------
    folder
        Where it is.
    parities
        One a precision.
    verification
        What its golden frames showed here, in the last precision.
    unreadable
        Validation frames that could not be read and were left out.
    """

    folder: Path
    parities: tuple[Parity, ...]
    verification: Verification
    unreadable: int


def check_precisions(wanted: Sequence[str]) -> tuple[str, ...]:
    """Refuse precisions that are unknown; one that is named twice is built once.

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
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export a run's best checkpoint, or an ensemble, to a bundle.

    Everything is written beside `out` and takes its name only when parity and verification have passed. A
    bundle that `out` held before is there, unchanged, until then.

    Parameters
    ----------
    folder
        The run or the ensemble.
    out
        The bundle's folder: new, empty, or an older bundle with nothing else in it.
    precisions
        Graphs to build; the first is what runs where none is asked for.
    calibrate_data
        The data folder whose ``train`` frames int8 is calibrated on, where it is built; None is the run's own.
    calibration_frames
        How many of them.
    parity_data
        The data folder whose ``validation`` frames parity is measured on; None is the one that the run was trained on.
    golden
        Where golden frames come from: ``phantom``, so that no patient's pixels ship, ``validation`` (the frames that
        parity is measured on), or a folder of frames.
    gate
        Other parity bounds than the precision's own.
    frame_graph
        Whether each precision also gets a graph from frame to decision, proved on the golden and the validation frames.
    sign_key
        A PEM file with a private key that signs the finished bundle; None leaves it unsigned.
    progress
        Called with a phrase as each step begins.

    Raises
    ------
    ParityError
        If a graph does not decide as the training code does, or its maps are not what decided; nothing is left of it.
    VerificationError
        If the finished bundle does not give its own golden answers.
    RunError, DatasetError, InputNotFoundError, UsageError, OutputError, ConfigError, MissingExtraError
        If the run, the data, the golden frames, the precisions, the target or the key stand in the way.
    """
    wanted = check_precisions(precisions)
    _check_ends(out, sign_key)
    progress("reading the run")
    run = load_trained(folder)
    split = _parity_split(run, parity_data)
    calibration = _calibration_set(run, calibrate_data, calibration_frames) if "int8" in wanted else None
    source = golden_source(golden, split.files())
    store = load_quadrants(split, run.contract)

    progress(f"judging {len(store.names)} validation frames with the training code")
    reference_engine = TorchEngine(run.model, run.contract)
    reference = infer_all(reference_engine, store.quadrants, REFERENCE_BATCH)

    target = out.resolve()  # a link stays a link, and "." has a name
    with beside(target) as place:
        draft = _Draft(place, run)
        draft.sections["metrics"] = measure_run(run, reference[1], store.labels, f"{split.name} split")

        def judge(precision: str, graph: bytes) -> Parity:
            """Take parity through the bundle reader, from bytes as they lie on the disk: what a cart will do."""
            draft.add_graph(precision, graph)
            return measure_parity(
                reference, draft.open_graph(precision), store.quadrants, f"{split.name} split", gate=gate
            )

        parities: dict[str, Parity] = {}
        single = build_graph(run.model, run.contract)
        for precision in wanted:
            progress(f"building the {precision} graph and measuring its parity")
            if precision == "int8":
                assert calibration is not None
                made = build_int8(single, run.contract, calibration, partial(judge, precision), progress)
                parities[precision] = made.parity
                graph = made.graph
                draft.details[precision] |= made.details
                progress(f"int8 passed: {made}")
            else:
                graph = single if precision == "fp32" else to_fp16(single)
                parities[precision] = judge(precision, graph)
                parities[precision].require()
            if maps := check_activation_maps(graph, store.quadrants[:CAM_FRAMES]):
                draft.details[precision]["cam"] = maps
        draft.figures = summary(tuple(parities.values()))

        progress("choosing golden frames")
        reduced = [draft.open_graph(precision) for precision in wanted if precision != "fp32"]
        packed, draft.sections["golden"] = pack_golden(reference_engine, source, reduced)
        draft.write(GOLDEN, packed)
        _add_frame_graphs(draft, wanted if frame_graph else (), split, progress)
        draft.write(MODEL_CARD, model_card(Bundle(place).manifest).markdown().encode())
        progress("replaying the golden frames")
        verification = [_replay(place, precision, out) for precision in wanted][-1]
        _sign(place, sign_key, progress)
        move_into_place(place, target)
    return Exported(out, tuple(parities.values()), verification, len(store.failures))


class _Draft:
    """A bundle that is being written; after every file its manifest is true of what lies in its folder.

    Attributes
    ----------
    details, figures, sections
        What the manifest says of each graph, of their parity, and under further keys.
    """

    def __init__(self, place: Path, run: Run | Ensemble) -> None:
        self.place = place
        self.details: dict[str, dict[str, Any]] = {}
        self.figures: Mapping[str, Any] = {}
        self.sections: dict[str, Any] = {}
        self._contract, self._training = run.contract, provenance(run)
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, data: bytes) -> None:
        """Write a file, and the manifest anew."""
        self._files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        write_bytes(self.place / name, data)
        manifest = make_manifest(
            self._contract, self._files, self.details, self._training, self.figures, self._created, self.sections
        )
        write_bytes(self.place / MANIFEST, manifest)

    def add_graph(self, precision: str, graph: bytes) -> None:
        """Write a precision's graph, in place of an earlier attempt at it."""
        self.details.setdefault(precision, {"opset": OPSET, "ir_version": IR_VERSION})
        self.write(model_file(precision), graph)

    def open_graph(self, precision: str) -> OnnxEngine:
        """Open a graph as a cart does."""
        return OnnxEngine(Bundle(self.place), precision=precision, device="cpu")


def _add_frame_graphs(draft: _Draft, precisions: Sequence[str], split: Split, progress: Callable[[str], None]) -> None:
    """Add the graphs from frame to decision, each once it is proved on the golden frames and on the split's."""
    for precision in precisions:
        progress(f"building the {precision} frame graph and measuring its parity")
        bundle = Bundle(draft.place)
        graph, parity = make_frame_graph(bundle, precision, whole_frames(split, bundle.contract))
        draft.sections.setdefault("frame_graphs", {})[precision] = parity.to_dict()
        draft.write(frame_file(precision), graph)


def _replay(place: Path, precision: str, out: Path) -> Verification:
    """Replay the golden frames of a bundle that is to become `out`, as a cart will."""
    found = verify(place, device="cpu", precision=precision)
    if not found.passed:
        raise VerificationError(
            f"{out.as_posix()}: the {precision} graph misses its golden frames "
            f"(worst: {found.worst_frame}, |dp| {found.max_abs_dprobability:.3g}); no bundle was written"
        )
    return found


def _check_ends(out: Path, sign_key: Path | None) -> None:
    """Refuse what would stop an export at its end before it begins."""
    check_target(out)
    if sign_key is not None:
        check_private_key(sign_key)


def _sign(place: Path, key: Path | None, progress: Callable[[str], None]) -> None:
    if key is not None:
        progress("signing the bundle")
        sign_bundle(place, key)


def _calibration_set(run: Run | Ensemble, data: Path | None, frames: int) -> CalibrationSet:
    try:
        return draw_calibration_set(
            data or _data_folder(run, "--calibrate"),
            run.contract,
            frames=frames,
            reading=ReadOptions.found_in(run.info.get("data")),
        )
    except DatasetError as error:
        if data is not None:
            raise
        raise RunError(
            f"{run.folder.as_posix()}: it cannot be calibrated on the frames it was trained on ({error}); "
            "name a data folder with --calibrate DATA"
        ) from error


def _data_folder(run: Run | Ensemble, option: str) -> Path:
    """Give the folder that a run was trained on."""
    try:
        return Path(run.info["data"]["folder"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{run.folder.as_posix()}: run.json names no data folder; name one with {option} DATA"
        ) from error


def _parity_split(run: Run | Ensemble, parity_data: Path | None) -> Split:
    data = parity_data or _data_folder(run, "--parity")
    try:
        return read_split(data, "validation", run.contract.classes, ReadOptions.found_in(run.info.get("data")))
    except DatasetError as error:
        if parity_data is not None:
            raise
        raise RunError(
            f"{run.folder.as_posix()}: the frames it was validated on are gone ({error}); "
            "name a data folder with --parity DATA"
        ) from error
