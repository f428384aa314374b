"""The environment variables that torchrun sets, read without importing torch."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from echoquad_runtime.errors import ConfigError

__all__ = ["TorchrunRank", "torchrun_rank"]

_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_REQUIRED: Final = {*_VARIABLES, "MASTER_ADDR", "MASTER_PORT"}


class TorchrunRank(NamedTuple):
    """The rank of a process, the number of processes, and its rank on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def torchrun_rank() -> TorchrunRank:
    """Return the rank of this process; 0 of 1 if torchrun did not start it.

    Raises
    ------
    ConfigError
        If the environment variables are invalid.
    """
    if not os.environ.keys() >= _REQUIRED:
        return TorchrunRank()
    values = [os.environ[name] for name in _VARIABLES]
    try:
        found = TorchrunRank(*map(int, values))
    except ValueError:
        found = TorchrunRank(-1)
    if not (0 <= found.rank < found.world_size and found.local_rank >= 0):
        raise ConfigError(
            f"torchrun: {', '.join(_VARIABLES)} are {', '.join(values)}; expected the numbers that torchrun sets; "
            "start with torchrun, or unset these variables"
        )
    return found
