"""Reports of storage commitment that the node owes its callers: on the disk until they were sent."""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from echoquad_runtime.storage.atomic import make_folder, sync_folder, write_json

__all__ = ["PendingReport", "PendingReports"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")
_MAX_AGE_S: Final = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class PendingReport:
    """A report that is due.

    Attributes
    ----------
    ae_title, host, port
        The caller, and where it takes the report; port 0 is on the association of the request.
    transaction_uid, instances
        Of the request; SOP class and instance UIDs.
    created
        Unix time of the request.
    id
        Name of its file, without the extension.
    """

    ae_title: str
    host: str
    port: int
    transaction_uid: str
    instances: tuple[tuple[str, str], ...]
    created: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: secrets.token_hex(8))


class PendingReports:
    """The reports that are due, each in a JSON file of a folder.

    Parameters
    ----------
    folder
        The folder; it is created if it does not exist.

    Raises
    ------
    OutputError
        If the folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)

    def load(self) -> list[PendingReport]:
        """Return all reports, the oldest first; files that cannot be read, and reports of a week ago, are removed."""
        found = []
        for path in self._folder.glob("*.json"):
            try:
                values = json.loads(path.read_bytes())
                values["instances"] = tuple((str(one), str(other)) for one, other in values["instances"])
                report = PendingReport(**values)
                if report.id == path.stem and time.time() - report.created < _MAX_AGE_S:
                    found.append(report)
                    continue
            except (OSError, ValueError, TypeError, KeyError) as error:
                _LOGGER.warning("a pending report of storage commitment is damaged (%s)", type(error).__name__)
            path.unlink(missing_ok=True)
        return sorted(found, key=lambda report: report.created)

    def add(self, report: PendingReport) -> None:
        """Write a report; on return it is on the disk.

        Raises
        ------
        OutputError
            If the system refuses.
        """
        write_json(self._path(report), asdict(report))
        sync_folder(self._folder)

    def remove(self, report: PendingReport) -> None:
        """Remove a report, which was sent or given up."""
        self._path(report).unlink(missing_ok=True)

    def _path(self, report: PendingReport) -> Path:
        return self._folder / f"{report.id}.json"
