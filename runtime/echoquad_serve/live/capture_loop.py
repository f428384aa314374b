"""The loop that keeps a source captured: it starts the process, watches it, and replaces it when it ends or is silent.

Two threads: one reads what the process sends, and one looks at the clock. So a read that blocks stops nothing: the
other thread kills the process, which ends the read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from echoquad_runtime.errors import EchoQuadError
from echoquad_serve.live.capture import Capture, CapturedFrame, Picture
from echoquad_serve.live.newest_frame import LiveFrame
from echoquad_serve.live.watchdog import State, Watchdog

__all__ = ["CaptureLoop", "Patience"]

_logger = logging.getLogger(__name__)

_NO_FRAME: Final = "the source delivers no frame; it is opened again; check its address, its cable and its power"
_SILENT: Final = "the source has become silent; it is opened again; check its cable and its power"
_FROZEN: Final = "the picture is frozen; the source is opened again"
_CLOSE_SECONDS: Final = 5.0
"""Seconds to wait for a thread at the end; one that waits for a driver may not end."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the loop waits, in seconds.

    Attributes
    ----------
    tick
        Between two looks at the clock.
    first_frame
        For the first frame of a process. A camera of a network sends a key frame every few seconds.
    silence
        For a further frame.
    frozen
        For a frozen picture to move, before the source is opened again, in case that helps. It doubles each time.
    longest_frozen
        At most.
    first_pause, longest_pause
        Before a new process. The pause doubles after each one that ends within `steady`.
    steady
        That a process must run for the next pause to be the first one.
    """

    tick: float = 0.1
    first_frame: float = 15.0
    silence: float = 2.5
    frozen: float = 15.0
    longest_frozen: float = 600.0
    first_pause: float = 0.25
    longest_pause: float = 5.0
    steady: float = 10.0


class CaptureLoop:
    """Keeps a source captured until it is closed.

    Parameters
    ----------
    open_capture
        Starts a process that captures the source.
    on_frame
        Called with each frame, by the thread that reads. It must return at once.
    on_picture
        Called with each frame as JPEG.
    on_state
        Called with each new state, by the thread that looks at the clock.
    patience
        How long to wait.

    Attributes
    ----------
    captured
        Number of frames that were delivered.
    skipped
        Number of frames that were left out before, since the source delivers more than are wanted.
    restarts
        Number of processes that were replaced.
    last_error
        Why the last one was; empty if none was, or a later one delivers frames.
    """

    def __init__(
        self,
        open_capture: Callable[[], Capture],
        on_frame: Callable[[LiveFrame], object],
        on_picture: Callable[[bytes], object],
        on_state: Callable[[State], object],
        patience: Patience | None = None,
    ) -> None:
        self._open, self._on_frame, self._on_picture, self._on_state = open_capture, on_frame, on_picture, on_state
        self._patience = patience or Patience()
        self._watchdog = Watchdog()
        self._lock = threading.Lock()  # guards what follows
        self._capture: Capture | None = None
        self._opened = 0.0  # when the process was started
        self._last_frame: float | None = None  # of the process, when it came
        self._watched = False
        self._closing = threading.Event()
        self._told: State = "stopped"
        self._frozen_limit = self._patience.frozen
        self.captured = self.skipped = self.restarts = 0
        self._skipped_before = 0  # by processes that have ended
        self._part: tuple[int, int] = (0, 0)
        self._parts = 0
        self.last_error = ""
        self._reason = ""  # why the process was killed
        self._reader = threading.Thread(target=self._read_all, name="echoquad-live-capture", daemon=True)
        self._clock = threading.Thread(target=self._watch_clock, name="echoquad-live-clock", daemon=True)

    @property
    def state(self) -> State:
        """The state at this moment; a change is told a tick later at most."""
        return self._watchdog.state(time.monotonic())

    @property
    def pid(self) -> int | None:
        """Process ID of the process that captures; None if there is none."""
        capture = self._capture
        return None if capture is None else capture.pid

    def start(self) -> None:
        """Start to capture, and return at once."""
        self._watchdog.start(time.monotonic())
        self._reader.start()
        self._clock.start()

    def watch(self, watched: bool) -> None:
        """Switch pictures on or off."""
        with self._lock:
            self._watched = watched
            if self._capture is not None:
                self._capture.watch(watched)

    def close(self) -> None:
        """End the process and the threads."""
        self._closing.set()
        self._kill()
        for thread in (self._reader, self._clock):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(_CLOSE_SECONDS)
        self._watchdog.stop()
        self._tell("stopped")

    def _kill(self, reason: str = "") -> None:
        with self._lock:
            self._reason = reason
            if self._capture is not None:
                self._capture.kill()

    # ------------------------------------------------------------------------------------------ reading

    def _read_all(self) -> None:
        pause, logged = self._patience.first_pause, ""
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                self._read_one()
            except EchoQuadError as error:
                reason = str(error)
            except Exception as error:  # a fault here must not end the loop
                reason = f"capturing failed with {type(error).__name__}, which is a bug in EchoQuad; please report it"
            if self._closing.is_set():
                break
            self.last_error = reason = self._reason or reason
            self._reason = ""
            # Once: a cable may be out for hours.
            _logger.log(logging.DEBUG if reason == logged else logging.WARNING, "live source: %s", reason)
            logged = reason
            if time.monotonic() - began >= self._patience.steady:
                pause = self._patience.first_pause
            self._closing.wait(pause)
            pause = min(2 * pause, self._patience.longest_pause)
            self.restarts += 1

    def _read_one(self) -> None:
        """Capture with one process until it ends.

        Raises
        ------
        EchoQuadError
            Always: why it has ended.
        """
        capture = self._open()
        try:
            with self._lock:
                self._capture, self._opened, self._last_frame = capture, time.monotonic(), None
                if self._watched:
                    capture.watch(True)
            if self._closing.is_set():
                capture.kill()
            while True:
                match capture.read():
                    case CapturedFrame() as frame:
                        self._deliver(frame)
                    case Picture(jpeg):
                        self._on_picture(jpeg)
        finally:
            with self._lock:
                self._capture = None
            self._skipped_before = self.skipped
            capture.end()

    def _deliver(self, frame: CapturedFrame) -> None:
        now = time.monotonic()
        with self._lock:
            self._last_frame = now
        self.last_error = ""
        self.captured += 1
        self.skipped = self._skipped_before + frame.skipped
        if (part := (self.restarts, frame.part)) != self._part:
            self._part, self._parts = part, self._parts + 1
        self._watchdog.observe(frame.grey, now)  # before its decision, which states the state
        self._on_frame(LiveFrame(frame.grey, frame.captured, self.captured, part=self._parts, flags=frame.flags))

    # ------------------------------------------------------------------------------------------ the clock

    def _watch_clock(self) -> None:
        while not self._closing.wait(self._patience.tick):
            now = time.monotonic()
            self._tell(self._watchdog.state(now))
            if (reason := self._reason_to_replace(now)) is not None:
                self._kill(reason)

    def _reason_to_replace(self, now: float) -> str | None:
        with self._lock:
            if self._capture is None or self._reason:
                return None
            if self._last_frame is None:
                return _NO_FRAME if now - self._opened >= self._patience.first_frame else None
            if now - self._last_frame >= self._patience.silence:
                return _SILENT
        frozen = self._watchdog.frozen_for(now)
        if not frozen:
            self._frozen_limit = self._patience.frozen
        elif frozen >= self._frozen_limit:
            self._frozen_limit = frozen + min(2 * self._frozen_limit, self._patience.longest_frozen)
            return _FROZEN
        return None

    def _tell(self, state: State) -> None:
        if state == self._told:
            return
        self._told = state
        level = logging.INFO if state in ("ok", "stopped") else logging.WARNING
        _logger.log(level, "the state of the live source has changed", extra={"state": state})
        try:
            self._on_state(state)
        except Exception as error:
            _logger.error("a listener to the live source's state failed with %s", type(error).__name__)
