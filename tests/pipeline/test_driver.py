"""Two drivers on one run directory, as commands."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.lease import read_holder
from cluster.progress import read_progress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recovering(prism, tiny_config, tmp_path):
    """A driver in the middle of a stage, the configuration, and the run directory."""
    path, out = tiny_config(recover={"iterations": 10**6}), tmp_path / "run"
    code, _, err = prism("squeeze", path, "--serial")
    assert code == 0, err
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "recover", str(path), "--serial"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not read_progress(str(out / "progress" / "recover")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    yield process, path, out
    process.kill()
    process.communicate()


def test_second_driver_is_refused_and_the_first_one_dead_is_followed_at_once(prism, recovering):
    process, path, out = recovering
    code, text, err = prism("recover", path, "--serial")
    assert code == 2
    assert f"error: out: {out} is being worked on by another driver (process {process.pid} on " in err
    assert process.poll() is None
    for words in (["run", path, "--dry-run"], ["status", out]):
        code, _, err = prism(*words)
        assert code == 0, err

    process.send_signal(signal.SIGKILL)
    process.wait()
    # A shell that starts things in the background makes them ignore the signal that ends this one.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    again = subprocess.Popen(
        process.args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed
    )
    try:
        while (found := read_holder(str(out))) is None or found.pid != again.pid:
            assert again.poll() is None, again.communicate()[0]
            time.sleep(0.05)
        os.kill(again.pid, signal.SIGINT)
        text = again.communicate(timeout=60)[0]
    finally:
        again.kill()
    assert "watching" not in text
    assert again.returncode == 1
    assert read_holder(str(out)) is None


def test_a_finished_or_failed_run_leaves_no_lease(prism, tiny_config, tmp_path):
    out, path = tmp_path / "run", tiny_config(recover={"r_bn": 1e300})
    for stage, expected in (("squeeze", 0), ("recover", 1)):
        code, _, err = prism(stage, path, "--serial")
        assert code == expected, err
        assert (out / "progress").is_dir()
        assert read_holder(str(out)) is None
