"""Checks of a request before it is served: its headers, its host, its token and its origin.

The API has no cookies and no other ambient authority. What a page of another site could use is that a browser on the
cart reaches the loopback address, where no token is needed. Two checks prevent it: the ``Host`` header must be a known
name (a DNS name that was rebound to the loopback address is not), and a request that another site made is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from echoquad_serve.config import HttpConfig
from echoquad_serve.http.error_responses import ApiError, error_response
from echoquad_serve.http.limits import Limits

__all__ = ["RequestChecks", "is_loopback"]

_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")
_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
_SINGLE = ("authorization", "content-type", "host", "idempotency-key", "last-event-id", "origin", "sec-fetch-site")


def is_loopback(address: str) -> bool:
    """Return whether an address is one of this machine alone: an IP address, or ``localhost``."""
    ip = _ip_address(address)
    return address.lower() == "localhost" or (ip is not None and ip.is_loopback)


class RequestChecks:
    """Middleware that refuses a request before anything of it is served.

    A peer on this machine needs no token, so that the page works in the cart's own browser. A request that a proxy on
    this machine passes on needs one: it may come from anywhere. No header makes a request trusted.

    Parameters
    ----------
    app
        The application.
    config
        The listener, with its names and its client certificates.
    limits
        Limits of headers.
    token
        The token of peers that are not this machine; None if there is none.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig, limits: Limits, token: str | None) -> None:
        self._app = app
        self._limits = limits
        self._token = token.encode() if token else None
        self._certificates = config.tls is not None and config.tls.client_ca is not None
        self._hosts = {name.lower() for name in ("localhost", "127.0.0.1", "::1", config.host, *config.allowed_hosts)}
        self._hosts -= {"", "0.0.0.0", "::"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that passes all checks, and answer why any other does not."""
        if scope["type"] == "http":
            try:
                headers = self._headers(scope)
                self._check_host(scope, headers)
                self._check_token(scope, headers)
                self._check_origin(scope, headers)
            except ApiError as error:
                answer = error_response(scope["path"], error.status_code, error.code, error.detail, error.headers)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _headers(self, scope: Scope) -> Mapping[str, str]:
        """Return the headers by name. One that is checked must not be there twice, once for each reader."""
        pairs = scope["headers"]
        # The server limits headers that arrive in pieces. These may have arrived at once.
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in pairs)
        if len(pairs) > self._limits.headers or size > self._limits.header_bytes:
            message = f"expected at most {self._limits.headers} headers of {self._limits.header_bytes} bytes in all"
            raise ApiError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "E_HTTP_HEADERS", message)
        headers: dict[str, str] = {}
        for raw_name, raw_value in pairs:
            name = raw_name.decode("latin-1").lower()
            if name in headers and name in _SINGLE:
                raise ApiError(HTTPStatus.BAD_REQUEST, "E_HTTP_HEADERS", f"header {name} is given twice; give it once")
            headers[name] = raw_value.decode("latin-1")
        return headers

    def _check_host(self, scope: Scope, headers: Mapping[str, str]) -> None:
        match = _HOST.fullmatch(headers.get("host", ""))
        name = match.group(1).strip("[]").lower() if match else ""
        # The address at which the connection arrived is no DNS name, so it was not rebound.
        arrived = _ip_address(str(scope["server"][0])) if scope.get("server") else None
        if name not in self._hosts and (arrived is None or _ip_address(name) != arrived):
            message = "the Host header is not a name of this service; add the name to http.allowed_hosts"
            raise ApiError(HTTPStatus.MISDIRECTED_REQUEST, "E_HTTP_HOST", message)

    def _check_token(self, scope: Scope, headers: Mapping[str, str]) -> None:
        client = scope.get("client")
        proxied = any(name in headers for name in _PROXY_HEADERS)
        if client and is_loopback(client[0]) and not proxied:
            return
        if self._token is None:
            if self._certificates:  # the server has checked that of the peer
                return
            message = "only requests from this machine are served; configure http.token_file or http.tls.client_ca"
            raise ApiError(HTTPStatus.FORBIDDEN, "E_HTTP_TOKEN", message)
        scheme, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip().encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._token):
            message = "the request does not come from this machine; expected Authorization: Bearer TOKEN"
            raise ApiError(HTTPStatus.UNAUTHORIZED, "E_HTTP_TOKEN", message, {"WWW-Authenticate": "Bearer"})

    @staticmethod
    def _check_origin(scope: Scope, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another origin asks a browser for; a link to the page itself is followed."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        foreign = origin is not None and origin.partition("://")[2].lower() != headers["host"].lower()
        if not foreign and site not in ("none", "same-origin"):
            navigation = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
            foreign = not (navigation and scope["method"] == "GET" and scope["path"] == "/")
        if foreign:
            message = "the request comes from a page of another origin; only the service's own page may send requests"
            raise ApiError(HTTPStatus.FORBIDDEN, "E_HTTP_ORIGIN", message)


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, that of version 4 if a listener of version 6 shows it so; None for anything else."""
    try:
        ip = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip
