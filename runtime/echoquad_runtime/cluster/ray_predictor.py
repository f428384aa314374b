"""Many frames on many machines: the predictor in the workers of a Ray cluster, the rows in the order of the inputs.

The frames lie where every node reads them by the same path. The bundle does not have to: its bytes are shipped once,
each node checks them against the manifest and, where a key is given, against the signature, and no node can judge with
another bundle that happens to lie at the same path.

Frames go out in slices, each a run of Ray Data over blocks of names, so that no more than a slice of names is held. A
block whose worker dies is judged again by the next one. Ray does that without end; here the attempts are counted, and a
run ends at the block that four workers died of. Frames are numbered, and the numbers that come back are held against
those that went out.
"""

from __future__ import annotations

import contextlib
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
from echoquad_runtime.cluster.ray_session import checked_address, joined, load_ray, room_for
from echoquad_runtime.cluster.ray_worker import CODEC, Job, Ledger, Worker
from echoquad_runtime.contract import VOTE_METHODS, Contract, VoteMethod
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.errors import ClusterError, ConfigError, EchoQuadError, FrameError
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.predict.prediction import Prediction, checked_bound
from echoquad_runtime.storage.atomic import read_regular

__all__ = ["RayPredictor"]

_BLOCK: Final = 128  # frames of a task: seconds of work, so that Ray's milliseconds a task do not count
_SLICE_A_WORKER: Final = 4096  # frames; to start workers for a slice takes two or three seconds
_LARGEST_SLICE: Final = 1 << 17  # frames; what is held of one is a few hundred bytes
_MAX_FILE: Final = 1 << 20  # bytes of a key or a signature


@dataclass(frozen=True, slots=True)
class _Engine:
    """What runs in every worker; as the `Engine` of a `Predictor` tells it."""

    device: str
    precision: str
    note: str = ""


class RayPredictor:
    """Judges frames on a Ray cluster: the rows that a `Predictor` gives, in the same order.

    What can be refused at once is refused here; the cluster is joined by `predict`. A session of Ray that this process
    has already is used, and left as it is.

    Parameters
    ----------
    bundle
        An open bundle. Its bytes go to the workers, which check them again.
    abstain_below
        As `Predictor`.
    device
        ``auto`` is the CPU, whatever the nodes have, so that all rows are of one kind; with ``cuda`` a worker takes a
        GPU.
    precision, method, batch_size
        As `Predictor`.
    threads
        CPUs of a worker, and the threads that compute in it; None is 1.
    public_key
        The PEM file with which `bundle` was opened, if it was with one.
    address
        ``HOST:PORT`` of the cluster's head, of which this machine has to be a node, or ``auto`` for the cluster that
        runs here. None is what ``RAY_ADDRESS`` names, else a Ray of one's own on this machine, gone at the end.
    workers
        How many; None is what the nodes have CPUs (or GPUs) for.
    tell
        Called with one line on what the work is spread over, and one if the head of the cluster is lost.

    Attributes
    ----------
    contract
        What the model was trained under.
    engine
        The device and the precision that every row will have.
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
        If a setting cannot be.
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
        tell: Callable[[str], object] | None = None,
        abstain_below: float | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("workers", workers), ("batch size", batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value} found; expected at least 1")
        if method is not None and method not in VOTE_METHODS:
            raise ConfigError(f"vote method {method!r} found; expected one of {', '.join(VOTE_METHODS)}")
        self._abstain_below = checked_bound(abstain_below)
        if (public_key is None) != (bundle.signed_by is None):
            raise ConfigError("the workers need the public key that the bundle was opened with, and no other")
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        load_ray(own=address == "local")
        self._address = checked_address(address)
        self._workers, self._tell = workers, tell or (lambda line: None)
        self.contract: Contract = bundle.contract
        self.method: VoteMethod = method or bundle.contract.vote
        self.engine = _Engine("cpu" if device == "auto" else device, bundle.choose_precision(precision))
        self._job = Job(
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
        """Judge frames. The cluster is left when the last is given, or the iterator is closed.

        Parameters
        ----------
        frames
            Taken lazily, a slice of at most 131,072 at a time. Every node has to find a frame at its path. Failures
            among them are given as they are.
        on_decision
            Called here, in this thread, with each frame whose decision has come; what it does holds up the rows. A
            FrameError that it raises takes the decision's place.

        Yields
        ------
        Prediction or Failure
            One a frame, in input order.

        Raises
        ------
        ClusterError
            If the cluster cannot be joined, cannot hold a worker, or its workers keep dying.
        DeviceUnavailableError
            If no node has the device, or it does not work on one.
        BundleError, MissingExtraError, ConfigError
            If a node cannot open the bundle or run it, or has no onnxruntime or another EchoQuad; the message names it.
        """
        job, frames = self._job, iter(frames)
        with joined(self._address, max(available_cpus(), job.threads * (self._workers or 1)), self._tell):
            pool = self._room()
            self._tell(f"{_counted(pool, 'Ray worker')} of {_counted(job.threads, 'CPU')} each")
            arguments = _ship(job)
            begin = 0
            while chunk := list(islice(frames, min(_LARGEST_SLICE, _SLICE_A_WORKER * pool))):
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
                with contextlib.closing(_rows(items, arguments, job, pool)) as rows:
                    for number, item in enumerate(chunk, begin):
                        yield (
                            item
                            if isinstance(item, Failure)
                            else self._result(next(rows, None), number, item, on_decision)
                        )
                    begin += len(chunk)
                    if (more := next(rows, None)) is not None:
                        raise _disorder(more, begin)
                pool = self._room()  # nodes come and go

    def _room(self) -> int:
        return self._workers or room_for(self.engine.device, self._job.threads)

    def _result(
        self,
        row: Mapping[str, Any] | None,
        number: int,
        item: FrameFile,
        on_decision: Callable[[FrameFile, Prediction], object] | None,
    ) -> Prediction | Failure:
        """Make of a row what the worker had."""
        error = None if row is None else _error(row)
        if row is None or row["frame"] != number:
            raise _disorder(row, number)
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
        ).abstaining(self._abstain_below, self.contract)
        try:
            if on_decision is not None:
                on_decision(item, prediction)
        except FrameError as failed:
            return Failure(item.name, failed)
        return prediction


def _files(bundle: Bundle, precision: str) -> dict[str, bytes]:
    """Read what a node needs of a bundle: a graph and the self-test's frames, or all of it to check its signature."""
    files = {MANIFEST: encode_manifest(bundle.manifest)}
    if bundle.signed_by is None:
        return files | {model_file(precision): bundle.read_model(precision), GOLDEN: bundle.read(GOLDEN)}
    files[SIGNATURE] = _read(bundle.folder / SIGNATURE)
    return files | {name: bundle.read(name) for name in bundle.manifest["files"]}


def _read(path: Path) -> bytes:
    """Read a key or a signature again, which was there when the bundle was opened."""
    try:
        return read_regular(path, _MAX_FILE)
    except OSError as error:
        raise ConfigError(f"{path.as_posix()}: it cannot be read any more ({error.strerror or error})") from error


def _ship(job: Job) -> tuple[object, object]:
    """Give what a worker begins with: where the job lies in the cluster, and who counts its beginnings."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this node, without which there is no run: no other node's death takes the count with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.put(job), ray.remote(num_cpus=0, scheduling_strategy=here)(Ledger).remote()


def _rows(
    items: Sequence[dict[str, object]], arguments: tuple[object, ...], job: Job, pool: int
) -> Generator[dict[str, Any], None, None]:
    """Run a slice; gives its rows in order."""
    if not items:
        return
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    blocks = max(math.ceil(len(items) / _BLOCK), min(len(items), 2 * pool))
    try:
        with ray.data.DataContext.current(context):  # a data set keeps the one that it was made in
            judged = ray.data.from_items(list(items), override_num_blocks=blocks).map_batches(
                Worker,
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=pool),
                fn_constructor_args=arguments,
                num_cpus=job.threads,
                num_gpus=1 if job.device == "cuda" else None,
            )
        for table in judged.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from table.to_pylist()
    except Exception as error:  # of Ray's some are RayErrors; the consumer's own do not come by here
        raise ClusterError(
            f"the Ray cluster failed ({_last_line(error)}); every node needs echoquad {__version__} with onnxruntime; "
            "see the logs of Ray on the nodes"
        ) from error


def _error(row: Mapping[str, Any]) -> EchoQuadError | None:
    """Make of a row the error that the worker had, if any; raises one after which no frame can be judged."""
    if row["error"] is None:
        return None
    kind = getattr(errors, row["error"]) if row["error"] in errors.__all__ else EchoQuadError
    error: EchoQuadError = kind(row["message"].decode(*CODEC))
    if row["fatal"]:
        raise error
    return error


def _disorder(row: Mapping[str, Any] | None, frame: int) -> ClusterError:
    found = "no row" if row is None else f"the row of frame {row['frame']}"
    return ClusterError(f"Ray gave {found} where frame {frame} was due; run it again, and report this")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _last_line(error: BaseException) -> str:
    """Give what an error of Ray is about: its text is a worker's traceback, which ends with that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return summarize_error(lines[-1] if lines else type(error).__name__)
