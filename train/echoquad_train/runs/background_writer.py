"""Background writer: an epoch's files are written while the next epoch trains on another device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

__all__ = ["BackgroundWriter"]


class BackgroundWriter:
    """Writes in the background where that is of use, else at once. What is written is written in order.

    Parameters
    ----------
    background
        Write in a thread. On a CPU that trains, a thread would take from the training what it saves.
    """

    def __init__(self, *, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "write") if background else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if error is None:
            self.wait()

    def kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values as `write` may use them after training has gone on: tensors are copied to the CPU."""
        return {name: _copied(value) for name, value in values.items()} if self._pool else dict(values)

    def write(self, function: Callable[[], None]) -> None:
        """Call the function, which writes, after what was written before.

        Raises
        ------
        Exception
            What the function raises, or the one before it.
        """
        self.wait()
        if self._pool is None:
            function()
        else:
            self._pending = self._pool.submit(function)

    def wait(self) -> None:
        """Wait until all is written.

        Raises
        ------
        Exception
            What the last function raised.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
