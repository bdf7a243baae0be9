"""``prism bench``: measured here, without data, weights or Ray."""

from __future__ import annotations

import json

import pytest
import yaml

from pipeline import bench
from pipeline.describe import check_networks
from pipeline.loading import load_config
from pipeline.plan import make_plan
from stages.recover import occupancy, timing
from stages.recover.occupancy import Sharing


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "TURN_S", 0.01)
    where = tmp_path / "config.yaml"
    where.write_text(
        yaml.safe_dump(
            {
                "out": "run",
                "data": {"image_size": 32, "num_classes": 6},
                "teachers": {"a": {"arch": "builtin:resnet10"}, "b": {"arch": "builtin:convnet_d3"}},
                "recover": {"selection": "fixed", "iterations": 40, "stagger": {"drop": 0}, "ipc": 3, "chunk": 4},
            },
            sort_keys=False,
        )
    )
    return where


def test_figures_belong_together(prism, config):
    code, text, err = prism("bench", config, "--json", "--rounds", 1, "--price", 2)
    assert code == 0, err
    found = json.loads(text)
    assert found["teachers"] == ["a", "b"]
    assert (found["images"], found["image_size"], found["precision"]) == (4, 32, "fp32")
    loaded = load_config(str(config))
    networks = check_networks(loaded, 6)
    step = 2 * sum(facts.flops for facts in networks.values())
    assert found["flops"] == pytest.approx(found["image_steps"] * step)
    # conv1 and the blocks of the one, three convolutions of the other: float32, nine passes.
    elements = sum(facts.bn_elements for facts in networks.values())
    assert found["traffic"] == pytest.approx(found["image_steps"] * elements * 4 * 9)
    image_steps = sum(unit.iterations * len(unit.classes) for unit in make_plan(loaded, 6))
    assert image_steps == 40 * 3 * 6
    assert found["recover_hours"] == pytest.approx(image_steps / found["image_steps"] / 3600)
    assert found["recover_cost"] == pytest.approx(2 * found["recover_hours"])
    assert found["ratio"] == pytest.approx(found["image_steps"] / found["published"])
    assert 0 < found["limit"] < 1.2
    assert not (config.parent / "run").exists()


def test_text(prism, config):
    code, text, err = prism("bench", config, "--rounds", 1, "recover.selection=per_step", "recover.precision=bf16")
    assert code == 0, err
    assert "fastest with" not in text
    for words in ("4 images of 32 px", "bf16", "image-steps/s", "published way", "whole plan"):
        assert words in text


def test_probe(prism, config, monkeypatch):
    rates = {Sharing(1, 4): 20.0, Sharing(2, 2): 30.0, Sharing(4, 1): None, Sharing(8, 1): 40.0}
    asked = []
    monkeypatch.setattr(bench, "sharings", lambda device, cpus: asked.append(cpus) or list(rates))
    monkeypatch.setattr(occupancy, "probe", lambda *args: rates[args[5]])
    code, text, err = prism("bench", config, "--rounds", 1, "--probe", "resources.session.num_cpus=4")
    assert code == 0, err
    assert asked == [4]
    assert "1 x 4 threads  20 image-steps/s" in text
    assert "4 x 1 thread   does not fit into the memory" in text
    assert "fastest with   resources.recover.threads=2 resources.recover.actors=2" in text
    assert "8 x" not in text, "more workers need more memory"
    code, text, err = prism("bench", config, "--rounds", 1, "--probe", "--json", "resources.probe=true")
    found = json.loads(text)
    assert found["together"][1] == {"workers": 2, "threads": 2, "image_steps": 30.0}
    # The plan is what two workers together need for it.
    assert found["recover_hours"] == pytest.approx(40 * 3 * 6 / 30 / 3600)
    load_config(str(config), ["resources.probe=true", *found["settings"]])


def test_classes_must_be_known(prism, config):
    code, _, err = prism("bench", config, "data.num_classes=null")
    assert code == 2
    assert "data.num_classes" in err
