"""The cache of what onnxruntime makes of a graph, so that the next start need not make it again.

An entry is one file: the graph as onnxruntime optimised it, and where its weights lie. Those that it has left as they
were, all of an int8 graph, lie in the bundle's graph, which is read and hashed at every start, cached or not; those
that it has laid out anew for this processor lie in the entry. It gets them where they are in memory, and copies none:
that, more than the optimisation, is what an entry saves.

An entry is used only where it is whole by its own SHA-256, where file and folder belong to this user and nobody else
may write them, and where it was made of this very graph by this onnxruntime on this kind of processor, all of which its
name is the hash of. Nothing about the cache is an error: what cannot be read or written is as if it were not there.

The folder is ``graphs`` in ``ECHOQUAD_CACHE_DIR``, else in the platform's: ``EchoQuad`` in ``~/Library/Caches``,
``EchoQuad/Cache`` in ``%LOCALAPPDATA%``, ``echoquad`` in ``XDG_CACHE_HOME`` or ``~/.cache``. Where the variable is
there and empty, there is no cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import platform
import stat
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.onnx_header import list_tensors
from echoquad_runtime.contract import canonical_json
from echoquad_runtime.devices.cpu_info import cpu_model
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, create_session, needs_exact_products
from echoquad_runtime.storage.atomic import user_folder

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["CachedGraph", "GraphCache", "cache_folder", "cached_session", "find_cache", "is_ours"]

_MAGIC: Final = b"EchoQuad graph 1\n"
_DIGEST: Final = slice(len(_MAGIC), len(_MAGIC) + 32)  # SHA-256 of all that follows
_SIZES: Final = struct.Struct("<QQ")  # of the header, JSON, and of the graph
_ALIGNED: Final = 64  # bytes, for weights in the entry
_ENDING: Final = ".graph"

_WORTHWHILE: Final = 1 << 20  # bytes of a graph; a smaller one is optimised in no time
_SMALL: Final = 1024  # bytes of a tensor; a smaller one stays inside the optimised graph
_LARGEST: Final = 1 << 30  # bytes of an entry; more is none of ours
_ALL: Final = 256 << 20  # bytes of all entries: beyond, those that were not used for longest go
_STALE: Final = 3600.0  # seconds after which a half-made entry has nobody who is still making it

_SAVED, _OUTSIDE = "graph.onnx", "weights.bin"  # what onnxruntime writes, in a folder of its own

_Weights = dict[str, npt.NDArray[Any]]


class CachedGraph:
    """An entry that was read and found whole.

    Attributes
    ----------
    graph
        An ONNX file's bytes, all optimisation done, most weights left out.
    exact
        Whether this processor needs onnxruntime's slower integer products for it.
    """

    def __init__(self, data: bytes) -> None:
        header_size, graph_size = _SIZES.unpack_from(data, _DIGEST.stop)
        begin = _DIGEST.stop + _SIZES.size
        header = json.loads(data[begin : begin + header_size])
        self.graph = data[begin + header_size : begin + header_size + graph_size]
        self.exact = bool(header["exact"])
        self._tensors: list[tuple[str, str, list[int], bool, int]] = header["tensors"]
        self._data, self._base = data, _aligned(begin + header_size + graph_size)

    def weights(self, model: bytes) -> _Weights:
        """Give the weights that were left out, by name: views of the entry and of `model`, the graph it was made of."""
        found = {}
        for name, elements, shape, inside, begin in self._tensors:
            data, offset = (model, begin) if inside else (self._data, self._base + begin)
            array = np.frombuffer(data, elements, math.prod(shape), offset).reshape(shape)
            found[name] = np.require(array, requirements="A")  # floats may lie askew in an ONNX file: those are copied
        return found


class GraphCache:
    """Where the entry of one graph is kept.

    Parameters
    ----------
    folder
        Of all entries.
    key
        The entry's name.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._path = folder, folder / f"{key}{_ENDING}"

    def read(self) -> CachedGraph | None:
        """Read the entry; None where there is none that may be used."""
        try:
            if not is_ours(self._folder.lstat(), folder=True):
                return None
            # What was opened is what is asked and read: nothing can take its place in between.
            flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
            with os.fdopen(os.open(self._path, os.O_RDONLY | sum(flags)), "rb") as stream:
                status = os.fstat(stream.fileno())
                if not is_ours(status, folder=False) or status.st_size > _LARGEST:
                    return None
                data = stream.read(status.st_size)
            if (
                not data.startswith(_MAGIC)
                or hashlib.sha256(memoryview(data)[_DIGEST.stop :]).digest() != data[_DIGEST]
            ):
                return None
            with contextlib.suppress(OSError):
                os.utime(self._path)  # used
            return CachedGraph(data)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None

    @contextlib.contextmanager
    def making(self, size: int) -> Iterator[Path | None]:
        """Give an empty folder for onnxruntime to write to; None where there is no place for a graph of `size` bytes.

        The folder goes when the block ends.
        """
        made = self._make_folder(size)
        try:
            yield made
        finally:
            if made is not None:
                _remove(made)

    def _make_folder(self, size: int) -> Path | None:
        import shutil

        made = self._folder / f".{self._path.stem[:16]}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            # Three times: onnxruntime's file, the entry, and room for what else happens on this disk.
            if not is_ours(self._folder.lstat(), folder=True) or shutil.disk_usage(self._folder).free < 3 * size:
                return None
            made.mkdir(mode=0o700)
        except OSError:
            return None
        return made

    def write(self, made: Path, model: bytes, *, exact: bool) -> None:
        """Make the entry of what onnxruntime has written to the folder `made`; `model` is the graph that it read."""
        with contextlib.suppress(OSError, ValueError):
            outside = made / _OUTSIDE
            parts = _entry(
                (made / _SAVED).read_bytes(), outside.read_bytes() if outside.exists() else b"", model, exact
            )
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            partial = made / "entry"
            # Not forced to the disk: what a power cut leaves half-written fails its hash, and is made again.
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.writelines([_MAGIC, digest.digest(), *parts])
            partial.replace(self._path)
            self._prune()

    def _prune(self) -> None:
        """Remove what was not used for longest, until the rest is within its bounds, and what nobody is making."""
        left = _ALL
        entries = [(path.stat(), path) for path in self._folder.glob(f"*{_ENDING}")]
        for status, path in sorted(entries, key=lambda entry: entry[0].st_mtime, reverse=True):
            left -= status.st_size
            if left < 0 and path != self._path:
                path.unlink(missing_ok=True)
        for path in self._folder.glob(".*"):
            if path.stat().st_mtime < time.time() - _STALE:
                _remove(path)


def find_cache(ort: ModuleType, graph_sha256: str, size: int) -> GraphCache | None:
    """Give the place in the cache for a graph's entry; None where none is to be kept.

    Parameters
    ----------
    ort
        The onnxruntime package.
    graph_sha256
        Of the bundle's graph.
    size
        Of it, in bytes.
    """
    folder, features = cache_folder(), _cpu_features()
    if folder is None or not features or size < _WORTHWHILE:
        return None
    facts = {
        "graph": graph_sha256,
        "onnxruntime": [ort.__version__, getattr(ort, "get_build_info", str)()],
        # What onnxruntime lays out for one kind of processor is wrong for another, and it would not notice. A virtual
        # machine may hide some of what its model has.
        "cpu": [cpu_model(), platform.system(), platform.machine(), features],
        "options": {"graph_optimization_level": "all", "external": _SMALL},
        "echoquad": __version__,
    }
    return GraphCache(folder / "graphs", hashlib.sha256(canonical_json(facts).encode("ascii")).hexdigest())


def cached_session(
    ort: ModuleType, cache: GraphCache, cached: CachedGraph | None, model: bytes, *, threads: int, spinning: bool
) -> onnxruntime.InferenceSession:
    """Make a session on the CPU from an entry; where there is none, from the graph, and make the entry.

    The one computes what the other does, to the last bit.

    Parameters
    ----------
    ort
        The onnxruntime package.
    cache, cached
        Where the entry is kept, and what was read there.
    model
        The bundle's graph, its hash checked.
    threads, spinning
        As `create_session`.

    Raises
    ------
    Exception
        Whatever onnxruntime raises of `model`; its exceptions share no base.
    """
    if cached is not None:
        with contextlib.suppress(Exception):  # onnxruntime's share no base: the graph itself is still there
            weights = cached.weights(model)
            values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}

            def use(options: onnxruntime.SessionOptions) -> None:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                options.add_external_initializers(list(values), list(values.values()))

            session = create_session(
                ort, cached.graph, CPU_PROVIDER, threads=threads, spinning=spinning, exact=cached.exact, adapt=use
            )
            session.weights = values  # onnxruntime has no other copy
            return session
    exact = needs_exact_products(model)
    with cache.making(len(model)) as made:
        if made is not None:

            def save(options: onnxruntime.SessionOptions) -> None:
                options.optimized_model_filepath = str(made / _SAVED)
                prefix = "session.optimized_model_external_initializers_"
                options.add_session_config_entry(f"{prefix}file_name", _OUTSIDE)
                options.add_session_config_entry(f"{prefix}min_size_in_bytes", str(_SMALL))

            with contextlib.suppress(Exception):  # as above; among them, a disk that is full
                session = create_session(
                    ort, model, CPU_PROVIDER, threads=threads, spinning=spinning, exact=exact, adapt=save
                )
                cache.write(made, model, exact=exact)
                return session
    return create_session(ort, model, CPU_PROVIDER, threads=threads, spinning=spinning, exact=exact)


def _entry(graph: bytes, outside: bytes, model: bytes, exact: bool) -> Sequence[bytes]:
    """Give the parts of an entry behind its hash.

    Raises
    ------
    ValueError
        If onnxruntime has written what is not understood.
    """
    by_length: dict[int, list[int]] = {}
    for tensor in list_tensors(model):
        by_length.setdefault(tensor.length, []).append(tensor.begin)
    listed, kept, position = [], [], 0
    for tensor in list_tensors(graph):
        if not tensor.outside:
            continue
        data = outside[tensor.begin : tensor.begin + tensor.length]
        if not tensor.elements or math.prod(tensor.shape) * np.dtype(tensor.elements).itemsize != len(data):
            raise ValueError(f"the tensor {tensor.name} is not understood")
        places = (begin for begin in by_length.get(len(data), ()) if model.startswith(data, begin))
        inside = next(places, None)
        listed.append(
            (tensor.name, tensor.elements, tensor.shape, inside is not None, position if inside is None else inside)
        )
        if inside is None:
            kept += [data, bytes(_aligned(len(data)) - len(data))]
            position += _aligned(len(data))
    header = canonical_json({"exact": exact, "tensors": listed}).encode("ascii")
    end = _DIGEST.stop + _SIZES.size + len(header) + len(graph)
    return [_SIZES.pack(len(header), len(graph)), header, graph, bytes(_aligned(end) - end), *kept]


def _aligned(position: int) -> int:
    return -(-position // _ALIGNED) * _ALIGNED


def is_ours(status: os.stat_result, *, folder: bool) -> bool:
    """Return whether a folder, or a regular file, is this user's and writable by nobody else.

    On Windows the kind alone counts: a user's folders there are not for others.
    """
    mine = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)
    return mine and (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _cpu_features() -> list[str]:
    """Name the instructions that this processor offers here, as numpy has found them; none where it does not tell."""
    try:
        found = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
    except (ImportError, AttributeError):  # before numpy 2
        return []
    return sorted(name for name, is_there in found.items() if is_there)


def cache_folder() -> Path | None:
    """Return EchoQuad's cache folder for this user; None where there is to be none."""
    given = os.environ.get("ECHOQUAD_CACHE_DIR")
    if given is not None:
        return Path(given).absolute() if given else None
    try:
        folder = user_folder(windows=("LOCALAPPDATA", "Local"), mac="Caches", xdg=("XDG_CACHE_HOME", ".cache"))
    except RuntimeError:  # the user has no home
        return None
    return folder / "Cache" if sys.platform == "win32" else folder
