"""What ``echoquad tune`` puts a candidate through: the golden frames, then turns of being timed.

What is timed is what ``predict`` does with a frame once its bytes are there: decode, quadrants, inference, vote. For
goal ``throughput`` that is its pipeline, as over a folder; for the others one frame after the other.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

from echoquad_runtime.bench.benchmark import time_stages
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.io_binding import new_batch
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.self_test import SelfTest
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import (
    BundleTamperedError,
    DeviceUnavailableError,
    EchoQuadError,
    MissingExtraError,
    UsageError,
)
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.tuning.racing import Turn
from echoquad_runtime.tuning.saved_settings import Goal, RunConfig
from echoquad_runtime.verify.verify import verify

__all__ = ["FRAME_RATE", "GoldenFrames", "Trial", "time_pipeline"]

FRAME_RATE: Final = 30.0
"""Frames a second of the live source that goal ``power`` imitates."""

_PERIOD = 1 / FRAME_RATE
_WARM_CALLS, _WARM_SECONDS = 3, 0.1  # whichever is first, untimed, at the beginning of a turn
_SETTLE_SECONDS = 0.06  # threads that spin go on for about half of it after their last work
_BATCHES_A_WORKER = 4  # in a call of the pipeline, which shares out at its begin and its end alone
_CLOCK_GRAIN = 1e-6  # CPU-seconds: less is none to a coarse clock, and no cost may be 0

_EngineKey = tuple[tuple[str, object], ...]


class GoldenFrames:
    """Whether the golden frames pass on a device, in a precision, with so many threads; each is tried once.

    Attributes
    ----------
    unusable
        The errors that say that a device, or a precision on it, is not there.
    """

    def __init__(self, bundle: Bundle, public_key: str | Path | None, tell: Callable[[str], None]) -> None:
        self.unusable: list[EchoQuadError] = []
        self._bundle, self._public_key, self._tell = bundle, public_key, tell
        self._found: dict[tuple[str, str, int, bool, bool], str] = {}

    def fault(self, device: str, precision: str, threads: int) -> str:
        """Say in one line why not; empty where they pass."""
        return self.fault_of(RunConfig(device, precision, threads, False, 1))

    def fault_of(self, choice: RunConfig) -> str:
        """Return in one line why a candidate does not pass; empty if it does."""
        key = choice.device, choice.precision, choice.threads, choice.cuda_graphs, choice.nhwc
        if key not in self._found:
            self._found[key] = found = self._replay(choice)
            threads = f"{choice.threads} thread{'s' * (choice.threads > 1)}"
            words = f"golden frames: {choice.precision} on {choice.device}{choice.on_cuda}, {threads}"
            self._tell(f"{words}: {'failed' if found else 'passed'}")
        return self._found[key]

    def _replay(self, choice: RunConfig) -> str:
        try:
            found = verify(
                self._bundle.folder,
                device=cast("Device", choice.device),
                precision=choice.precision,
                threads=choice.threads,
                cuda_graphs=choice.cuda_graphs,
                nhwc=choice.nhwc,
                public_key=self._public_key,
            )
        except (BundleTamperedError, MissingExtraError):  # no candidate's fault
            raise
        except (DeviceUnavailableError, UsageError) as error:
            self.unusable.append(error)
            return str(error)
        except Exception as error:  # what a provider raises has no common base
            return summarize_error(error)
        if found.passed:
            return ""
        allowed = ", ".join(f"{name} {value:g}" for name, value in found.gate.items())
        return (
            f"worst |dlogit| {found.max_abs_dlogit:.2e}, worst |dprobability| {found.max_abs_dprobability:.2e}, "
            f"{found.frame_flips} frame flips; allowed: {allowed}"
        )


class Trial:
    """Where candidates are timed: their engines, which share nothing but the frames, and their turns.

    Attributes
    ----------
    faults
        Why a candidate is out, by its number.
    """

    def __init__(
        self, bundle: Bundle, encoded: Sequence[bytes], choices: Sequence[RunConfig], goal: Goal, seconds: float
    ) -> None:
        self.faults: dict[int, str] = {}
        self._bundle, self._encoded, self._choices, self._goal = bundle, encoded, choices, goal
        # About eight rounds of all, more of those that are left; long enough for the grain of the clocks.
        shortest, longest = (0.35, 1.0) if goal == "power" else (0.05, 0.5)
        self._seconds = min(longest, max(shortest, seconds / (8 * max(1, len(choices)))))
        self._engines: dict[_EngineKey, SlotPool | Predictor] = {}
        self._next = [0] * len(choices)  # frame, so that over its turns each candidate goes through all of them
        self._spun = False
        self._most = max((choice.batch_size for choice in choices), default=1)
        self._batch = new_batch(bundle.contract, self._most)

    def close_others(self, running: Collection[int]) -> None:
        """Close the engines that none of these candidates needs: one takes two to three times its graph's memory."""
        kept = {_engine_key(self._choices[index]) for index in running}
        self._engines = {key: engine for key, engine in self._engines.items() if key in kept}
        gc.collect()

    def give_turn(self, index: int) -> Turn | None:
        """Time a candidate for a while; None where it does not run."""
        try:
            return self._measure(index)
        except BundleTamperedError:
            raise
        except Exception as error:  # what a provider raises, out of memory say, has no common base
            self.faults[index] = summarize_error(error)
            return None

    def _measure(self, index: int) -> Turn:
        choice, clock = self._choices[index], time.perf_counter
        if self._spun:
            time.sleep(_SETTLE_SECONDS)
        self._spun = choice.spinning
        calls: list[float] = []
        begin, warm = clock(), 0
        while warm < (1 if self._next[index] else 2) or (warm < _WARM_CALLS and clock() - begin < _WARM_SECONDS):
            self._call(index)
            warm += 1
        if self._goal == "power":
            time.sleep(_SETTLE_SECONDS)
        begin, cpu = clock(), time.process_time()
        while not calls or clock() - begin < self._seconds:
            calls.append(self._call(index))
            if self._goal == "power":  # the next frame comes when it comes; those that were missed are gone
                time.sleep(_PERIOD - (clock() - begin) % _PERIOD)
        cpu, frames = time.process_time() - cpu, len(calls) * self._frames_a_call(choice)
        if self._goal == "latency":
            score = median(calls)
        elif self._goal == "power":
            score = max(cpu, _CLOCK_GRAIN) / frames
        else:
            score = sum(calls) * _BATCHES_A_WORKER / frames
        return Turn(score, tuple(calls), frames, cpu)

    def _frames_a_call(self, choice: RunConfig) -> int:
        if self._goal != "throughput":
            return choice.batch_size
        return choice.batch_size * choice.threads * _BATCHES_A_WORKER

    def _call(self, index: int) -> float:
        """Judge the next frames; gives the seconds of a batch, of which the pipeline does several at a time."""
        choice = self._choices[index]
        begin, count = self._next[index], self._frames_a_call(choice)
        self._next[index] += count
        chunk = [self._encoded[one % len(self._encoded)] for one in range(begin, begin + count)]
        engine = self._engine(choice)
        if isinstance(engine, SlotPool):
            return sum(time_stages(engine, chunk, self._batch))
        engine.batch_size = choice.batch_size
        return time_pipeline(engine, chunk) / _BATCHES_A_WORKER

    def _engine(self, choice: RunConfig) -> SlotPool | Predictor:
        key = _engine_key(choice)
        if key not in self._engines:
            options: dict[str, Any] = dict(key)
            # Both test their slots first: candidates run batches of other sizes than `GoldenFrames` replays.
            if self._goal == "throughput":
                self._engines[key] = Predictor(self._bundle, **options, many=True)
            else:
                engine = OnnxEngine(self._bundle, **options)
                self._engines[key] = SlotPool(engine, self._most, SelfTest(self._bundle, engine, self._most))
        return self._engines[key]


def time_pipeline(predictor: Predictor, encoded: Sequence[bytes]) -> float:
    """Judge frames as those of a folder are, file bytes to decisions; gives the seconds."""
    begin = time.perf_counter()
    for result in predictor.predict_encoded((str(number), data) for number, data in enumerate(encoded)):
        if isinstance(result, Failure):
            raise result.error
    return time.perf_counter() - begin


def _engine_key(choice: RunConfig) -> _EngineKey:
    """Return the options of a candidate's engine; candidates of other batch sizes share it."""
    return tuple((name, value) for name, value in asdict(choice).items() if name != "batch_size")
