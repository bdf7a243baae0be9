"""Every bad input: one clear sentence with the field or file and the remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import yaml
from safetensors.torch import save_file

from stages.teachers.build import build_network
from stages.teachers.options import NetworkSpec


def refused(result, *words):
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), err
    for word in words:
        assert word in err, err


def nothing_written(tmp_path):
    return not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        pytest.param({"recover": {"itterations": 3}}, ["recover.itterations", "iterations"], id="misspelt key"),
        pytest.param({"recover": {"iterations": "many"}}, ["recover.iterations", "'many'", "integer"], id="wrong type"),
        pytest.param(
            {"data": {"train": "no/such/folder"}}, ["data.train", "no/such/folder", "prism import"], id="missing data"
        ),
        pytest.param({"out": "/proc/nowhere"}, ["out", "/proc/nowhere", "not writable"], id="unwritable out"),
        pytest.param(
            {"data": {"num_classes": 7}}, ["data.num_classes", "7", "3 classes"], id="class count of the data"
        ),
        pytest.param(
            {"data": {"class_names": ["bee", "ant", "cat"]}}, ["data.class_names", "bee", "order"], id="class order"
        ),
        pytest.param({"recover": {"ipc": 30}}, ["recover.ipc", "30", "24", "'ant'"], id="fewer images than IPC"),
        pytest.param(
            {"teachers": {"conv": {"arch": "builtin:convnet_d4"}}},
            ["teachers.conv", "convnet_d3"],
            id="unknown network",
        ),
        pytest.param(
            {"teachers": {"conv": {"arch": "timm:resnt18", "kwargs": {}}}},
            ["teachers.conv", "resnt18", "resnet18"],
            id="unknown timm",
        ),
        pytest.param({"teachers": {"conv": {"kwargs": {"widht": 8}}}}, ["teachers.conv", "widht"], id="unknown kwarg"),
        pytest.param(
            {"teachers": {"conv": {"num_outputs": 5}}},
            ["teachers.conv", "num_outputs", "weights"],
            id="classes of a fresh teacher",
        ),
        pytest.param(
            {"teachers": {"conv": {"weights": "no/such.safetensors"}}},
            ["teachers.conv", "no/such.safetensors"],
            id="missing weights",
        ),
        pytest.param(
            {"data": {"image_size": 8}, "teachers": {"conv": {"arch": "torchvision:inception_v3", "kwargs": {}}}},
            ["teachers.conv", "8"],
            id="image size that does not fit",
        ),
    ],
)
def test_configuration(prism, tiny_config, tmp_path, sections, words):
    refused(prism("run", tiny_config(**sections)), *words)
    assert nothing_written(tmp_path)


def network(num_classes=3):
    return build_network(NetworkSpec(arch="builtin:convnet_d3", kwargs={"width": 8}), num_classes, 3)


def given(path, **more):
    return {"teachers": {"conv": {"weights": str(path), **more}}}


def test_weights_with_other_keys(prism, tiny_config, tmp_path):
    state = network().state_dict()
    first = next(iter(state))
    state["foreign.weight"] = state.pop(first)
    path = tmp_path / "odd.safetensors"
    save_file(state, path)
    refused(prism("run", tiny_config(**given(path))), "teachers.conv", first, "foreign.weight", "key_map")
    assert nothing_written(tmp_path)


def test_weights_of_another_class_count(prism, tiny_config, tmp_path):
    path = tmp_path / "ten.safetensors"
    save_file(network(10).state_dict(), path)
    refused(prism("run", tiny_config(**given(path))), "teachers.conv", "ten.safetensors")
    assert nothing_written(tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_weights_that_need_unpickling(prism, tiny_config, tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"w": Evil()}, path)
    result = prism("run", tiny_config(**given(path)))
    refused(result, "teachers.conv", "evil.pt", "safetensors")
    assert "executed" not in result[1]
    path.write_bytes(pickle.dumps(Evil()))
    refused(prism("run", tiny_config(**given(path))), "evil.pt")
    assert nothing_written(tmp_path)


def test_class_order_of_a_teacher(prism, tiny_config, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(network().state_dict(), path)
    refused(
        prism("run", tiny_config(**given(path, class_names=["cat", "bee", "ant"]))),
        "teachers.conv",
        "cat",
        "class_index",
    )
    assert nothing_written(tmp_path)


def test_bn_teacher_without_batchnorm(prism, tiny_config, tmp_path):
    file = tmp_path / "plain.py"
    file.write_text(
        "from torch import nn\n\n"
        "def make(num_classes, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, num_classes))\n"
    )
    sections = {"teachers": {"plain": {"arch": f"user:{file}:make"}}}
    refused(prism("run", tiny_config(**sections)), "recover.bn_teachers", "plain", "no BatchNorm", "allow_null_bn")
    assert nothing_written(tmp_path)
    # As a logit teacher and labeller it is fine, and the published arithmetic may be asked for.
    for recover in ({"bn_teachers": ["res", "conv"]}, {"allow_null_bn": True}):
        code, _, err = prism("run", tiny_config(**sections, recover=recover), "--dry-run")
        assert code == 0, err


def test_bn_layer_that_runs_twice_and_padding_beyond_the_image(prism, tiny_config, tmp_path):
    file = tmp_path / "twice.py"
    file.write_text(
        "from torch import nn\n\n"
        "def make(num_classes, width=8):\n"
        "    bn = nn.BatchNorm2d(width)\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), bn, nn.ReLU(), bn, nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, num_classes))\n"
    )
    refused(prism("run", tiny_config(teachers={"twice": {"arch": f"user:{file}:make"}})), "twice", "more than once")
    refused(prism("run", tiny_config(squeeze={"crop_padding": 16})), "squeeze.crop_padding", "16")
    assert nothing_written(tmp_path)


def test_hub_out_of_reach(prism, tiny_config, tmp_path):
    sections = {
        "teachers": {
            "hub": {
                "arch": "timm:resnet10t",
                "weights": "pretrained",
                "num_outputs": 1000,
                "class_index": {"ant": 310, "bee": 309, "cat": 281},
            }
        }
    }
    refused(prism("run", tiny_config(**sections)), "teachers.hub", "weights")
    assert nothing_written(tmp_path)


def test_out_of_another_configuration_or_other_data(prism, tiny_config, tiny_data, tmp_path):
    from cluster.shards import load_dataset
    from pipeline.loading import load_config
    from pipeline.rundir import claim

    fingerprints = {split: load_dataset(str(tiny_data / split)).fingerprint for split in ("train", "val")}
    claim(load_config(str(tiny_config())), fingerprints)
    before = (tmp_path / "run" / "run.yaml").read_bytes()
    code, _, err = prism("run", tiny_config(), "--dry-run")
    assert code == 0, err
    refused(prism("run", tiny_config(recover={"lr": 0.2})), "out", "recover.lr", "another configuration")
    for split in ("train", "val"):
        other = tmp_path / f"other-{split}"
        other.mkdir()
        for file in (tiny_data / split).iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        dataset = json.loads((other / "dataset.json").read_text())
        (other / "dataset.json").write_text(json.dumps({**dataset, "fingerprint": "of other images"}))
        refused(prism("run", tiny_config(data={split: str(other)})), f"data.{split}", "other images")
    assert (tmp_path / "run" / "run.yaml").read_bytes() == before
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.yaml"]


def test_too_little_disk(prism, tiny_config, tmp_path, monkeypatch):
    from cluster import storage

    monkeypatch.setattr(storage, "free_bytes", lambda uri: 1000)
    refused(prism("run", tiny_config()), "out", "free", "relabel.epochs")
    assert nothing_written(tmp_path)


def test_all_images_of_a_run_need_room(tiny_config, monkeypatch):
    """The initial real ones and the baseline's take as much as the distilled ones."""
    from pipeline import run
    from pipeline.loading import load_config

    seen = {}
    monkeypatch.setattr(
        run, "check_space", lambda config, planned, students: seen.update({p.folder: p for p in planned})
    )
    run.check(load_config(str(tiny_config())), serial=True)
    images = [seen[folder].size for folder in ("recovered", "init", "baselines/random_real")]
    assert images[0] == images[1] == images[2] > 0
    seen.clear()
    words = ["recover.init=noise", "evaluate.baselines=[]"]
    run.check(load_config(str(tiny_config()), words), serial=True)
    assert set(seen) == {"recovered", "labels/distilled"}


def test_a_full_disk_is_enough_for_what_is_finished(prism, tiny_config, monkeypatch):
    from cluster import storage

    path = tiny_config()
    assert prism("run", path, "--serial")[0] == 0
    monkeypatch.setattr(storage, "free_bytes", lambda uri: 1000)
    code, _, err = prism("run", path, "--serial")
    assert code == 0, err


def test_splits_with_different_class_order(prism, tiny_config, tiny_data, tmp_path):
    other = tmp_path / "val"
    other.mkdir()
    for file in (tiny_data / "val").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    dataset = json.loads((other / "dataset.json").read_text())
    dataset["class_names"] = ["bee", "ant", "cat"]
    (other / "dataset.json").write_text(json.dumps(dataset))
    refused(prism("run", tiny_config(data={"val": str(other)})), "data.val", "bee", "order")
    assert nothing_written(tmp_path)


def test_not_yaml_and_no_file(prism, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [")
    refused(prism("run", path), "bad.yaml line", "not valid YAML")
    refused(prism("run", tmp_path / "none.yaml"), "none.yaml", "prism init")


def test_dry_run_checks_and_writes_nothing(prism, tiny_config, tmp_path):
    code, out, err = prism("run", tiny_config(), "--dry-run")
    assert code == 0, err
    assert "2 units" in out
    assert nothing_written(tmp_path)
    refused(prism("run", tiny_config(recover={"ipc": 30}), "--dry-run"), "recover.ipc")


def test_init_keeps_what_is_there(prism, tmp_path):
    code, _, _ = prism("init", tmp_path)
    assert code == 0
    assert yaml.safe_load((tmp_path / "prism.yaml").read_text())["recipe"] == "prism"
    refused(prism("init", tmp_path), "prism.yaml", "exists")
