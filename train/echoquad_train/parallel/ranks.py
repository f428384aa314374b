"""Ranks: the processes of a run under ``torchrun`` and their communication (torch.distributed).

A process that ``torchrun`` did not start has rank 0 of 1 and communicates with nobody.
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

TIMEOUT: Final = timedelta(days=1)
"""How long ranks wait for one that decodes or writes. The end of a process is noticed at once."""

_FAILED: Final = "echoquad/failed"


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of a batch of `total` that belong to a rank: from `first` to before `last`."""

    first: int
    last: int
    total: int

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of a process, the number of processes, and its rank on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and reports progress."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """Return this rank's rows of a batch; they are consecutive, and the ranks' shares nearly equal."""
        return Share(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size, total)

    def from_first(self, work: Callable[[], Value]) -> Value:
        """Call `work` on rank 0; return its value, or raise its error, on every rank.

        Raises
        ------
        EchoQuadError
            If `work` raises it.
        """
        if self.world_size == 1:
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
        """Return the values of all ranks, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Value | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return cast(list[Value], values)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def fails_first(self) -> bool:
        """Return whether this rank is the first to fail, which alone reports the error."""
        if self.world_size == 1:
            return True
        with suppress(Exception):  # the store ends with the rank that holds it
            store = dist.distributed_c10d._get_default_store()
            return bytes(store.compare_set(_FAILED, "", str(self.rank))).decode() == str(self.rank)
        return False


ALONE: Final = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the process group of torchrun, if there is one: over gloo on the CPU, over NCCL on CUDA.

    Raises
    ------
    DeviceUnavailableError
        If the machine has fewer GPUs than processes.
    ConfigError
        If torchrun's environment variables are invalid.
    RunError
        If the processes cannot connect, or lose their connection.
    """
    ranks = Ranks(*torchrun_rank())
    if ranks.world_size == 1:
        yield ranks
        return
    if device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise DeviceUnavailableError(
                f"torchrun: process {ranks.local_rank} of this machine found {torch.cuda.device_count()} GPUs; "
                "expected one for each process; start torchrun with a lower --nproc-per-node"
            )
        torch.cuda.set_device(ranks.local_rank)
    try:
        # Python objects always use gloo, gradients the backend of the device.
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunError(
            f"torchrun: the processes cannot reach each other ({reason}); check MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield ranks
    except RuntimeError as error:
        if isinstance(error, EchoQuadError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RunError(
            f"torchrun: process {ranks.rank} lost the connection to another process, which may have reported why it "
            "ended; start all processes again with --resume"
        ) from error
    finally:
        with suppress(Exception):  # another rank may have ended before
            dist.destroy_process_group()
