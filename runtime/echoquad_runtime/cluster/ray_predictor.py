"""Prediction on many hosts: predictors in the workers of a Ray cluster, with results in input order.

Every node must find the frames at the same paths. The bundle is shipped: its bytes go to the workers once, and every
node checks them against the manifest and, if a key is given, against the signature. So no node can use another bundle
that happens to have the same path.

Frames are sent in slices, each one run of Ray Data over blocks of file names, so only one slice of names is in memory.
A block whose worker dies is processed again by another worker. Ray would retry without limit; here the attempts are
counted, and the run fails at a block on which four workers died. Frames are numbered, and the numbers of the results
are checked against those that were sent.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from echoquad_runtime import errors
from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import GOLDEN, MANIFEST, SIGNATURE, encode_manifest, model_file
from echoquad_runtime.bundle.typicality import typicality_threshold
from echoquad_runtime.cluster.ray_session import check_address, count_workers, join_cluster, load_ray
from echoquad_runtime.cluster.ray_worker import CODEC, AttemptCounter, Worker, WorkerConfig
from echoquad_runtime.contract import VOTE_METHODS, Contract, VoteMethod
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.errors import ClusterError, ConfigError, EchoQuadError, FrameError
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.predict.prediction import Prediction, check_abstain_below, check_abstain_unlike
from echoquad_runtime.storage.regular_file import read_regular

__all__ = ["RayPredictor"]

logger = logging.getLogger(__name__)

_BLOCK: Final = 128  # frames per task: seconds of work, against milliseconds of overhead of Ray
_SLICE_PER_WORKER: Final = 4096  # frames; starting the workers of a slice takes two or three seconds
_MAX_SLICE: Final = 1 << 17  # frames; each takes a few hundred bytes
_MAX_FILE: Final = 1 << 20  # bytes of a key or a signature file


@dataclass(frozen=True, slots=True)
class _Engine:
    """The engine that every worker runs, with the same fields as the `Engine` of a `Predictor`."""

    device: str
    precision: str
    note: str = ""


class RayPredictor:
    """Predict frames on a Ray cluster, with the same results as a `Predictor`, in the same order.

    The constructor checks the settings; `predict` joins the cluster. An existing Ray session of this process is used,
    and stays open.

    Parameters
    ----------
    bundle
        An open bundle. Its bytes go to the workers, which check them.
    abstain_below, abstain_unlike
        As `Predictor`.
    device
        ``auto`` is the CPU, whatever devices the nodes have, so that all rows have the same device. With ``cuda`` each
        worker takes a GPU.
    precision, method, batch_size
        As `Predictor`.
    threads
        CPUs and computing threads per worker; None is 1.
    public_key
        The PEM file with which `bundle` was opened, if any.
    address
        ``HOST:PORT`` of the cluster's head, if this host is a node of it, or ``auto`` for the cluster that runs on this
        host. None is the environment variable ``RAY_ADDRESS``, else a temporary local cluster.
    workers
        Number of workers; None is as many as the CPUs (or GPUs) of the nodes allow.

    Attributes
    ----------
    contract
        The contract that the model was trained under.
    engine
        The device and the precision of all rows.
    method
        The vote rule.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.
    ClusterError
        If no cluster answers at the address.
    BundleError
        If the bundle lacks the precision, or was changed since it was opened.
    ConfigError, UsageError
        If a setting is out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "auto",
        precision: str | None = None,
        method: VoteMethod | None = None,
        batch_size: int | None = None,
        threads: int | None = None,
        public_key: str | Path | None = None,
        address: str | None = None,
        workers: int | None = None,
        abstain_below: float | None = None,
        abstain_unlike: bool = False,
    ) -> None:
        for name, value in (("threads", threads), ("workers", workers), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if method is not None and method not in VOTE_METHODS:
            raise ConfigError(f"vote method is {method!r}; expected one of {', '.join(VOTE_METHODS)}")
        self._abstain_below = check_abstain_below(abstain_below)
        if (public_key is None) != (bundle.signed_by is None):
            raise ConfigError("public_key must be the key with which the bundle was opened; the workers check it")
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        load_ray(own=address == "local")
        self._address = check_address(address)
        self._workers = workers
        self.contract: Contract = bundle.contract
        self.method: VoteMethod = method or bundle.contract.vote
        self.engine = _Engine("cpu" if device == "auto" else device, bundle.choose_precision(precision))
        threshold = typicality_threshold(bundle.manifest, self.engine.precision)
        self._abstain_unlike = check_abstain_unlike(abstain_unlike, threshold)
        self._config = WorkerConfig(
            label=bundle.folder.as_posix(),
            files=_files(bundle, self.engine.precision),
            key=None if public_key is None else _read(Path(public_key)),
            version=__version__,
            device="cpu" if device == "auto" else device,
            precision=self.engine.precision,
            method=self.method,
            batch_size=batch_size,
            threads=threads or 1,
        )

    def predict(
        self,
        frames: Iterable[FrameFile | Failure],
        on_decision: Callable[[FrameFile, Prediction], object] | None = None,
    ) -> Generator[Prediction | Failure, None, None]:
        """Predict frames. The cluster is left after the last result, or when the iterator is closed.

        Parameters
        ----------
        frames
            Consumed lazily, in slices of at most 131,072. Every node must find a frame at its path. Failures among them
            are yielded unchanged.
        on_decision
            Called in this thread with each predicted frame, before its result is yielded. If it raises a FrameError, a
            failure replaces the prediction.

        Yields
        ------
        Prediction or Failure
            One per frame, in input order.

        Raises
        ------
        ClusterError
            If the cluster cannot be joined or has no room for a worker, or its workers keep dying.
        DeviceUnavailableError
            If no node has the device, or it does not work on a node.
        BundleError, MissingExtraError, ConfigError
            If a node cannot open or run the bundle, lacks onnxruntime, or has another version of EchoQuad; the message
            names the node.
        """
        config, frames = self._config, iter(frames)
        with join_cluster(self._address, max(available_cpus(), config.threads * (self._workers or 1))):
            pool = self._pool_size()
            logger.info("%s of %s each", _plural(pool, "Ray worker"), _plural(config.threads, "CPU"))
            arguments = _ship(config)
            begin = 0
            while chunk := list(islice(frames, min(_MAX_SLICE, _SLICE_PER_WORKER * pool))):
                items: list[dict[str, object]] = [
                    {
                        "frame": number,
                        "path": os.fspath(item.path.absolute()).encode(*CODEC),
                        "of_clip": item.frame,
                        "flip": item.flip,
                    }
                    for number, item in enumerate(chunk, begin)
                    if isinstance(item, FrameFile)
                ]
                with contextlib.closing(_rows(items, arguments, config, pool)) as rows:
                    for number, item in enumerate(chunk, begin):
                        yield (
                            item
                            if isinstance(item, Failure)
                            else self._result(next(rows, None), number, item, on_decision)
                        )
                    begin += len(chunk)
                    if (more := next(rows, None)) is not None:
                        raise _order_error(more, begin)
                pool = self._pool_size()  # nodes join and leave

    def _pool_size(self) -> int:
        return self._workers or count_workers(self.engine.device, self._config.threads)

    def _result(
        self,
        row: Mapping[str, Any] | None,
        number: int,
        item: FrameFile,
        on_decision: Callable[[FrameFile, Prediction], object] | None,
    ) -> Prediction | Failure:
        """Return the result that a worker's row encodes."""
        error = None if row is None else _error(row)
        if row is None or row["frame"] != number:
            raise _order_error(row, number)
        if error is not None:
            return Failure(item.name, error)
        classes, flat = self.contract.classes, row["quadrant_probabilities"]
        count = len(classes)
        prediction = Prediction(
            file=item.name,
            classes=classes,
            method=self.method,
            label=classes[row["label"]],
            probabilities=tuple(row["probabilities"]),
            quadrant_labels=tuple(classes[label] for label in row["quadrant_labels"]),
            quadrant_probabilities=tuple(tuple(flat[at : at + count]) for at in range(0, len(flat), count)),
            flags=tuple(row["flags"]),
            device=row["device"],
            precision=row["precision"],
            typicality=row["typicality"],
        ).abstaining(self._abstain_below, self.contract, unlike=self._abstain_unlike)
        try:
            if on_decision is not None:
                on_decision(item, prediction)
        except FrameError as failed:
            return Failure(item.name, failed)
        return prediction


def _files(bundle: Bundle, precision: str) -> dict[str, bytes]:
    """Read the files that a node needs: a graph and the golden frames, or all files to check the signature."""
    files = {MANIFEST: encode_manifest(bundle.manifest)}
    if bundle.signed_by is None:
        return files | {model_file(precision): bundle.read_model(precision), GOLDEN: bundle.read(GOLDEN)}
    files[SIGNATURE] = _read(bundle.folder / SIGNATURE)
    return files | {name: bundle.read(name) for name in bundle.manifest["files"]}


def _read(path: Path) -> bytes:
    """Read a key or a signature file."""
    try:
        return read_regular(path, _MAX_FILE)
    except OSError as error:
        raise ConfigError(f"{path.as_posix()}: it can no longer be read ({error.strerror or error})") from error


def _ship(config: WorkerConfig) -> tuple[object, object]:
    """Return the arguments of a worker: references to its configuration and to the attempt counter."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The counter runs on this node, so that it does not die with another node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.put(config), ray.remote(num_cpus=0, scheduling_strategy=here)(AttemptCounter).remote()


def _rows(
    items: Sequence[dict[str, object]], arguments: tuple[object, ...], config: WorkerConfig, pool: int
) -> Generator[dict[str, Any], None, None]:
    """Run a slice and yield its rows in order."""
    if not items:
        return
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    blocks = max(math.ceil(len(items) / _BLOCK), min(len(items), 2 * pool))
    try:
        with ray.data.DataContext.current(context):  # a dataset keeps the context of its creation
            dataset = ray.data.from_items(list(items), override_num_blocks=blocks).map_batches(
                Worker,
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=pool),
                fn_constructor_args=arguments,
                num_cpus=config.threads,
                num_gpus=1 if config.device == "cuda" else None,
            )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from table.to_pylist()
    except Exception as error:  # Ray raises RayErrors and others; exceptions of the consumer do not pass here
        raise ClusterError(
            f"the Ray cluster failed ({_last_line(error)}); check that every node has echoquad {__version__} with "
            "onnxruntime, and see the Ray logs on the nodes"
        ) from error


def _error(row: Mapping[str, Any]) -> EchoQuadError | None:
    """Return the error that a worker's row encodes, if any; raise it if no other frame can be predicted either."""
    if row["error"] is None:
        return None
    error_class = getattr(errors, row["error"]) if row["error"] in errors.__all__ else EchoQuadError
    error: EchoQuadError = error_class(row["message"].decode(*CODEC))
    if row["fatal"]:
        raise error
    return error


def _order_error(row: Mapping[str, Any] | None, frame: int) -> ClusterError:
    found = "no row" if row is None else f"the row of frame {row['frame']}"
    return ClusterError(f"Ray returned {found}; expected that of frame {frame}: run it again, and report this")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _last_line(error: BaseException) -> str:
    """Return the last line of an error of Ray: its text is a worker's traceback, which ends with the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return summarize_error(lines[-1] if lines else type(error).__name__)
