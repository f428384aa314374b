"""``echoquad predict``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from echoquad.cli.console import PARTIAL, Progress, failure_line, note
from echoquad.cli.declare import Argument, Option
from echoquad.cli.options import (
    BundleFolder,
    CudaGraphs,
    Every,
    Flip,
    FlipName,
    Matrices,
    Method,
    Nhwc,
    Precision,
    PublicKey,
    Threads,
    TunedBatchSize,
    TunedDevice,
    Untuned,
    reading_of,
)
from echoquad.cli.rows import rows_writer, tell_of

if TYPE_CHECKING:
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.cluster.ray_predictor import RayPredictor
    from echoquad_runtime.contract import VoteMethod
    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_runtime.frames.frame_file import Failure, FrameFile
    from echoquad_runtime.predict.prediction import Prediction
    from echoquad_runtime.predict.predictor import Predictor
    from echoquad_runtime.results.result_file import ResultFile
    from echoquad_runtime.results.row_formats import Writer
    from echoquad_runtime.results.shards import Shard
    from echoquad_runtime.tuning.saved_settings import ResolvedSettings

    _Results = Generator[Prediction | Failure, None, None]

__all__ = ["EngineName", "predict"]


class EngineName(StrEnum):
    """What runs a prediction, by the names that --engine takes."""

    local = "local"
    ray = "ray"


def predict(
    bundle: BundleFolder,
    inputs: Annotated[
        list[str],
        Argument(
            metavar="INPUT",
            help="Images, DICOM files, clips, matrices; folders; patterns such as 'exam/*.png'; any number. "
            "clip.dcm#12 is a clip's twelfth frame.",
        ),
    ],
    out: Annotated[
        Path | None,
        Option("--out", metavar="FILE", help="Result file, .csv or .jsonl; CSV on stdout where not given."),
    ] = None,
    resume: Annotated[
        bool,
        Option("--resume", help="Go on behind the rows that an interrupted run has left for --out, or a finished one."),
    ] = False,
    shard: Annotated[
        str | None,
        Option(
            "--shard",
            metavar="I/N",
            help="Judge only the I-th of N parts of the frames, each with an --out of its own; see echoquad merge.",
        ),
    ] = None,
    method: Method = None,
    overlay: Annotated[
        Path | None,
        Option("--overlay", metavar="DIR", help="Also draw each frame with its four decisions."),
    ] = None,
    cam: Annotated[
        bool,
        Option("--cam", help="Colour the overlays by class activation maps: where the evidence lies, and for what."),
    ] = False,
    abstain_below: Annotated[
        float | None,
        Option(
            "--abstain-below",
            metavar="P",
            min=0,
            max=1,
            help="Call a frame INDETERMINATE where the confidence in its class, its mean probability as calibrated by "
            "the bundle, is below P.",
        ),
    ] = None,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
    device: TunedDevice = None,
    precision: Precision = None,
    batch_size: TunedBatchSize = None,
    threads: Threads = None,
    workers: Annotated[
        int | None,
        Option(
            "--workers",
            metavar="N",
            min=0,
            max=512,
            help="Processes that read and cut files where there are many; 0 reads in threads. Without it, none for "
            "up to four threads and one a thread beyond.",
        ),
    ] = None,
    untuned: Untuned = False,
    public_key: PublicKey = None,
    cuda_graphs: CudaGraphs = False,
    nhwc: Nhwc = False,
    engine: Annotated[
        EngineName,
        Option(
            "--engine",
            help="What runs it: this machine, or workers of a Ray cluster (extra ray) with --threads CPUs each or one.",
        ),
    ] = EngineName.local,
    ray_address: Annotated[
        str | None,
        Option(
            "--ray-address",
            metavar="HOST:PORT",
            help="Head of the Ray cluster that this machine is a node of, or auto; a Ray of its own where not given.",
        ),
    ] = None,
) -> None:
    """Judge frames with a bundle. Needs no torch.

    Rows gather in FILE.partial and stay there whatever happens; --resume goes on behind them. FILE.run.json beside the
    finished file says what made it.
    """
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.devices.session_factory import available_cpus
    from echoquad_runtime.engine.self_test import PASSED
    from echoquad_runtime.results.result_file import ResultFile, check_resume, is_stream
    from echoquad_runtime.results.row_formats import format_for
    from echoquad_runtime.tuning.saved_settings import resolve_settings

    on_ray = engine is EngineName.ray
    _check_ray(ray_address, workers, on_ray=on_ray)
    _check_cam(cam, overlay, on_ray=on_ray)
    if out is not None:
        format_for(out)
    if resume:
        check_resume(out)
    part = _parse(shard) if shard is not None else None
    opened = Bundle(bundle, public_key=public_key)
    settings = resolve_settings(
        opened,
        device=device.value if device else None,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        untuned=untuned or on_ray,  # what is tuned is tuned for this host
    )
    rows = ResultFile(out, resume=resume) if out is not None and not is_stream(out) else None
    tally, written = _Tally(), rows is None
    try:
        with rows or nullcontext():
            reading = _reading(opened, matrices, flip, every)
            frames = _Frames(inputs, reading, part, rows)
            first = frames.peek((settings.threads or available_cpus()) + 1)
            if frames.ended and not frames.wanted and not frames.settled:
                for failure in first:
                    tally.fail(failure, note)  # type: ignore[arg-type]  # there is no frame among them
                raise SystemExit(tally.code(0))
            rule: VoteMethod | None = method.value if method else None
            predictor = (
                _on_ray(opened, settings, rule, ray_address, public_key, abstain_below)
                if on_ray
                else _here(
                    opened,
                    settings,
                    rule,
                    many=not frames.ended,
                    cuda_graphs=cuda_graphs or settings.cuda_graphs,
                    nhwc=nhwc or settings.nhwc,
                    cam=cam,
                    abstain_below=abstain_below,
                    workers=workers,
                )
            )
            if settings.note:
                note(settings.note)
            if predictor.engine.note or not settings.tuned:  # what is tuned has named device and precision
                note(predictor.engine.note or f"on {predictor.engine.device} in {predictor.engine.precision}")
            if rows is not None:
                rows.begin(
                    predictor.contract.classes,
                    {
                        "bundle": opened.manifest["manifest_sha256"],
                        "method": predictor.method,
                        "device": predictor.engine.device,
                        "precision": predictor.engine.precision,
                        "shard": str(part) if part else None,
                        **({} if reading.flip == "none" else {"flip": reading.flip}),
                        "abstain_below": None if abstain_below is None else f"{abstain_below:g}",
                        "self_test": PASSED,  # there is no row without
                    },
                )
                tell_of(rows)
            with rows_writer(out, rows, predictor.contract.classes) as writer:
                _judge(predictor, frames, writer, tally, overlay)
            if rows is not None and (tally.judged or frames.settled):  # no file of a header alone, but for a shard
                written = rows.finish()
    finally:
        if rows is not None and rows.interrupted:
            kept = f"{rows.rows} rows are kept in {rows.partial.as_posix()}"
            note(f"{kept}; the same line with --resume goes on behind them")
    if tally.judged or frames.settled:
        places = [f"{'wrote' if written else 'left as it is:'} {out.as_posix()}"] if out is not None else []
        places += [f"overlays in {overlay.as_posix()}/"] if overlay is not None else []
        note("; ".join([*tally.words(predictor.contract.classes, frames.kept), *places]))
    raise SystemExit(tally.code(tally.judged + frames.kept))


def _parse(shard: str) -> Shard:
    from echoquad_runtime.results.shards import Shard

    return Shard.parse(shard)


def _check_ray(address: str | None, workers: int | None, *, on_ray: bool) -> None:
    from echoquad_runtime.errors import UsageError

    if address is not None and not on_ray:
        raise UsageError("--ray-address is given without --engine ray; give both, or neither")
    if workers is not None and on_ray:
        raise UsageError("--workers with --engine ray: Ray starts its own; give one of the two")


def _check_cam(wanted: bool, overlay: Path | None, *, on_ray: bool) -> None:
    from echoquad_runtime.errors import UsageError

    if wanted and overlay is None:
        raise UsageError("--cam is given without --overlay DIR; name the folder for the pictures")
    if wanted and on_ray:
        raise UsageError("--cam with --engine ray: maps are not sent between machines; leave out one of the two")


def _reading(opened: Bundle, matrices: bool, flip: FlipName | None, every: int) -> ReadOptions:
    """Settle how frames are read, and tell what is done to matrices that their files do not say."""
    from echoquad_runtime.frames.formats import ReadOptions

    trained = ReadOptions.found_in(opened.manifest["training"])
    if flip is None and trained.flip != "none":
        note(f"matrices are turned over ({trained.flip}), as in training")
    elif flip is not None and flip.value != trained.flip:
        note(f"--flip {flip.value}: matrices are turned over otherwise than in training, which had {trained.flip}")
    return reading_of(matrices, flip, every, trained)


def _here(
    opened: Bundle,
    settings: ResolvedSettings,
    method: VoteMethod | None,
    *,
    many: bool,
    cuda_graphs: bool,
    nhwc: bool,
    cam: bool,
    abstain_below: float | None,
    workers: int | None,
) -> Predictor:
    from echoquad_runtime.predict.predictor import Predictor

    return Predictor(
        opened,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        spinning=settings.spinning,
        cuda_graphs=cuda_graphs,
        nhwc=nhwc,
        method=method,
        batch_size=settings.batch_size,
        concurrent=many,
        cam=cam,
        abstain_below=abstain_below,
        workers=workers,
        warm_up=False,  # a warm-up run would delay the first frame
    )


def _on_ray(
    opened: Bundle,
    settings: ResolvedSettings,
    method: VoteMethod | None,
    address: str | None,
    public_key: Path | None,
    abstain_below: float | None,
) -> RayPredictor:
    from echoquad_runtime.cluster.ray_predictor import RayPredictor

    return RayPredictor(
        opened,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        method=method,
        batch_size=settings.batch_size,
        public_key=public_key,
        address=address,
        tell=note,
        abstain_below=abstain_below,
    )


class _Frames:
    """The frames that are to be judged, found lazily, and failures among them.

    Attributes
    ----------
    found, wanted
        How many frames were found up to now, and how many of these are to be judged: in this shard, and without a row.
    given
        How many frames and failures were given up to now.
    ended
        Whether these are all.
    kept
        How many rows were there before.
    """

    def __init__(
        self, inputs: Sequence[str], reading: ReadOptions, shard: Shard | None, rows: ResultFile | None
    ) -> None:
        from echoquad_runtime.frames.discovery import find_frames

        self.found = self.wanted = self.given = 0
        self.ended = False
        self.kept = rows.existing_rows if rows is not None else 0
        self._shard, self._rows = shard, rows
        self._ahead: list[FrameFile | Failure] = []
        self._chosen = self._choose(find_frames(inputs, reading))

    def _choose(self, found: Iterator[FrameFile | Failure]) -> Iterator[FrameFile | Failure]:
        from echoquad_runtime.frames.frame_file import FrameFile

        for item in found:
            if isinstance(item, FrameFile):
                self.found += 1
                if self._shard is not None and not self._shard.holds(item.name):
                    continue
                if self._rows is not None and self._rows.claim(item.name):
                    continue
                self.wanted += 1
            self.given += 1
            yield item
        self.ended = True

    @property
    def settled(self) -> bool:
        """Whether there is a result without another row: rows from before, or a shard, which may be empty.

        Not where no frame was found at all: a disk that is not mounted is no finished archive.
        """
        return self.found > 0 and (self.kept > 0 or self._shard is not None)

    def peek(self, count: int) -> Sequence[FrameFile | Failure]:
        """Look at the first `count`, or as many as there are."""
        self._ahead = list(islice(self._chosen, count))
        return self._ahead

    def __iter__(self) -> Iterator[FrameFile | Failure]:
        return chain(self._ahead, self._chosen)


class _Tally:
    """What became of the frames."""

    def __init__(self) -> None:
        self.decided: Counter[str] = Counter()
        self.seconds = 0.0
        self._failed: Failure | None = None  # the first; there may be a million

    @property
    def judged(self) -> int:
        """How many have a row."""
        return self.decided.total()

    def fail(self, failure: Failure, tell: Callable[[str], None]) -> None:
        """Take note of a failure and tell it on a line."""
        self._failed = self._failed or failure
        tell(failure_line(failure))

    def words(self, classes: Sequence[str], kept: int) -> list[str]:
        """Sum up in a few phrases, beside `kept` rows from before."""
        from echoquad_runtime.contract import INDETERMINATE

        if not self.judged:
            return [f"no new frame; {kept} rows were there" if kept else "no frame of this shard"]
        undecided = [INDETERMINATE] if self.decided[INDETERMINATE] else []
        shares = ", ".join(f"{self.decided[name]} {name}" for name in [*classes, *undecided])
        words = [f"{self.judged} frames: {shares}", f"{self.judged / self.seconds:.1f} frames a second"]
        return [*words, f"{kept} rows were there"] if kept else words

    def code(self, done: int) -> int:
        """Give the exit code of a run of which `done` frames have a row."""
        if self._failed is None:
            return 0
        return PARTIAL if done else self._failed.error.exit_code


def _judge(
    predictor: Predictor | RayPredictor, frames: _Frames, writer: Writer, tally: _Tally, overlay: Path | None
) -> None:
    from echoquad_runtime.frames.frame_file import Failure

    def draw(frame: FrameFile, prediction: Prediction) -> None:
        from echoquad_runtime.overlay.drawing import save_overlay

        assert overlay is not None
        save_overlay(overlay, frame, prediction, predictor.contract)

    begin = time.perf_counter()
    with (
        Progress("predicting") as progress,
        closing(cast("_Results", predictor.predict(frames, draw if overlay is not None else None))) as results,
    ):
        for done, result in enumerate(results, 1):
            if isinstance(result, Failure):
                tally.fail(result, progress.print)
            else:
                writer.write(result)
                tally.decided[result.label] += 1
            progress.update(done, frames.given if frames.ended else None)
    tally.seconds = time.perf_counter() - begin
