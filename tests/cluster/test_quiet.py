"""What Ray would print among the progress."""

from __future__ import annotations

import pytest
import ray
from ray._private.worker import print_to_stdstream


@pytest.mark.ray
def test_nodes_do_not_talk_to_the_user(ray_local, capsys, monkeypatch):
    line = "WARNING: 8 PYTHON worker processes have been started on node: x"
    data = {"lines": [line], "pid": "raylet", "is_err": False}
    print_to_stdstream(dict(data), ignore_prefix=False)
    assert "worker processes" not in capsys.readouterr().out
    # By the way it takes otherwise.
    monkeypatch.setattr(ray._private.worker, "_worker_logs_enabled", True)
    print_to_stdstream(dict(data) | {"lines": [line + "y"]}, ignore_prefix=False)
    assert "worker processes" in capsys.readouterr().out
