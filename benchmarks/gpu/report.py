"""Context and process of a section, and the report, which is written as it grows.

Each section runs in a separate process, so a crash, a lost CUDA context or a hanging call ends that section only. It
sends its results through a pipe, and the parent process keeps all that has arrived.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from common import as_markdown, as_text, write_section
from workers.peer import Setup

from echoquad_runtime.devices.error_summary import summarize_error

LARGE = 32  # frames per batch from which half of the rounds suffice
GRACE = 5.0  # seconds after the deadline before a section's process is killed
NEEDS_CUDA = "needs CUDA; this run is on the CPU"
OUT_OF_TIME = "out of time"
DRY_RUN = "**Dry run on the CPU: no figure of this section was measured on a GPU.**"

Rows = Sequence[Sequence[str]]
Message = tuple[Any, ...]


class OutOfTimeError(Exception):
    """The time of a section is used up."""


@dataclass(frozen=True)
class Settings:
    """Settings of a section.

    Attributes
    ----------
    run, bundle, frames, data
        Folders; `data` is None without training data.
    device
        ``cuda`` or ``cpu``.
    count
        Files per pass from files to CSV.
    epochs
        Epochs of the training section, half of them at reduced resolution.
    rounds
        Timed rounds of engines; half as many from `LARGE` frames on.
    threads
        CPU threads that the process may use.
    work
        Folder for frames and results, shared by all sections.
    deadline
        Time at which the section must end, as returned by `time.time`.
    """

    run: Path
    bundle: Path
    frames: Path
    data: Path | None
    device: str
    count: int
    epochs: int
    rounds: int
    threads: int
    work: Path
    deadline: float


@dataclass(frozen=True)
class Context:
    """The settings of a section, and its connection to the report."""

    settings: Settings
    send: Callable[[Message], object]

    @property
    def cuda(self) -> bool:
        return self.settings.device == "cuda"

    @cached_property
    def peer(self) -> Setup:
        return Setup(self.settings.run, self.settings.bundle, self.settings.threads)

    def left(self) -> float:
        """Return the remaining seconds of the section."""
        return self.settings.deadline - time.time()

    def within(self, share: float) -> Context:
        """Return a context for a part of the section with a share of the remaining time."""
        deadline = time.time() + share * self.left()
        return Context(replace(self.settings, deadline=deadline), self.send)

    def record(self, **values: Any) -> None:
        """Send a measurement, which becomes a line of JSON."""
        self.send(("record", values))

    def table(self, title: str, rows: Rows) -> None:
        """Send a table, header first; it replaces an earlier table with the same title."""
        self.send(("table", title, [list(row) for row in rows]))

    def note(self, line: str) -> None:
        """Send a sentence to print below the tables."""
        self.send(("note", line))

    def aims(self, lines: Sequence[str]) -> None:
        """Send results of `aim`; on the CPU they are listed as missing, because the aims are for a GPU."""
        if self.cuda:
            for line in lines:
                self.note(line)
        else:
            self.missing("the aims", NEEDS_CUDA)

    def missing(self, what: str, why: object) -> None:
        """Send what could not be measured, and why."""
        self.send(("missing", what, why if isinstance(why, str) else summarize_error(why)))

    def command(self, *line: object, environment: Mapping[str, str] | None = None) -> Finished:
        """Run ``python LINE`` within the time of the section; raise OutOfTimeError and kill it if it takes longer."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            begin = time.perf_counter()
            # Files instead of pipes: children of a killed command would keep a pipe open.
            process = subprocess.Popen(
                [sys.executable, *map(str, line)], stdout=out, stderr=err, env={**os.environ, **(environment or {})}
            )
            try:
                code = process.wait(max(0.1, self.left()))
            except subprocess.TimeoutExpired:
                raise OutOfTimeError from None
            finally:
                process.kill()
                process.wait()
            seconds = time.perf_counter() - begin
            out.seek(0)
            err.seek(0)
            return Finished(code, seconds, out.read(), err.read())

    def checked(self, *line: object, environment: Mapping[str, str] | None = None) -> Finished:
        """Run ``python LINE``; raise RuntimeError with the last line of stderr if the exit code is not 0."""
        finished = self.command(*line, environment=environment)
        if finished.code:
            lines = finished.err.strip().splitlines() or ["no message"]
            raise RuntimeError(f"exit code {finished.code}: {lines[-1]}")
        return finished


class Finished(NamedTuple):
    """A finished command: exit code, wall seconds, stdout, stderr."""

    code: int
    seconds: float
    out: str
    err: str


def visible_gpu() -> str:
    """Return nvidia-smi's index or UUID of the first GPU that is visible to CUDA."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"


# Aims


def ratio(values: Mapping[str, float], over: str, under: str) -> float | None:
    """Return the ratio of two values, or None if one was not measured."""
    return values[over] / values[under] if over in values and under in values else None


def aim(what: str, value: float | None, bound: float, *, at_most: bool) -> str:
    """Return a sentence that compares a value with its aim."""
    words = f"aim: at {'most' if at_most else 'least'} {bound:g}"
    if value is None:
        return f"{what}: not measured ({words})."
    reached = value <= bound if at_most else value >= bound
    return f"{what}: {value:.2f} ({words}; {'reached' if reached else 'missed'})."


# A section's process


def run_section(target: str, settings: Settings, take: Callable[[Message], object]) -> None:
    """Run a section in a separate process and pass on its messages.

    Parameters
    ----------
    target
        Function of the section, ``module:function``; it takes a `Context`.
    settings
        Include the deadline; the process is killed `GRACE` seconds later.
    take
        Called with each message.
    """
    spawn = multiprocessing.get_context("spawn")
    receiving, sending = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run, args=(sending, target, settings))
    process.start()
    sending.close()
    try:
        while True:
            if not receiving.poll(max(0.0, settings.deadline + GRACE - time.time())):
                take(("missing", "the rest of the section", f"{OUT_OF_TIME}; its process was stopped"))
                return
            try:
                take(receiving.recv())
            except EOFError:
                break
        process.join(GRACE)
        if process.exitcode:
            take(("missing", "the rest of the section", f"its process ended with {process.exitcode}"))
    finally:
        _kill_group(process)
        receiving.close()


def _run(sending: Connection, target: str, settings: Settings) -> None:
    os.setsid()  # a process group, to kill it with its children
    module, _, function = target.partition(":")
    try:
        getattr(importlib.import_module(module), function)(Context(settings, sending.send))
    except OutOfTimeError:
        sending.send(("missing", "the rest of the section", OUT_OF_TIME))
    except Exception as error:
        traceback.print_exc()
        sending.send(("missing", "the rest of the section", f"{type(error).__name__}: {summarize_error(error)}"))


def _kill_group(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, or has not reached os.setsid
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# The report


@dataclass
class Findings:
    """Results of a section so far; `missing` lists what was not measured, and why."""

    title: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    ended: bool = False


class Report:
    """Results of all sections, written after each addition.

    Parameters
    ----------
    titles
        Titles of the sections by name.
    facts
        Those of `common.run_facts`, and ``gpu``: card, driver, CUDA and cuDNN as text.
    device
        ``cuda`` or ``cpu``; a run on the CPU is marked as a dry run.
    results
        ``RESULTS.md``, or None.
    out
        File for JSON lines, or None; an existing file is replaced.
    """

    def __init__(
        self, titles: Mapping[str, str], facts: Mapping[str, Any], device: str, results: Path | None, out: Path | None
    ) -> None:
        self.sections = {name: Findings(title) for name, title in titles.items()}
        self._facts, self._device, self._results, self._out = facts, device, results, out
        if out is not None:
            out.write_text(json.dumps(dict(facts)) + "\n", encoding="utf-8")
        self._write()

    def take(self, name: str, message: Message) -> None:
        """Add a message of a section."""
        found, (kind, *content) = self.sections[name], message
        match kind:
            case "record":
                print(f"{name}: {_words(content[0])}", file=sys.stderr, flush=True)
                self._append({"section": name, **content[0]})
                return
            case "table":
                found.tables[content[0]] = content[1]
            case "note":
                found.notes.append(content[0])
            case "missing":
                found.missing.append((content[0], content[1]))
                self._append({"section": name, "not_measured": content[0], "why": content[1]})
        self._write()

    def end(self, name: str) -> None:
        """Mark a section as finished, and print its results."""
        found = self.sections[name]
        found.ended = True
        self._write()
        print(f"\n{found.title}")
        for title, rows in found.tables.items():
            print(f"\n{title}\n{as_text(rows)}")
        for note in found.notes:
            print(note)
        sys.stdout.flush()

    def not_measured(self) -> list[str]:
        """Return a line for each measurement that is missing."""
        lines = []
        for name, found in self.sections.items():
            lines += [f"{name}: {what}: {why}" for what, why in found.missing]
            if not found.ended:
                lines.append(f"{name}: incomplete: the benchmark ended before the section")
        return lines

    def print_rest(self) -> None:
        """Print the missing measurements."""
        print("\nNot measured")
        for line in self.not_measured() or ["nothing"]:
            print(f"- {line}")
        sys.stdout.flush()

    def _append(self, values: Mapping[str, Any]) -> None:
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")

    def _write(self) -> None:
        if self._results is None:
            return
        parts = [self._facts["gpu"]] if self._device == "cuda" else [DRY_RUN]
        for found in self.sections.values():
            if found.tables or found.notes:
                parts.append(f"### {found.title}")
            for title, rows in found.tables.items():
                parts += [f"**{title}**", as_markdown(rows)]
            parts += found.notes
        if lines := self.not_measured():
            parts += ["### Not measured", "\n".join(f"- {line}" for line in lines)]
        write_section(self._results, "GPU", parts, self._facts)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
