"""A cluster that cannot come up says why, and leaves nothing behind."""

from pathlib import Path

import pytest
from clusters import EmbeddedCluster

pytestmark = pytest.mark.ray


def test_a_backbone_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    refused = EmbeddedCluster(tmp_path)
    done = refused.run("up", "--port", "0", "--backbone", "nosuch", check=False)
    assert done.returncode == 1
    assert "no backbone 'nosuch'" in done.stderr
    assert "efficientnet_lite0" in done.stderr
    assert "timm/" in done.stderr
    assert "Traceback" not in done.stderr
    assert refused.run("status", check=False).returncode == 1
    state = str(refused.state_dir).encode()
    left = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if b"TRUNKLINE_STATE_DIR=" + state in environment.read_bytes():
                left.append(environment)
        except OSError:
            continue
    assert left == []
