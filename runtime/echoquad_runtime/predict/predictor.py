"""The predictor: frames in, predictions out, in input order; a frame that fails does not affect the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.typicality import typicality_threshold
from echoquad_runtime.contract import VOTE_METHODS, Contract, VoteMethod
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.io_binding import InferenceOutput, join_outputs
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.self_test import PASSED, SelfTest
from echoquad_runtime.engine.slot_pool import Engine, SlotPool
from echoquad_runtime.errors import ConfigError, FrameError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.isolation.limits import TIME_LIMIT
from echoquad_runtime.frames.isolation.reader_pool import reader_pool
from echoquad_runtime.frames.reader import decode_quadrants, load_quadrants
from echoquad_runtime.frames.sources import Flags, cut_quadrants
from echoquad_runtime.predict.pickling import reopening
from echoquad_runtime.predict.prediction import Prediction, check_abstain_below, check_abstain_unlike, decide
from echoquad_runtime.predict.reader_count import MAX_WORKERS, choose_readers
from echoquad_runtime.predict.worker_pool import FrameTask, WorkerPool
from echoquad_runtime.quadrants import Grey

__all__ = ["TIME_LIMIT", "Predictor"]

# Default batch sizes for concurrent frames. On the CPU more than two only costs memory; a GPU needs full batches.
_BATCH_SIZES: Final = {"cpu": 2, "openvino": 4, "cuda": 16}
_ENGINE_BATCH_SIZE: Final = 8  # for an engine that does not come from a bundle

_KEPT_READERS: Final = 2  # after a run that had one for each worker

_Result = TypeVar("_Result")
_Postprocess = Callable[[Sequence[FrameTask], Sequence[Flags], InferenceOutput], Sequence[_Result | Failure]]


class Predictor:
    """Predict the class of frames with a bundle, or with any other engine.

    A single frame uses all threads, for the lowest latency. Of many frames, each thread takes its own, for the highest
    throughput. On the CPU these are two inference sessions; each opens on first use.

    Before its first prediction, the predictor of a bundle runs a self-test on golden frames, through the slots and
    threads that predict; see `echoquad_runtime.engine.self_test`.

    Parameters
    ----------
    model
        A bundle's folder, an open `Bundle`, or an engine.
    device, precision, threads, spinning, cuda_graphs, nhwc
        As `OnnxEngine`; without effect if `model` is an engine. `threads` bounds all computing threads, including
        those that decode; while reader processes decode, one more frame is in progress.
    method
        Vote rule; None is the contract's.
    batch_size
        Frames per batch for concurrent frames; None is a default for the device.
    public_key
        A PEM file. If given, `model` must be a bundle's folder, signed by the matching private key.
    concurrent
        Whether to open the session for many concurrent frames now, rather than the one for a single frame.
    warm_up
        Whether to run the network once now, so that the self-test and the slow first run do not delay a frame.
    self_test
        Whether to test a bundle before the first prediction. `verify` disables it, since it compares all golden frames.
    workers
        Processes that read and cut all files, each with a thread that predicts; 0 reads PNG, JPEG, BMP and uncompressed
        DICOM in threads. None is 0 for up to four threads, and one per thread beyond that if there are enough files.
    time_limit
        Seconds for reading and decoding one file; a file that takes longer is a failure.
    cam
        Whether predictions carry class activation maps, for bundles whose graphs compute them.
    abstain_below
        If given, a frame whose `Prediction.confidence` is lower is ``INDETERMINATE``.
    abstain_unlike
        Whether a frame unlike the training frames is ``INDETERMINATE``: one with the flag ``unlike-training``.

    A predictor of a bundle can be pickled and copied: the copy opens the bundle again. One of an engine cannot.

    Attributes
    ----------
    engine
        The engine that was opened first; it has the device and the precision in use.
    bundle
        The bundle; None for an engine.

    Raises
    ------
    BundleError
        If the bundle is missing, damaged, or lacks the precision; a `SignatureError` if its signature is missing or
        wrong.
    DeviceUnavailableError
        If the device is not available.
    VerificationError
        If the self-test fails. With ``warm_up=False`` or ``concurrent=True``, the first prediction raises it.
    ConfigError
        If the method, the batch size, the number of workers, the time limit or `abstain_below` is out of range, or
        `abstain_unlike` is True and the model has no typicality score.

    Examples
    --------
    >>> predictor = Predictor("bundle")                                # doctest: +SKIP
    >>> for result in predictor.predict(["exam1/", "exam2/3.png"]):    # doctest: +SKIP
    ...     print(result.file, result.label if isinstance(result, Prediction) else result.error)
    """

    def __init__(
        self,
        model: str | Path | Bundle | Engine,
        *,
        device: Device = "auto",
        precision: str | None = None,
        threads: int | None = None,
        spinning: bool = True,
        cuda_graphs: bool = False,
        nhwc: bool = False,
        method: VoteMethod | None = None,
        batch_size: int | None = None,
        public_key: str | Path | None = None,
        concurrent: bool = False,
        warm_up: bool = True,
        self_test: bool = True,
        workers: int | None = None,
        time_limit: float = TIME_LIMIT,
        cam: bool = False,
        abstain_below: float | None = None,
        abstain_unlike: bool = False,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "model")}
        if isinstance(model, str | Path):
            model = Bundle(model, public_key=public_key)
        elif public_key is not None:  # too late to check the signature, and wrong to ignore the key
            raise ConfigError("public_key needs a bundle's folder; pass it to Bundle for an open bundle")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        if workers is not None and not 0 <= workers <= MAX_WORKERS:
            raise ConfigError(f"workers is {workers}; expected 0 to {MAX_WORKERS}")
        if not time_limit > 0:
            raise ConfigError(f"time_limit is {time_limit:g}; expected more than 0 seconds")
        self.abstain_below = check_abstain_below(abstain_below)
        self.bundle = model if isinstance(model, Bundle) else None
        self._engine_options: dict[str, Any] = {
            "precision": precision,
            "spinning": spinning,
            "cuda_graphs": cuda_graphs,
            "nhwc": nhwc,
            "cam": cam,
        }
        self._device: Device = device
        self._threads = threads or available_cpus()
        self._engines: dict[int, Engine] = {}
        self._pools: dict[tuple[int, int], SlotPool] = {}
        self._pools_lock = threading.RLock()
        self._self_test_enabled = self_test and self.bundle is not None
        self._self_tests: list[SelfTest] = []
        self.engine: Engine = self._open(concurrent=concurrent) if isinstance(model, Bundle) else model
        self.method: VoteMethod = method or self.contract.vote
        manifest = {} if self.bundle is None else self.bundle.manifest
        self._threshold = typicality_threshold(manifest, self.engine.precision)
        self.abstain_unlike = check_abstain_unlike(abstain_unlike, self._threshold)
        if self.method not in VOTE_METHODS:
            raise ConfigError(f"vote method is {method!r}; expected one of {', '.join(VOTE_METHODS)}")
        self.batch_size = batch_size or (_BATCH_SIZES[self.engine.device] if self.bundle else _ENGINE_BATCH_SIZE)
        self.time_limit, self._requested_workers = time_limit, workers
        if warm_up and not concurrent and self.bundle is not None:
            slots = self.slots(concurrent=False)
            slots.run(slots.new_batch(), 1)

    def __reduce__(self) -> tuple[Callable[..., Predictor], tuple[object, ...]]:
        """Return how to open the bundle again; raise ConfigError for an engine."""
        return reopening(type(self), self.bundle, self._arguments)

    @property
    def contract(self) -> Contract:
        """The contract that the model was trained under."""
        return self.engine.contract

    @property
    def threads(self) -> int:
        """Maximum number of computing threads, including those that decode."""
        return self._threads

    @property
    def workers(self) -> int:
        """Number of threads that predict concurrent frames without reader processes."""
        engine = self._engine(concurrent=True)
        if self.bundle is None:  # torch has threads of its own, which decoding would slow down
            return 1
        # OpenVINO computes on all threads at once: one worker waits for it, one decodes meanwhile.
        return min(2, self._threads) if engine.device == "openvino" else self._threads

    @property
    def self_test(self) -> str:
        """``passed`` once every opened slot has passed its self-test; empty before, and without a bundle."""
        return PASSED if self._self_tests and all(test.passed for test in self._self_tests) else ""

    def predict(
        self,
        inputs: str | Path | FrameFile | Failure | Iterable[str | Path | FrameFile | Failure],
        on_decision: Callable[[FrameFile, Prediction], object] | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Predict files: one or any number of paths, folders, patterns, or discovered frames.

        Parameters
        ----------
        inputs
            Consumed lazily, a few dozen ahead of the results; failures among them are yielded unchanged.
        on_decision
            Called with each predicted frame, in the worker's thread: for slow work such as drawing an overlay. If it
            raises a FrameError, a failure replaces the prediction.

        Yields
        ------
        Prediction or Failure
            One per frame, in input order.
        """
        if isinstance(inputs, str | Path | FrameFile | Failure):  # iterating over a string would yield its letters
            inputs = [inputs]
        return self._run_files(_discover(inputs), on_decision)

    def predict_encoded(self, items: Iterable[tuple[str, bytes]]) -> Iterator[Prediction | Failure]:
        """Predict files in memory: names and bytes of images, DICOM or numpy files with one frame. As `predict`."""
        return self.predict_tasks(FrameTask(name, partial(self._load_bytes, data)) for name, data in items)

    def predict_frames(
        self, frames: Iterable[Grey], names: Iterable[str] | None = None
    ) -> Iterator[Prediction | Failure]:
        """Predict decoded frames.

        Parameters
        ----------
        frames
            uint8 [H, W] each, grey levels 0 to 255; sizes may differ. Consumed lazily, a few dozen ahead of the
            results. If a frame depends on the result of the previous one, call the predictor instead.
        names
            Names of the frames; None numbers them from 0.

        Yields
        ------
        Prediction or Failure
            One per frame, in order.
        """
        named = zip(names, frames, strict=True) if names is not None else ((str(i), it) for i, it in enumerate(frames))
        return self.predict_tasks(FrameTask(name, partial(self._load_grey, frame)) for name, frame in named)

    def __call__(self, frame: Grey | bytes, name: str = "0") -> Prediction:
        """Predict one frame in the caller's thread, with the lowest latency.

        `frame` is uint8 [H, W], or the bytes of a file as in `predict_encoded`.

        Raises
        ------
        FrameError
            If the frame cannot be decoded or predicted.
        """
        load: Callable[[Grey], Flags]
        load = partial(self._load_bytes, frame) if isinstance(frame, bytes) else partial(self._load_grey, frame)
        slots = self.slots(concurrent=False)
        batch = slots.new_batch()
        flags = load(batch[0])
        (result,) = self._classify([FrameTask(name, load)], [flags], slots.run(batch, 1))
        if isinstance(result, Failure):
            raise result.error
        return result

    # ------------------------------------------------------------------------------------------ engines

    def _open(self, *, concurrent: bool) -> Engine:
        """Open the bundle's engine for concurrent frames or for one at a time, unless it is open."""
        assert self.bundle is not None
        # On the CPU each worker computes on its own thread; CUDA and OpenVINO distribute the work themselves.
        threads = 1 if concurrent and self._device in ("auto", "cpu") else self._threads
        if threads not in self._engines:
            engine = OnnxEngine(self.bundle, device=self._device, threads=threads, **self._engine_options)
            self._device = cast("Device", engine.device)  # do not resolve `auto` again
            self._engines[threads] = engine
        return self._engines[threads]

    def _engine(self, *, concurrent: bool) -> Engine:
        return self.engine if self.bundle is None else self._open(concurrent=concurrent)

    def slots(self, *, concurrent: bool) -> SlotPool:
        """Return the slot pool for batches of `batch_size` frames, or for one frame at a time; slots stay open."""
        with self._pools_lock:
            engine, frames = self._engine(concurrent=concurrent), self.batch_size if concurrent else 1
            key = id(engine), frames
            if key not in self._pools:
                test: SelfTest | None = None
                if self._self_test_enabled:
                    test = SelfTest(cast("Bundle", self.bundle), cast("OnnxEngine", engine), frames)
                    self._self_tests.append(test)
                self._pools[key] = SlotPool(engine, frames, test)
            return self._pools[key]

    # ------------------------------------------------------------------------------------------ loading

    def _file_task(
        self,
        item: FrameFile | Failure,
        on_decision: Callable[[FrameFile, Prediction], object] | None,
        *,
        isolated: bool,
    ) -> FrameTask | Failure:
        if isinstance(item, Failure):
            return item
        callback = partial(on_decision, item) if on_decision else None
        load = partial(load_quadrants, item, self.contract, isolated=isolated, time_limit=self.time_limit)
        return FrameTask(item.name, load, callback)

    def _load_bytes(self, data: bytes, out: Grey) -> Flags:
        return decode_quadrants(data, self.contract, out, time_limit=self.time_limit)

    def _load_grey(self, frame: Grey, out: Grey) -> Flags:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 2:
            found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise FrameError(f"the frame is {found}; expected a grey uint8 array [height, width]")
        return cut_quadrants(frame, self.contract, out)

    # ------------------------------------------------------------------------------------------ many frames

    def _run_files(
        self,
        items: Iterator[FrameFile | Failure],
        on_decision: Callable[[FrameFile, Prediction], object] | None,
    ) -> Iterator[Prediction | Failure]:
        readers, items = choose_readers(items, 0 if self.bundle is None else self._requested_workers, self._threads)
        tasks = (self._file_task(item, on_decision, isolated=readers > 0) for item in items)
        if not readers:
            yield from self.predict_tasks(tasks)
            return
        reader_pool().start(readers)
        try:
            yield from self.predict_tasks(tasks, readers)
        finally:
            reader_pool().trim(_KEPT_READERS)

    def predict_tasks(self, tasks: Iterable[FrameTask | Failure], readers: int = 0) -> Iterator[Prediction | Failure]:
        """Predict frames that load themselves, with a thread for each of `readers` reader processes. As `predict`."""
        tasks = iter(tasks)
        first = list(islice(tasks, self._threads + 1))
        pool = self._worker_pool(self._classify, concurrent=len(first) > self._threads, readers=readers)
        yield from pool.run(chain(first, tasks))

    def _worker_pool(
        self,
        postprocess: _Postprocess[_Result],
        *,
        concurrent: bool,
        batch_size: int | None = None,
        readers: int = 0,
    ) -> WorkerPool[_Result]:
        return WorkerPool(
            self.slots(concurrent=concurrent),
            postprocess,
            workers=readers or (self.workers if concurrent else 1),
            time_limit=self.time_limit,
            frames=batch_size,
            add_worker=not readers,
        )

    def replay(self, frames: Sequence[Grey], *, concurrent: bool, batch_size: int | None = None) -> InferenceOutput:
        """Run frames through the same path as predictions, and return the network's answers instead.

        Parameters
        ----------
        frames
            uint8 [H, W] each, grey levels 0 to 255.
        concurrent
            Whether to run them like the frames of a folder, with the same workers and slots, rather than one at a time.
        batch_size
            Frames per batch, at most the predictor's `batch_size`, which is the default. Only with `concurrent`.

        Returns
        -------
        InferenceOutput
            Of F frames, in their order; without activation maps.

        Raises
        ------
        FrameError
            If a frame cannot be processed.
        BundleError
            If the engine fails.
        """
        tasks = [FrameTask(str(index), partial(self._load_grey, frame)) for index, frame in enumerate(frames)]
        answers: list[InferenceOutput] = []
        for result in self._worker_pool(_raw_answers, concurrent=concurrent, batch_size=batch_size).run(tasks):
            if isinstance(result, Failure):
                raise result.error
            answers.append(result)
        return join_outputs(answers)

    def _classify(
        self, tasks: Sequence[FrameTask], flags: Sequence[Flags], answers: InferenceOutput
    ) -> list[Prediction | Failure]:
        """Return the predictions of a batch."""
        found = decide(
            [task.name for task in tasks],
            flags,
            answers,
            self.contract,
            method=self.method,
            device=self.engine.device,
            precision=self.engine.precision,
            threshold=self._threshold,
        )
        results: list[Prediction | Failure] = []
        for task, result in zip(tasks, found, strict=True):
            if isinstance(result, Failure):
                results.append(result)
                continue
            prediction = result.abstaining(self.abstain_below, self.contract, unlike=self.abstain_unlike)
            try:
                if task.on_decision is not None:
                    task.on_decision(prediction)
                results.append(prediction)
            except FrameError as error:
                results.append(Failure(task.name, error))
        return results


def _raw_answers(tasks: Sequence[FrameTask], flags: Sequence[Flags], answers: InferenceOutput) -> list[InferenceOutput]:
    """Return each frame's output, of one frame each."""
    scores = answers.typicality
    return [
        InferenceOutput(logits[None], p[None], typicality=None if scores is None else scores[index : index + 1])
        for index, (logits, p) in enumerate(zip(answers.logits, answers.probabilities, strict=True))
    ]


def _discover(inputs: Iterable[str | Path | FrameFile | Failure]) -> Iterator[FrameFile | Failure]:
    paths: list[str | Path] = []
    for item in inputs:
        if isinstance(item, FrameFile | Failure):
            yield from find_frames(paths)
            paths = []
            yield item
        else:
            paths.append(item)
    yield from find_frames(paths)
