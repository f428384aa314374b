"""A folder as destination: a JSON file for each result, and a CSV file of rows for each day."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from echoquad_runtime.errors import ConfigError, OutputError
from echoquad_runtime.storage.atomic import make_folder, sync_folder, write_json
from echoquad_runtime.storage.file_lock import FileLock, LockedError
from echoquad_serve.config import DestinationConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.outbox.daily_rows import DailyRows
from echoquad_serve.records import Delivery

__all__ = ["FolderDestination"]

_ID: Final = re.compile(r"[0-9a-f]{32}")
_LOCK: Final = ".echoquad.lock"


class FolderDestination:
    """Writes results into a folder, also on a network share.

    A result is ``2026-11-27/ID.json``, which appears complete under its name. Its rows are appended to
    ``2026-11-27.csv``, whose columns are those of `echoquad predict` and ``id``. The day is that of the result's end in
    UTC, so that a repeat on another day or in another time zone goes to the same files, where it changes nothing.

    Parameters
    ----------
    config
        The destination's configuration. The folder is created by the first delivery, since a share may be mounted
        later.

    Raises
    ------
    ConfigError
        If no path is configured.
    """

    def __init__(self, config: DestinationConfig) -> None:
        if config.path is None:
            raise ConfigError(f"destination {config.name!r}: path is missing; a folder needs one")
        self._name, self._path = config.name, config.path
        self._rows = DailyRows(config.path)
        self._lock: FileLock | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """Name from the configuration."""
        return self._name

    def deliver(self, delivery: Delivery) -> None:
        """Write a result, and return once it is on the disk.

        Raises
        ------
        DeliveryError
            If the folder cannot be written, or another process writes results into it.
        DeliveryRefusedError
            If the result's id is none, and so cannot be the name of a file.
        """
        result = delivery.result
        if not _ID.fullmatch(result.id):
            raise DeliveryRefusedError("the id of the result is malformed; expected 32 hexadecimal digits")
        day = datetime.fromtimestamp(result.finished, UTC).date().isoformat()
        try:
            folder = make_folder(self._path / day)
            self._hold_lock()
            write_json(folder / f"{result.id}.json", result.to_delivered_dict())
            sync_folder(folder)
            self._rows.add(day, result.id, result.rows)
        except LockedError as error:
            raise DeliveryError(
                f"{self._path.as_posix()}: another process writes results here; give each service a folder of its own"
            ) from error
        except OSError as error:
            self._release_lock()  # the share may be another one when it is back
            raise DeliveryError(str(error) if isinstance(error, OutputError) else _explain(error)) from error

    def close(self) -> None:
        """Release the folder for other processes. A delivery in progress may end, and further ones fail."""
        self._closed = True
        self._release_lock()

    def _hold_lock(self) -> None:
        if self._lock is None:
            self._lock = FileLock(Path(self._path, _LOCK))
        if self._closed:  # while a share blocked this thread
            self._release_lock()
            raise DeliveryError("the destination is closed")

    def _release_lock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):  # of a share that is gone: there is nothing to release
                lock.release()


def _explain(error: OSError) -> str:
    return f"the folder cannot be written ({error.strerror or type(error).__name__}); check space and permissions"
