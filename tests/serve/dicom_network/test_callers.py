"""Who may send: AE titles with addresses and networks, and what no entry can be."""

from __future__ import annotations

import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import Caller
from echoquad_serve.dicom_network.callers import CallerList


def test_empty_list_is_this_machine() -> None:
    callers = CallerList(())
    for address in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert callers.admits_address(address) and callers.find("ANY", address) == Caller("ANY")
    for address in ("10.0.0.1", "fe80::1%eth0", "::ffff:10.0.0.1"):
        assert not callers.admits_address(address) and callers.find("ANY", address) is None


def test_titles_go_with_their_addresses() -> None:
    callers = CallerList([Caller("A", "10.0.0.1"), Caller("B", "10.0.1.0/24"), Caller("B", "fd00::/8"), Caller("C")])
    assert callers.find("A", "10.0.0.1") and callers.find("A", "::ffff:10.0.0.1") and callers.find(" A ", "10.0.0.1")
    assert not callers.find("A", "10.0.0.2") and not callers.find("a", "10.0.0.1")
    assert callers.find("B", "10.0.1.77") and callers.find("B", "fd12::1") and not callers.find("B", "10.0.2.1")
    assert callers.find("C", "192.0.2.1") and callers.admits_address("192.0.2.1")
    assert not CallerList([Caller("A", "10.0.0.1")]).admits_address("127.0.0.1")


@pytest.mark.parametrize(
    "caller",
    [
        Caller(""),
        Caller("  "),
        Caller("SEVENTEEN_LETTERS"),
        Caller("Ä"),
        Caller("A\\B"),
        Caller("A", "cart-7"),
        Caller("A", "10.0.0.300"),
        Caller("A", "10.0.0.1", 70000),
    ],
)
def test_entry_that_is_none_is_named(caller: Caller) -> None:
    with pytest.raises(ConfigError, match=r"dicom\.caller"):
        CallerList([caller])
