"""Golden frames: what a cart replays to show that it computes what was trained.

They are chosen from a pool that the training code judges: phantoms, so that no patient's pixels ship; or, asked for
by name, frames of the validation split or of a folder. Chosen are, in this order, for as long as there is room:

1. each class as the decision on a frame,
2. ties of votes, decided for each class,
3. the smallest leads that a decision on a frame hangs on,
4. the smallest leads of a quadrant's class over its runner-up,
5. each class as the vote of each quadrant,
6. each pattern of four votes; patterns that no phantom has are stitched from the quadrants of several,
7. shapes: upright, wide, an odd height, an odd width, a scanner's size.

For each of these lines the frame that serves most of it for its bytes is taken, until nothing of the line is left that
the pool has. A blank, a saturated, a ramp, stripes (wide and upright) and the smallest frame there is are always in.
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
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.engine.slot_pool import Engine, infer_in_batches
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
"""Of the golden file: what no longer fits is left out, the last line of the list above first."""

MAX_FRAMES: Final = 64
"""A cart replays each frame twice, and may take a tenth of a second for it."""

POOL: Final = 128  # frames that are judged to choose from; a minute at worst on one slow core
MARGINS: Final = 4  # frames with the smallest leads, of each kind
MOST_PATTERNS: Final = 8**4  # of four votes: beyond it, eight classes, patterns are taken as they come
STITCHED: Final = 32
LARGEST: Final = 2_000_000  # pixels of a frame that is worth judging: a larger one of an exam never fits

# Height and width. The small ones come again and again: cheap to ship, and phantoms of one size can be stitched.
# The large ones are common and odd sizes of scanners, upright and wide.
_SMALL: Final = ((64, 80), (97, 83), (81, 120), (120, 96), (128, 160))
_LARGE: Final = ((240, 320), (241, 319), (300, 301), (177, 146), (354, 292), (129, 400), (224, 224), (331, 250))
_OVERHEAD: Final = 400  # bytes that an array costs in the file beside its pixels

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GoldenSource:
    """Where golden frames come from: ``phantom``, ``validation`` or ``folder``, and the files of the last two."""

    name: str
    files: tuple[FrameFile, ...] = ()


PHANTOM: Final = GoldenSource("phantom")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A judged frame; logits and probabilities are float32 [4, C], `cost` is in bytes of the golden file."""

    name: str
    frame: Grey
    logits: FloatArray
    probabilities: FloatArray
    cost: int


def golden_source(wanted: str, validation: Iterable[FrameFile | Failure]) -> GoldenSource:
    """Understand what ``--golden`` names: ``phantom``, ``validation`` (these files), or a folder of frames.

    Raises
    ------
    InputNotFoundError
        If it is a folder that is not there, cannot be read, or holds no frame.
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
    """Make the frames that are golden whatever the model: by name, each with the reason for it."""
    # Fine stripes in quadrants larger than the input: shrunk by another filter, or in another order, they come out
    # otherwise. They are of an echo's greys: black and white would try an int8 graph far beyond what it is calibrated
    # on. They compress to next to nothing.
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
    """Judge a pool of frames with the training code, one frame at a time, and choose the golden ones.

    The same engine and source give the same golden frames. Their names are their places in the pool; no file name is in
    them.

    Parameters
    ----------
    engine
        The training code.
    source
        Where the pool comes from.

    Raises
    ------
    InputNotFoundError
        If the source has files, but none that can be read.
    """
    contract = engine.contract

    def judge(name: str, frame: Grey) -> _Candidate:
        logits, probabilities = engine.infer(frame_quadrants(frame, contract))
        cost = len(zlib.compress(frame.tobytes())) + _OVERHEAD + logits.nbytes + probabilities.nbytes
        return _Candidate(name, frame, logits, probabilities, cost)

    fixed = {name: (judge(name, frame), (why,)) for name, (frame, why) in fixed_frames(contract).items()}
    pool = [judge(name, frame) for name, frame in (_phantoms() if source == PHANTOM else _read(source))]
    if not pool:
        raise InputNotFoundError(
            f"golden frames: none of the {len(source.files)} files of the {source.name} can be read and has up to "
            f"{LARGEST // 1_000_000} million pixels; choose --golden phantom"
        )
    if source == PHANTOM:
        pool += [judge(name, frame) for name, frame in _stitched(pool, contract)]
    budget = MAX_BYTES - _OVERHEAD - sum(candidate.cost for candidate, _ in fixed.values())
    chosen = [
        *((pool[index], reasons) for index, reasons in _choose(pool, contract, budget, MAX_FRAMES - len(fixed))),
        *fixed.values(),
    ]
    return GoldenFrames(
        names=tuple(candidate.name for candidate, _ in chosen),
        frames=tuple(candidate.frame for candidate, _ in chosen),
        logits=np.stack([candidate.logits for candidate, _ in chosen]),
        probabilities=np.stack([candidate.probabilities for candidate, _ in chosen]),
        reasons=tuple(reasons for _, reasons in chosen),
    )


def pack_golden(engine: Engine, source: GoldenSource, exported: Iterable[Engine] = ()) -> tuple[bytes, dict[str, Any]]:
    """Choose golden frames; gives the bytes of the golden file, and what the manifest says of them.

    Parameters
    ----------
    engine
        The training code.
    source
        Where the pool comes from.
    exported
        Graphs of less precision, parity passed: what they give is kept too, for them to be held to elsewhere.

    Raises
    ------
    InputNotFoundError
        As `make_golden`.
    """
    golden = make_golden(engine, source)
    golden = replace(golden, exported={graph.precision: _answers(graph, golden.frames) for graph in exported})
    data = encode_golden(golden)
    return data, golden_facts(golden, engine.contract, source, len(data))


def _answers(engine: Engine, frames: Iterable[Grey]) -> tuple[FloatArray, FloatArray]:
    quadrants = np.stack([frame_quadrants(frame, engine.contract) for frame in frames])
    logits, probabilities = (part.reshape(len(quadrants), 4, -1) for part in infer_in_batches(engine, quadrants, 1))
    return logits, probabilities


def golden_facts(golden: GoldenFrames, contract: Contract, source: GoldenSource, size: int) -> dict[str, Any]:
    """Say what the golden frames cover, as the manifest holds it; `size` is that of the golden file in bytes."""
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
    """Draw the pool of phantoms; the label and the size go by turns that do not keep step."""
    for index in range(POOL):
        size = _LARGE[index] if index < len(_LARGE) else _SMALL[index % len(_SMALL)]
        yield f"phantom-{index:03d}", phantom_frame(1000 + index, ("NORM", "ASD")[index % 2], size)


def _read(source: GoldenSource) -> Iterator[tuple[str, Grey]]:
    """Read a pool from files, evenly spread where there are more than it takes. Other files' frames are passed over."""
    for index, file in _spread(list(enumerate(source.files)), POOL):
        try:
            frame = load_grey(file)
            quadrant_boxes(frame.shape[1], frame.shape[0], 1.0)
        except FrameError:
            continue
        if frame.size <= LARGEST:
            yield f"{source.name}-{index:03d}", frame


def _stitched(pool: Sequence[_Candidate], contract: Contract) -> Iterator[tuple[str, Grey]]:
    """Stitch phantoms with patterns of votes that none of the pool has.

    A quadrant is cut and judged by itself, so in a frame of the same size it keeps its vote whatever is beside it.
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

    possible = {p: whole[0] for p in missing if (whole := [d for g in groups if len(d := donors(p, g)) == len(p)])}
    for pattern, indices in _spread(list(possible.items()), STITCHED):
        frame = pool[indices[0]].frame.copy()
        boxes = quadrant_boxes(frame.shape[1], frame.shape[0], contract.keep)
        for index, (left, top, right, bottom) in zip(indices, boxes, strict=True):
            frame[top:bottom, left:right] = pool[index].frame[top:bottom, left:right]
        yield f"phantom-stitched-{''.join(map(str, pattern))}", frame


def _choose(
    pool: Sequence[_Candidate], contract: Contract, budget: int, count: int
) -> list[tuple[int, tuple[str, ...]]]:
    """Choose from the pool by the module's list; gives places in it, in order, with what each is there for."""
    lines = _needs(pool, contract)
    met: set[str] = set()
    chosen: dict[int, tuple[str, ...]] = {}
    for line in lines:
        while True:
            gains = {
                index: len(needs - met)
                for index, needs in enumerate(line)
                if needs - met and index not in chosen and pool[index].cost <= budget
            }
            if not gains or len(chosen) == count:
                break
            best = max(gains, key=lambda index: (gains[index] / pool[index].cost, -index))
            fresh = [need for needs in lines for need in sorted(needs[best] - met)]
            chosen[best] = tuple(fresh)
            met.update(fresh)
            budget -= pool[best].cost
    return sorted(chosen.items())


def _needs(pool: Sequence[_Candidate], contract: Contract) -> list[list[set[str]]]:
    """Say in words what each candidate serves: for each line of the module's list, a set a candidate."""
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
        [{f"{place} votes {name}" for place, name in zip(QUADRANTS, row, strict=True)} for row in votes],
        [{f"votes {' '.join(row)}"} for row in votes],
        [_shape(*candidate.frame.shape) for candidate in pool],
    ]


def _shape(height: int, width: int) -> set[str]:
    large = min(height, width) >= 200
    shape = "upright" if height > width else "wide" if width > height else "square"
    found = {shape, *(["odd height"] if height % 2 else []), *(["odd width"] if width % 2 else [])}
    return found | ({f"a scanner's size, {shape}"} if large else set())


def _margins(probabilities: FloatArray, contract: Contract) -> np.ndarray:
    """Give the lead that the decision on each frame, of float32 [N, 4, C], hangs on: float64 [N]."""
    return _second(frame_margins(probabilities, contract.vote, contract.vote_weights))


def _second(leads: np.ndarray) -> np.ndarray:
    """Give the least lead to another class than the leader's, of float64 [..., C]."""
    return np.asarray(np.partition(leads, 1, axis=-1)[..., 1])


def _tied(probabilities: FloatArray) -> np.ndarray:
    return np.asarray(aggregate_votes(probabilities, "majority").margins == 0)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Take `count` items, evenly spread; all of fewer."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)
