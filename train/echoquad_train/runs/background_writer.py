"""Background writer: write an epoch's files in a thread while the next epoch trains on another device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

__all__ = ["BackgroundWriter"]


class BackgroundWriter:
    """Calls writing functions in order, in a thread or at once.

    Parameters
    ----------
    background
        Use a thread. Where the CPU trains, a thread would slow the training down by what it saves.
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

    def snapshot(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values that training does not change while they are written: tensors are copied to the CPU."""
        return {name: _copy(value) for name, value in values.items()} if self._pool else dict(values)

    def write(self, function: Callable[[], None]) -> None:
        """Call `function` after the earlier ones; re-raise the exception of `function` or of an earlier one."""
        self.wait()
        if self._pool is None:
            function()
        else:
            self._pending = self._pool.submit(function)

    def wait(self) -> None:
        """Wait until everything is written; re-raise the exception of the last function."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copy(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value
