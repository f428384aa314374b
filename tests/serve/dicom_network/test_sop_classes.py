"""Presentation contexts of the node, and the check of UIDs."""

from __future__ import annotations

import pytest

pytest.importorskip("pynetdicom")

from hypothesis import given
from hypothesis import strategies as st
from pydicom.config import IGNORE
from pydicom.uid import UID
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import uid_to_service_class

from echoquad_runtime.frames import DICOM_TRANSFER_SYNTAXES
from echoquad_runtime.frames.sop_uids import is_uid
from echoquad_serve.dicom_network.sop_classes import COMMITMENT, IMAGE_CLASSES, VERIFICATION, node_contexts


def test_pictures_come_in_every_transfer_syntax_that_is_read() -> None:
    contexts = {str(one.abstract_syntax): one for one in node_contexts()}
    assert set(contexts) == {VERIFICATION, COMMITMENT, *IMAGE_CLASSES}
    for uid in IMAGE_CLASSES:
        assert set(contexts[uid].transfer_syntax) == DICOM_TRANSFER_SYNTAXES
        assert uid_to_service_class(uid) is StorageServiceClass
    assert contexts[COMMITMENT].scu_role and contexts[COMMITMENT].scp_role


@given(st.text(max_size=70) | st.from_regex(r"[0-9.]{0,70}", fullmatch=True))
def test_uids(text: str) -> None:
    if UID(text, validation_mode=IGNORE).is_valid:
        assert is_uid(text)
    if is_uid(text):
        assert len(text) <= 64 and set(text) <= set("0123456789.") and ".." not in text


@pytest.mark.parametrize("value", ["1.02", "2.25.123", "0"])
def test_uids_of_careless_makers_are_taken(value: str) -> None:
    assert is_uid(value)


@pytest.mark.parametrize("value", ["", ".", "1.", ".1", "1..2", "1/2", "1.2\n", "１.2", "1" * 65, None, 3])
def test_what_is_no_uid(value: object) -> None:
    assert not is_uid(value)
