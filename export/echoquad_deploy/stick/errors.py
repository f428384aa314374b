"""Exceptions of packing and checking a stick; see `echoquad_runtime.errors` for the others."""

from __future__ import annotations

from echoquad_runtime.errors import EchoQuadError

__all__ = ["RegistryError", "StickError", "WheelhouseError"]


class WheelhouseError(EchoQuadError, RuntimeError):
    """The wheels of a stick cannot be had: a package has none for the target, or versions exclude each other."""

    code = "E_WHEELHOUSE"


class RegistryError(WheelhouseError, ConnectionError):
    """The package registry cannot be reached."""

    code = "E_REGISTRY"


class StickError(EchoQuadError, ValueError):
    """A stick is damaged, incomplete or changed, or another key has signed it."""

    code = "E_STICK"
    exit_code = 3
