"""The inference worker: the thread that takes what waits, first in, first out, and records one result for each."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.frames.formats import ReadOptions
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.isolation.limits import TIME_LIMIT
from echoquad_runtime.frames.reader import frames_in
from echoquad_runtime.predict.prediction import Prediction
from echoquad_serve.inference.loaded_model import LoadedModel
from echoquad_serve.inference.model_manager import ModelManager
from echoquad_serve.records import Job, Result, Status

__all__ = ["InferenceWorker", "JobSource"]

logger = logging.getLogger(__name__)

_BATCH: Final = 16  # jobs taken at once: enough for all threads, few enough for a new bundle to take over soon
_POLL_S: Final = 0.25  # how soon a closing service is noticed
_RETRY_S: Final = 1.0  # until a result that could not be recorded is tried again
_INTERRUPTIONS: Final = 3  # crashes of the service during a job, after which its object is not read again


class JobSource(Protocol):
    """What the worker needs of the queue."""

    def take(self, count: int, timeout: float) -> list[Job]:
        """Return the oldest waiting jobs, at most `count`; empty after `timeout` seconds without one."""
        ...

    def finish(self, result: Result) -> Result:
        """Record the result of a job; raise KeyError if its object was not accepted after all."""
        ...


@dataclass(slots=True)
class _Progress:
    """The frames of a job that are decided so far."""

    job: Job
    begin: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    shadow: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    found: int = 0
    decided: int = 0
    listed: bool = False  # whether all frames of the file are found

    def fail(self, code: str, message: str) -> None:
        """Note that the object could not be decided."""
        self.failures.append({"file": self.job.name, "code": code, "message": message})


class InferenceWorker:
    """Decides jobs in a thread of its own.

    Jobs that wait together are decided together, each on a thread of its own; a single one gets all threads.

    Parameters
    ----------
    jobs
        The queue.
    models
        The bundle in use. Each batch of jobs is decided by one bundle.
    every
        Every N-th frame of a clip.
    clock
        Returns the Unix time.
    """

    def __init__(
        self, jobs: JobSource, models: ModelManager, *, every: int = 1, clock: Callable[[], float] = time.time
    ) -> None:
        self._jobs, self._models, self._clock = jobs, models, clock
        self._options = ReadOptions(matrices=True, every=every)
        self._closing = threading.Event()
        self._progressed = time.monotonic()
        self._stall_s = _stall_limit_s(1)
        self._thread = threading.Thread(target=self._work, name="echoquad-inference", daemon=True)

    def start(self) -> None:
        """Begin to decide."""
        self._note_progress()
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Stop after the job at hand. Jobs without a result wait for the next start."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def fault(self) -> str | None:
        """Why nothing is decided any more; None while the thread makes progress. Reading it never waits."""
        if not self._thread.is_alive():
            return "no thread decides any more"
        limit = self._stall_s
        silent = time.monotonic() - self._progressed
        return None if silent <= limit else f"no frame was read or decided for {limit:g} seconds"

    def _note_progress(self) -> None:
        self._progressed = time.monotonic()

    def _work(self) -> None:
        while not self._closing.is_set():
            self._note_progress()
            try:
                jobs = self._jobs.take(_BATCH, _POLL_S)
            except Exception:
                logger.exception("the queue cannot be read")
                self._closing.wait(_RETRY_S)
                continue
            if jobs:
                self._decide(jobs)

    def _decide(self, jobs: Sequence[Job]) -> None:
        """Record a result for each job, whatever its file holds."""
        now, model = self._clock(), self._models.current
        self._stall_s = _stall_limit_s(model.predictor.batch_size)
        pending = deque[_Progress]()
        for job in jobs:
            progress = _Progress(job, now)
            if job.expired(now):
                self._finish(progress, model, "expired")
            elif job.interrupted >= _INTERRUPTIONS:
                progress.fail(
                    "E_INTERRUPTED", f"the service crashed {job.interrupted} times while it decided the object"
                )
                self._finish(progress, model)
            else:
                pending.append(progress)
        try:
            for progress in self._predict(list(pending), model):
                self._finish(progress, model)
                pending.popleft()
        except Exception as error:  # such as a GPU that is gone: the frames are not to blame, and yet need a result
            logger.exception("a batch of jobs failed")
            code = error.code if isinstance(error, EchoQuadError) else "E_UNEXPECTED"
            for progress in pending:
                progress.rows.clear()
                progress.fail(code, f"deciding failed with {type(error).__name__}")
                self._finish(progress, model)

    def _predict(self, pending: Sequence[_Progress], model: LoadedModel) -> Iterator[_Progress]:
        """Yield each job when all of its frames are decided."""
        shadow = self._models.shadow
        owners = deque[tuple[_Progress, FrameFile | Failure]]()

        def items() -> Iterator[FrameFile | Failure]:
            for progress in pending:
                for item in frames_in(progress.job.path, progress.job.name, self._options):
                    self._note_progress()
                    owners.append((progress, item))
                    progress.found += 1
                    yield item
                progress.listed = True

        waiting = deque(pending)
        for answer in model.predictor.predict(items()):
            self._note_progress()
            progress, item = owners.popleft()
            progress.decided += 1
            if isinstance(answer, Prediction):
                progress.rows.append(model.row(answer))
                if shadow is not None and isinstance(item, FrameFile):
                    progress.shadow += _shadow_rows(shadow, item)
            else:
                progress.failures.append({"file": answer.file, "code": answer.error.code, "message": str(answer.error)})
            # In order, and as soon as it is known: nobody waits for a longer object behind.
            while waiting and waiting[0].listed and waiting[0].decided == waiting[0].found:
                yield waiting.popleft()
        yield from waiting

    def _finish(self, progress: _Progress, model: LoadedModel, status: Status | None = None) -> None:
        job, now = progress.job, self._clock()
        result = Result(
            id=job.id,
            status=status or ("done" if progress.rows else "failed"),
            origin=job.origin,
            name=job.name,
            received=job.received,
            finished=now,
            rows=tuple(progress.rows),
            failures=tuple(progress.failures),
            bundle=model.identity() if progress.rows else {},
            timings_ms={
                "queue": round(max(0.0, progress.begin - job.received) * 1e3, 3),
                "predict": round(max(0.0, now - progress.begin) * 1e3, 3),
            },
            sender=job.sender,
            sop_class_uid=job.sop_class_uid,
            sop_instance_uid=job.sop_instance_uid,
            shadow=tuple(progress.shadow),
        )
        told = False
        while True:
            self._note_progress()
            try:
                self._jobs.finish(result)
                return
            except KeyError:  # the disk failed during the acceptance: the sender was told, and nobody waits
                return
            except Exception:  # a full disk, for example: the job is not lost, and waits
                if not told:  # and not with each attempt: the log may be on the same disk
                    logger.exception("a result cannot be recorded; it is tried again each second")
                    told = True
                if self._closing.wait(_RETRY_S):
                    return


def _stall_limit_s(batch_size: int) -> float:
    """Return the seconds without progress after which the thread counts as stuck, however long its job is.

    Progress is a look at an empty queue, a frame found, a batch decided or an attempt to record a result. Each frame of
    a batch may take `TIME_LIMIT` to read, and may wait for others of its clip.
    """
    return TIME_LIMIT * (batch_size + 3)


def _shadow_rows(shadow: LoadedModel, frame: FrameFile) -> list[dict[str, Any]]:
    """Return what the second bundle decides; nothing if it fails, since results come from the first alone."""
    try:
        return [shadow.row(answer) for answer in shadow.predictor.predict(frame) if isinstance(answer, Prediction)]
    except Exception:
        logger.exception("the shadow bundle failed")
        return []
