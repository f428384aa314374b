"""The configuration file of the service: types, paths, and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import Caller, ServiceConfig, load_config

FULL = """
[http]
port = 9000
allowed_hosts = ["cart-7.ward.example"]
tls = { certificate = "c.pem", key = "k.pem" }

[model]
precision = "int8"
abstain_below = 1

[[folder]]
path = "in"
after = "move"

[dicom]
ae_title = "CART7"
[[dicom.caller]]
ae_title = "ECHO1"

[[destination]]
name = "pacs"
type = "dicom"
host = "10.0.0.2"
reports = ["sr"]
"""


def load(tmp_path: Path, text: str) -> ServiceConfig:
    path = tmp_path / "service.toml"
    path.write_text(text)
    return load_config(path)


def test_without_a_file_the_defaults_listen_on_loopback_only() -> None:
    config = load_config(None)
    assert config.http.host == "127.0.0.1" and config.dicom is None and config.destination == ()


def test_tables_keys_and_relative_paths(tmp_path: Path) -> None:
    config = load(tmp_path, FULL)
    assert config.http.port == 9000 and config.http.allowed_hosts == ("cart-7.ward.example",)
    assert config.http.tls is not None and config.http.tls.certificate == tmp_path / "c.pem"
    assert config.model.precision == "int8" and config.model.abstain_below == 1.0
    assert (config.folder[0].path, config.folder[0].after) == (tmp_path / "in", "move")
    assert config.dicom is not None and config.dicom.caller == (Caller("ECHO1"),)
    assert config.destination[0].reports == ("sr",)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("[htp]\n", "htp: unknown key"),
        ("[http]\nprot = 1\n", "http.prot: unknown key"),
        ('[http]\nport = "1"\n', "http.port: the value is '1'; expected int"),
        ("[http]\nport = true\n", "http.port"),
        ("[[folder]]\n", "folder[0].path: the key is missing"),
        ('[[folder]]\npath = "a"\nafter = "burn"\n', "expected 'leave' or 'delete' or 'move'"),
        ("[dicom]\ncaller = 3\n", "dicom.caller"),
        ("= 3", "cannot be read as TOML"),
        ('[[destination]]\nname = "a"\ntype = "folder"\n[[destination]]\nname = "a"\ntype = "folder"\n', "named 'a'"),
    ],
)
def test_errors_name_the_key_and_what_was_expected(tmp_path: Path, text: str, fact: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert fact in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("[http]\nport = 65536", "http.port: the value is 65536; expected 0 to 65535"),
        ("[store]\ndeadline_s = 0", "store.deadline_s"),
        ("[store]\nkeep_days = nan", "store.keep_days"),
        ("[model]\nevery = 0", "model.every"),
        ("[monitoring]\ndrift_window = 99", "monitoring.drift_window"),
        ('[[folder]]\npath = "in"\npoll_s = inf', "poll_s"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, text: str, fact: str) -> None:
    with pytest.raises(ConfigError, match="expected") as caught:
        load(tmp_path, text)
    assert fact in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.toml")
