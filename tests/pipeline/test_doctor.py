"""``prism doctor`` as a command."""

from __future__ import annotations

import pytest

from pipeline.doctor import gpu_fields
from pipeline.loading import load_config


def findings(text: str, check: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.split()[1:2] == [check]]


@pytest.mark.ray
def test_machine_and_cluster_without_a_configuration(prism, ray_local, monkeypatch):
    code, text, err = prism("doctor")
    levels = [line.split()[0] for line in text.splitlines()]
    assert set(levels) <= {"ok", "warning", "problem"}, text
    assert code == ("problem" in levels), text + err
    assert findings(text, "versions") == ["ok"]
    assert "ok       ray            a private session: 1 nodes answer" in text
    # A worker with other code is found.
    monkeypatch.setattr("pipeline.doctor.versions", lambda: {"torch": "1.0.0"})
    code, text, err = prism("doctor")
    assert code == 1
    assert findings(text, "versions") == ["problem"]
    assert "torch is 1.0.0 in the driver and" in text


@pytest.mark.ray
def test_a_configuration_whose_parts_are_there(prism, ray_local, tiny_config):
    _, text, err = prism("doctor", tiny_config())
    assert findings(text, "data") == ["ok"], text + err
    assert findings(text, "out") == ["ok", "ok"]
    assert findings(text, "resources") == ["ok"]
    assert text.count("usable from every node") == 3


@pytest.mark.ray
def test_everything_that_is_wrong_is_said_at_once(prism, ray_local, tiny_config, tmp_path):
    path = tiny_config(
        out="s3://no-such-bucket-here/run",
        teachers={"conv": {"weights": str(tmp_path / "none.safetensors")}},
        resources={"recover": {"gpus": 1, "cpus": 64, "actors": 1}},
    )
    code, text, err = prism("doctor", path)
    assert code == 1, err
    lines = [line for line in text.splitlines() if line.startswith("problem")]
    for words in (
        "out: s3://no-such-bucket-here/run: there",
        "none.safetensors",
        "teachers.conv.weights",
        "resources.recover.gpus asks for one",
        "recover ask for",
    ):
        assert any(words in line for line in lines), (words, text)
    assert "Traceback" not in text + err


def test_bad_words_are_bad_input(prism, tiny_config):
    code, _, err = prism("doctor", "recover.ipc=1")
    assert code == 2
    assert "name its file before it" in err
    code, _, err = prism("doctor", tiny_config(recover={"ipk": 1}))
    assert code == 2
    assert "ipk" in err


def test_fields_that_ask_for_a_gpu(tiny_config):
    assert gpu_fields(load_config(str(tiny_config()))) == []
    path = tiny_config(resources={"relabel": {"gpus": 0.5}, "evaluate": {"gpus": 1}, "recover": {"gpus": 0}})
    assert gpu_fields(load_config(str(path))) == ["resources.relabel.gpus", "resources.evaluate.gpus"]


def test_address_and_serial_exclude_each_other(prism, tiny_config):
    code, _, err = prism("run", tiny_config(), "--serial", "--address", "auto")
    assert code == 2
    assert "--address" in err
