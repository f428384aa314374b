"""``echoquad pack``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from echoquad.cli.framework.console import print_result, print_status
from echoquad.cli.framework.options import PublicKey

if TYPE_CHECKING:
    from echoquad_deploy.stick.check import StickCheck

__all__ = ["pack"]


def pack(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Folder that `echoquad export` wrote.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="STICK", help="Folder to create.")] = None,
    target: Annotated[
        Literal["x86_64", "aarch64", "win_amd64"] | None,
        typer.Option("--target", help="Processor of the machine, as uname -m prints it there; win_amd64 for Windows."),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option("--python", metavar="X.Y", help="Python version of the machine. Default: that of this Python."),
    ] = None,
    extras: Annotated[
        str,
        typer.Option(
            "--extras",
            metavar="NAMES",
            help="Extras of EchoQuad to install, separated by commas. cpu is added unless gpu or openvino is named.",
        ),
    ] = "serve",
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="PEM", help="Private key that signs bundle and stick. Its public half goes onto the stick."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Configuration of the service to begin with, TOML."),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            "--wheel", metavar="WHL", help="Wheel of EchoQuad to install. Default: one made of the code that runs."
        ),
    ] = None,
    glibc: Annotated[
        int,
        typer.Option(
            "--glibc",
            metavar="N",
            min=17,
            max=99,
            help="The machine has glibc 2.N or newer. 28: Debian 10, Ubuntu 20.04, RHEL 8; 36: Debian 12.",
        ),
    ] = 28,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="STICK", help="Check a stick instead of packing one; with --public-key its signer."
        ),
    ] = None,
    public_key: PublicKey = None,
) -> None:
    """Pack a stick: a folder that installs EchoQuad and a bundle on a machine without a network.

    It holds all packages with their hashes, the bundle, the installer, the unit of the service, licences and a bill of
    materials. SHA256SUMS names every file; with --key it is signed.
    """
    from echoquad_runtime.errors import UsageError

    if check is not None:
        if bundle is not None or out is not None:
            raise UsageError("--check with BUNDLE or --out: they exclude each other; leave one out")
        from echoquad_deploy.stick.check import verify_stick

        print_result(f"PASS {check.as_posix()}: {_describe(verify_stick(check, public_key))}")
        return
    if public_key is not None:
        raise UsageError("--public-key without --check: a stick is signed with --key; leave it out")
    if bundle is None or out is None or target is None:
        missing = next(
            name for name, value in (("BUNDLE", bundle), ("--out", out), ("--target", target)) if value is None
        )
        raise UsageError(f"{missing} is missing; see: echoquad pack --help")
    from echoquad_deploy.stick.packer import pack_stick
    from echoquad_deploy.stick.target import Target
    from echoquad_serve.config import load_config

    if config is not None and load_config(config).model.public_key is None and key is not None:
        print_status(
            f'{config.as_posix()}: the service will not check the signature; add public_key = "bundle.pub" to [model]'
        )
    machine = Target(target, glibc=glibc) if python is None else Target(target, python, glibc)
    names = [name.strip() for name in extras.split(",") if name.strip()]
    packed = pack_stick(bundle, out, machine, extras=names, key=key, config=config, wheel=wheel)
    if packed.without_licence:
        print_status(f"no licence text in the wheels of: {', '.join(packed.without_licence)}; see licences/README.txt")
    if packed.fingerprint is None:
        print_status("the stick is not signed; with --key PEM the machine can check whose it is")
    script = "install.ps1" if machine.windows else "sh install.sh"
    signed = "not signed" if packed.fingerprint is None else f"signed, --key-sha256 {packed.fingerprint}"
    print_result(
        f"packed {packed.wheels} wheels and {bundle.as_posix()} for {machine.architecture}, Python {machine.python}: "
        f"{packed.size / 1e6:.0f} MB in {out.as_posix()}; {signed}; next: {script} on the machine"
    )


def _describe(found: StickCheck) -> str:
    facts = found.facts
    if found.fingerprint is None:
        signed = "not signed"
    elif found.trusted:
        signed = f"signed by the key {found.fingerprint}"
    else:
        signed = f"signed by the key on it, {found.fingerprint}: compare it, or use --public-key"
    return (
        f"{found.files} files intact; EchoQuad {facts.get('echoquad')} for {facts.get('target')}, Python "
        f"{facts.get('python')}, bundle {facts.get('bundle')}; {signed}"
    )
