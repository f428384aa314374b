"""The manifest: what ``bundle.json`` says of a bundle and of the run that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echoquad_runtime.bundle.manifest import INTENDED_USE, SCHEMA, encode_manifest
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import RunError
from echoquad_train.runs.checkpoint import Run
from echoquad_train.runs.ensemble_folder import Ensemble
from echoquad_train.runs.run_metadata import versions

__all__ = ["make_manifest", "provenance"]


def make_manifest(
    contract: Contract,
    files: Mapping[str, Mapping[str, Any]],
    precisions: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Any],
    parity: Mapping[str, Any],
    created: str,
    sections: Mapping[str, Any],
) -> bytes:
    """Give the bytes of ``bundle.json``.

    Parameters
    ----------
    contract
        How a frame becomes a decision.
    files
        SHA-256 and size of every other file, by name.
    precisions
        What is to be known of each graph: opset, how it was calibrated. The first is the default.
    training, parity
        Where the model comes from, and how the graphs compare with the training code.
    created
        Date and time of the export.
    sections
        Further keys of the manifest's own, such as ``golden``.
    """
    return encode_manifest(
        {
            "schema": SCHEMA,
            "created": created,
            "contract": contract.to_dict(),
            "contract_sha256": contract.sha256,
            "files": files,
            "precisions": precisions,
            "default_precision": next(iter(precisions)),
            "parity": parity,
            "training": training,
            "versions": versions(),
            "intended_use": INTENDED_USE,
            **sections,
        }
    )


def provenance(run: Run | Ensemble) -> dict[str, Any]:
    """Give what a bundle says of its training. Folders and file names stay behind: they can name patients."""
    return _of_ensemble(run) if isinstance(run, Ensemble) else _of_run(run)


def _of_ensemble(ensemble: Ensemble) -> dict[str, Any]:
    """Say of an ensemble how its members judge together, and of each what would be said of it alone."""
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
        kept = {
            key: info[key]
            for key in (
                "created",
                "backbone",
                "seed",
                "device",
                "precision",
                "epochs",
                "best",
                "versions",
                "git_commit",
            )
        }
        data = info["data"]
        return {
            **kept,
            # Of the audit the counts alone are in a run: no name.
            **{key: info[key] for key in ("teacher", "fit", "calibration", "audit") if key in info},
            "frames": data["frames"],
            "unreadable": len(data["unreadable"]),
            **({"reading": data["reading"]} if "reading" in data else {}),
            "recipe": recipe.to_toml(),
        }
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.folder.as_posix()}: run.json lacks {error}; train again") from error
