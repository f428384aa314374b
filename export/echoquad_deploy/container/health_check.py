"""The health check of the container: ask the service whether it is ready.

``python -m echoquad_deploy.container.health_check`` ends with 0 if it is, else with 1 and the reason in one line.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request
from typing import Final

__all__ = ["DEFAULT_URL", "unready_reason"]

DEFAULT_URL: Final = "http://127.0.0.1:8770/api/v1/ready"
"""Where to ask, unless the variable ``ECHOQUAD_READY_URL`` says otherwise."""

_TIMEOUT_S: Final = 4.0  # less than the container's own limit, so that the reason can still be printed
_MAX_ANSWER: Final = 1000


def unready_reason(url: str) -> str | None:
    """Return why the service at `url` is not ready, in one line; None if it is ready."""
    # The certificate names the cart and not 127.0.0.1. Nothing secret is sent, and the answer decides over a restart.
    context = ssl._create_unverified_context() if url.startswith("https:") else None
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])
    )
    try:
        with opener.open(url, timeout=_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        text = error.read(_MAX_ANSWER).decode("utf-8", "replace")
        return " ".join(f"HTTP {error.code}: {text}".split())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"no answer from {url}: {getattr(error, 'reason', error)}"


if __name__ == "__main__":
    # A text is printed to the standard error and ends the process with 1; None ends it with 0.
    sys.exit(unready_reason(os.environ.get("ECHOQUAD_READY_URL", DEFAULT_URL)))
