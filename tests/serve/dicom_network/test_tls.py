"""TLS of the node and of the client, with certificates made for the tests."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import Caller, TlsConfig
from echoquad_serve.dicom_network import DicomNode, StoreClient
from echoquad_serve.errors import DeliveryError

from .conftest import Queue, echoscu, make_object, storescp, storescu, wait_until

Start = Callable[..., DicomNode]


class Authority:
    """Issues certificates; writes them and their keys as PEM files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.file = folder / "ca.pem"
        self.file.write_bytes(self._issue(self._name, self._key, authority=True))

    def certificate(self, name: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        files = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        files[0].write_bytes(self._issue(subject, key, address=address))
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(*form))
        return files

    def _issue(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool = False, address: str = ""
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if address:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def node(start_node: Start, authority: Authority) -> DicomNode:
    """Return a node that wants certificates of the authority."""
    certificate, key = authority.certificate("node")
    return start_node(tls=TlsConfig(certificate, key, authority.file))


def dcmtk_options(authority: Authority, name: str = "cart") -> list[str]:
    certificate, key = authority.certificate(name)
    return ["+tls", str(key), str(certificate), "+cf", str(authority.file)]


def test_store_over_tls(node: DicomNode, authority: Authority, queue: Queue, tmp_path: Path) -> None:
    sent = make_object(tmp_path / "a.dcm", size=512)
    answer = storescu(node.port, tmp_path / "a.dcm", options=dcmtk_options(authority))
    assert answer.returncode == 0, answer.stderr
    assert [one.sop_instance_uid for one in queue.objects] == [sent.SOPInstanceUID]
    assert node.status()["tls"]


def test_caller_without_a_certificate_of_the_authority_is_not_served(
    node: DicomNode, authority: Authority, tmp_path: Path
) -> None:
    assert echoscu(node.port).returncode != 0  # no TLS
    assert echoscu(node.port, "+tla", "+cf", str(authority.file)).returncode != 0  # no certificate
    stranger = Authority(tmp_path / "stranger")
    certificate, key = stranger.certificate("cart")
    assert echoscu(node.port, "+tls", str(key), str(certificate), "+cf", str(authority.file)).returncode != 0
    assert echoscu(node.port, *dcmtk_options(authority)).returncode == 0


def test_silent_client_does_not_block_the_handshakes_of_others(node: DicomNode, authority: Authority) -> None:
    with (
        socket.create_connection(("127.0.0.1", node.port)) as silent,
        socket.create_connection(("127.0.0.1", node.port)) as half,
    ):
        half.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
        begin = time.monotonic()
        assert echoscu(node.port, *dcmtk_options(authority)).returncode == 0
        assert time.monotonic() - begin < 1.0
        for connection in (silent, half):
            connection.settimeout(5.0)
            assert connection.recv(1) in {b"", b"\x15"}  # closed, perhaps after an alert


def test_commitment_between_two_nodes_over_tls(start_node: Start, authority: Authority, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm")
    mine = TlsConfig(*authority.certificate("cart"), client_ca=authority.file)
    cart = start_node(ae_title="CART", tls=mine)
    archive = start_node(
        caller=(Caller("CART", "127.0.0.1", cart.port),),
        tls=TlsConfig(*authority.certificate("archive"), client_ca=authority.file),
    )
    client = StoreClient(
        "127.0.0.1", archive.port, "ECHOQUAD", "CART", mine, timeout_s=5.0, commitment=True, reports=cart.reports
    )
    client.send([tmp_path / "a.dcm"])
    wait_until(lambda: archive.status()["pending_reports"] == 0)


def test_old_protocols_are_not_spoken(node: DicomNode) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", node.port), timeout=5.0) as connection,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(connection)


def test_client_stores_at_storescp_over_tls(authority: Authority, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm", size=512)
    certificate, key = authority.certificate("pacs")
    mine = authority.certificate("cart")
    options = "+tls", str(key), str(certificate), "+cf", str(authority.file)
    with storescp(tmp_path / "pacs", *options) as port:
        tls = TlsConfig(*mine, client_ca=authority.file)
        StoreClient("127.0.0.1", port, "PACS", tls=tls, timeout_s=5.0).send([tmp_path / "a.dcm"])
    assert len(list((tmp_path / "pacs").iterdir())) == 1


def test_client_checks_the_archives_certificate(
    start_node: Start, authority: Authority, queue: Queue, tmp_path: Path
) -> None:
    make_object(tmp_path / "a.dcm")
    other_address = start_node(tls=TlsConfig(*authority.certificate("other", "10.0.0.1")))
    right = start_node(tls=TlsConfig(*authority.certificate("right")))
    stranger = Authority(tmp_path / "stranger")
    for node, trusted in [(other_address, authority), (right, stranger)]:
        client = StoreClient("127.0.0.1", node.port, "ECHOQUAD", tls=TlsConfig(client_ca=trusted.file), timeout_s=3.0)
        with pytest.raises(DeliveryError, match="certificate"):
            client.send([tmp_path / "a.dcm"])
    assert queue.objects == []
    client = StoreClient("127.0.0.1", right.port, "ECHOQUAD", tls=TlsConfig(client_ca=authority.file), timeout_s=3.0)
    client.send([tmp_path / "a.dcm"])
    assert len(queue.objects) == 1


def test_handshake_that_never_ends_ends_in_time(authority: Authority, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = StoreClient(
            "127.0.0.1", silent.getsockname()[1], "PACS", tls=TlsConfig(client_ca=authority.file), timeout_s=0.5
        )
        begin = time.monotonic()
        with pytest.raises(DeliveryError):
            client.send([tmp_path / "a.dcm"])
        assert time.monotonic() - begin < 2.0


def test_files_that_cannot_be_used_are_named(start_node: Start, authority: Authority, tmp_path: Path) -> None:
    certificate, _ = authority.certificate("node")
    _, other_key = authority.certificate("other")
    (tmp_path / "empty.pem").touch()
    for tls in (
        TlsConfig(),
        TlsConfig(certificate, other_key),
        TlsConfig(tmp_path / "missing.pem", other_key),
        TlsConfig(tmp_path / "empty.pem"),
    ):
        with pytest.raises(ConfigError, match="PEM") as caught:
            start_node(tls=tls)
        assert "\n" not in str(caught.value)


def test_key_with_a_password_does_not_ask_on_the_terminal(
    start_node: Start, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.certificate("node")
    locked = tmp_path / "locked.key"
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(loaded.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(ConfigError, match="password"):
        start_node(tls=TlsConfig(certificate, locked))
