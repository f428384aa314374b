"""The model that clients see: the bundle in use, its names, and what goes in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.http.backend import Backend
from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.kserve.errors import quote

__all__ = ["ANY_BUNDLE", "ModelFinder", "ServedModel"]

ANY_BUNDLE: Final = "echoquad"
"""Name of whichever bundle is in use, for clients that shall not notice a new one."""

_VERSION_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A bundle under the name by which a client has asked for it.

    Attributes
    ----------
    name
        Name of the bundle's folder, or `ANY_BUNDLE`.
    version
        The first 12 digits of the SHA-256 of the bundle's manifest: another bundle has another version.
    predictor
        Decides frames.
    parameters
        What decided, for each answer.
    """

    name: str
    version: str
    predictor: Predictor
    parameters: dict[str, Any]

    @property
    def contract(self) -> Contract:
        """The contract of the bundle."""
        return self.predictor.contract

    @property
    def has_typicality(self) -> bool:
        """Whether its predictions have a typicality."""
        return bool(getattr(self.predictor.engine, "typicality", False))

    @property
    def properties(self) -> dict[str, str]:
        """What a client needs to read the tensors: classes and quadrants in the order of their axes."""
        contract = self.contract
        return {
            "classes": json.dumps(contract.classes),
            "positive_class": contract.positive,
            "quadrants": json.dumps(QUADRANTS),
            "quadrant_layout": contract.quadrant_layout,
            **{name: str(value) for name, value in self.parameters.items()},
        }


class ModelFinder:
    """Finds the model that a request names.

    Parameters
    ----------
    backend
        The service.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def find(self, name: str, version: str | None) -> ServedModel:
        """Return the model of that name and version; None is the version in use.

        Raises
        ------
        ApiError
            If there is no such model: 404. If the service is not ready: 503.
        """
        self.check_ready()
        predictor = self._backend.predictor()
        # Its own bundle, and not that of `Backend.info`, which another one may have replaced since.
        bundle, engine = predictor.bundle, predictor.engine
        assert bundle is not None
        found, sha256 = bundle.folder.name, str(bundle.manifest["manifest_sha256"])
        current = sha256[:_VERSION_DIGITS]
        if name not in (found, ANY_BUNDLE):
            message = f"there is no model {quote(name)}; expected {quote(found)} or {quote(ANY_BUNDLE)}"
            raise ApiError(HTTPStatus.NOT_FOUND, "E_KSERVE_MODEL", message)
        if version is not None and version != current:
            message = f"the model has no version {quote(version)}; the bundle in use is version {quote(current)}"
            raise ApiError(HTTPStatus.NOT_FOUND, "E_KSERVE_MODEL", message)
        parameters = {
            "bundle": found,
            "bundle_sha256": sha256,
            "contract_hash": predictor.contract.sha256,
            "vote": predictor.method,
            "device": engine.device,
            "provider": getattr(engine, "provider", ""),
            "precision": engine.precision,
        }
        return ServedModel(name, current, predictor, parameters)

    def check_ready(self) -> None:
        """Return if the service decides frames.

        Raises
        ------
        ApiError
            If not: 503.
        """
        if reasons := list(self._backend.unready_reasons()):
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "E_NOT_READY",
                f"the service is not ready: {'; '.join(reasons)}; repeat the request after Retry-After seconds",
                {"Retry-After": "5"},
            )
