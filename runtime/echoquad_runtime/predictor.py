"""The predictor: frames in, decisions out, in order, a bad frame apart from the good ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from echoquad_runtime.bundle import Bundle
from echoquad_runtime.contract import VOTE_METHODS, Contract, VoteMethod
from echoquad_runtime.devices import Device
from echoquad_runtime.errors import ConfigError, FrameError
from echoquad_runtime.frames import read_frame
from echoquad_runtime.inputs import Failure, FrameFile, find_frames
from echoquad_runtime.quadrants import Grey, frame_quadrants
from echoquad_runtime.session import Engine, OnnxEngine
from echoquad_runtime.vote import decide

__all__ = ["DEFAULT_BATCH_SIZE", "Failure", "Prediction", "Predictor"]

DEFAULT_BATCH_SIZE: Final = 8
"""Frames, of four quadrants each, that go through the network at a time."""

TIE: Final = "tie"
"""Flag of a frame whose quadrants' votes were even, so that mean probabilities decided."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The decision on one frame.

    Attributes
    ----------
    file
        The frame's name.
    classes
        Class names; every row of probabilities is in this order.
    method
        The vote rule that decided.
    label
        The decided class.
    probabilities
        C numbers in [0, 1]: the plain mean over the quadrants, whatever the method.
    quadrant_labels, quadrant_probabilities
        The same for LA, RA, LV, RV: four names, four times C numbers.
    flags
        What a reader should know of this row: ``tie``.
    device, precision
        What really ran.
    """

    file: str
    classes: tuple[str, ...]
    method: VoteMethod
    label: str
    probabilities: tuple[float, ...]
    quadrant_labels: tuple[str, ...]
    quadrant_probabilities: tuple[tuple[float, ...], ...]
    flags: tuple[str, ...]
    device: str
    precision: str


Source = tuple[str, Callable[[], Grey]]


class Predictor:
    """Judges frames with a bundle, or with any other engine.

    Parameters
    ----------
    model
        A bundle's folder, an open `Bundle`, or an engine.
    device, precision, threads, spinning
        As `OnnxEngine`; of no effect where `model` is an engine.
    method
        Vote rule; None is the contract's.
    batch_size
        Frames that go through the network at a time.
    public_key
        A PEM file; where given, the key that belongs to it must have signed the bundle whose folder `model` names.

    Raises
    ------
    BundleError
        If the bundle is missing, damaged, or lacks the precision; a `SignatureError` if it is not signed as it must be.
    DeviceUnavailableError
        If the device is not there.
    ConfigError
        If the method or the batch size cannot be.

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
        method: VoteMethod | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        public_key: str | Path | None = None,
    ) -> None:
        if isinstance(model, str | Path):
            model = Bundle(model, public_key=public_key)
        elif public_key is not None:  # too late to check, and not to be passed over
            raise ConfigError("public_key is for a bundle's folder; an open Bundle takes its own, an engine has none")
        if isinstance(model, Bundle):
            model = OnnxEngine(model, precision=precision, device=device, threads=threads, spinning=spinning)
        self.engine: Engine = model
        self.method: VoteMethod = method or self.contract.vote
        if self.method not in VOTE_METHODS:
            raise ConfigError(f"vote method {method!r} found; expected one of {', '.join(VOTE_METHODS)}")
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size} found; expected at least 1 frame")
        self.batch_size = batch_size

    @property
    def contract(self) -> Contract:
        """What the model was trained under."""
        return self.engine.contract

    def predict(
        self, inputs: str | Path | FrameFile | Iterable[str | Path | FrameFile]
    ) -> Iterator[Prediction | Failure]:
        """Judge files: paths, folders, patterns, or frames already found; one, or any number.

        Yields
        ------
        Prediction or Failure
            One a frame, in input order; lazily, a batch at a time.
        """
        if isinstance(inputs, str | Path | FrameFile):  # a string would be gone through letter by letter
            inputs = [inputs]
        return self._run(_sources(inputs))

    def predict_frames(
        self, frames: Iterable[Grey], names: Iterable[str] | None = None
    ) -> Iterator[Prediction | Failure]:
        """Judge frames in memory.

        Parameters
        ----------
        frames
            uint8 [H, W] each, grey levels 0 to 255; sizes may differ.
        names
            What to call them; numbers from 0 where not given.

        Yields
        ------
        Prediction or Failure
            One a frame, in order.
        """
        if names is None:
            return self._run((str(index), partial(_grey, frame)) for index, frame in enumerate(frames))
        return self._run((name, partial(_grey, frame)) for name, frame in zip(names, frames, strict=True))

    def __call__(self, frame: Grey) -> Prediction:
        """Judge one frame, uint8 [H, W].

        Raises
        ------
        FrameError
            If it cannot be judged.
        """
        (result,) = self.predict_frames([frame])
        if isinstance(result, Failure):
            raise result.error
        return result

    def _run(self, sources: Iterable[Source | Failure]) -> Iterator[Prediction | Failure]:
        size = self.contract.input_size
        batch = np.empty((self.batch_size, 4, 1, size, size), np.uint8)
        waiting: list[str | Failure] = []  # in input order; a name stands for the next slot of the batch
        filled = 0
        for source in sources:
            result = source if isinstance(source, Failure) else self._load(source, batch[filled])
            waiting.append(result)
            filled += isinstance(result, str)
            if len(waiting) == self.batch_size:
                yield from self._judge(waiting, batch[:filled])
                waiting, filled = [], 0
        yield from self._judge(waiting, batch[:filled])

    def _load(self, source: Source, slot: Grey) -> str | Failure:
        name, read = source
        try:
            frame_quadrants(read(), self.contract, out=slot)
        except FrameError as error:
            return Failure(name, error)
        return name

    def _judge(self, waiting: Sequence[str | Failure], batch: Grey) -> Iterator[Prediction | Failure]:
        judged = self._decide([item for item in waiting if isinstance(item, str)], batch)
        for item in waiting:
            yield next(judged) if isinstance(item, str) else item

    def _decide(self, names: Sequence[str], batch: Grey) -> Iterator[Prediction | Failure]:
        if not names:
            return
        classes, size = self.contract.classes, self.contract.input_size
        _, flat = self.engine.infer(batch.reshape(-1, 1, size, size))
        probabilities = flat.reshape(len(names), 4, len(classes))
        finite = np.asarray(np.isfinite(probabilities).all(axis=(1, 2)))
        judged = np.where(finite[:, None, None], probabilities, 0)
        decision = decide(judged, self.method, self.contract.vote_weights)
        for index, name in enumerate(names):
            if not finite[index]:  # the first class would win by being first
                what = f"the network's answer on {self.engine.device} in {self.engine.precision} is no number"
                yield Failure(name, FrameError(f"{what}; try another precision, and run echoquad verify"))
                continue
            tied = self.method == "majority" and decision.margins[index] == 0
            yield Prediction(
                file=name,
                classes=classes,
                method=self.method,
                label=classes[decision.labels[index]],
                probabilities=tuple(decision.probabilities[index].tolist()),
                quadrant_labels=tuple(classes[label] for label in decision.quadrant_labels[index]),
                quadrant_probabilities=tuple(tuple(row) for row in probabilities[index].tolist()),
                flags=(TIE,) if tied else (),
                device=self.engine.device,
                precision=self.engine.precision,
            )


def _sources(inputs: Iterable[str | Path | FrameFile]) -> Iterator[Source | Failure]:
    paths: list[str | Path] = []
    for item in inputs:
        if isinstance(item, FrameFile):
            yield from _find(paths)
            paths = []
            yield _file_source(item)
        else:
            paths.append(item)
    yield from _find(paths)


def _find(paths: Sequence[str | Path]) -> Iterator[Source | Failure]:
    for found in find_frames(paths):
        yield found if isinstance(found, Failure) else _file_source(found)


def _file_source(file: FrameFile) -> Source:
    return file.name, partial(read_frame, file.path)


def _grey(frame: Grey) -> Grey:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 2:
        found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise FrameError(f"the frame is {found}; expected a grey uint8 array [height, width]")
    return frame
