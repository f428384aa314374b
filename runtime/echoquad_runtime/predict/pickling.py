"""Pickles of predictors: sessions of onnxruntime have none, so that a copy opens the bundle again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.errors import BundleError, ConfigError

__all__ = ["reopen", "reopening"]

_Predictor = TypeVar("_Predictor")


def reopening(
    build: Callable[..., _Predictor], bundle: Bundle | None, arguments: Mapping[str, Any]
) -> tuple[Callable[..., _Predictor], tuple[object, ...]]:
    """Return the function and the arguments that open a predictor again, as ``__reduce__`` does.

    Parameters
    ----------
    build
        The class of the predictor.
    bundle
        The bundle; None for a predictor of an engine.
    arguments
        The keyword arguments that it was built with.

    Raises
    ------
    ConfigError
        If it was built from an engine, or from an open signed bundle, whose key is not known.
    """
    if bundle is None or (bundle.signed_by is not None and arguments["public_key"] is None):
        source = "an engine" if bundle is None else "an open signed bundle"
        raise ConfigError(f"a predictor of {source} cannot be pickled or copied; build it from a bundle's folder")
    key = arguments["public_key"]
    kept = {**arguments, "public_key": None if key is None else Path(key).resolve()}
    return reopen, (build, bundle.folder.resolve(), bundle.manifest["manifest_sha256"], kept)


def reopen(build: Callable[..., _Predictor], folder: Path, manifest_sha256: str, arguments: Any) -> _Predictor:
    """Build a predictor again from its pickle.

    Raises
    ------
    BundleError
        If the bundle has been replaced since, or as the predictor's constructor.
    """
    if Bundle(folder).manifest["manifest_sha256"] != manifest_sha256:
        raise BundleError(
            f"{folder.as_posix()}: the bundle was replaced since the predictor was pickled; build the predictor again"
        )
    return build(folder, **arguments)
