"""Golden frames: frames with reference answers that a deployment replays to show that it computes what was trained.

They are chosen from a pool of frames that the training code has decided on: phantoms, so that no patient data ships, or
on request the validation frames or a folder. The aims, in order of priority while space is left:

1. each class as the decision on a frame,
2. ties of votes, decided for each class,
3. the smallest margins of a decision on a frame,
4. the smallest margins of a quadrant's class over its runner-up,
5. each class as the vote of each quadrant,
6. each pattern of four votes; missing patterns are stitched from the quadrants of several phantoms,
7. shapes: upright, wide, odd height, odd width, typical scanner sizes.

For each aim, the frame that adds most per byte is taken until the pool can add nothing. A blank, a saturated, a ramp,
stripes (wide and upright) and the smallest possible frame are always included.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from echoquad_runtime.bundle.golden_frames import GoldenFrames, encode_golden
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.engine.io_binding import FloatArray, InferenceOutput
from echoquad_runtime.engine.slot_pool import Engine, SlotPool, run_in_batches
from echoquad_runtime.errors import FrameError, InputNotFoundError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.reader import load_grey
from echoquad_runtime.quadrants import Grey, frame_quadrants, quadrant_boxes
from echoquad_runtime.verify.decision_margins import frame_margins, quadrant_margins
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.phantom.drawing import phantom_frame

__all__ = [
    "MAX_BYTES",
    "MAX_FRAMES",
    "PHANTOM",
    "GoldenSource",
    "fixed_frames",
    "golden_facts",
    "golden_source",
    "make_golden",
    "pack_golden",
]

MAX_BYTES: Final = 400_000
"""Size limit of the golden file; the last aims are dropped first."""

MAX_FRAMES: Final = 64
"""Verification replays each frame twice, at up to a tenth of a second each."""

POOL: Final = 128  # frames to choose from; they take up to a minute on one slow core
MARGINS: Final = 4  # frames with the smallest margins, for aims 3 and 4
MOST_PATTERNS: Final = 8**4  # of four votes; with more than eight classes no pattern is stitched
STITCHED: Final = 32
LARGEST: Final = 2_000_000  # pixels; larger frames never fit the size limit

# Height and width. Small sizes recur: they are cheap, and only phantoms of one size can be stitched. Large sizes occur
# once: common and odd sizes of scanners, upright and wide.
_SMALL: Final = ((64, 80), (97, 83), (81, 120), (120, 96), (128, 160))
_LARGE: Final = ((240, 320), (241, 319), (300, 301), (177, 146), (354, 292), (129, 400), (224, 224), (331, 250))
_OVERHEAD: Final = 400  # bytes per array in the file, without its pixels

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GoldenSource:
    """Source of golden frames: ``phantom``, ``validation`` or ``folder``, with the files of the last two."""

    name: str
    files: tuple[FrameFile, ...] = ()


PHANTOM: Final = GoldenSource("phantom")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A frame with its logits and probabilities, float32 [4, C], and its `cost` in bytes of the golden file.

    The typicality of its quadrants, float32 [4], is None if the engine does not compute it.
    """

    name: str
    frame: Grey
    logits: FloatArray
    probabilities: FloatArray
    typicality: FloatArray | None
    cost: int


def golden_source(wanted: str, validation: Iterable[FrameFile | Failure]) -> GoldenSource:
    """Return the source that ``--golden`` names: ``phantom``, ``validation`` (the given files), or a folder of frames.

    Raises
    ------
    InputNotFoundError
        If the folder does not exist, cannot be read, or contains no frame.
    """
    if wanted == PHANTOM.name:
        return PHANTOM
    if wanted == "validation":
        return GoldenSource(wanted, tuple(file for file in validation if isinstance(file, FrameFile)))
    files: list[FrameFile] = []
    for found in find_frames([Path(wanted)]):
        if isinstance(found, Failure):
            raise InputNotFoundError(f"--golden {wanted}: {found.error}; or name phantom or validation")
        files.append(found)
    return GoldenSource("folder", tuple(files))


def fixed_frames(contract: Contract) -> dict[str, tuple[Grey, str]]:
    """Return the frames that are always included, by name, each with the reason."""
    # Fine stripes in quadrants larger than the input reveal another resize filter or another order of operations. They
    # have grey levels of an echo, because int8 is not calibrated for black and white. They compress to almost nothing.
    low, high = (min(int(ratio * contract.input_size / contract.keep), 1500) | 1 for ratio in (2.3, 2.9))
    rows, columns = np.ogrid[:low, :high]
    stripes = (40 + (rows // 5 + columns // 3) % 2 * 50).astype(np.uint8)
    ramp = np.add.outer(np.arange(160), np.arange(211)) * 255 // (159 + 210)
    return {
        "blank": (np.zeros((120, 160), np.uint8), "a blank frame"),
        "saturated": (np.full((121, 161), 255, np.uint8), "a saturated frame, both sides odd"),
        "ramp": (ramp.astype(np.uint8), "every grey level"),
        "stripes": (stripes, "quadrants larger than the input, of fine stripes, wide"),
        "stripes-upright": (np.ascontiguousarray(stripes.T), "the same, upright"),
        "smallest": (np.array([[0, 255], [128, 64]], np.uint8), "the smallest frame there is"),
    }


def make_golden(engine: Engine, source: GoldenSource = PHANTOM) -> GoldenFrames:
    """Run a pool of frames through the training code, one at a time, and choose the golden frames.

    The result depends on engine and source only. Frames are named by their position in the pool, not by their file.

    Parameters
    ----------
    engine
        The training code.
    source
        Source of the pool.

    Raises
    ------
    InputNotFoundError
        If the source has files, but none can be read.
    """
    contract, slots = engine.contract, SlotPool(engine, 1)

    def infer(name: str, frame: Grey) -> _Candidate:
        output = slots.run(frame_quadrants(frame, contract)[None], 1)
        logits, probabilities = output.logits[0], output.probabilities[0]
        cost = len(zlib.compress(frame.tobytes())) + _OVERHEAD + logits.nbytes + probabilities.nbytes
        scores = None if output.typicality is None else output.typicality[0]
        return _Candidate(name, frame, logits, probabilities, scores, cost)

    fixed = {name: (infer(name, frame), (why,)) for name, (frame, why) in fixed_frames(contract).items()}
    pool = [infer(name, frame) for name, frame in (_phantoms() if source == PHANTOM else _read(source))]
    if not pool:
        raise InputNotFoundError(
            f"golden frames: none of the {len(source.files)} files of the {source.name} can be read and has up to "
            f"{LARGEST // 1_000_000} million pixels; choose --golden phantom"
        )
    if source == PHANTOM:
        pool += [infer(name, frame) for name, frame in _stitched(pool, contract)]
    budget = MAX_BYTES - _OVERHEAD - sum(candidate.cost for candidate, _ in fixed.values())
    chosen = [
        *((pool[index], reasons) for index, reasons in _choose(pool, contract, budget, MAX_FRAMES - len(fixed))),
        *fixed.values(),
    ]
    scores = [candidate.typicality for candidate, _ in chosen if candidate.typicality is not None]
    return GoldenFrames(
        names=tuple(candidate.name for candidate, _ in chosen),
        frames=tuple(candidate.frame for candidate, _ in chosen),
        logits=np.stack([candidate.logits for candidate, _ in chosen]),
        probabilities=np.stack([candidate.probabilities for candidate, _ in chosen]),
        reasons=tuple(reasons for _, reasons in chosen),
        typicality=np.stack(scores) if scores else None,
    )


def pack_golden(engine: Engine, source: GoldenSource, exported: Iterable[Engine] = ()) -> tuple[bytes, dict[str, Any]]:
    """Choose golden frames; return the bytes of the golden file and the manifest's entry.

    Parameters
    ----------
    engine
        The training code.
    source
        Source of the pool.
    exported
        Graphs of reduced precision that passed parity; their answers are stored too, as the reference elsewhere.

    Raises
    ------
    InputNotFoundError
        See `make_golden`.
    """
    golden = make_golden(engine, source)
    answers = {graph.precision: _answers(graph, golden.frames) for graph in exported}
    golden = replace(
        golden,
        exported={name: (output.logits, output.probabilities) for name, output in answers.items()},
        exported_typicality={
            name: output.typicality for name, output in answers.items() if output.typicality is not None
        },
    )
    data = encode_golden(golden)
    return data, golden_facts(golden, engine.contract, source, len(data))


def _answers(engine: Engine, frames: Iterable[Grey]) -> InferenceOutput:
    return run_in_batches(engine, np.stack([frame_quadrants(frame, engine.contract) for frame in frames]), 1)


def golden_facts(golden: GoldenFrames, contract: Contract, source: GoldenSource, size: int) -> dict[str, Any]:
    """Return what the golden frames cover, for the manifest; `size` is that of the golden file in bytes."""
    p, classes = golden.probabilities, len(contract.classes)
    decision = aggregate_votes(p, contract.vote, contract.vote_weights)
    return {
        "source": source.name,
        "frames": len(golden.names),
        "bytes": size,
        "classes": {name: int((decision.labels == index).sum()) for index, name in enumerate(contract.classes)},
        "patterns_found": len(np.unique(decision.quadrant_labels, axis=0)),
        "patterns_possible": classes ** len(QUADRANTS),
        "ties": int(_tied(p).sum()),
        "smallest_margin": float(_margins(p, contract).min()),
        "smallest_quadrant_margin": float(_second(quadrant_margins(p)).min()),
    }


def _phantoms() -> Iterator[tuple[str, Grey]]:
    """Draw the pool of phantoms; label and size alternate with different periods."""
    for index in range(POOL):
        size = _LARGE[index] if index < len(_LARGE) else _SMALL[index % len(_SMALL)]
        yield f"phantom-{index:03d}", phantom_frame(1000 + index, ("NORM", "ASD")[index % 2], size)


def _read(source: GoldenSource) -> Iterator[tuple[str, Grey]]:
    """Read a pool from files, evenly spread if there are too many; skip files that cannot be used."""
    for index, file in _spread(list(enumerate(source.files)), POOL):
        try:
            frame = load_grey(file)
            quadrant_boxes(frame.shape[1], frame.shape[0], 1.0)
        except FrameError:
            continue
        if frame.size <= LARGEST:
            yield f"{source.name}-{index:03d}", frame


def _stitched(pool: Sequence[_Candidate], contract: Contract) -> Iterator[tuple[str, Grey]]:
    """Stitch phantoms to frames with patterns of votes that the pool lacks.

    A quadrant is cut and classified on its own, so in a frame of the same size it keeps its vote.
    """
    votes = np.stack([candidate.probabilities for candidate in pool]).argmax(axis=2)
    if len(contract.classes) ** len(QUADRANTS) > MOST_PATTERNS:
        return
    found = set(map(tuple, votes.tolist()))
    missing = [p for p in product(range(len(contract.classes)), repeat=len(QUADRANTS)) if p not in found]
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, candidate in enumerate(pool):
        by_size.setdefault(candidate.frame.shape, []).append(index)
    groups = sorted(by_size.values(), key=lambda group: pool[group[0]].frame.size)

    def donors(pattern: tuple[int, ...], group: list[int]) -> list[int]:
        first = (next((i for i in group if votes[i, q] == label), None) for q, label in enumerate(pattern))
        return [index for index in first if index is not None]

    possible = {
        p: complete[0] for p in missing if (complete := [d for g in groups if len(d := donors(p, g)) == len(p)])
    }
    for pattern, indices in _spread(list(possible.items()), STITCHED):
        frame = pool[indices[0]].frame.copy()
        boxes = quadrant_boxes(frame.shape[1], frame.shape[0], contract.keep, contract.quadrants)
        for index, (left, top, right, bottom) in zip(indices, boxes, strict=True):
            frame[top:bottom, left:right] = pool[index].frame[top:bottom, left:right]
        yield f"phantom-stitched-{''.join(map(str, pattern))}", frame


def _choose(
    pool: Sequence[_Candidate], contract: Contract, budget: int, count: int
) -> list[tuple[int, tuple[str, ...]]]:
    """Choose frames for the aims in order; return the indices into the pool, sorted, each with its reasons."""
    aims = _reasons(pool, contract)
    met: set[str] = set()
    chosen: dict[int, tuple[str, ...]] = {}
    for aim in aims:
        while True:
            gains = {
                index: len(needs - met)
                for index, needs in enumerate(aim)
                if needs - met and index not in chosen and pool[index].cost <= budget
            }
            if not gains or len(chosen) == count:
                break
            best = max(gains, key=lambda index: (gains[index] / pool[index].cost, -index))
            fresh = [need for needs in aims for need in sorted(needs[best] - met)]
            chosen[best] = tuple(fresh)
            met.update(fresh)
            budget -= pool[best].cost
    return sorted(chosen.items())


def _reasons(pool: Sequence[_Candidate], contract: Contract) -> list[list[set[str]]]:
    """Return the reasons for each candidate, as phrases: one list per aim, with a set per candidate."""
    p, classes = np.stack([candidate.probabilities for candidate in pool]), contract.classes
    decision = aggregate_votes(p, contract.vote, contract.vote_weights)
    decided = [classes[label] for label in decision.labels]
    votes = [[classes[label] for label in row] for row in decision.quadrant_labels]
    tied = _tied(p)

    def smallest(margins: np.ndarray, what: str) -> list[set[str]]:
        needs: list[set[str]] = [set() for _ in pool]
        for rank, index in enumerate(np.argsort(margins, kind="stable")[:MARGINS], 1):
            needs[index] = {f"{what} margin {margins[index]:.2g}, number {rank} from below"}
        return needs

    return [
        [{f"decided {name}"} for name in decided],
        [{f"tie of votes decided {name}"} if tie else set() for name, tie in zip(decided, tied, strict=True)],
        smallest(_margins(p, contract), "frame"),
        smallest(_second(quadrant_margins(p)).min(axis=1), "quadrant"),
        [{f"{quadrant} votes {name}" for quadrant, name in zip(QUADRANTS, row, strict=True)} for row in votes],
        [{f"votes {' '.join(row)}"} for row in votes],
        [_shape(*candidate.frame.shape) for candidate in pool],
    ]


def _shape(height: int, width: int) -> set[str]:
    large = min(height, width) >= 200
    shape = "upright" if height > width else "wide" if width > height else "square"
    found = {shape, *(["odd height"] if height % 2 else []), *(["odd width"] if width % 2 else [])}
    return found | ({f"a scanner's size, {shape}"} if large else set())


def _margins(probabilities: FloatArray, contract: Contract) -> np.ndarray:
    """Return the margin of the decision on each frame, float64 [N], from probabilities float32 [N, 4, C]."""
    return _second(frame_margins(probabilities, contract.vote, contract.vote_weights))


def _second(leads: np.ndarray) -> np.ndarray:
    """Return the second smallest value, the margin to the runner-up, of leads float64 [..., C]."""
    return np.asarray(np.partition(leads, 1, axis=-1)[..., 1])


def _tied(probabilities: FloatArray) -> np.ndarray:
    return np.asarray(aggregate_votes(probabilities, "majority").margins == 0)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items, evenly spread, or all if there are fewer."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)
