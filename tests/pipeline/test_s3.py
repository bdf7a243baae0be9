"""A whole run with everything it reads and writes in an object store, over HTTP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from image_tree import write_tree
from s3.fault_proxy import FAULTS

from cluster import shards, storage
from cluster.runner import run_serial
from stages.importing.detect import open_source
from stages.importing.run import import_dataset

ROOT = Path(__file__).resolve().parents[2]
# What a run computes; the rest has times and addresses in it.
RESULTS = ("recovered/", "init/", "labels/", "baselines/")


def fetch(uri: str) -> dict[str, bytes]:
    """Everything below a folder, name → content."""
    fs, root = storage.resolve(uri)
    found = {path: fs.cat_file(path) for path in fs.find(root)}
    return {path[len(root) + 1 :]: data for path, data in found.items()}


def same_results(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    results = {name for name in one if name.startswith(RESULTS)}
    assert results == {name for name in other if name.startswith(RESULTS)}
    assert len({name.split("/")[0] for name in results}) == len(RESULTS)
    assert {name for name in results if one[name] != other[name]} == set()


def check_shards(uri: str, files: dict[str, bytes]) -> None:
    """All of them are read, checksums included."""
    names = [name for name in files if name.endswith(".parquet") and name != "plan.parquet"]
    assert names
    for name in names:
        shards.read_shard(f"{uri}/{name}")


def test_a_whole_run_in_a_bucket_gives_the_local_bytes(s3_store, prism, tiny_config, tiny_data, tmp_path):
    """Images, dataset, teachers' cache and run; nothing of it may touch the local disk."""
    tree = write_tree(tmp_path / "tree", ["ant", "bee", "cat"], {"train": 24, "val": 8})
    for path in tree.rglob("*.png"):
        storage.write_bytes(f"{s3_store}/images/{path.relative_to(tree)}", path.read_bytes())
    shutil.rmtree(tree)
    import_dataset(open_source(f"{s3_store}/images"), f"{s3_store}/data", runner=run_serial)
    # The record of an import has its address.
    for name in ("train/part-00000.parquet", "train/dataset.json", "val/dataset.json"):
        assert storage.read_bytes(f"{s3_store}/data/{name}") == (tiny_data / name).read_bytes()

    out, local, cache = f"{s3_store}/run", tmp_path / "local", f"{s3_store}/cache"
    data = {"data": {"train": f"{s3_store}/data/train", "val": f"{s3_store}/data/val"}, "squeeze": {"cache": cache}}
    code, text, err = prism("run", tiny_config(out=out, **data), "--serial")
    assert code == 0, err
    assert f"report: {out}/report.html" in text
    there = fetch(out)
    assert {"run.yaml", "plan.parquet", "summary.json", "report.html"} <= set(there)
    assert {"teachers/res/model.safetensors", "teachers/conv/card.json"} <= set(there)
    assert len([name for name in there if name.startswith("eval/") and name.endswith(".json")]) >= 3
    check_shards(out, there)
    assert len(fetch(cache)) == 4
    assert "2/2 units" in prism("status", out)[1]

    # The teachers of both runs are the same, from the cache in the bucket.
    code, _, err = prism("run", tiny_config(out=str(local), squeeze={"cache": cache}), "--serial")
    assert code == 0, err
    same_results(there, fetch(str(local)))

    # A shard that was cut short, and one that is gone, are made again; the others are not.
    (cut, size), (gone, _) = list(storage.list_files(f"{out}/recovered").items())[:2]
    storage.write_bytes(f"{out}/recovered/{cut}", there[f"recovered/{cut}"][: size // 2])
    storage.remove(f"{out}/recovered/{gone}")
    code, _, err = prism("run", f"{out}/run.yaml", "--serial")
    assert code == 0, err
    same_results(there, fetch(out))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_demo_through_a_store_that_fails_now_and_then(s3_store, fault_proxy, monkeypatch, tmp_path):
    """`prism run` as users start it, one in fifty requests spoiled: complete, and the bytes of a local run."""
    small = [
        *("recover.ipc=2", "recover.iterations=20", "squeeze.epochs=1", "relabel.epochs=2"),
        *("evaluate.seeds=[0]", "evaluate.protocol.val_every=2", "resources.session.num_cpus=2"),
        # With and without Ray, which would choose differently.
        *("resources.squeeze.threads=1", "resources.evaluate.threads=1"),
    ]
    address = os.environ["AWS_ENDPOINT_URL"]
    demo = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    for split in ("train", "val"):
        folder = ROOT / demo["data"][split]
        for name in storage.list_files(str(folder)):
            storage.write_bytes(f"{s3_store}/data/{split}/{name}", (folder / name).read_bytes())

    def run(*words: str) -> None:
        command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "examples" / "demo.yaml"), *small, *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        assert "Traceback" not in done.stdout

    proxy = fault_proxy(rate=0.02, stall_s=5.0)
    out, cache = f"{s3_store}/run", f"{s3_store}/cache"
    run(f"out={out}", f"data.train={s3_store}/data/train", f"data.val={s3_store}/data/val", f"squeeze.cache={cache}")
    assert all(proxy.done[fault] for fault in FAULTS), proxy.done
    # Told of the server itself, the local run takes the same teachers; without Ray, for bytes do not depend on it.
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    run(f"out={tmp_path / 'local'}", f"squeeze.cache={cache}", "--serial")
    there = fetch(out)
    check_shards(out, there)
    same_results(there, fetch(str(tmp_path / "local")))
