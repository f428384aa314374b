"""The texts that a stick carries: the instructions, and the configuration to begin with."""

from __future__ import annotations

from typing import Final

from echoquad_deploy.stick.target import Target

__all__ = ["default_config", "instructions"]

_CONFIG: Final = """\
# Configuration of `echoquad serve`. The first installation copies this file ({place}); later ones leave
# the copy alone. Every option: docs/reference/service.md of EchoQuad.

[http]
host = "127.0.0.1"          # for other machines: an address of this one, and token_file or tls
port = 8770

[store]
folder = "{store}"   # the queue and the results

[model]
device = "auto"
{public_key}
# [[folder]]                # a watched folder
# path = "/srv/inbox"

# [[destination]]           # where results go
# name = "files"
# type = "folder"
# path = "/srv/results"
"""

_INSTRUCTIONS: Final = """\
EchoQuad {version} for {architecture}, Python {python}, with the bundle {bundle}

Research use only. Not a medical device; not for diagnosis, triage, or any decision on a patient's care.

{system}
{trust_note}

What is in this folder

    wheels/, requirements.lock    the packages and their hashes
    bundle/                       the model: {bundle}, SHA-256 {bundle_sha256}
    config/, systemd/             configuration and unit of the service
    licences/                     licence texts of all packages; licences/README.txt is a table
    sbom.cdx.json                 bill of materials, CycloneDX 1.6
    SHA256SUMS                    hash of every file: sha256sum --check --quiet SHA256SUMS
{signature_line}"""

_LINUX: Final = """\
The machine needs Linux with glibc 2.{glibc} or newer on {architecture}, Python {python} (on Debian: the package
python{python}), openssl, and systemd. It needs no network, no compiler and no pip.

Install, as root, in this folder:

    sh install.sh {trust}

This checks every file of this folder first, then makes the user "echoquad", installs below /opt/echoquad, checks the
bundle on this machine, starts the service and prints the address to open. With another stick it upgrades.

    sh install.sh --rollback      return to the release before
    sh install.sh --remove        remove the program; configuration and results stay
"""

_WINDOWS: Final = """\
The machine needs 64-bit Windows on x86-64 and Python {python} from python.org. It needs no network and no compiler.

Install in this folder, in PowerShell:

    powershell -ExecutionPolicy Bypass -File install.ps1 {trust}

This checks every file of this folder first, installs, checks the bundle on this machine and prints what to start. With
another stick it upgrades. -Rollback returns to the release before; -Remove removes the program.
"""

_TRUST: Final = """\
bundle.pub is the public key of the person who packed this stick. Take it from them, and not from this stick: a stick
that somebody else has made holds the key of somebody else. The fingerprint, which `echoquad pack` has printed to them,
will do instead of the file:

    {by_fingerprint} FINGERPRINT"""

_NO_TRUST: Final = """\
This stick is not signed: its hashes show damage, but not who made it."""

_SIGNATURE: Final = """\
    SHA256SUMS.sig                its signature:
                                  openssl dgst -sha256 -verify bundle.pub -signature SHA256SUMS.sig SHA256SUMS
"""


def default_config(target: Target, *, signed: bool) -> str:
    """Return the configuration to begin with: loopback only, and the bundle's signature required if there is one."""
    key = 'public_key = "bundle.pub"   # beside this file: only a bundle that this key has signed is served\n'
    return _CONFIG.format(
        place="beside echoquad.cmd" if target.windows else "/etc/echoquad/service.toml",
        store="store" if target.windows else "/var/lib/echoquad/store",
        public_key=key if signed else "",
    )


def instructions(target: Target, *, version: str, bundle: str, bundle_sha256: str, signed: bool) -> str:
    """Return ``README.txt``.

    Parameters
    ----------
    target
        The machine.
    version
        EchoQuad's version.
    bundle, bundle_sha256
        Name and SHA-256 of the bundle.
    signed
        Whether the stick is signed.
    """
    key, unsigned = ("-Key bundle.pub", "-Unsigned") if target.windows else ("--key /path/to/bundle.pub", "--unsigned")
    system = _WINDOWS if target.windows else _LINUX
    by_fingerprint = "install.ps1 -KeySha256" if target.windows else "sh install.sh --key-sha256"
    return _INSTRUCTIONS.format(
        version=version,
        architecture=target.architecture,
        python=target.python,
        bundle=bundle,
        bundle_sha256=bundle_sha256,
        system=system.format(
            architecture=target.architecture,
            python=target.python,
            glibc=target.glibc,
            trust=key if signed else unsigned,
        ),
        trust_note=_TRUST.format(by_fingerprint=by_fingerprint) if signed else _NO_TRUST,
        signature_line=_SIGNATURE if signed else "",
    )
