"""Exceptions of the fleet check; see `echoquad_runtime.errors` for the others."""

from __future__ import annotations

from echoquad_runtime.errors import EchoQuadError

__all__ = ["FleetError", "NoAnswerError"]


class FleetError(EchoQuadError, ValueError):
    """A service of the fleet runs another bundle, has not passed its self-test, is not ready, or is late."""

    code = "E_FLEET"
    exit_code = 3


class NoAnswerError(EchoQuadError, ConnectionError):
    """A service of the fleet cannot be reached, refuses to answer, or is none of EchoQuad."""

    code = "E_FLEET_NO_ANSWER"
