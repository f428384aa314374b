"""The code that runs in a Ray worker: a predictor opened from shipped bytes, blocks of paths in, result rows out."""

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
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor

__all__ = ["CODEC", "MAX_ATTEMPTS", "AttemptCounter", "Worker", "WorkerConfig"]

CODEC: Final = ("utf-8", "surrogatepass")  # file names may be invalid UTF-8, which Arrow's strings cannot hold

MAX_ATTEMPTS: Final = 4
"""Number of workers that may die on a block of frames before the run fails."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker needs to open its predictor: settings, the bundle's files, and the PEM of the public key if any."""

    label: str
    files: Mapping[str, bytes]
    key: bytes | None
    version: str
    device: Device
    precision: str
    method: VoteMethod
    batch_size: int | None
    threads: int


class AttemptCounter:
    """Counts the attempts at each block, as a Ray actor that outlives the workers."""

    def __init__(self) -> None:
        self._attempts: Counter[int] = Counter()

    def begin(self, block: int) -> int:
        """Count one attempt and return their number."""
        self._attempts[block] += 1
        return self._attempts[block]


class Worker:
    """Predicts blocks of frames. It opens its predictor with the first block, so that a crash there counts too."""

    def __init__(self, config: Any, attempts: Any) -> None:
        self._config, self._attempts = config, attempts
        self._predictor: Predictor | None = None

    def __call__(self, table: Any) -> Any:
        """Predict a block: from columns ``frame``, ``path``, ``of_clip`` and ``flip`` to a table of `_schema`."""
        import pyarrow
        import ray

        items = table.to_pylist()
        try:
            attempts = ray.get(self._attempts.begin.remote(items[0]["frame"]))
            paths = [Path(item["path"].decode(*CODEC)) for item in items]
            if attempts > MAX_ATTEMPTS:
                raise ClusterError(
                    f"{MAX_ATTEMPTS} workers died in a row on {paths[0].as_posix()} to {paths[-1].as_posix()} "
                    f"({len(paths)} frames); see the Ray logs, or leave these frames out"
                )
            if self._predictor is None:
                self._predictor = _open(ray.get(self._config))
            frames = [
                FrameFile(path, path.as_posix(), item["of_clip"], item["flip"])
                for path, item in zip(paths, items, strict=True)
            ]
            results = self._predictor.predict(frames)
            rows = [_row(item["frame"], result) for item, result in zip(items, results, strict=True)]
        except EchoQuadError as error:  # no other frame can be predicted either
            where = "" if isinstance(error, ClusterError) else f"on the node {ray.util.get_node_ip_address()}: "
            failure = Failure("", type(error)(where + str(error)))
            rows = [{**_row(item["frame"], failure), "fatal": True} for item in items]
        return pyarrow.Table.from_pylist(rows, schema=_schema())


def _open(config: WorkerConfig) -> Predictor:
    """Open the predictor from the shipped bytes, which are checked like those of any bundle."""
    if config.version != __version__:
        raise ConfigError(f"its echoquad is {__version__}, expected {config.version}; install the same on all nodes")
    with tempfile.TemporaryDirectory(prefix="echoquad-") as private:
        folder, key = Path(private, "bundle"), Path(private, "key.pem")
        folder.mkdir()
        for name, data in config.files.items():
            (folder / name).write_bytes(data)
        if config.key is not None:
            key.write_bytes(config.key)
        try:
            predictor = Predictor(
                folder,
                device=config.device,
                precision=config.precision,
                threads=config.threads,
                method=config.method,
                batch_size=config.batch_size,
                public_key=None if config.key is None else key,
                concurrent=True,
            )
            for concurrent in (True, False):  # open now: the folder is temporary, so that a killed worker leaves none
                predictor.slots(concurrent=concurrent)
        except EchoQuadError as error:
            raise type(error)(str(error).replace(folder.as_posix(), config.label)) from error
    return predictor


def _row(frame: int, result: Prediction | Failure) -> dict[str, Any]:
    """Encode a result as plain values; a class is its index in the contract."""
    if isinstance(result, Failure):
        message = str(result.error).encode(*CODEC)
        return {"frame": frame, "fatal": False, "error": type(result.error).__name__, "message": message}
    class_index = {name: index for index, name in enumerate(result.classes)}
    return {
        "frame": frame,
        "fatal": False,
        "label": class_index[result.predicted_class],
        "probabilities": result.probabilities,
        "quadrant_labels": [class_index[label] for label in result.quadrant_labels],
        "quadrant_probabilities": [value for row in result.quadrant_probabilities for value in row],
        "flags": result.flags,
        "device": result.device,
        "precision": result.precision,
        "typicality": result.typicality,
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
            "typicality": pa.float64(),
        }
    )
