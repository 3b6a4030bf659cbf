"""The file by which a cluster on this machine is found."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from trunkline_wire import local

CLUSTER = local.LocalCluster("127.0.0.1:50051", "/somewhere/token", "", 123, "abc")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "state"
    monkeypatch.setenv(local.STATE_DIR_VARIABLE, str(path))
    return path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_its_owner_can_read_it(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        local.write_local_cluster(CLUSTER)
    finally:
        os.umask(before)
    assert local.read_local_cluster() == CLUSTER
    assert stat.S_IMODE(local.cluster_file().stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["cluster.json"]


def test_a_second_cluster_replaces_the_first_whatever_was_left_over(folder: Path, tmp_path: Path) -> None:
    local.write_local_cluster(CLUSTER)
    local.cluster_file().chmod(0o644)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / f"cluster.json.{os.getpid()}.tmp").symlink_to(victim)
    other = local.LocalCluster("127.0.0.1:1", "", "", 1, "other")
    local.write_local_cluster(other)
    assert local.read_local_cluster() == other
    assert stat.S_IMODE(local.cluster_file().stat().st_mode) == 0o600
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"address": "a"}', '{"surprise": 1}', "\x00\xff"])
def test_a_file_that_is_not_ours_is_no_cluster(folder: Path, content: str) -> None:
    assert local.read_local_cluster() is None
    folder.mkdir(parents=True)
    local.cluster_file().write_text(content, encoding="latin-1")
    assert local.read_local_cluster() is None


def test_without_the_variable_it_lies_in_the_users_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(local.STATE_DIR_VARIABLE)
    assert local.cluster_file().parts[-2:] == ("trunkline", "cluster.json")
    monkeypatch.setenv(local.STATE_DIR_VARIABLE, "")
    assert local.state_dir().name == "trunkline"
