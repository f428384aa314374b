"""What later deliveries need of the bundles that have decided, kept beside the queue.

A result may be delivered long after its bundle was replaced, and after a restart. It is drawn with the contract, and
reported with the codes, of the bundle that decided it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from echoquad_runtime.bundle.code_table import CodeTable
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError, ContractError, FrameReadError
from echoquad_runtime.storage.atomic import make_folder, write_json
from echoquad_serve.inference.loaded_model import LoadedModel
from echoquad_serve.records import Result

__all__ = ["BundleRecord", "BundleRecords"]


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """Contract and code table of a bundle; `codes` is None if it is reported without codes."""

    contract: Contract
    codes: CodeTable | None


class BundleRecords:
    """The records, a small file for each bundle.

    Parameters
    ----------
    folder
        Their folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[str, BundleRecord] = {}

    def keep(self, model: LoadedModel) -> None:
        """Write the record of a bundle, before it decides.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        make_folder(self._folder)
        codes = None if model.codes is None else model.codes.to_dict()
        write_json(self._folder / f"{model.sha256}.json", {"contract": model.contract.to_dict(), "codes": codes})
        self._records[model.sha256] = BundleRecord(model.contract, model.codes)

    def of(self, result: Result) -> BundleRecord:
        """Return the record of the bundle that decided a result.

        Raises
        ------
        FrameReadError
            If there is none that can be read.
        """
        record = self.find(result.bundle.get("sha256", ""))
        if record is None:
            raise FrameReadError("the bundle that decided is not known any more; send the object again")
        return record

    def find(self, sha256: str) -> BundleRecord | None:
        """Return the record of a bundle; None if there is none that can be read."""
        if sha256 not in self._records:
            if not re.fullmatch("[0-9a-f]{64}", sha256):
                return None
            try:
                values = json.loads((self._folder / f"{sha256}.json").read_text("utf-8"))
                contract, codes = Contract.from_dict(values["contract"]), values["codes"]
                table = None if codes is None else CodeTable.from_dict(codes, contract.classes, "codes")
            except (OSError, ValueError, LookupError, TypeError, ConfigError, ContractError):
                return None
            self._records[sha256] = BundleRecord(contract, table)
        return self._records[sha256]
