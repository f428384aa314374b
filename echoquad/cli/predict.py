"""``echoquad predict``."""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from echoquad.cli.console import STDOUT, Progress, list_failures, note
from echoquad.cli.options import (
    BundleFolder,
    Method,
    Precision,
    PublicKey,
    Threads,
    TunedBatchSize,
    TunedDevice,
    Untuned,
)

if TYPE_CHECKING:
    from echoquad_runtime.writers import Writer

__all__ = ["predict"]


def predict(
    bundle: BundleFolder,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Frame files, folders, patterns such as 'exam/*.png'; any number."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Result file, .csv or .jsonl; CSV on stdout where not given."),
    ] = None,
    method: Method = None,
    overlay: Annotated[
        Path | None,
        typer.Option("--overlay", metavar="DIR", help="Also draw each frame with its four decisions."),
    ] = None,
    device: TunedDevice = None,
    precision: Precision = None,
    batch_size: TunedBatchSize = None,
    threads: Threads = None,
    untuned: Untuned = False,
    public_key: PublicKey = None,
) -> None:
    """Judge frames with a bundle. Needs no torch."""
    from echoquad_runtime.bundle import Bundle
    from echoquad_runtime.errors import FrameError
    from echoquad_runtime.host import settle
    from echoquad_runtime.inputs import Failure, find_frames
    from echoquad_runtime.overlay import save_overlay
    from echoquad_runtime.predictor import Predictor
    from echoquad_runtime.writers import check_ending

    if out is not None:
        check_ending(out)
    opened = Bundle(bundle, public_key=public_key)
    settings = settle(
        opened,
        device=device.value if device else None,
        precision=precision,
        threads=threads,
        batch_size=batch_size,
        untuned=untuned,
    )
    predictor = Predictor(
        opened,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        spinning=settings.spinning,
        method=method.value if method else None,
        batch_size=settings.batch_size,
    )
    found = list(find_frames(inputs))
    failures = [item for item in found if isinstance(item, Failure)]
    frames = [item for item in found if not isinstance(item, Failure)]
    if not frames:
        raise typer.Exit(list_failures(failures, done=0))
    if settings.note:
        note(settings.note)
    if predictor.engine.note or not settings.tuned:  # what is tuned has named device and precision
        note(predictor.engine.note or f"on {predictor.engine.device} in {predictor.engine.precision}")

    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    with (
        _writer(out, predictor.contract.classes) as writer,
        Progress("predicting", len(frames)) as progress,
    ):
        results = predictor.predict(frames)
        for done, (frame, result) in enumerate(zip(frames, results, strict=True), 1):
            if isinstance(result, Failure):
                failures.append(result)
            else:
                writer.write(result)
                counts[result.label] += 1
                if overlay is not None:
                    try:
                        save_overlay(overlay, frame.path, result, predictor.contract)
                    except FrameError as error:  # gone since it was judged
                        failures.append(Failure(result.file, error))
            progress.update(done)
        if not counts:  # no file of a header alone, in place of what an older run has written
            raise typer.Exit(list_failures(failures, done=0))
    seconds = time.perf_counter() - begin
    judged = sum(counts.values())
    shares = ", ".join(f"{counts[name]} {name}" for name in predictor.contract.classes)
    where = f"; wrote {out.as_posix()}" if out else ""
    where += f"; overlays in {overlay.as_posix()}/" if overlay else ""
    note(f"{judged} frames: {shares}; {judged / seconds:.1f} frames a second{where}")
    raise typer.Exit(list_failures(failures, done=judged))


@contextmanager
def _writer(out: Path | None, classes: tuple[str, ...]) -> Iterator[Writer]:
    from echoquad_runtime.files import output_errors
    from echoquad_runtime.writers import CsvWriter, open_writer

    if out is not None:
        with open_writer(out, classes) as writer:
            yield writer
        return
    with output_errors(STDOUT):
        stream: IO[bytes] = sys.stdout.buffer
        if not sys.stdout.isatty():
            yield CsvWriter(stream, classes)
            stream.flush()
            return
        # Rows would be torn by the bar that is drawn on the same terminal: they follow it.
        held = io.BytesIO()
        try:
            yield CsvWriter(held, classes)
        finally:
            stream.write(held.getvalue())
            stream.flush()
