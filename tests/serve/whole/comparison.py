"""The comparison of what was acknowledged with what has become of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .load_senders import DicomSender, FolderSender, HttpSender
from .result_receivers import Archive, ResultFolder, Webhook
from .service_process import ServiceProcess


def compare(
    service: ServiceProcess,
    http: Sequence[HttpSender],
    files: FolderSender,
    modality: DicomSender,
    webhook: Webhook,
    archive: Archive,
) -> None:
    """Check that each acknowledged object has one result, and that each destination has each result once."""
    results = service.results()
    ids = [result["id"] for result in results]
    assert [result["number"] for result in results] == list(range(1, len(results) + 1))
    assert len(set(ids)) == len(ids)
    assert {result["status"] for result in results} == {"done"}
    names = Counter((result["origin"], result["name"]) for result in results)
    by_name = {(result["origin"], result["name"]): result["id"] for result in results}

    expected = {("folder", name) for name in files.acknowledged}
    unknown = set()
    for sender in http:
        assert sender.acknowledged
        expected |= {("http", name) for name in sender.acknowledged}
        unknown |= {("http", name) for name in sender.unknown}
        assert {name: by_name.get(("http", name)) for name in sender.acknowledged} == sender.acknowledged
    found = {name for name in names if name[0] != "dicom"}
    assert expected - found == set(), "acknowledged, and no result"
    assert found - expected - unknown == set()
    assert max(names.values()) == 1, "two results of one object"
    assert names.total() == len(found) + len(modality.acknowledged)

    assert list(webhook.changed) == []
    assert set(webhook.effects) == set(ids)
    destination = ResultFolder(service.folder / "out")
    assert destination.ids() == sorted(ids)
    assert destination.rows() == Counter((one["id"], row["file"]) for one in results for row in one["rows"])
    assert destination.strangers() == []
    uids = Counter(body["sop_instance_uid"] for body in webhook.effects.values() if body["origin"] == "dicom")
    assert uids == Counter(modality.acknowledged.keys())
    assert archive.changed == []
    assert archive.sources() == Counter({(kind, uid): 1 for kind in ("sr", "sc") for uid in modality.acknowledged})
    assert archive.committed == set(archive.objects)

    watched = service.folder / "watched"
    for name in files.acknowledged:
        assert (watched / name).exists() or (watched / "accepted" / name).exists()
