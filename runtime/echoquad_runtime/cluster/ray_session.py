"""Ray as a guest: imported only when it is asked for, joined and left, silent, and calling nobody."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.output_suppression import suppress_native_stderr
from echoquad_runtime.errors import ClusterError, DeviceUnavailableError, MissingExtraError, UsageError

__all__ = ["checked_address", "joined", "load_ray", "room_for"]

_STORE: Final = 512 << 20  # bytes of shared memory of a Ray of one's own: a bundle, and names
_REACH: Final = 5.0  # seconds in which the head of a cluster has to answer
_EVERY: Final = 10.0  # seconds after which it is asked again


def load_ray(*, own: bool) -> None:
    """Import Ray, its telemetry refused before, and what it says kept from the terminal.

    Parameters
    ----------
    own
        Whether it is for a Ray of one's own. Its ports are open to the network, so that it asks for a token that
        nobody else has; it can be told so only before its first import.

    Raises
    ------
    MissingExtraError
        If it is not installed, or what is installed cannot be imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if own and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray.data  # noqa: F401 - it needs more packages than Ray alone
    except ImportError as error:
        lacking = (error.name or "ray").partition(".")[0]
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        raise MissingExtraError(f'this needs {lacking}, which {found}; do: pip install "echoquad[cpu,ray]"') from error


def checked_address(address: str) -> str:
    """Give the address back; refuses one that Ray would not understand, or would try for minutes.

    Raises
    ------
    UsageError
        If it is neither ``HOST:PORT``, ``auto``, nor ``local``.
    ClusterError
        If nobody listens there.
    """
    if address in ("auto", "local"):
        return address
    host, colon, port = address.rpartition(":")
    if "/" in address or not colon or not host or not port.isdecimal():
        raise UsageError(
            f"the Ray address is {address!r}; expected HOST:PORT of the cluster's head, of which this machine is a "
            "node, or auto"
        )
    try:
        _reach(address)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error}); start its head with "
            "`ray start --head`, or check the address"
        ) from error
    return address


@contextmanager
def joined(address: str, cpus: int, tell: Callable[[str], object]) -> Iterator[None]:
    """Be part of a cluster while the block runs; a session that is there already is used and left open.

    Parameters
    ----------
    address
        As `checked_address` lets pass; ``local`` starts a Ray of one's own.
    cpus
        How many that one has.
    tell
        Called with a line if the head of a cluster is lost. Ray ends this process a minute later, without a word.

    Raises
    ------
    ClusterError
        If Ray cannot be started, or the cluster not be joined.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    own = address == "local"
    start = {"num_cpus": cpus, "object_store_memory": _STORE, "include_dashboard": False} if own else {}
    # Ray's handlers end the process in the middle of whatever it writes: the caller's are put back.
    kept = {number: signal.getsignal(number) for number in _signals()}
    with _quiet():
        try:
            try:
                with suppress_native_stderr():
                    ray.init(address, log_to_driver=False, configure_logging=False, **start)
            except Exception as error:  # ConnectionError, ValueError, RuntimeError: whatever its processes died of
                where = "Ray cannot be started here" if own else f"the Ray cluster at {address} cannot be joined"
                do = "see its logs" if own else "try auto on a node of it, or RAY_AUTH_MODE=token where it asks for one"
                raise ClusterError(f"{where} ({summarize_error(error)}); {do}") from error
            finally:
                for number, handler in kept.items():
                    signal.signal(number, handler)
            with contextlib.nullcontext() if own else _watched(ray.get_runtime_context().gcs_address, tell):
                yield
        finally:
            ray.shutdown()


@contextmanager
def _watched(head: str, tell: Callable[[str], object]) -> Iterator[None]:
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY):
            try:
                _reach(head)
            except OSError as error:
                if not ended.is_set():
                    tell(
                        f"the head of the Ray cluster, {head}, answers no more ({error.strerror or error}); if that "
                        "stays so, this run ends within minutes; what it has written is kept"
                    )
                return

    watcher = threading.Thread(target=watch, name="watches the head", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


def _reach(address: str) -> None:
    """Raise an OSError if nobody listens at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _REACH).close()


def _signals() -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():  # no other thread may set a handler, nor does Ray
        return []
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not None]  # one set from C cannot be put back


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's log from the terminal; it is in Ray's own files, under its session's folder."""
    import ray

    logger = logging.getLogger("ray")
    kept = logger.level
    handlers = [
        (it, it.level) for it in logging.getLogger("ray.data").handlers if isinstance(it, logging.StreamHandler)
    ]
    silent = logging.CRITICAL + 1
    logger.setLevel(silent)
    for handler, _ in handlers:
        handler.setLevel(silent)
    # That a node or a worker has died it prints among the rows, to stdout, whatever `log_to_driver` says. This is the
    # switch that its debugger uses; there is no public one.
    inside = ray._private.worker
    inside._worker_logs_enabled = False
    try:
        yield
    finally:
        inside._worker_logs_enabled = True
        logger.setLevel(kept)
        for handler, level in handlers:
            handler.setLevel(level)


def room_for(device: str, threads: int) -> int:
    """Count the workers that the nodes have room for.

    Raises
    ------
    ClusterError, DeviceUnavailableError
        If that is none.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = device == "cuda"
    room = sum(int(min(node.get("CPU", 0) // threads, node.get("GPU", 0) if gpu else math.inf)) for node in nodes)
    if room:
        return room
    if gpu and not any(node.get("GPU") for node in nodes):
        raise DeviceUnavailableError(f"no node of the Ray cluster, {len(nodes)} in all, has a GPU; use --device cpu")
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    raise ClusterError(f"no node of the Ray cluster has {threads} CPUs for a worker, but at most {most}; ask for less")
