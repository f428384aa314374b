"""SOP classes and transfer syntaxes that the node accepts."""

from __future__ import annotations

from typing import Final

from pynetdicom import register_uid
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.service_class import StorageServiceClass

from echoquad_runtime.frames import DICOM_TRANSFER_SYNTAXES

__all__ = [
    "COMMITMENT",
    "COMMITMENT_INSTANCE",
    "IMAGE_CLASSES",
    "NATIVE_LITTLE_ENDIAN",
    "VERIFICATION",
    "node_contexts",
]

VERIFICATION: Final = "1.2.840.10008.1.1"
COMMITMENT: Final = "1.2.840.10008.1.20.1"
"""Storage Commitment Push Model."""

COMMITMENT_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
"""Its well-known instance."""

_STORAGE: Final = "1.2.840.10008.5.1.4.1.1"
_RETIRED: Final = {f"{_STORAGE}.6": "UltrasoundImageStorageRetired", f"{_STORAGE}.3": "UltrasoundMultiFrameRetired"}
IMAGE_CLASSES: Final = (
    f"{_STORAGE}.6.1",  # ultrasound image
    f"{_STORAGE}.3.1",  # ultrasound multi-frame image
    *_RETIRED,  # which old carts still send
    f"{_STORAGE}.7",  # secondary capture, then its multi-frame kinds: grey of 8 and of 16 bits, colour
    *(f"{_STORAGE}.7.{end}" for end in (2, 3, 4)),
)
"""What the node stores: pictures that may show an echocardiogram."""

NATIVE_LITTLE_ENDIAN: Final = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")

# pynetdicom answers a C-STORE of a class that it does not know with an abort.
for _uid, _keyword in _RETIRED.items():
    register_uid(_uid, _keyword, StorageServiceClass)


def node_contexts() -> list[PresentationContext]:
    """Return the presentation contexts that the node supports.

    The commitment context has both roles: as provider the node answers requests, as user it takes the reports of an
    archive, which come on a new association.
    """
    contexts = [build_context(VERIFICATION, list(NATIVE_LITTLE_ENDIAN))]
    contexts += [build_context(uid, sorted(DICOM_TRANSFER_SYNTAXES)) for uid in IMAGE_CLASSES]
    both = build_context(COMMITMENT, list(NATIVE_LITTLE_ENDIAN))
    both.scu_role = both.scp_role = True
    return [*contexts, both]
