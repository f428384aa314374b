"""The live view: each newest frame of a source is decided at once, and told with its age and the source's state."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING
from echoquad_runtime.errors import ConfigError, EchoQuadError
from echoquad_runtime.frames.quality_flags import BLANK
from echoquad_runtime.predict.prediction import TIE, Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.config import LiveConfig
from echoquad_serve.live.capture import Capture, check_source
from echoquad_serve.live.capture_loop import CaptureLoop, Patience
from echoquad_serve.live.newest_frame import LiveFrame, NewestFrame
from echoquad_serve.live.picture_feed import PictureFeed
from echoquad_serve.live.smoothing import Smoothing
from echoquad_serve.live.watchdog import State

__all__ = ["LiveView"]

_logger = logging.getLogger(__name__)

_GAP_S: Final = 0.5
"""Seconds between two frames from which the later one is no continuation of the earlier."""

_WAIT_S: Final = 0.5
_AGES: Final = 1000  # of the last frames, for the status
_CLOSE_SECONDS: Final = 5.0


class LiveView:
    """Decides the frames of a live source until it is closed. Nothing is queued, and nothing is written to the disk.

    The newest frame wins: one that was not taken before the next came is dropped and counted. So ``captured`` is the
    sum of ``decided``, ``failed`` and ``dropped``, and of the frame that waits or is being decided.

    Parameters
    ----------
    config
        The source, the smoothing and the largest rate.
    predictor
        Returns the predictor in use, for each frame anew: a new bundle takes over between two frames.
    on_decision
        Called with each row, by the thread that decides; what it takes delays the next frame. A row is as `to_row`
        returns it, and has ``captured`` (Unix time), ``age_ms`` (from the capture to the decision), ``dropped`` (frames
        until now), ``smoothed_over`` (frames, 1 for none) and ``state`` (of the source).
    on_state
        Called with each new state of the source: ``ok``, ``frozen``, ``no signal`` or ``stopped``. See
        `echoquad_serve.live.watchdog`.
    to_row
        Returns a prediction as a row.
    patience
        How long to wait for the source.

    Raises
    ------
    ConfigError
        If the configuration names no source, or a number is out of range.
    MissingExtraError
        If PyAV is not installed.
    """

    def __init__(
        self,
        config: LiveConfig,
        predictor: Callable[[], Predictor],
        on_decision: Callable[[dict[str, Any]], object],
        on_state: Callable[[State], object],
        *,
        to_row: Callable[[Predictor, Prediction], dict[str, Any]],
        patience: Patience | None = None,
    ) -> None:
        self._source = check_source(config.source)
        if config.smoothing < 1:
            raise ConfigError(f"live.smoothing is {config.smoothing}; expected at least 1 frame")
        if not 0 < config.max_fps <= 1000:
            raise ConfigError(f"live.max_fps is {config.max_fps:g}; expected more than 0 and at most 1000")
        self._predictor, self._on_decision, self._on_state, self._to_row = predictor, on_decision, on_state, to_row
        self._slot = NewestFrame()
        self._smoothing = Smoothing(config.smoothing)
        self._feed = PictureFeed(self._watch)
        self._capture = CaptureLoop(
            lambda: Capture(self._source, config.max_fps), self._slot.put, self._feed.put, self._tell_state, patience
        )
        self._lock = threading.Lock()  # guards the three below
        self._ages: deque[float] = deque(maxlen=_AGES)
        self._decided = self._failed = 0
        self._before: LiveFrame | None = None  # the frame before, without which there is nothing to smooth
        self._state_before: State = "stopped"
        self._failing = ""  # the fault of the frame before, so that it is logged once
        self._closing = threading.Event()
        self._worker = threading.Thread(target=self._decide_all, name="echoquad-live-inference", daemon=True)

    def start(self) -> None:
        """Start to capture and to decide, and return at once."""
        self._worker.start()
        self._capture.start()

    def close(self) -> None:
        """End the threads and the process, and drop the frame that waits. Later calls do nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._feed.close()
        self._capture.close()
        self._slot.close()
        if self._worker.ident is not None and self._worker is not threading.current_thread():
            self._worker.join(_CLOSE_SECONDS)

    def frames(self) -> Iterator[bytes]:
        """Yield each new frame as JPEG until the end, black if there is none; made only while somebody watches."""
        return self._feed.frames()

    def status(self) -> dict[str, Any]:
        """Return the state and the counts, as JSON values.

        Returns
        -------
        dict
            ``source``, ``state``, ``captured``, ``decided``, ``failed``, ``dropped``, ``skipped`` (frames beyond the
            largest rate), ``restarts``, ``last_error``, ``watchers``, ``age_ms``: ``p50``, ``p99`` and ``max`` of the
            last frames, None without any.
        """
        with self._lock:
            decided, failed, ages = self._decided, self._failed, sorted(self._ages)
        return {
            "source": self._source.title,
            "state": self._capture.state,
            "captured": self._capture.captured,
            "decided": decided,
            "failed": failed,
            "dropped": self._slot.dropped,
            "skipped": self._capture.skipped,
            "restarts": self._capture.restarts,
            "last_error": self._capture.last_error,
            "watchers": self._feed.watchers,
            "age_ms": _quantiles(ages),
        }

    # ------------------------------------------------------------------------------------------ the source

    def _watch(self, watched: bool) -> None:
        self._capture.watch(watched)

    def _tell_state(self, state: State) -> None:
        if state in ("no signal", "stopped"):
            self._feed.put(None)  # an old picture must not be taken for a live one
        self._on_state(state)

    # ------------------------------------------------------------------------------------------ decisions

    def _decide_all(self) -> None:
        while not self._closing.is_set():
            frame = self._slot.get(_WAIT_S)
            if frame is None:
                continue
            fault = ""
            try:
                row = self._decide(frame)
            except EchoQuadError as error:
                fault = error.code
            except Exception as error:  # its text may quote anything
                fault = type(error).__name__
            with self._lock:
                if fault:
                    self._failed += 1
                else:
                    self._decided += 1
                    self._ages.append(row["age_ms"])
            if fault:
                self._smoothing.reset()
            else:
                try:
                    self._on_decision(row)
                except Exception as error:
                    fault = f"a listener's {type(error).__name__}"
            if fault and fault != self._failing:
                _logger.error("live frame %d: %s; the next one is tried", frame.number, fault)
            self._failing = fault

    def _decide(self, frame: LiveFrame) -> dict[str, Any]:
        predictor = self._predictor()
        prediction = _with_flags(predictor(frame.grey, f"live#{frame.number}"), frame.flags)
        state = self._capture.state
        if state != self._state_before or self._is_cut(frame) or BLANK in prediction.flags:
            self._smoothing.reset()
        self._before, self._state_before = frame, state
        prediction, smoothed_over = self._smoothing.add(prediction, predictor)
        row = self._to_row(predictor, prediction)
        now = time.monotonic()
        return {
            **row,
            "captured": round(time.time() - (now - frame.captured), 6),
            "age_ms": round(1000 * (now - frame.captured), 3),
            "dropped": frame.dropped,
            "smoothed_over": smoothed_over,
            "state": state,
        }

    def _is_cut(self, frame: LiveFrame) -> bool:
        """Return whether a frame is no continuation of the one before."""
        before = self._before
        return before is None or before.part != frame.part or frame.captured - before.captured > _GAP_S


def _with_flags(prediction: Prediction, flags: tuple[str, ...]) -> Prediction:
    """Return a prediction with the flags of the frame's decoder, where those of a file are."""
    if not flags:
        return prediction
    last = [flag for flag in prediction.flags if flag in (TIE, UNLIKE_TRAINING)]
    first = [flag for flag in prediction.flags if flag not in last]
    return replace(prediction, flags=(*first, *flags, *last))


def _quantiles(ages: Sequence[float]) -> dict[str, float] | None:
    """Return the quantiles of ages in ascending order."""
    if not ages:
        return None
    last = len(ages) - 1
    return {"p50": ages[last // 2], "p99": ages[round(0.99 * last)], "max": ages[last]}
