"""How well the typicality separates held-out frames from other pictures, and what it costs.

    python benchmarks/typicality.py BUNDLE FRAMES [--other NAME=FOLDER ...] [--rounds 200] [--results FILE]

FRAMES is a folder of frames like the training frames, of patients that neither trained the model nor set its
thresholds. The script changes them (inverted, mirrored, turned, blurred, with a Doppler box, enlarged, as a part of a
screen) and draws phantoms and noise; --other adds folders of other pictures, of which it takes up to three frames a
file. For each precision of the bundle it reports the area under the ROC curve of each set against FRAMES, and the share
of frames with the flag `unlike-training`. The cost is the time of the graph with its score over that of the same graph
without it, both computing one frame on one core, in alternation.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from common import arguments, one_core, paired_ratio, report, time_interleaved
from PIL import Image
from sklearn.metrics import roc_auc_score

from echoquad_export.graph.onnx_graph import replace_nodes
from echoquad_export.graph.typicality import typicality_branch
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import INPUT, TYPICALITY
from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.reader import load_grey
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.quadrants import Grey
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.phantom.drawing import LABELS, phantom_frame

PER_FILE = 3  # frames of a multi-frame file, which are much alike
DRAWN = 60  # phantoms and pictures of noise
AIM = 1.02  # times the graph without the score


def main() -> None:
    parser = arguments(__doc__, frames=False, rounds=200)
    parser.add_argument("frames", type=Path, help="folder of held-out frames like the training frames")
    parser.add_argument("--other", metavar="NAME=FOLDER", action="append", default=[], help="a set of other pictures")
    options = parser.parse_args()

    bundle = Bundle(options.bundle)
    held_out = list(read(options.frames))
    sets = {name: list(read(Path(folder))) for name, _, folder in (item.partition("=") for item in options.other)}
    sets |= {name: [change(frame) for frame in held_out[::2]] for name, change in CHANGES.items()}
    rng = np.random.default_rng(0)
    sets["phantoms"] = [phantom_frame(seed, LABELS[seed % 2], (300, 400)) for seed in range(DRAWN)]
    sets["noise"] = [rng.normal(70, 40, (300, 400)).clip(0, 255).astype(np.uint8) for _ in range(DRAWN)]

    rows = [["", "frames", *(f"{name}: {what}" for name in bundle.precisions for what in ("AUROC", "flagged"))]]
    record: dict[str, dict[str, dict[str, float]]] = {}
    table: dict[str, list[str]] = {}
    notes = [f"Flagged share of the held-out frames with its Wilson interval of 95 %: {len(held_out)} frames."]
    for precision in bundle.precisions:
        predictor = Predictor(bundle, device="cpu", precision=precision, threads=options.threads)
        typical, share, interval = measure(predictor, held_out)
        table.setdefault("held out", [str(len(held_out))]).extend(["", f"{share:.3f}"])
        notes.append(f"{precision}: {share:.3f} of the held-out frames ({interval[0]:.3f} to {interval[1]:.3f}).")
        record[precision] = {"held out": {"flagged": share}}
        for name, frames in sets.items():
            scores, share, _ = measure(predictor, frames)
            truth = [1] * len(typical) + [0] * len(scores)
            area = float(roc_auc_score(truth, [*typical, *scores]))
            table.setdefault(name, [str(len(scores))]).extend([f"{area:.3f}", f"{share:.2f}"])
            record[precision][name] = {"auroc": area, "flagged": share}
    ratios = {precision: cost(bundle, precision, options.rounds) for precision in bundle.precisions}
    notes += [
        f"Cost: {name} {ratio:.3f} of the graph without the score; aim at most {AIM}." for name, ratio in ratios.items()
    ]
    rows += [[name, *cells] for name, cells in table.items()]
    report("typicality", rows, {"sets": record, "cost": ratios}, options.results, threads=options.threads, notes=notes)


def read(folder: Path) -> Iterator[Grey]:
    """Yield the readable frames of a folder; report the others."""
    taken: Counter[Path] = Counter()
    for file in find_frames([folder]):
        if isinstance(file, Failure):
            print(f"left out {file.file}: {file.error}", file=sys.stderr)
            continue
        taken[file.path] += 1
        if taken[file.path] <= PER_FILE:
            try:
                yield load_grey(file)
            except FrameError as error:
                print(f"left out {file.name}: {error}", file=sys.stderr)


def measure(predictor: Predictor, frames: Sequence[Grey]) -> tuple[list[float], float, tuple[float, float]]:
    """Return the typicality of each frame, the flagged share, and its interval."""
    found = [one for one in predictor.predict_frames(frames) if isinstance(one, Prediction)]
    scores = [one.typicality for one in found if one.typicality is not None]
    if not scores:
        raise SystemExit("the bundle has no typicality score; export it again")
    flagged = sum(UNLIKE_TRAINING in one.flags for one in found)
    return scores, flagged / len(scores), wilson_interval(flagged, len(scores))


def doppler(frame: Grey) -> Grey:
    """Return a frame with a box of colour flow, converted to grey as the runtime converts colour files."""
    height, width = frame.shape
    rng = np.random.default_rng(int(frame.sum()))
    box = np.s_[int(0.3 * height) : int(0.65 * height), int(0.35 * width) : int(0.65 * width)]
    rows, columns = frame[box].shape
    coarse = rng.normal(size=(rows // 12 + 2, columns // 12 + 2)).astype(np.float32)
    flow = np.asarray(Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC))
    colour = np.where(flow[..., None] > 0, (255, 60, 0), (0, 60, 255)) * np.clip(np.abs(flow), 0.4, 1)[..., None]
    pixels = np.repeat(frame[..., None], 3, axis=2)
    pixels[box][np.abs(flow) > 0.5] = colour[np.abs(flow) > 0.5].astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).convert("L"))


def blurred(frame: Grey) -> Grey:
    size = frame.shape[1], frame.shape[0]
    small = Image.fromarray(frame).resize((size[0] // 12, size[1] // 12), Image.Resampling.BILINEAR)
    return np.asarray(small.resize(size, Image.Resampling.BILINEAR))


def enlarged(frame: Grey) -> Grey:
    height, width = frame.shape
    return np.ascontiguousarray(frame[height // 4 : -height // 4, width // 4 : -width // 4])


def on_a_screen(frame: Grey) -> Grey:
    return np.pad(frame, ((frame.shape[0] // 3,) * 2, (frame.shape[1] // 2,) * 2))


CHANGES: dict[str, Callable[[Grey], Grey]] = {
    "inverted grey levels": lambda frame: 255 - frame,
    "mirrored": lambda frame: np.ascontiguousarray(frame[:, ::-1]),
    "turned by 90 degrees": lambda frame: np.ascontiguousarray(np.rot90(frame)),
    "turned by 180 degrees": lambda frame: np.ascontiguousarray(frame[::-1, ::-1]),
    "upside down": lambda frame: np.ascontiguousarray(frame[::-1]),
    "middle half, enlarged": enlarged,
    "small, on a black screen": on_a_screen,
    "blurred": blurred,
    "colour Doppler box": doppler,
}


def cost(bundle: Bundle, precision: str, rounds: int) -> float:
    """Return the time of the graph over that of the same graph without the score."""
    whole = bundle.read_model(precision)
    model = onnx.load_from_string(whole)
    branch = typicality_branch(model.graph)
    replace_nodes(model.graph, [node for node in model.graph.node if branch.isdisjoint(node.output)])
    kept = [output for output in model.graph.output if output.name != TYPICALITY]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    size = bundle.contract.input_size
    quadrants = np.random.default_rng(0).integers(0, 256, (4, 1, size, size), np.uint8)
    with one_core():
        sessions = {
            name: open_session(data, device="cpu", threads=1).session
            for name, data in (("with", whole), ("without", model.SerializeToString()))
        }
        calls = {
            name: lambda session=session: session.run(None, {INPUT: quadrants}) for name, session in sessions.items()
        }
        times = time_interleaved(calls, rounds, pause=0.0)
    return paired_ratio(times["with"], times["without"])


if __name__ == "__main__":
    main()
