"""The predictor: frames in, decisions out, in order, a bad frame apart from the good ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import VOTE_METHODS, Contract, VoteMethod
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.io_binding import FloatArray, InferenceOutput
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.self_test import PASSED, SelfTest
from echoquad_runtime.engine.slot_pool import Engine, SlotPool
from echoquad_runtime.errors import ConfigError, FrameError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.reader import decode_checked
from echoquad_runtime.predict.frame_reader import Flags, FrameReader, cut_quadrants, read_quadrants
from echoquad_runtime.predict.prediction import Prediction, checked_bound
from echoquad_runtime.predict.worker_pool import Pipeline, Source
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.voting import aggregate_votes

__all__ = ["TIME_LIMIT", "Failure", "Prediction", "Predictor"]

TIME_LIMIT: Final = 60.0
"""Seconds for reading and decoding one file."""

MOST_WORKERS: Final = 512
FILES_A_READER: Final = 8
"""Files from which on reader processes are started unasked: a start costs about as much as reading so many."""

# Frames at a time where there are many. On the CPU more than two gain nothing and cost memory; a GPU wants filling.
_BATCHES: Final = {"cpu": 2, "openvino": 4, "cuda": 16}
_BATCH_ELSEWHERE: Final = 8  # an engine that is no bundle's

_Result = TypeVar("_Result")
_Judge = Callable[[Sequence[Source], Sequence[Flags], InferenceOutput], Sequence[_Result | Failure]]

TIE: Final = "tie"
"""Flag of a frame whose quadrants' votes were even, so that mean probabilities decided."""


class Predictor:
    """Judges frames with a bundle, or with any other engine.

    One frame gets all threads, so that its answer is there soonest; of many frames each thread takes its own, so that
    most are done in a second. On the CPU these are two sessions, each opened when it is first needed.

    Before its first answer a bundle's predictor tests itself on golden frames, through the slots and the threads that
    judge; see `echoquad_runtime.engine.self_test`.

    Parameters
    ----------
    model
        A bundle's folder, an open `Bundle`, or an engine.
    device, precision, threads, spinning, cuda_graphs, nhwc
        As `OnnxEngine`; of no effect where `model` is an engine. `threads` bounds the threads that compute, decoding
        included.
    method
        Vote rule; None is the contract's.
    batch_size
        Frames that go through the network at a time where there are many; None is what suits the device.
    public_key
        A PEM file; where given, the key that belongs to it must have signed the bundle whose folder `model` names.
    many
        Whether many frames come first: which session to open now.
    warm
        Whether to run the network once now, so that the self-test and the first run do not fall into an exam.
    self_test
        Whether to test a bundle before the first answer. `verify` leaves it out, since it compares all golden frames.
    workers
        Processes that read and cut files, each with a thread that judges what it has read; 0 reads in threads. None is
        0 for up to four threads and one a thread beyond, where there are files enough for that to pay.
    time_limit
        Seconds for reading and decoding one file; one that takes longer is a failure.
    cam
        Whether predictions shall carry class activation maps: of bundles whose graphs give them.
    abstain_below
        Where given, a frame whose confidence is below it is ``INDETERMINATE``; see `Prediction.confidence`.

    Attributes
    ----------
    engine
        The engine that was opened first; it tells the device and the precision that really run.

    Raises
    ------
    BundleError
        If the bundle is missing, damaged, or lacks the precision; a `SignatureError` if it is not signed as it must be.
    DeviceUnavailableError
        If the device is not there.
    VerificationError
        If the self-test fails; also from the first answer, where `warm` is False or `many` is True.
    ConfigError
        If the method, the batch size, the number of workers, the time limit or the bound for abstaining cannot be.

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
        many: bool = False,
        warm: bool = True,
        self_test: bool = True,
        workers: int | None = None,
        time_limit: float = TIME_LIMIT,
        cam: bool = False,
        abstain_below: float | None = None,
    ) -> None:
        if isinstance(model, str | Path):
            model = Bundle(model, public_key=public_key)
        elif public_key is not None:  # too late to check, and not to be passed over
            raise ConfigError("public_key is for a bundle's folder; an open Bundle takes its own, an engine has none")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch size {batch_size} found; expected at least 1 frame")
        if workers is not None and not 0 <= workers <= MOST_WORKERS:
            raise ConfigError(f"{workers} workers found; expected 0 to {MOST_WORKERS}")
        if not time_limit > 0:
            raise ConfigError(f"time limit {time_limit:g} found; expected more than 0 seconds")
        self.abstain_below = checked_bound(abstain_below)
        self._bundle = model if isinstance(model, Bundle) else None
        self._settings: dict[str, Any] = {
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
        self._tests_itself = self_test and self._bundle is not None
        self._self_tests: list[SelfTest] = []
        self.engine: Engine = self._open(many=many) if isinstance(model, Bundle) else model
        self.method: VoteMethod = method or self.contract.vote
        if self.method not in VOTE_METHODS:
            raise ConfigError(f"vote method {method!r} found; expected one of {', '.join(VOTE_METHODS)}")
        self.batch_size = batch_size or (_BATCHES[self.engine.device] if self._bundle else _BATCH_ELSEWHERE)
        self.time_limit, self._wanted_workers = time_limit, workers
        if warm and not many and self._bundle is not None:
            single = self.slots(many=False)
            single.run(single.new_batch(), 1)

    @property
    def contract(self) -> Contract:
        """What the model was trained under."""
        return self.engine.contract

    @property
    def threads(self) -> int:
        """How many threads compute at most, decoding included."""
        return self._threads

    @property
    def workers(self) -> int:
        """How many threads judge at the same time where there are many frames and no reader processes."""
        engine = self._engine(many=True)
        if self._bundle is None:  # torch's threads are its own, and would be in decoding's way
            return 1
        # OpenVINO computes on all threads at once: one worker to wait for it, one to decode meanwhile.
        return min(2, self._threads) if engine.device == "openvino" else self._threads

    @property
    def self_test(self) -> str:
        """``passed`` once every slot that was opened has passed its self-test; empty before, and without a bundle."""
        return PASSED if self._self_tests and all(test.passed for test in self._self_tests) else ""

    def predict(
        self,
        inputs: str | Path | FrameFile | Failure | Iterable[str | Path | FrameFile | Failure],
        on_decision: Callable[[FrameFile, Prediction], object] | None = None,
    ) -> Iterator[Prediction | Failure]:
        """Judge files: paths, folders, patterns, or frames already found; one, or any number.

        Parameters
        ----------
        inputs
            Taken lazily, a few dozen ahead of what is given; failures among them are given as they are.
        on_decision
            Called with each decided frame, in the thread that decided it: for what takes long, such as a picture. A
            FrameError that it raises takes the decision's place.

        Yields
        ------
        Prediction or Failure
            One a frame, in input order.
        """
        if isinstance(inputs, str | Path | FrameFile | Failure):  # a string would be gone through letter by letter
            inputs = [inputs]
        return self._run(self._file_source(item, on_decision) for item in _found(inputs))

    def predict_encoded(self, items: Iterable[tuple[str, bytes]]) -> Iterator[Prediction | Failure]:
        """Judge files of one frame in memory, images, DICOM or numpy: names, and the files' bytes. As `predict`."""
        return self._run(Source(name, partial(self._load_bytes, data)) for name, data in items)

    def predict_frames(
        self, frames: Iterable[Grey], names: Iterable[str] | None = None
    ) -> Iterator[Prediction | Failure]:
        """Judge frames in memory.

        Parameters
        ----------
        frames
            uint8 [H, W] each, grey levels 0 to 255; sizes may differ. Taken lazily, a few dozen ahead of what is given:
            for a source of which each frame waits for the last one's answer, call the predictor.
        names
            What to call them; numbers from 0 where not given.

        Yields
        ------
        Prediction or Failure
            One a frame, in order.
        """
        if names is None:
            return self._run(Source(str(index), partial(self._load_grey, it)) for index, it in enumerate(frames))
        return self._run(Source(name, partial(self._load_grey, it)) for name, it in zip(names, frames, strict=True))

    def __call__(self, frame: Grey | bytes, name: str = "0") -> Prediction:
        """Judge one frame in the caller's thread, as soon as can be.

        It is uint8 [H, W], or the bytes of a file as `predict_encoded` takes them.

        Raises
        ------
        FrameError
            If it cannot be judged.
        """
        load = self._load_bytes if isinstance(frame, bytes) else self._load_grey
        slots = self.slots(many=False)
        batch = slots.new_batch()
        flags = load(frame, batch[0])  # type: ignore[arg-type]  # each its own kind
        (result,) = self._judge([Source(name, partial(load, frame))], [flags], slots.run(batch, 1))  # type: ignore[arg-type]
        if isinstance(result, Failure):
            raise result.error
        return result

    # ------------------------------------------------------------------------------------------ engines

    def _open(self, *, many: bool) -> Engine:
        """Open the bundle for one frame at a time or for many, unless it is open."""
        assert self._bundle is not None
        # Where each worker computes for itself; CUDA's and OpenVINO's sessions share out their work by themselves.
        threads = 1 if many and self._device in ("auto", "cpu") else self._threads
        if threads not in self._engines:
            opened = OnnxEngine(self._bundle, device=self._device, threads=threads, **self._settings)
            self._device = cast("Device", opened.device)  # what auto has found is not looked for again
            self._engines[threads] = opened
        return self._engines[threads]

    def _engine(self, *, many: bool) -> Engine:
        return self.engine if self._bundle is None else self._open(many=many)

    def slots(self, *, many: bool) -> SlotPool:
        """Return what runs the network, for one frame at a time or for `batch_size` frames; it keeps its slots open."""
        with self._pools_lock:
            engine, frames = self._engine(many=many), self.batch_size if many else 1
            key = id(engine), frames
            if key not in self._pools:
                test: SelfTest | None = None
                if self._tests_itself:
                    test = SelfTest(cast("Bundle", self._bundle), cast("OnnxEngine", engine), frames)
                    self._self_tests.append(test)
                self._pools[key] = SlotPool(engine, frames, test)
            return self._pools[key]

    # ------------------------------------------------------------------------------------------ one frame

    def _file_source(
        self, item: FrameFile | Failure, on_decision: Callable[[FrameFile, Prediction], object] | None
    ) -> Source | Failure:
        if isinstance(item, Failure):
            return item
        after = partial(on_decision, item) if on_decision else None
        return Source(item.name, partial(read_quadrants, item, self.contract), after, item)

    def _load_bytes(self, data: bytes, slot: Grey) -> Flags:
        grey, flags = decode_checked(data)
        return self._cut(grey, slot, flags)

    def _load_grey(self, frame: Grey, slot: Grey) -> Flags:
        return self._cut(_grey(frame), slot, ())

    def _cut(self, grey: Grey, slot: Grey, flags: Flags) -> Flags:
        return (*cut_quadrants(grey, self.contract, slot), *flags)

    # ------------------------------------------------------------------------------------------ many frames

    def _run(self, sources: Iterable[Source | Failure]) -> Iterator[Prediction | Failure]:
        sources = iter(sources)
        first = list(islice(sources, self._threads + 1))
        many = len(first) > self._threads
        files = any(isinstance(item, Source) and item.file for item in first)
        readers = self._reader_processes() if many and files else 0
        if readers and self._wanted_workers is None:  # to start them pays from a number of files on
            first += islice(sources, FILES_A_READER * readers - len(first))
            readers = readers if len(first) == FILES_A_READER * readers else 0
        yield from self._pipeline(self._judge, many=many, readers=readers).run(chain(first, sources))

    def _reader_processes(self) -> int:
        from echoquad_runtime.predict.reader_process import reader_processes

        return 0 if self._bundle is None else reader_processes(self._wanted_workers, self._threads)

    def _pipeline(
        self, judge: _Judge[_Result], *, many: bool, frames: int | None = None, readers: int = 0
    ) -> Pipeline[_Result]:
        slots = self.slots(many=many)
        open_reader: Callable[[], FrameReader] | None = None
        if readers:
            from echoquad_runtime.predict.reader_process import ReaderProcess

            open_reader = partial(ReaderProcess, self.contract, slots.frames)
        return Pipeline(
            slots,
            judge,
            workers=readers or (self.workers if many else 1),
            time_limit=self.time_limit,
            frames=frames,
            open_reader=open_reader,
        )

    def replay(
        self, frames: Sequence[Grey], *, many: bool, together: int | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Run frames through the path that judges, and return the network's answers in place of decisions.

        Parameters
        ----------
        frames
            uint8 [H, W] each, grey levels 0 to 255.
        many
            Whether they go as one frame at a time does, or as those of a folder do: as many workers, the same slots.
        together
            Frames of a batch, at most `batch_size`; None is `batch_size`. Only with `many`.

        Returns
        -------
        logits, probabilities
            float32 [F, 4, C] each, in the order of the frames.

        Raises
        ------
        FrameError
            If a frame cannot be judged.
        BundleError
            If the engine fails.
        """
        sources = [Source(str(index), partial(self._load_grey, frame)) for index, frame in enumerate(frames)]
        logits, probabilities = [], []
        for found in self._pipeline(_raw, many=many, frames=together).run(sources):
            if isinstance(found, Failure):
                raise found.error
            logits.append(found[0])
            probabilities.append(found[1])
        return np.stack(logits), np.stack(probabilities)

    def _judge(
        self, sources: Sequence[Source], flags: Sequence[Flags], found: InferenceOutput
    ) -> list[Prediction | Failure]:
        classes, answers, maps = self.contract.classes, found.probabilities, found.maps
        finite = np.asarray(np.isfinite(answers).all(axis=(1, 2)))
        decision = aggregate_votes(np.where(finite[:, None, None], answers, 0), self.method, self.contract.vote_weights)
        results: list[Prediction | Failure] = []
        for index, source in enumerate(sources):
            if not finite[index]:  # the first class would win by being first
                what = f"the network's answer on {self.engine.device} in {self.engine.precision} is no number"
                error = FrameError(f"{what}; try another precision, and run echoquad verify")
                results.append(Failure(source.name, error))
                continue
            tied = self.method == "majority" and decision.margins[index] == 0
            prediction = Prediction(
                file=source.name,
                classes=classes,
                method=self.method,
                label=classes[decision.labels[index]],
                probabilities=tuple(decision.probabilities[index].tolist()),
                quadrant_labels=tuple(classes[label] for label in decision.quadrant_labels[index]),
                quadrant_probabilities=tuple(tuple(row) for row in answers[index].tolist()),
                flags=(*flags[index], TIE) if tied else flags[index],
                device=self.engine.device,
                precision=self.engine.precision,
                cam=None if maps is None else maps[index],
            )
            results.append(_after(source, prediction.abstaining(self.abstain_below, self.contract)))
        return results


def _raw(
    sources: Sequence[Source], flags: Sequence[Flags], found: InferenceOutput
) -> list[tuple[FloatArray, FloatArray]]:
    """Return each frame's logits and probabilities, float32 [4, C] each."""
    return list(zip(found.logits, found.probabilities, strict=True))


def _after(source: Source, prediction: Prediction) -> Prediction | Failure:
    try:
        if source.on_decision is not None:
            source.on_decision(prediction)
    except FrameError as error:
        return Failure(source.name, error)
    return prediction


def _found(inputs: Iterable[str | Path | FrameFile | Failure]) -> Iterator[FrameFile | Failure]:
    paths: list[str | Path] = []
    for item in inputs:
        if isinstance(item, FrameFile | Failure):
            yield from find_frames(paths)
            paths = []
            yield item
        else:
            paths.append(item)
    yield from find_frames(paths)


def _grey(frame: Grey) -> Grey:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 2:
        found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise FrameError(f"the frame is {found}; expected a grey uint8 array [height, width]")
    return frame
