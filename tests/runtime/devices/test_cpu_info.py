"""CPU information: affinity, cgroup quotas, the CPU model and its instruction sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from echoquad_runtime.devices import cpu_info as cpus
from echoquad_runtime.devices.cpu_info import available_cpus, cgroup_quotas, cpu_features, cpu_model, schedulable_cpus

ARM = "implementer 0x41 part 0xd0b"


def limit(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{text}\n")


def limit_v1(folder: Path, quota: int, period: int = 100000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


def quotas(root: Path, membership: str | bytes) -> list[float]:
    file = root / "membership"
    file.write_bytes(membership.encode() if isinstance(membership, str) else membership)
    return cgroup_quotas(root, file)


def test_available_cpus_is_between_one_and_the_cpu_count() -> None:
    assert 1 <= available_cpus() <= schedulable_cpus() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("schedulable", "limits", "expected"),
    [(8, [], 8), (8, [0.5], 1), (8, [1.0], 1), (8, [1.99], 1), (8, [3.0, 2.5], 2), (2, [4.0], 2), (1, [0.01], 1)],
)
def test_available_cpus_rounds_the_smallest_limit_down(
    schedulable: int, limits: list[float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "schedulable_cpus", lambda: schedulable)
    monkeypatch.setattr(cpus, "cgroup_quotas", lambda *_: limits)
    assert available_cpus() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_affinity_limits_the_cpus() -> None:
    kept = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(kept)})
        assert schedulable_cpus() == available_cpus() == 1
    finally:
        os.sched_setaffinity(0, kept)


def test_cgroup_v2_includes_parents(tmp_path: Path) -> None:
    limit(tmp_path, "max 100000")
    limit(tmp_path / "pod", "150000 100000")
    limit(tmp_path / "pod" / "box", "400000 100000")
    assert quotas(tmp_path, "0::/pod/box\n") == [1.5, 4.0]
    assert quotas(tmp_path, "0::/pod/box (deleted)\n") == [1.5]
    assert quotas(tmp_path, "0::/pod") == [1.5]
    assert quotas(tmp_path, "0::/") == []


def test_cgroup_v2_in_a_namespace(tmp_path: Path) -> None:
    limit(tmp_path, "50000 100000")
    assert quotas(tmp_path, "0::/\n") == [0.5]
    assert 0.5 in quotas(tmp_path, "0::/../../beside\n")


def test_cgroup_v1_with_a_path_of_the_host(tmp_path: Path) -> None:
    membership = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n"
    limit_v1(tmp_path / "cpu", 200000)
    limit_v1(tmp_path / "memory", 100000)
    assert quotas(tmp_path, membership) == [2.0]
    limit_v1(tmp_path / "cpu", -1)
    assert quotas(tmp_path, membership) == []


def test_cgroup_v1_mounted_under_its_long_name(tmp_path: Path) -> None:
    limit_v1(tmp_path / "cpu,cpuacct" / "docker", 250000)
    assert quotas(tmp_path, "4:cpu,cpuacct:/docker/x\n") == [2.5]


def test_cgroup_v1_and_v2_together(tmp_path: Path) -> None:
    limit_v1(tmp_path / "cpu" / "a", 300000)
    limit(tmp_path / "a", "100000 100000")
    assert sorted(quotas(tmp_path, "3:cpuset:/a\n1:cpu:/a\n0::/a\n")) == [1.0, 3.0]


@pytest.mark.parametrize(
    "found", [b"", b"\n", b"no colon", b"0:", b"0::", b"::::", b"\xff\xfe\n", b"0::/\xff\xfe\n", b"1:cpu", b"0::/a\0b"]
)
def test_invalid_membership_is_no_limit(found: bytes, tmp_path: Path) -> None:
    assert quotas(tmp_path, found) == []


@pytest.mark.parametrize("found", ["", "max", "max 100000", "0 100000", "-1 100000", "100000 0", "1 2 3", "a b", "ü 1"])
def test_invalid_quota_is_no_limit(found: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(found, "utf-8")
    assert quotas(tmp_path, "0::/\n") == []


def test_missing_cgroups_are_no_limit(tmp_path: Path) -> None:
    assert cgroup_quotas(tmp_path, tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Fast: 9000\n\nprocessor\t: 1\nmodel name\t: other\n", "Fast: 9000"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nprocessor\t: 1\n", ARM),
        ("processor\t: 0\n\nprocessor\t: 1\n\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n", ARM),
    ],
    ids=["x86", "Arm", "old Arm"],
)
def test_cpu_model_from_cpuinfo(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_model(tmp_path / "cpuinfo") == expected


def test_cpu_model_without_cpuinfo(tmp_path: Path) -> None:
    assert cpu_model(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_int8\n\nflags\t: other\n", {"fpu", "amx_bf16", "amx_int8"}),
        ("processor\t: 0\nFeatures\t: fp asimddp\n", {"fp", "asimddp"}),
        ("processor\t: 0\n", set()),
    ],
    ids=["x86", "Arm", "none"],
)
def test_cpu_features_from_cpuinfo(text: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_features(tmp_path / "cpuinfo") == expected
    assert cpu_features(tmp_path / "absent") == frozenset()
