"""The Ray session: import Ray on demand and without telemetry, join a cluster and leave it, keep its log quiet."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.output_suppression import suppress_native_stderr
from echoquad_runtime.errors import ClusterError, DeviceUnavailableError, MissingExtraError, UsageError

__all__ = ["check_address", "count_workers", "join_cluster", "load_ray"]

_logger = logging.getLogger(__name__)

_STORE: Final = 512 << 20  # bytes of shared memory of a local cluster: a bundle and file names
_CONNECT_SECONDS: Final = 5.0  # within which the head of a cluster must answer
_CHECK_SECONDS: Final = 10.0  # between two checks of the head


def load_ray(*, own: bool) -> None:
    """Import Ray, with telemetry disabled before the import and its log kept off the terminal.

    Parameters
    ----------
    own
        Whether Ray will start a local cluster. Its ports are open to the network, so it requires a random token, which
        can only be set before the first import.

    Raises
    ------
    MissingExtraError
        If Ray is not installed or cannot be imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if own and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray.data  # noqa: F401 - needs more packages than ray alone
    except ImportError as error:
        package = (error.name or "ray").partition(".")[0]
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        raise MissingExtraError(f'this needs {package}, which {reason}; do: pip install "echoquad[cpu,ray]"') from error


def check_address(address: str) -> str:
    """Return the address after checking it: Ray would retry a wrong one for minutes.

    Raises
    ------
    UsageError
        If it is not ``HOST:PORT``, ``auto`` or ``local``.
    ClusterError
        If nothing listens there.
    """
    if address in ("auto", "local"):
        return address
    host, colon, port = address.rpartition(":")
    if "/" in address or not colon or not host or not port.isdecimal():
        raise UsageError(
            f"the Ray address is {address!r}; expected auto, or HOST:PORT of the head of a cluster that this host is a "
            "node of"
        )
    try:
        _connect(address)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error}); start its head with "
            "`ray start --head`, or check the address"
        ) from error
    return address


@contextmanager
def join_cluster(address: str, cpus: int) -> Iterator[None]:
    """Join a cluster for the duration of the block. An existing session is used and stays open.

    If the head of the cluster is lost, Ray ends this process a minute later without a message, so this logs a warning.

    Parameters
    ----------
    address
        As returned by `check_address`; ``local`` starts a local cluster.
    cpus
        Number of CPUs of a local cluster.

    Raises
    ------
    ClusterError
        If Ray cannot be started, or the cluster cannot be joined.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    own = address == "local"
    start = {"num_cpus": cpus, "object_store_memory": _STORE, "include_dashboard": False} if own else {}
    # Ray's signal handlers would end the process in the middle of a write, so the caller's handlers are restored.
    handlers = {number: signal.getsignal(number) for number in _signals()}
    with _quiet():
        try:
            try:
                with suppress_native_stderr():
                    ray.init(address, log_to_driver=False, configure_logging=False, **start)
            except Exception as error:  # ConnectionError, ValueError, RuntimeError and others
                where = "Ray cannot be started here" if own else f"the Ray cluster at {address} cannot be joined"
                remedy = "see its logs" if own else "try auto on a node of it, or RAY_AUTH_MODE=token if it needs one"
                raise ClusterError(f"{where} ({summarize_error(error)}); {remedy}") from error
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            with contextlib.nullcontext() if own else _watch_head(ray.get_runtime_context().gcs_address):
                yield
        finally:
            ray.shutdown()


@contextmanager
def _watch_head(head: str) -> Iterator[None]:
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_CHECK_SECONDS):
            try:
                _connect(head)
            except OSError as error:
                if not ended.is_set():
                    _logger.warning(
                        "the head of the Ray cluster, %s, does not answer (%s); unless it comes back, this run ends "
                        "within minutes; rows written so far are kept",
                        head,
                        error.strerror or error,
                    )
                return

    watcher = threading.Thread(target=watch, name="echoquad-ray-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


def _connect(address: str) -> None:
    """Raise an OSError if nothing listens at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _signals() -> list[signal.Signals]:
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread can set handlers, here and in Ray
        return []
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    return [
        number for number in numbers if signal.getsignal(number) is not None
    ]  # a handler set from C cannot be restored


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's log off the terminal; it stays in the files of Ray's session folder."""
    import ray

    logger = logging.getLogger("ray")
    level_before = logger.level
    handlers = [
        (it, it.level) for it in logging.getLogger("ray.data").handlers if isinstance(it, logging.StreamHandler)
    ]
    silent = logging.CRITICAL + 1
    logger.setLevel(silent)
    for handler, _ in handlers:
        handler.setLevel(silent)
    # Whatever `log_to_driver` is, Ray prints the death of a node or worker to stdout, which carries rows. There is no
    # public switch; Ray's debugger uses this one.
    private = ray._private.worker
    private._worker_logs_enabled = False
    try:
        yield
    finally:
        private._worker_logs_enabled = True
        logger.setLevel(level_before)
        for handler, level in handlers:
            handler.setLevel(level)


def count_workers(device: str, threads: int) -> int:
    """Return the number of workers for which the nodes have resources.

    Raises
    ------
    ClusterError, DeviceUnavailableError
        If there is room for none.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = device == "cuda"
    workers = sum(int(min(node.get("CPU", 0) // threads, node.get("GPU", 0) if gpu else math.inf)) for node in nodes)
    if workers:
        return workers
    if gpu and not any(node.get("GPU") for node in nodes):
        raise DeviceUnavailableError(f"none of the {len(nodes)} nodes of the Ray cluster has a GPU; use --device cpu")
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    raise ClusterError(
        f"no node of the Ray cluster has the {threads} CPUs of a worker, but at most {most}; use fewer --threads"
    )
