"""Ranks: the processes of one run under ``torchrun``, and what they tell each other.

A process that ``torchrun`` did not start is alone: rank 0 of 1, and nothing here costs it anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from echoquad_runtime.errors import DeviceUnavailableError, EchoQuadError, RunError
from echoquad_train.parallel.torchrun import torchrun_rank

__all__ = ["ALONE", "Ranks", "Share", "joined"]

Value = TypeVar("Value")

PATIENCE: Final = timedelta(days=1)
"""How long ranks wait for one that decodes or writes; of one that died, torchrun and the connection tell at once."""

_FAILED: Final = "echoquad/failed"


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of a batch of `total` that are one rank's: from `first` to before `last`."""

    first: int
    last: int
    total: int

    @property
    def rows(self) -> slice:
        """Give the rows as a slice."""
        return slice(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Ranks:
    """A process's place: its rank, of how many, and its place among those of its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and reports."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """Give this rank's rows of a batch: in one piece, the pieces as equal as can be."""
        return Share(total * self.rank // self.count, total * (self.rank + 1) // self.count, total)

    def from_first(self, work: Callable[[], Value]) -> Value:
        """Have rank 0 do the work and every rank get its value, or its error.

        Raises
        ------
        EchoQuadError
            As the work does.
        """
        if self.count == 1:
            return work()
        outcome: list[object] = [None]
        if self.first:
            try:
                outcome = [work()]
            except EchoQuadError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], EchoQuadError):
            raise outcome[0]
        return cast(Value, outcome[0])

    def gather(self, value: Value) -> list[Value]:
        """Give every rank the values of all, in their order."""
        if self.count == 1:
            return [value]
        values: list[Value | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return cast(list[Value], values)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def fails_first(self) -> bool:
        """Tell whether this rank is the first to fail: it alone is to tell of it."""
        if self.count == 1:
            return True
        with suppress(Exception):  # the store may have gone with the rank that held it
            store = dist.distributed_c10d._get_default_store()
            return bytes(store.compare_set(_FAILED, "", str(self.rank))).decode() == str(self.rank)
        return False


ALONE: Final = Ranks()


@contextmanager
def joined(where: torch.device) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, if it has: over gloo on the CPU, over NCCL on CUDA.

    Raises
    ------
    DeviceUnavailableError
        If the machine has fewer GPUs than processes.
    ConfigError
        If torchrun's variables cannot be.
    RunError
        If the processes do not find each other, or lose each other.
    """
    ranks = Ranks(*torchrun_rank())
    if ranks.count == 1:
        yield ranks
        return
    if where.type == "cuda":
        if ranks.local >= torch.cuda.device_count():
            raise DeviceUnavailableError(
                f"torchrun: process {ranks.local} of this machine found {torch.cuda.device_count()} GPUs; expected one "
                "for each process; start it with a lower --nproc-per-node"
            )
        torch.cuda.set_device(ranks.local)
    try:
        # Values go over gloo either way, gradients over what is made for the device.
        dist.init_process_group("gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"torchrun: the processes cannot reach each other ({_first_line(error)}); check MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield ranks
    except RuntimeError as error:
        if isinstance(error, EchoQuadError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RunError(
            f"torchrun: process {ranks.rank} found another gone; expected all to work to the end; it may have said "
            "why it ended; start all of them again with --resume"
        ) from error
    finally:
        with suppress(Exception):  # another rank may have gone before
            dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
