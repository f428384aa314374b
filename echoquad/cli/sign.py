"""``echoquad sign``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from echoquad.cli.console import say
from echoquad.cli.declare import Option
from echoquad.cli.options import BundleFolder

__all__ = ["sign"]


def sign(
    bundle: BundleFolder,
    key: Annotated[
        Path,
        Option("--key", metavar="PEM", help="Private key that signs: elliptic-curve, as openssl writes it."),
    ],
) -> None:
    """Sign a bundle, so that --public-key can tell it from every other. Needs no torch.

    For a key that does not lie where models are trained; export --sign-key does the same where it does.

    A key pair: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; and for carts, which need only this
    half: openssl pkey -in key.pem -pubout -out pub.pem
    """
    from echoquad_runtime.bundle.manifest import SIGNATURE
    from echoquad_runtime.bundle.signing import sign_bundle

    fingerprint = sign_bundle(bundle, key)
    say(
        f"signed {bundle.as_posix()} with key {fingerprint[:12]}; wrote {SIGNATURE}; "
        f"next: echoquad verify {bundle.as_posix()} --public-key PEM"
    )
