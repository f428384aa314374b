"""Ensemble folders: member runs and a ``run.json`` that states how they vote.

=================================  ===============================================================================
``run.json``                       ``kind: ensemble``, vote, views, contract, the members with their weights' hashes
``members/1`` ... or               the members: `echoquad ensemble` copies runs without their resume state,
``fold-1`` ...                     `echoquad train --folds` uses the runs of the folds
=================================  ===============================================================================

The ensemble's contract is that of its members except for the temperatures. A member's temperature divides its own
logits before the vote; its frame temperature is not used. The ensemble has its own temperatures in ``run.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError, ContractError, RunError
from echoquad_runtime.storage.atomic import make_folder, output_errors, write_bytes, write_json
from echoquad_runtime.storage.atomic_folder import atomic_folder
from echoquad_train.networks.ensemble_classifier import VOTES, EnsembleClassifier, EnsembleVote
from echoquad_train.runs.checkpoint import BEST, RECIPE, RUN, Run, load_run, read_info
from echoquad_train.runs.run_metadata import git_commit, versions

__all__ = [
    "ENSEMBLE",
    "Ensemble",
    "ensemble_metadata",
    "is_ensemble",
    "load_trained",
    "new_ensemble_metadata",
    "write_ensemble",
]

ENSEMBLE: Final = "ensemble"
"""``kind`` in the ``run.json`` of an ensemble; that of a single run has none."""

SCHEMA: Final = 1
VIEWS: Final = ("as it is", "flipped")

_MEMBER: Final = re.compile(r"members/\d{1,4}|fold-\d{1,4}")  # no path out of the ensemble's folder


@dataclass(frozen=True, slots=True)
class Ensemble:
    """An ensemble: its folder, its ``run.json``, its contract, the model in evaluation mode, and the member runs."""

    folder: Path
    info: dict[str, Any]
    contract: Contract
    model: EnsembleClassifier
    members: tuple[Run, ...]

    @property
    def trained_in_folds(self) -> bool:
        """Whether members are runs of folds: each was trained on frames that another holds out."""
        return any("fold" in member.info for member in self.members)


def is_ensemble(info: dict[str, Any]) -> bool:
    """Return whether a ``run.json`` is that of an ensemble."""
    return info.get("kind") == ENSEMBLE


def load_trained(folder: Path) -> Run | Ensemble:
    """Read a run or an ensemble of runs.

    Raises
    ------
    RunError
        As `load_run`; also if an ensemble is not finished or a member was changed.
    """
    info = read_info(folder)
    return _load_ensemble(folder, info) if is_ensemble(info) else load_run(folder)


def _load_ensemble(folder: Path, info: dict[str, Any]) -> Ensemble:
    label = folder.as_posix()
    if info.get("status") != "finished":
        raise RunError(f"{label}: its folds are not all trained; continue them with `echoquad train --resume`")
    try:
        entries = [(str(entry["folder"]), str(entry["weights_sha256"])) for entry in info["members"]]
        vote, views = info["vote"], tuple(info["views"])
        contract = Contract.from_dict(info["contract"])
    except (KeyError, TypeError, ContractError) as error:
        raise RunError(f"{label}: {RUN} does not describe an ensemble ({error}); make it again") from error
    supported = vote in VOTES and views in (VIEWS[:1], VIEWS) and entries
    if not supported or not all(_MEMBER.fullmatch(name) for name, _ in entries):
        raise RunError(f"{label}: {RUN} has a vote, views or members that this release does not support; make it again")
    members = []
    for name, expected in entries:
        member = load_run(folder / name)
        if _weights_hash(member.folder) != expected:
            raise RunError(f"{label}: {name} was changed since the ensemble was made; make it again")
        if (found := _difference(member.contract, contract)) is not None:
            raise RunError(f"{label}: {found} of {name} and {RUN} differ; make it again")
        members.append(member)
    return Ensemble(folder, info, contract, _build_model(members, vote, flip_tta=len(views) > 1), tuple(members))


def write_ensemble(
    folders: Sequence[Path], out: Path, *, vote: EnsembleVote = "soft", flip_tta: bool = False
) -> Ensemble:
    """Write an ensemble folder that holds copies of finished runs.

    Parameters
    ----------
    folders
        The runs. An ensemble among them stands for its members; its own vote and views are ignored.
    out
        The folder to write, new or empty. It is written completely or not at all.
    vote
        ``soft`` or ``hard``; see `echoquad_train.networks.ensemble_classifier`.
    flip_tta
        Test-time augmentation: whether every member also classifies the flipped quadrant.

    Raises
    ------
    RunError
        If a folder holds no run, an unfinished or a damaged one, or `out` is not empty.
    ConfigError
        If the runs have different contracts, such as other classes, another crop or input size.
    OutputError
        If a file cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out.as_posix()}: exists and is not empty; choose another --out")
    runs = [run for folder in folders for run in _load_members(folder)]
    if not runs:
        raise ConfigError("an ensemble needs at least one run; none was given")
    for run in runs[1:]:
        if (found := _difference(run.contract, runs[0].contract)) is not None:
            raise ConfigError(
                f"{run.folder.as_posix()}: its {found} is {_shown(run.contract, found)}; expected that of "
                f"{runs[0].folder.as_posix()}, {_shown(runs[0].contract, found)}; members need the same contract"
            )
    names = [f"members/{number}" for number in range(1, len(runs) + 1)]
    metadata = ensemble_metadata(list(zip(names, runs, strict=True)), vote, flip_tta)
    with atomic_folder(out) as partial:
        for name, run in zip(names, runs, strict=True):
            place = make_folder(partial / name)
            for file in (RECIPE, RUN, BEST):
                with output_errors(place / file):
                    data = (run.folder / file).read_bytes()
                write_bytes(place / file, data)
        write_json(partial / RUN, metadata)
    contract = Contract.from_dict(metadata["contract"])
    return Ensemble(out, metadata, contract, _build_model(runs, vote, flip_tta=flip_tta), tuple(runs))


def ensemble_metadata(members: Sequence[tuple[str, Run]], vote: EnsembleVote, flip_tta: bool) -> dict[str, Any]:
    """Return the ``run.json`` of an ensemble.

    Parameters
    ----------
    members
        The name of each member's folder, relative to the ensemble's, and the run.
    vote
        ``soft`` or ``hard``.
    flip_tta
        Whether every member also classifies the flipped quadrant.

    Raises
    ------
    RunError
        If a required key is missing in a run's ``run.json``.
    """
    runs = [run for _, run in members]
    frames = _frame_temperature(runs) if vote == "soft" else 1.0
    contract = replace(runs[0].contract, temperature=1.0, frame_temperature=frames)
    backbones = ", ".join(sorted({run.model.name for run in runs}))
    return {
        **new_ensemble_metadata(),
        "vote": vote,
        "views": list(VIEWS if flip_tta else VIEWS[:1]),
        "contract": contract.to_dict(),
        "contract_sha256": contract.sha256,
        "backbone": f"{vote} vote of {len(runs)} {'network' if len(runs) == 1 else 'networks'} ({backbones})",
        "members": [_entry(name, run) for name, run in members],
        "data": _shared_data(runs),
        "versions": versions(),
        "git_commit": git_commit(),
        "status": "finished",
    }


def _frame_temperature(runs: Sequence[Run]) -> float:
    """Return the geometric mean of the members' frame temperatures, to four decimals.

    A temperature must be fitted on frames that no member was trained on. With members of folds there are none, so the
    ensemble takes the mean. An ensemble is slightly less confident than its members, so the mean errs on the safe side.
    """
    logarithms = [math.log(run.contract.frame_temperature) for run in runs]
    return round(math.exp(math.fsum(logarithms) / len(runs)), 4)


def new_ensemble_metadata(**known: Any) -> dict[str, Any]:
    """Return the ``run.json`` of an ensemble whose members are not all trained, with the keys `known`."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"schema": SCHEMA, "kind": ENSEMBLE, "created": created, **known, "status": "running"}


def _entry(name: str, run: Run) -> dict[str, Any]:
    """Return what ``run.json`` lists of a member."""
    info = run.info
    try:
        return {
            "folder": name,
            "weights_sha256": _weights_hash(run.folder),
            "backbone": run.model.name,
            "seed": info["seed"],
            "epochs": info["epochs"],
            "best": info["best"],
            "temperature": run.contract.temperature,
            **({"fold": info["fold"]} if "fold" in info else {}),
        }
    except KeyError as error:
        raise RunError(f"{run.folder.as_posix()}: {RUN} lacks {error}; train again") from error


def _shared_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the members' descriptions of their data have in common.

    Folds differ in the frames that they train on, validate on and hold out, but the sum of these is the same for all.
    """
    try:
        data = [run.info["data"] for run in runs]
        folders = [found["folder"] for found in data]
        folds = any("fold" in run.info for run in runs)
        frames = [_pool_counts(run.info) if folds else run.info["data"]["frames"] for run in runs]
        readings = [found.get("reading") for found in data]
        unreadable = {failure["file"]: failure for found in data for failure in found["unreadable"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{runs[0].folder.as_posix()}: {RUN} does not describe its data ({error}); train again"
        ) from error
    return {
        "folder": folders[0] if len(set(folders)) == 1 else None,
        "frames": frames[0] if all(found == frames[0] for found in frames) else {},
        "unreadable": list(unreadable.values()),
        **({"reading": readings[0]} if readings[0] and all(found == readings[0] for found in readings) else {}),
    }


def _pool_counts(info: dict[str, Any]) -> dict[str, dict[str, int]]:
    counts = list(info["data"]["frames"].values())
    if held_out := info.get("fold", {}).get("held_out"):  # missing in earlier releases, which validated on the fold
        counts.append(held_out)
    return {"train and validation": {name: sum(count[name] for count in counts) for name in counts[0]}}


def _load_members(folder: Path) -> tuple[Run, ...]:
    found = load_trained(folder)
    if isinstance(found, Ensemble):
        return found.members
    if found.info.get("status") != "finished":
        raise RunError(f"{folder.as_posix()}: the run is not finished; continue it with `echoquad train --resume`")
    return (found,)


def _build_model(runs: Sequence[Run], vote: EnsembleVote, *, flip_tta: bool) -> EnsembleClassifier:
    temperatures = [run.contract.temperature for run in runs]
    return EnsembleClassifier([run.model for run in runs], temperatures, vote, flip_tta).eval()


def _difference(a: Contract, b: Contract) -> str | None:
    """Return the first field in which two contracts differ, ignoring temperatures; None if they match."""
    names = [field.name for field in fields(Contract) if not field.name.endswith("temperature")]
    return next((name for name in names if getattr(a, name) != getattr(b, name)), None)


def _shown(contract: Contract, field: str) -> str:
    value = getattr(contract, field)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else json.dumps(value, ensure_ascii=False).strip('"')


def _weights_hash(folder: Path) -> str:
    try:
        return hashlib.sha256((folder / BEST).read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{folder.as_posix()}: {BEST} cannot be read ({error.strerror or error})") from error
