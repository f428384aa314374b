"""How ``echoquad tune`` checks and measures a candidate: first on the golden frames, then by timed samples.

The timed work is what ``predict`` does with a frame once its bytes are in memory: decode, quadrants, inference, vote.
Goal ``throughput`` times the worker pool, as for a folder; the other goals time one frame after the other.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final, cast

from echoquad_runtime.bench.benchmark import time_pool, time_stages
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
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.tuning.racing import Sample
from echoquad_runtime.tuning.saved_settings import Goal, RunConfig
from echoquad_runtime.verify.verify import verify

__all__ = ["FRAME_RATE", "CandidateTimer", "GoldenFrameCheck"]

_logger = logging.getLogger(__name__)

FRAME_RATE: Final = 30.0
"""Frames per second of the live source that goal ``power`` simulates."""

_PERIOD = 1 / FRAME_RATE
_WARM_UP_CALLS, _WARM_UP_SECONDS = 3, 0.1  # untimed calls at the start of a sample, whichever limit comes first
_SPIN_DOWN_SECONDS = 0.06  # spinning threads stop about half of this time after their last work
_BATCHES_PER_WORKER = 4  # in a call of the worker pool: only its start and its end leave workers idle
_CLOCK_RESOLUTION = 1e-6  # CPU-seconds: a coarse clock measures less as 0, and a score must be positive

_EngineKey = tuple[tuple[str, object], ...]


class GoldenFrameCheck:
    """Replays the golden frames for a configuration, once each, and remembers the outcome.

    Attributes
    ----------
    unavailable
        The errors of devices, and of precisions on them, that are not available.
    """

    def __init__(self, bundle: Bundle, public_key: str | Path | None) -> None:
        self.unavailable: list[EchoQuadError] = []
        self._bundle, self._public_key = bundle, public_key
        self._reasons: dict[tuple[str, str, int, bool, bool], str] = {}

    def failure_reason(self, config: RunConfig) -> str:
        """Return in one line why the golden frames fail with `config`; empty if they pass."""
        key = config.device, config.precision, config.threads, config.cuda_graphs, config.nhwc
        if key not in self._reasons:
            self._reasons[key] = reason = self._replay(config)
            threads = f"{config.threads} thread{'s' * (config.threads > 1)}"
            name = f"{config.precision} on {config.device}{config.cuda_options}, {threads}"
            _logger.info("golden frames: %s: %s", name, "failed" if reason else "passed")
        return self._reasons[key]

    def _replay(self, config: RunConfig) -> str:
        try:
            verification = verify(
                self._bundle.folder,
                device=cast("Device", config.device),
                precision=config.precision,
                threads=config.threads,
                cuda_graphs=config.cuda_graphs,
                nhwc=config.nhwc,
                public_key=self._public_key,
            )
        except (BundleTamperedError, MissingExtraError):  # not specific to this configuration
            raise
        except (DeviceUnavailableError, UsageError) as error:
            self.unavailable.append(error)
            return str(error)
        except Exception as error:  # execution providers raise exceptions without a common base class
            return summarize_error(error)
        if verification.passed:
            return ""
        allowed = ", ".join(f"{name} {value:g}" for name, value in verification.gate.items())
        return (
            f"worst |dlogit| {verification.max_abs_dlogit:.2e}, "
            f"worst |dprobability| {verification.max_abs_dprobability:.2e}, "
            f"{verification.frame_flips} frame flips; allowed: {allowed}"
        )


class CandidateTimer:
    """Measures candidates. Each has an engine of its own; they share only the frames.

    Parameters
    ----------
    bundle
        The bundle.
    encoded
        File bytes of the frames to time.
    configs
        The candidates.
    goal
        What a sample's score measures.
    seconds
        Time limit of the whole search; it determines the duration of a sample.

    Attributes
    ----------
    failures
        Why a candidate cannot run, by its number.
    """

    def __init__(
        self, bundle: Bundle, encoded: Sequence[bytes], configs: Sequence[RunConfig], goal: Goal, seconds: float
    ) -> None:
        self.failures: dict[int, str] = {}
        self._bundle, self._encoded, self._configs, self._goal = bundle, encoded, configs, goal
        # About eight rounds of all candidates, more of the remaining ones; long enough for the resolution of the clock.
        shortest, longest = (0.35, 1.0) if goal == "power" else (0.05, 0.5)
        self._seconds = min(longest, max(shortest, seconds / (8 * max(1, len(configs)))))
        self._engines: dict[_EngineKey, SlotPool | Predictor] = {}
        self._next = [0] * len(configs)  # next frame of each candidate: over its samples it goes through all frames
        self._spun = False
        self._max_batch = max((config.batch_size for config in configs), default=1)
        self._batch = new_batch(bundle.contract, self._max_batch)

    def close_others(self, running: Collection[int]) -> None:
        """Close the engines that none of these candidates uses: each takes two to three times its graph's memory."""
        needed = {_engine_key(self._configs[index]) for index in running}
        if self._engines.keys() - needed:
            self._engines = {key: engine for key, engine in self._engines.items() if key in needed}
            gc.collect()

    def measure(self, index: int) -> Sample | None:
        """Measure a candidate once; None if it does not run (see `failures`)."""
        try:
            return self._measure(index)
        except BundleTamperedError:
            raise
        except Exception as error:  # execution providers raise exceptions without a common base class
            self.failures[index] = summarize_error(error)
            return None

    def _measure(self, index: int) -> Sample:
        config, clock = self._configs[index], time.perf_counter
        if self._spun:
            time.sleep(_SPIN_DOWN_SECONDS)
        self._spun = config.spinning
        calls: list[float] = []
        begin, warm = clock(), 0
        while warm < (1 if self._next[index] else 2) or (warm < _WARM_UP_CALLS and clock() - begin < _WARM_UP_SECONDS):
            self._call(index)
            warm += 1
        if self._goal == "power":
            time.sleep(_SPIN_DOWN_SECONDS)
        begin, cpu = clock(), time.process_time()
        while not calls or clock() - begin < self._seconds:
            calls.append(self._call(index))
            if self._goal == "power":  # wait for the next frame of the live source; frames missed meanwhile are skipped
                time.sleep(_PERIOD - (clock() - begin) % _PERIOD)
        cpu, frames = time.process_time() - cpu, len(calls) * self._frames_per_call(config)
        if self._goal == "latency":
            score = median(calls)
        elif self._goal == "power":
            score = max(cpu, _CLOCK_RESOLUTION) / frames
        else:
            score = sum(calls) * _BATCHES_PER_WORKER / frames
        return Sample(score, tuple(calls), frames, cpu)

    def _frames_per_call(self, config: RunConfig) -> int:
        if self._goal != "throughput":
            return config.batch_size
        return config.batch_size * config.threads * _BATCHES_PER_WORKER

    def _call(self, index: int) -> float:
        """Predict the next frames and return the seconds per batch; the worker pool runs several batches at a time."""
        config = self._configs[index]
        begin, count = self._next[index], self._frames_per_call(config)
        self._next[index] += count
        chunk = [self._encoded[number % len(self._encoded)] for number in range(begin, begin + count)]
        engine = self._engine(config)
        if isinstance(engine, SlotPool):
            return sum(time_stages(engine, chunk, self._batch))
        engine.batch_size = config.batch_size
        return time_pool(engine, chunk) / _BATCHES_PER_WORKER

    def _engine(self, config: RunConfig) -> SlotPool | Predictor:
        key = _engine_key(config)
        if key not in self._engines:
            options: dict[str, Any] = dict(key)
            # Both self-test their slots: candidates run batch sizes that `GoldenFrameCheck` does not replay.
            if self._goal == "throughput":
                self._engines[key] = Predictor(self._bundle, **options, concurrent=True)
            else:
                engine = OnnxEngine(self._bundle, **options)
                self._engines[key] = SlotPool(engine, self._max_batch, SelfTest(self._bundle, engine, self._max_batch))
        return self._engines[key]


def _engine_key(config: RunConfig) -> _EngineKey:
    """Return the options of a candidate's engine; candidates that differ only in batch size share an engine."""
    return tuple((name, value) for name, value in asdict(config).items() if name != "batch_size")
