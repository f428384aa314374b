"""The graph cache: graphs as onnxruntime has optimised them for the CPU, so that the next start is faster.

An entry is one file. It holds the optimised graph and the locations of its weights. Weights that the optimisation left
unchanged (all of an int8 graph) stay in the bundle's graph, which is read and hashed at every start. Weights that
onnxruntime packed for this processor are in the entry. onnxruntime uses both in place; saving these copies gains more
time than saving the optimisation.

The name of an entry is a hash of the graph, the onnxruntime build and the processor that it was created with. An entry
is used only if its own SHA-256 is correct, and if file and folder belong to this user and nobody else may write them.
No problem with the cache is an error: an entry that cannot be read or written is treated as absent.

The entries are in the subfolder ``graphs`` of the cache folder; see `cache_folder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import platform
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.onnx_header import list_tensors
from echoquad_runtime.contract import canonical_json
from echoquad_runtime.devices.cache_folder import cache_folder, make_private_folder, read_private_file
from echoquad_runtime.devices.cpu_info import cpu_model
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, create_session, needs_exact_products

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["CacheEntry", "CachedGraph", "create_cached_session", "find_cache_entry"]

_MAGIC: Final = b"EchoQuad graph 1\n"
_DIGEST: Final = slice(len(_MAGIC), len(_MAGIC) + 32)  # SHA-256 of everything after it
_SIZES: Final = struct.Struct("<QQ")  # of the JSON header and of the graph, in bytes
_ALIGNMENT: Final = 64  # bytes, of the weights in an entry
_SUFFIX: Final = ".graph"

_MIN_GRAPH: Final = 1 << 20  # bytes; onnxruntime optimises a smaller graph in no time
_MIN_EXTERNAL: Final = 1024  # bytes; smaller tensors stay in the optimised graph
_MAX_ENTRY: Final = 1 << 30  # bytes; no entry of EchoQuad is larger
_MAX_TOTAL: Final = 256 << 20  # bytes of all entries; beyond it the least recently used ones are removed
_STALE_SECONDS: Final = 3600.0  # age at which a temporary folder has been abandoned

_OPTIMIZED, _EXTERNAL = "graph.onnx", "weights.bin"  # what onnxruntime writes to the temporary folder


class CachedGraph:
    """The content of a valid entry.

    Attributes
    ----------
    graph
        Bytes of the optimised ONNX file; most weights are external.
    exact
        Whether this processor needs onnxruntime's slower, exact integer products for it.
    """

    def __init__(self, data: bytes) -> None:
        header_size, graph_size = _SIZES.unpack_from(data, _DIGEST.stop)
        begin = _DIGEST.stop + _SIZES.size
        header = json.loads(data[begin : begin + header_size])
        self.graph = data[begin + header_size : begin + header_size + graph_size]
        self.exact = bool(header["exact"])
        self._tensors: list[tuple[str, str, list[int], bool, int]] = header["tensors"]
        self._data, self._base = data, _align(begin + header_size + graph_size)

    def weights(self, model: bytes) -> dict[str, npt.NDArray[Any]]:
        """Return the external weights by name, as views of the entry and of `model`, the bundle's graph."""
        weights = {}
        for name, dtype, shape, in_model, begin in self._tensors:
            data, offset = (model, begin) if in_model else (self._data, self._base + begin)
            array = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
            weights[name] = np.require(array, requirements="A")  # copies the floats that an ONNX file misaligns
        return weights


class CacheEntry:
    """The place of one graph in the cache.

    Parameters
    ----------
    folder
        Folder of all entries.
    key
        File name of the entry without its suffix.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._path = folder, folder / f"{key}{_SUFFIX}"

    def read(self) -> CachedGraph | None:
        """Return the content of the entry; None if there is no valid one."""
        try:
            data = read_private_file(self._path, _MAX_ENTRY)
            if (
                not data.startswith(_MAGIC)
                or hashlib.sha256(memoryview(data)[_DIGEST.stop :]).digest() != data[_DIGEST]
            ):
                return None
            with contextlib.suppress(OSError):
                os.utime(self._path)  # marks the entry as recently used
            return CachedGraph(data)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None

    @contextlib.contextmanager
    def temporary_folder(self, size: int) -> Iterator[Path | None]:
        """Create a folder for onnxruntime's output and remove it when the block ends.

        Yields None if the cache is not writable or the disk has no room for a graph of `size` bytes.
        """
        import shutil
        import tempfile

        with contextlib.ExitStack() as stack:
            path = None
            with contextlib.suppress(OSError):
                make_private_folder(self._folder)
                # Three times the size: onnxruntime's files, the entry, and a reserve for other users of the disk.
                if shutil.disk_usage(self._folder).free >= 3 * size:
                    temporary = tempfile.TemporaryDirectory(prefix=".", dir=self._folder, ignore_cleanup_errors=True)
                    path = Path(stack.enter_context(temporary))
            yield path

    def write(self, temporary: Path, model: bytes, *, exact: bool) -> None:
        """Write the entry from onnxruntime's output in the folder `temporary`; `model` is the original graph."""
        with contextlib.suppress(OSError, ValueError):
            external = temporary / _EXTERNAL
            parts = _encode(
                (temporary / _OPTIMIZED).read_bytes(), external.read_bytes() if external.exists() else b"", model, exact
            )
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            partial = temporary / "entry"
            # 0o600: an entry that the group may write is not accepted. No fsync: if a power cut truncates the entry,
            # its hash is wrong and it is written again.
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.writelines([_MAGIC, digest.digest(), *parts])
            partial.replace(self._path)
            self._prune()

    def _prune(self) -> None:
        """Remove the least recently used entries beyond the size limit, and abandoned temporary folders."""
        import shutil

        remaining = _MAX_TOTAL
        entries = [(path.stat(), path) for path in self._folder.glob(f"*{_SUFFIX}")]
        for status, path in sorted(entries, key=lambda entry: entry[0].st_mtime, reverse=True):
            remaining -= status.st_size
            if remaining < 0 and path != self._path:
                path.unlink(missing_ok=True)
        for path in self._folder.glob(".*"):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def find_cache_entry(ort: ModuleType, graph_sha256: str, size: int) -> CacheEntry | None:
    """Return the place of a graph in the cache; None if it must not be cached.

    Parameters
    ----------
    ort
        The onnxruntime package.
    graph_sha256
        SHA-256 of the bundle's graph.
    size
        Size of the bundle's graph in bytes.
    """
    folder, features = cache_folder(), _cpu_features()
    if folder is None or not features or size < _MIN_GRAPH:
        return None
    facts = {
        "graph": graph_sha256,
        "onnxruntime": [ort.__version__, getattr(ort, "get_build_info", str)()],
        # Weights packed for another processor give wrong results, and onnxruntime does not notice. The model name alone
        # is not enough: a virtual machine may hide features of its processor.
        "cpu": [cpu_model(), platform.system(), platform.machine(), features],
        "options": {"graph_optimization_level": "all", "external": _MIN_EXTERNAL},
        "echoquad": __version__,
    }
    return CacheEntry(folder / "graphs", hashlib.sha256(canonical_json(facts).encode("ascii")).hexdigest())


def create_cached_session(
    ort: ModuleType, entry: CacheEntry, cached: CachedGraph | None, model: bytes, *, threads: int, spinning: bool
) -> onnxruntime.InferenceSession:
    """Create a CPU session from a cached graph; without one, create it from `model` and write the entry.

    Both sessions compute the same bits.

    Parameters
    ----------
    ort
        The onnxruntime package.
    entry, cached
        The graph's place in the cache, and what ``entry.read()`` returned.
    model
        The bundle's graph; its hash has been checked.
    threads, spinning
        As in `create_session`.

    Raises
    ------
    Exception
        Any exception that onnxruntime raises for `model`; its exceptions share no base class.
    """
    if cached is not None:
        with contextlib.suppress(Exception):  # if the cached graph fails, use the original one below
            weights = cached.weights(model)
            values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}

            def use_cached_weights(options: onnxruntime.SessionOptions) -> None:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                options.add_external_initializers(list(values), list(values.values()))

            session = create_session(
                ort,
                cached.graph,
                CPU_PROVIDER,
                threads=threads,
                spinning=spinning,
                exact=cached.exact,
                adapt=use_cached_weights,
            )
            session.weights = values  # onnxruntime does not copy them: keep them alive with the session
            return session
    exact = needs_exact_products(model)
    with entry.temporary_folder(len(model)) as folder:
        if folder is not None:

            def save_optimized(options: onnxruntime.SessionOptions) -> None:
                options.optimized_model_filepath = str(folder / _OPTIMIZED)
                prefix = "session.optimized_model_external_initializers_"
                options.add_session_config_entry(f"{prefix}file_name", _EXTERNAL)
                options.add_session_config_entry(f"{prefix}min_size_in_bytes", str(_MIN_EXTERNAL))

            with contextlib.suppress(Exception):  # for example a full disk: create the session without the cache below
                session = create_session(
                    ort, model, CPU_PROVIDER, threads=threads, spinning=spinning, exact=exact, adapt=save_optimized
                )
                entry.write(folder, model, exact=exact)
                return session
    return create_session(ort, model, CPU_PROVIDER, threads=threads, spinning=spinning, exact=exact)


def _encode(graph: bytes, external: bytes, model: bytes, exact: bool) -> list[bytes]:
    """Return the parts of an entry that follow its hash.

    Raises
    ------
    ValueError
        If onnxruntime's output has an unexpected form.
    """
    by_length: dict[int, list[int]] = {}
    for tensor in list_tensors(model):
        by_length.setdefault(tensor.length, []).append(tensor.begin)
    header_tensors, packed, position = [], [], 0
    for tensor in list_tensors(graph):
        if not tensor.external:
            continue
        data = external[tensor.begin : tensor.begin + tensor.length]
        if not tensor.dtype or math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize != len(data):
            raise ValueError(f"the external tensor {tensor.name} has an unknown type or a wrong size")
        matches = (begin for begin in by_length.get(len(data), ()) if model.startswith(data, begin))
        in_model = next(matches, None)
        begin = position if in_model is None else in_model
        header_tensors.append((tensor.name, tensor.dtype, tensor.shape, in_model is not None, begin))
        if in_model is None:
            packed += [data, bytes(_align(len(data)) - len(data))]
            position += _align(len(data))
    header = canonical_json({"exact": exact, "tensors": header_tensors}).encode("ascii")
    end = _DIGEST.stop + _SIZES.size + len(header) + len(graph)
    return [_SIZES.pack(len(header), len(graph)), header, graph, bytes(_align(end) - end), *packed]


def _align(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _cpu_features() -> list[str]:
    """Return the processor features that numpy detects; empty before numpy 2, which does not list them."""
    try:
        features = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
    except (ImportError, AttributeError):
        return []
    return sorted(name for name, available in features.items() if available)
