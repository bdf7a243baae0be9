"""Driver memory while units run: does it grow with their number?

    python benchmarks/driver_memory.py [UNITS] > benchmarks/results/driver_memory.json

Runs UNITS recovery units of one step (tiny images, a tiny teacher) through the real Ray Data path, each committing its
shards, and records the driver's resident memory after every tenth of them.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from cluster import storage
from cluster.resources import ActorResources, SessionOptions
from cluster.runner import run_ray, run_serial
from cluster.session import ray_session
from cluster.shards import labels_of, load_dataset
from pipeline.loading import resolve
from pipeline.plan import make_plan, with_sources
from stages.data import DataSpec
from stages.importing.detect import open_source
from stages.importing.run import import_dataset
from stages.recover.stage import recover_rows, recover_stage
from stages.teachers.build import build_network
from stages.teachers.weights import save_weights

CLASSES = ["a", "b", "c", "d"]


def resident_mb() -> float:
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) / 1024


def main(units: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rng = np.random.default_rng(0)
        for split, count in (("train", units), ("val", 1)):
            for name in CLASSES:
                (root / "tree" / split / name).mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / "tree" / split / name / f"{i:05d}.png")
        import_dataset(open_source(str(root / "tree")), str(root / "data"), runner=run_serial)
        config = resolve(
            {
                "out": str(root / "out"),
                "data": {"image_size": 8},
                "teachers": {"t": {"arch": "builtin:convnet_d3", "kwargs": {"width": 4}}},
                "recover": {"ipc": units, "iterations": 1, "chunk": len(CLASSES)},
            }
        )
        train = load_dataset(str(root / "data" / "train"))
        data = DataSpec(8, 3, tuple(train.mean), tuple(train.std), tuple(CLASSES))
        weights = storage.join(config.out, "teachers", "t", "model.safetensors")
        save_weights(weights, build_network(config.teachers["t"], len(CLASSES), 3).state_dict())
        teachers = {"t": config.teachers["t"].model_copy(update={"weights": weights})}
        planned = with_sources(make_plan(config, len(CLASSES)), labels_of(train), len(CLASSES))
        resources = ActorResources(actors=1)
        stage = recover_stage(config.out, train.uri, teachers, data, config.recover, "benchmark", resources)
        samples = []
        with ray_session(SessionOptions(num_cpus=2, object_store_mb=200)):
            for done, row in enumerate(run_ray(recover_rows(planned), [stage]), 1):
                assert not row["error"], row
                if done == 1 or done % max(1, units // 10) == 0:
                    samples.append({"units": done, "driver_rss_mb": round(resident_mb(), 1)})
    growth = samples[-1]["driver_rss_mb"] - samples[0]["driver_rss_mb"]
    result = {"units": units, "growth_mb": round(growth, 1), "samples": samples, "machine": platform.machine()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
