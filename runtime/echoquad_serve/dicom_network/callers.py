"""The list of those who may send: AE titles, each with an address or a network."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import Caller

__all__ = ["CallerList", "check_ae_title"]

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_TITLE: Final = 16


class CallerList:
    """Who may send. An empty list allows every AE title from this machine alone.

    Parameters
    ----------
    callers
        The tables ``[[dicom.caller]]``.

    Raises
    ------
    ConfigError
        If an AE title or an address is none.
    """

    def __init__(self, callers: Sequence[Caller]) -> None:
        self._callers = [(caller, _network(caller)) for caller in callers]

    def admits_address(self, address: str) -> bool:
        """Return whether any caller has this address."""
        ip = _parse(address)
        if not self._callers:
            return ip.is_loopback
        return any(network is None or ip in network for _, network in self._callers)

    def find(self, ae_title: str, address: str) -> Caller | None:
        """Return the caller with this AE title and address; None if it may not send."""
        ip = _parse(address)
        if not self._callers:
            return Caller(ae_title) if ip.is_loopback else None
        for caller, network in self._callers:
            if caller.ae_title.strip() == ae_title.strip() and (network is None or ip in network):
                return caller
        return None


def check_ae_title(title: str, where: str) -> str:
    """Return an AE title without surrounding spaces, which do not count.

    Raises
    ------
    ConfigError
        If it is none; `where` names the key.
    """
    title = title.strip(" ")
    if not 0 < len(title) <= _MAX_TITLE or not title.isascii() or not title.isprintable() or "\\" in title:
        raise ConfigError(
            f"{where}: the AE title is {title!r}; expected 1 to 16 printable ASCII characters, no backslash"
        )
    return title


def _parse(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return mapped or ip


def _network(caller: Caller) -> _Network | None:
    check_ae_title(caller.ae_title, "dicom.caller.ae_title")
    if not 0 <= caller.port <= 65535:
        raise ConfigError(f"dicom.caller: the port is {caller.port}; expected 0 to 65535")
    if not caller.address:
        return None
    try:
        return ipaddress.ip_network(caller.address, strict=False)
    except ValueError as error:
        message = f"dicom.caller: the address is {caller.address!r}; expected an IP address or a network, not a name"
        raise ConfigError(message) from error
