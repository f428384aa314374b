"""What runs in a Ray worker: a predictor opened from shipped bytes, blocks of paths in, rows of plain values out."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from echoquad_runtime._version import __version__
from echoquad_runtime.contract import VoteMethod
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.errors import ClusterError, ConfigError, EchoQuadError
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.predict.predictor import Prediction, Predictor

__all__ = ["CODEC", "MOST_ATTEMPTS", "Job", "Ledger", "Worker"]

CODEC: Final = ("utf-8", "surrogatepass")  # names are what the disk has, and Arrow's text is Unicode

MOST_ATTEMPTS: Final = 4
"""Workers that may die over a block of frames before the run is given up."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to open its predictor: settings, and the bundle's files, the key's PEM among them if any."""

    label: str
    files: Mapping[str, bytes]
    key: bytes | None
    version: str
    device: Device
    precision: str
    method: VoteMethod
    batch_size: int | None
    threads: int


class Ledger:
    """Counts how often each block was begun; an actor of its own, which outlives the workers."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, block: int) -> int:
        """Count a beginning; gives how many there have been."""
        self._begun[block] += 1
        return self._begun[block]


class Worker:
    """Judges blocks of frames. It opens its predictor with the first of them, so that a death over that counts."""

    def __init__(self, job: Any, ledger: Any) -> None:
        self._job, self._ledger = job, ledger
        self._predictor: Predictor | None = None

    def __call__(self, table: Any) -> Any:
        """Judge a block: columns ``frame``, ``path``, ``of_clip`` and ``flip`` in, `_schema` out."""
        import pyarrow
        import ray

        items = table.to_pylist()
        try:
            begun = ray.get(self._ledger.begin.remote(items[0]["frame"]))
            paths = [Path(item["path"].decode(*CODEC)) for item in items]
            if begun > MOST_ATTEMPTS:
                raise ClusterError(
                    f"{MOST_ATTEMPTS} workers died one after the other over {paths[0].as_posix()} to "
                    f"{paths[-1].as_posix()} ({len(paths)} frames); see why in the logs of Ray, or leave these out"
                )
            if self._predictor is None:
                self._predictor = _open(ray.get(self._job))
            frames = [
                FrameFile(path, path.as_posix(), item["of_clip"], item["flip"])
                for path, item in zip(paths, items, strict=True)
            ]
            results = self._predictor.predict(frames)
            rows = [_row(item["frame"], result) for item, result in zip(items, results, strict=True)]
        except EchoQuadError as error:  # what no frame can be judged after
            where = "" if isinstance(error, ClusterError) else f"on the node {ray.util.get_node_ip_address()}: "
            failure = Failure("", type(error)(where + str(error)))
            rows = [{**_row(item["frame"], failure), "fatal": True} for item in items]
        return pyarrow.Table.from_pylist(rows, schema=_schema())


def _open(job: Job) -> Predictor:
    """Open the predictor from the shipped bytes, checked like those of any bundle."""
    if job.version != __version__:
        raise ConfigError(f"echoquad {__version__} found, where predict runs {job.version}; install the same on all")
    with tempfile.TemporaryDirectory(prefix="echoquad-") as private:
        folder, key = Path(private, "bundle"), Path(private, "key.pem")
        folder.mkdir()
        for name, data in job.files.items():
            (folder / name).write_bytes(data)
        if job.key is not None:
            key.write_bytes(job.key)
        try:
            predictor = Predictor(
                folder,
                device=job.device,
                precision=job.precision,
                threads=job.threads,
                method=job.method,
                batch_size=job.batch_size,
                public_key=None if job.key is None else key,
                many=True,
            )
            for many in (True, False):  # now, while the folder is there: it is not kept, so that a kill leaves none
                predictor.slots(many=many)
        except EchoQuadError as error:
            raise type(error)(str(error).replace(folder.as_posix(), job.label)) from error
    return predictor


def _row(frame: int, result: Prediction | Failure) -> dict[str, Any]:
    """Make a row of plain values; a class by its place among the contract's."""
    if isinstance(result, Failure):
        message = str(result.error).encode(*CODEC)
        return {"frame": frame, "fatal": False, "error": type(result.error).__name__, "message": message}
    place = {name: index for index, name in enumerate(result.classes)}
    return {
        "frame": frame,
        "fatal": False,
        "label": place[result.decided],
        "probabilities": result.probabilities,
        "quadrant_labels": [place[label] for label in result.quadrant_labels],
        "quadrant_probabilities": [value for row in result.quadrant_probabilities for value in row],
        "flags": result.flags,
        "device": result.device,
        "precision": result.precision,
    }


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "frame": pa.int64(),
            "fatal": pa.bool_(),
            "error": pa.string(),
            "message": pa.binary(),
            "label": pa.int32(),
            "probabilities": pa.list_(pa.float64()),
            "quadrant_labels": pa.list_(pa.int32()),
            "quadrant_probabilities": pa.list_(pa.float64()),
            "flags": pa.list_(pa.string()),
            "device": pa.string(),
            "precision": pa.string(),
        }
    )
