"""Ensemble folders: members side by side, and a ``run.json`` that says how they judge together.

=================================  ===============================================================================
``run.json``                       ``kind: ensemble``, vote, views, contract, the members with their weights' hashes
``members/1`` ... or               the members: of ``echoquad ensemble`` copies of runs without what only a resumed run
``fold-1`` ...                     needs, of ``echoquad train --folds`` the folds' own runs
=================================  ===============================================================================

The contract is the members' own but for its temperatures: those of their softmax are applied before they are joined,
those of their frames are not used, and the ensemble has its own in ``run.json``, 1 unless it was calibrated.
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

__all__ = ["ENSEMBLE", "Ensemble", "begin_facts", "ensemble_facts", "is_ensemble", "load_trained", "write_ensemble"]

ENSEMBLE: Final = "ensemble"
"""``kind`` in the ``run.json`` of an ensemble; a run's has none."""

SCHEMA: Final = 1
VIEWS: Final = ("as it is", "flipped")

_MEMBER: Final = re.compile(r"members/\d{1,4}|fold-\d{1,4}")  # nothing outside the ensemble's folder


@dataclass(frozen=True, slots=True)
class Ensemble:
    """An ensemble: its folder, what ``run.json`` says, its contract, the model in evaluation mode, and the runs."""

    folder: Path
    info: dict[str, Any]
    contract: Contract
    model: EnsembleClassifier
    members: tuple[Run, ...]

    @property
    def trained_in_folds(self) -> bool:
        """Whether a member is a fold's: then others have learned from the frames that it was validated on."""
        return any("fold" in member.info for member in self.members)


def is_ensemble(info: dict[str, Any]) -> bool:
    """Tell whether a ``run.json`` is an ensemble's."""
    return info.get("kind") == ENSEMBLE


def load_trained(folder: Path) -> Run | Ensemble:
    """Read what training left in a folder: a run, or an ensemble of runs.

    Raises
    ------
    RunError
        As `load_run`; for an ensemble also if it is not finished, or a member is not the one
        that it was made of.
    """
    info = read_info(folder)
    return _load_ensemble(folder, info) if is_ensemble(info) else load_run(folder)


def _load_ensemble(folder: Path, info: dict[str, Any]) -> Ensemble:
    label = folder.as_posix()
    if info.get("status") != "finished":
        raise RunError(f"{label}: its folds are not all trained; go on with them by `echoquad train --resume`")
    try:
        entries = [(str(entry["folder"]), str(entry["weights_sha256"])) for entry in info["members"]]
        vote, views = info["vote"], tuple(info["views"])
        contract = Contract.from_dict(info["contract"])
    except (KeyError, TypeError, ContractError) as error:
        raise RunError(f"{label}: {RUN} is no proper ensemble's ({error}); make it again") from error
    known = vote in VOTES and views in (VIEWS[:1], VIEWS) and entries
    if not known or not all(_MEMBER.fullmatch(name) for name, _ in entries):
        raise RunError(f"{label}: {RUN} names a vote, views or members that this release does not know; make it again")
    members = []
    for name, expected in entries:
        member = load_run(folder / name)
        if _weights_hash(member.folder) != expected:
            raise RunError(f"{label}: {name} was changed since the ensemble was made; make it again")
        if (found := _difference(member.contract, contract)) is not None:
            raise RunError(f"{label}: {found} of {name} and {RUN} differ; they do not belong together; make it again")
        members.append(member)
    return Ensemble(folder, info, contract, _join(members, vote, flip=len(views) > 1), tuple(members))


def write_ensemble(folders: Sequence[Path], out: Path, *, vote: EnsembleVote = "soft", flip: bool = False) -> Ensemble:
    """Join finished runs into an ensemble that holds copies of them.

    Parameters
    ----------
    folders
        The runs; an ensemble among them stands for its members, whatever its own vote and views.
    out
        The folder to make, new or empty; it is there whole or not at all.
    vote
        ``soft`` or ``hard``; see `echoquad_train.networks.ensemble_classifier`.
    flip
        Whether every member also judges the flipped quadrant.

    Raises
    ------
    RunError
        If a folder holds no run, an unfinished or a damaged one, or `out` is in the way.
    ConfigError
        If the runs do not judge alike: other classes, another crop or input size.
    OutputError
        If the system refuses.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out.as_posix()}: is there and not empty; choose another --out")
    runs = [run for folder in folders for run in _runs_of(folder)]
    if not runs:
        raise ConfigError("an ensemble of no runs; name one or more")
    for run in runs[1:]:
        if (found := _difference(run.contract, runs[0].contract)) is not None:
            raise ConfigError(
                f"{run.folder.as_posix()}: its {found} is {_shown(run.contract, found)}; expected that of "
                f"{runs[0].folder.as_posix()}, {_shown(runs[0].contract, found)}; members must judge alike"
            )
    names = [f"members/{number}" for number in range(1, len(runs) + 1)]
    facts = ensemble_facts(list(zip(names, runs, strict=True)), vote, flip)
    with atomic_folder(out) as partial:
        for name, run in zip(names, runs, strict=True):
            place = make_folder(partial / name)
            for file in (RECIPE, RUN, BEST):
                with output_errors(place / file):
                    data = (run.folder / file).read_bytes()
                write_bytes(place / file, data)
        write_json(partial / RUN, facts)
    contract = Contract.from_dict(facts["contract"])
    return Ensemble(out, facts, contract, _join(runs, vote, flip=flip), tuple(runs))


def ensemble_facts(members: Sequence[tuple[str, Run]], vote: EnsembleVote, flip: bool) -> dict[str, Any]:
    """Collect what ``run.json`` says of an ensemble of runs, each with its folder's name within the ensemble's.

    Raises
    ------
    RunError
        If a run's record lacks what has to be known of it.
    """
    runs = [run for _, run in members]
    frames = _frame_temperature(runs) if vote == "soft" else 1.0
    contract = replace(runs[0].contract, temperature=1.0, frame_temperature=frames)
    backbones = ", ".join(sorted({run.model.name for run in runs}))
    return {
        **begin_facts(),
        "vote": vote,
        "views": list(VIEWS if flip else VIEWS[:1]),
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
    """Give the geometric mean of the members' frame temperatures, four decimals.

    A member's is fitted on frames that it has not learned from, which of members of folds no frame is for all of them.
    The mean of several is a little more timid than each, so that it errs on the side of too little confidence.
    """
    logarithms = [math.log(run.contract.frame_temperature) for run in runs]
    return round(math.exp(math.fsum(logarithms) / len(runs)), 4)


def begin_facts(**known: Any) -> dict[str, Any]:
    """Give what ``run.json`` says of an ensemble whose members are not all trained, and `known`."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"schema": SCHEMA, "kind": ENSEMBLE, "created": created, **known, "status": "running"}


def _entry(name: str, run: Run) -> dict[str, Any]:
    """Say of a member what tells it from the others."""
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
    """Say what the members were trained on, as far as it is the same for all.

    Of folds the frames that each has drawn from, train and validation together, are the same; the parts are not.
    """
    try:
        data = [run.info["data"] for run in runs]
        folders = [found["folder"] for found in data]
        folds = any("fold" in run.info for run in runs)
        frames = [_pooled(found["frames"]) if folds else found["frames"] for found in data]
        readings = [found.get("reading") for found in data]
        unreadable = {failure["file"]: failure for found in data for failure in found["unreadable"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{runs[0].folder.as_posix()}: {RUN} does not name its data ({error}); train again") from error
    return {
        "folder": folders[0] if len(set(folders)) == 1 else None,
        "frames": frames[0] if all(found == frames[0] for found in frames) else {},
        "unreadable": list(unreadable.values()),
        **({"reading": readings[0]} if readings[0] and all(found == readings[0] for found in readings) else {}),
    }


def _pooled(frames: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    names = next(iter(frames.values()))
    return {"train and validation": {name: sum(counts[name] for counts in frames.values()) for name in names}}


def _runs_of(folder: Path) -> tuple[Run, ...]:
    found = load_trained(folder)
    if isinstance(found, Ensemble):
        return found.members
    if found.info.get("status") != "finished":
        raise RunError(f"{folder.as_posix()}: the run is not finished; go on with it by `echoquad train --resume`")
    return (found,)


def _join(runs: Sequence[Run], vote: EnsembleVote, *, flip: bool) -> EnsembleClassifier:
    temperatures = [run.contract.temperature for run in runs]
    return EnsembleClassifier([run.model for run in runs], temperatures, vote, flip).eval()


def _difference(a: Contract, b: Contract) -> str | None:
    """Name the first field in which two contracts differ; temperatures may."""
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
