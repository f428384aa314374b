"""The manifest: the content of ``bundle.json``, with the provenance of the model."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from echoquad_runtime.bundle.manifest import INTENDED_USE, SCHEMA
from echoquad_runtime.errors import RunError
from echoquad_train.runs.checkpoint import Run
from echoquad_train.runs.ensemble_folder import Ensemble
from echoquad_train.runs.run_metadata import versions

__all__ = ["new_manifest", "provenance"]


def new_manifest(run: Run | Ensemble, default_precision: str) -> dict[str, Any]:
    """Return the manifest of a bundle that has no files yet: ``files``, ``precisions`` and ``parity`` are empty."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "contract": run.contract.to_dict(),
        "contract_sha256": run.contract.sha256,
        "files": {},
        "precisions": {},
        "default_precision": default_precision,
        "parity": {},
        "training": provenance(run),
        "versions": versions(),
        "intended_use": INTENDED_USE,
    }


def provenance(run: Run | Ensemble) -> dict[str, Any]:
    """Return how the model was trained, without folders and file names: these can contain patients' names."""
    return _of_ensemble(run) if isinstance(run, Ensemble) else _of_run(run)


_RUN_KEYS = ("created", "backbone", "seed", "device", "precision", "epochs", "best", "versions", "git_commit")


def _of_ensemble(ensemble: Ensemble) -> dict[str, Any]:
    """Return how an ensemble combines its members, and the provenance of each."""
    info = ensemble.info
    members = []
    for entry, run in zip(info["members"], ensemble.members, strict=True):
        fold = {"fold": entry["fold"]} if "fold" in entry else {}
        own = {"weights_sha256": entry["weights_sha256"], "temperature": entry["temperature"], **fold}
        members.append({**_of_run(run), **own})
    recipes = {member["recipe"] for member in members}
    try:
        return {
            **{key: info[key] for key in ("kind", "created", "backbone", "vote", "views", "versions", "git_commit")},
            "members": members,
            "frames": info["data"]["frames"],
            "unreadable": len(info["data"]["unreadable"]),
            **({"reading": info["data"]["reading"]} if "reading" in info["data"] else {}),
            **({"recipe": recipes.pop()} if len(recipes) == 1 else {}),
        }
    except (KeyError, TypeError) as error:
        raise RunError(f"{ensemble.folder.as_posix()}: run.json lacks {error}; make the ensemble again") from error


def _of_run(run: Run) -> dict[str, Any]:
    info, recipe = run.info, run.recipe
    if recipe.weights not in ("imagenet", "none"):
        recipe = recipe.replace(weights="file")
    try:
        data = info["data"]
        return {
            **{key: info[key] for key in _RUN_KEYS},
            # The audit in a run holds counts only, no names.
            **{key: info[key] for key in ("pretrained", "teacher", "fit", "calibration", "audit") if key in info},
            "frames": data["frames"],
            "unreadable": len(data["unreadable"]),
            **({"reading": data["reading"]} if "reading" in data else {}),
            "recipe": recipe.to_toml(),
        }
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.folder.as_posix()}: run.json lacks {error}; train again") from error
