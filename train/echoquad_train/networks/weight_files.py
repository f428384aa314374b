"""Files of tensors, from anybody: safetensors files and archives of `torch.save`, bounded before anything is loaded.

Neither format can make the process allocate more than the file has bytes: a safetensors header is small and describes
exactly the bytes that follow it, and the records of an archive are stored without compression, as torch writes them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from echoquad_runtime.storage.regular_file import open_regular, read_regular

__all__ = ["TensorFile", "TensorFileError", "first_line", "read_archive", "read_safetensors", "read_tensors"]

_MAX_BYTES: Final = 8 << 30  # of a file; ten times the largest backbone with the state of its optimizer
_MAX_HEADER: Final = 1 << 20  # of a safetensors file; ten times that of the largest backbone
_MAX_RECORDS: Final = 100_000  # of an archive; each tensor has one


class TensorFileError(ValueError):
    """A file cannot be read as tensors: one line on why, which begins neither with its name nor with a capital."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Content of a safetensors file: its metadata, its tensors, and the SHA-256 of their bytes without the header."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    sha256: str


def read_tensors(path: Path) -> Any:
    """Read the tensors of a safetensors file, or what an archive of `torch.save` holds; see the functions below."""
    return read_safetensors(path).tensors if path.suffix == ".safetensors" else read_archive(path)


def read_safetensors(path: Path) -> TensorFile:
    """Read a safetensors file.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    TensorFileError
        If it cannot be read, is damaged, or exceeds the bounds.
    """
    with _errors():
        data = read_regular(path, _MAX_BYTES)
        if len(data) > _MAX_BYTES:
            raise TensorFileError(f"it has more than {_MAX_BYTES} bytes")
        length = int.from_bytes(data[:8], "little")
        if _MAX_HEADER < length < len(data):  # beyond the end, it is no safetensors file
            raise TensorFileError(f"its header has {length} bytes; expected at most {_MAX_HEADER}")
        tensors = safetensors.torch.load(data)  # checks the header
        _refuse_complex(tensors)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        return TensorFile(metadata, tensors, hashlib.sha256(data[8 + length :]).hexdigest())


def read_archive(path: Path) -> Any:
    """Read what `torch.save` wrote: only tensors and plain values.

    The archive's checksums are compared, which torch does not do. Files of torch before 1.6, which are no archives, are
    read as well.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    TensorFileError
        If it cannot be read, is damaged, holds more than tensors and plain values, or exceeds the bounds.
    """
    with _errors(), open_regular(path) as stream:
        if zipfile.is_zipfile(stream):
            _check_archive(stream)
        stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other programs; an error reports them
            content = torch.load(stream, map_location="cpu", weights_only=True)
        _refuse_complex(content)
        return content


def _refuse_complex(content: Any) -> None:
    """Raise an error if a tensor is complex: torch would only warn, and drop the imaginary part."""
    seen: set[int] = set()
    pending = [content]
    while pending:
        part = pending.pop()
        if isinstance(part, torch.Tensor) and part.is_complex():
            raise TensorFileError("it holds complex numbers; expected real weights")
        if isinstance(part, Mapping | list | tuple) and id(part) not in seen:  # a pickle may contain itself
            seen.add(id(part))
            pending.extend(part.values() if isinstance(part, Mapping) else part)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, TensorFileError):
        raise
    except pickle.UnpicklingError as error:  # torch's message explains how to run the code in a pickle
        raise TensorFileError("it holds more than tensors") from error
    except Exception as error:  # torch and safetensors raise many classes for damaged files
        raise TensorFileError(first_line(error)) from error


def _check_archive(stream: Any) -> None:
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        size = stream.seek(0, 2)
        if len(records) > _MAX_RECORDS or size > _MAX_BYTES:
            raise TensorFileError(f"it has {len(records)} records and {size} bytes, more than weights have")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise TensorFileError("its records are compressed; expected those that torch.save writes, which are not")
        if sum(record.file_size for record in records) > size:
            raise TensorFileError("its records announce more bytes than the file has")
        if (damaged := archive.testzip()) is not None:
            raise TensorFileError(f"{damaged} does not match its checksum")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the pages that torch appends."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
