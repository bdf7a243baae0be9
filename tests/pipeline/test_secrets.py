"""Secrets of the environment, and in addresses, are in nothing that a run leaves or says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from cluster import storage

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "awsSecret/k3y+9f8e7d6c5b4a",
    "AWS_SESSION_TOKEN": "awsSession-k3y-1a2b3c4d5e6f",
    "HF_TOKEN": "hf_k3y0f0e0d0c0b0a",
    "RAY_AUTH_TOKEN": "ray-k3y-00112233445566778899",
}
ADDRESS = "s3://AKIAK3YK3YK3Y:uriSecret/k3y0123456789@bucket/x"
HIDDEN = [*SECRETS.values(), "AKIAK3YK3YK3Y", "uriSecret", "k3y0123456789"]


@pytest.fixture
def bucket(s3_server, open_store, monkeypatch) -> str:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return open_store("moto")


def assert_clean(where: str, content: bytes | str) -> None:
    text = content if isinstance(content, bytes) else content.encode()
    for secret in HIDDEN:
        assert secret.encode() not in text, f"{secret} is in {where}"


def assert_clean_files(uri: str) -> int:
    """How many files were looked through."""
    fs, root = storage.resolve(uri)
    found = fs.find(root)
    for path in found:
        assert_clean(path, fs.cat_file(path))
    return len(found)


@pytest.mark.s3
def test_a_run_its_failures_and_its_words(bucket, prism, tiny_config, monkeypatch, caplog):
    """Serial: all of it happens in this process."""
    caplog.set_level(logging.DEBUG, logger="prism")
    out, said = f"{bucket}/run", []

    def call(*args: object) -> int:
        code, text, err = prism(*args)
        said.append(text + err)
        assert_clean(f"the words of prism {args[0]}", said[-1])
        return code

    def fails(*_, **__):
        raise ConnectionAbortedError(f"refused: {' '.join(SECRETS.values())} {ADDRESS}")

    # A library whose error repeats what it was given; then a storage that does.
    with monkeypatch.context() as patch:
        patch.setattr("stages.recover.stage.recover_unit", fails)
        assert call("run", tiny_config(out=out), "--serial") == 1
        assert "ConnectionAbortedError: refused: ***" in said[-1]
    with monkeypatch.context() as patch:
        patch.setattr("cluster.storage.list_files", fails)
        assert call("status", out) == 1
        assert "refused: ***" in said[-1]

    assert call("run", tiny_config(out=out), "--serial") == 0
    assert call("status", out) == 0
    assert call("report", out) == 0
    assert call("run", tiny_config(out="s3://prism-no-such-bucket/x"), "--serial") == 2
    assert assert_clean_files(out) > 15
    assert "ConnectionAbortedError" in caplog.text
    assert_clean("the log", caplog.text)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "CONFIG", f"out={ADDRESS}"],
        ["run", "CONFIG", f"data.train={ADDRESS}"],
        ["run", "CONFIG", f"teachers.res.weights={ADDRESS}"],
        ["run", "CONFIG", f"squeeze.cache={ADDRESS}"],
        ["run", "CONFIG", f"ouT={ADDRESS}"],
        ["run", "CONFIG", f"recover.ipc={ADDRESS}"],
        ["run", ADDRESS],
        ["run", "CONFIG", ADDRESS],
        ["run", "CONFIG", "--dry-run", f"out={ADDRESS}"],
        ["plan", "CONFIG", f"out={ADDRESS}"],
        ["status", ADDRESS],
        ["status", "here", ADDRESS],
        ["report", ADDRESS],
        ["import", ADDRESS, "here"],
        ["import", "HERE", ADDRESS],
        ["init", ADDRESS],
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(prism, tiny_config, tmp_path, words):
    path = tiny_config()
    words = [{"CONFIG": str(path), "HERE": str(tmp_path)}.get(word, word) for word in words]
    code, text, err = prism(*words)
    # A plan goes nowhere.
    assert code == (0 if words[0] == "plan" else 2)
    assert_clean("the words of prism", text + err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_a_run_on_ray_and_its_logs(bucket, tiny_config, tmp_path):
    """Also with a unit that fails in its actor; every file of Ray's session is looked through."""
    out = f"{bucket}/run"
    config = tiny_config(out=out, evaluate={"baselines": []})
    value = yaml.safe_load(config.read_text())
    # Sockets of the session have short names.
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:

        def run(*words: str) -> tuple[int, str]:
            done = subprocess.run(
                [sys.executable, "-m", "pipeline", "run", str(config), *words],
                cwd=ROOT,
                env={**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert_clean("the words of prism run", done.stdout)
            return done.returncode, done.stdout

        bad = {**value, "recover": {**value["recover"], "r_bn": 1e300}, "out": f"{out}-bad"}
        config.write_text(yaml.safe_dump(bad))
        code, text = run()
        assert code == 1, text
        config.write_text(yaml.safe_dump(value))
        code, text = run()
        assert code == 0, text
        assert assert_clean_files(out) > 15
        assert_clean_files(f"{out}-bad")
        logs = [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
        assert any("logs" in path.parts for path in logs)
        for path in logs:
            assert_clean(str(path), path.read_bytes())
