"""``echoquad sign``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.framework.console import format_command, print_result
from echoquad.cli.framework.options import BundleFolder

__all__ = ["sign"]


def sign(
    bundle: BundleFolder,
    key: Annotated[
        Path, typer.Option("--key", metavar="PEM", help="Private key: elliptic-curve, PEM, as openssl writes it.")
    ],
) -> None:
    """Sign a bundle, so that --public-key accepts it and no other. Needs no torch.

    Use it if the key is not on the machine that trains; otherwise export --sign-key does the same.

    To make a key pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; for the carts, which need only
    the public key: openssl pkey -in key.pem -pubout -out pub.pem
    """
    from echoquad_runtime.bundle.manifest import SIGNATURE
    from echoquad_runtime.bundle.signing import sign_bundle

    fingerprint = sign_bundle(bundle, key)
    print_result(
        f"signed {bundle.as_posix()} with key {fingerprint[:12]}; wrote {SIGNATURE}; "
        f"next: {format_command('verify', bundle.as_posix(), '--public-key', 'PEM')}"
    )
