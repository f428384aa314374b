"""What torchrun tells the processes that it starts; read without torch."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from echoquad_runtime.errors import ConfigError

__all__ = ["Place", "torchrun_rank"]

_TOLD: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_NEEDED: Final = {*_TOLD, "MASTER_ADDR", "MASTER_PORT"}


class Place(NamedTuple):
    """A process's rank, of how many, and its place among those of its machine."""

    rank: int = 0
    ranks: int = 1
    local: int = 0


def torchrun_rank() -> Place:
    """Read this process's place; one that torchrun did not start is alone.

    Raises
    ------
    ConfigError
        If what the environment says cannot be.
    """
    if not os.environ.keys() >= _NEEDED:
        return Place()
    told = [os.environ[name] for name in _TOLD]
    try:
        found = Place(*map(int, told))
    except ValueError:
        found = Place(-1)
    if not (0 <= found.rank < found.ranks and found.local >= 0):
        raise ConfigError(
            f"torchrun: {', '.join(_TOLD)} are {', '.join(told)}; expected the numbers that torchrun gives; "
            "start with torchrun, or without these variables"
        )
    return found
