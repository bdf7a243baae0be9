"""Memory of every process while labels several times larger than Ray's object store are made and used.

    python benchmarks/label_memory.py [EPOCHS ...] > benchmarks/results/label_memory.json

Labels 20,000 tiny images of 1,000 classes with two teachers, of which the first is the faster, for EPOCHS epochs (40 MB
of labels each), then trains and tests a student on them, in a Ray session with the smallest object store that this
project allows. The memory of all processes of the session is sampled: ``rss`` with all that is mapped, ``own`` without
files and the object store (``RssAnon``). Each EPOCHS is a session of its own, in a process of its own. Linux alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster import shards, storage
from cluster.resources import ActorResources, SessionOptions, TrainResources
from cluster.runner import run_ray
from cluster.session import OBJECT_STORE_MIN, ray_session
from stages.data import DataSpec
from stages.evaluate.jobs import plan_jobs
from stages.evaluate.options import EvaluateOptions, Protocol
from stages.evaluate.train import train_students
from stages.evaluate.validate import validate_students
from stages.images import encode_png
from stages.relabel.options import RelabelOptions
from stages.relabel.stage import relabel_rows, relabel_stages
from stages.relabel.unit import plan_units
from stages.teachers.build import build_network
from stages.teachers.options import NetworkSpec, TeacherSpec
from stages.teachers.weights import save_weights

CLASSES, IPC, SIZE = 1000, 20, 16
COUNT = CLASSES * IPC
DATA = DataSpec(SIZE, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple(f"class {k}" for k in range(CLASSES)))
WIDTHS = {"fast": 4, "slow": 32}
MB = 2**20


class Sampler(threading.Thread):
    """Samples the memory of this process and of all its descendants, by what they are doing.

    Attributes:
        phase: of the run, set from outside.
        peaks: (phase, process) to what its largest samples were, bytes.
        courses: (phase, process) to ``own`` of the largest such process, sample by sample.
        spilled: phase to the most bytes that Ray's object store had on disk.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "start"
        self.peaks: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"rss": 0, "own": 0, "processes": 0})
        self.courses: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.spilled: dict[str, int] = defaultdict(int)

    def run(self) -> None:
        while True:
            self._sample(self.phase)
            time.sleep(0.25)

    def _sample(self, phase: str) -> None:
        found: dict[str, list[dict[str, int]]] = defaultdict(list)
        for pid in family():
            try:
                fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
                sample = {"rss": int(fields["VmRSS"]) * 1024, "own": int(fields["RssAnon"]) * 1024}
                found[kind(pid)].append(sample)
            except (OSError, KeyError):
                continue  # It ended.
        self.spilled[phase] = max(self.spilled[phase], spilled_bytes())
        for name, samples in found.items():
            peak = self.peaks[phase, name]
            peak["processes"] = max(peak["processes"], len(samples))
            for key in ("rss", "own"):
                peak[key] = max(peak[key], max(sample[key] for sample in samples))
            self.courses[phase, name].append(max(sample["own"] for sample in samples))


def family() -> list[int]:
    """This process and its descendants."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children[parent].append(int(path.parent.name))
    out, todo = [], [os.getpid()]
    while todo:
        out.append(todo.pop())
        todo += children[out[-1]]
    return out


def kind(pid: int) -> str:
    """What a process is, without what tells it from its like."""
    if pid == os.getpid():
        return "driver"
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().split()
    if not words:
        return "other"
    if words[0].startswith("ray::"):
        return re.sub(r"^ray::(_?)MapWorker\(Map\((\w+)\)\).*", r"actor \2", " ".join(words)).split(".")[0]
    program = Path(words[0]).name
    script = next((word for word in words[1:] if word.endswith(".py")), program)
    return Path(script).name if program.startswith("python") else program


def write_images(uri: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
    schema = shards.image_schema(list(DATA.class_names), shards.RECOVERED_FIELDS)
    for ipc in range(IPC):
        rows = [
            {
                "image": {"bytes": encode_png(pixels[k]), "path": f"{k}.png"},
                "label": k % CLASSES,
                "image_id": k,
                "ipc": ipc,
            }
            for k in range(ipc * CLASSES, (ipc + 1) * CLASSES)
        ]
        shards.write_shard(storage.join(uri, f"unit-{ipc:05d}.parquet"), pa.Table.from_pylist(rows, schema=schema))


def write_validation(uri: str, source: str) -> None:
    """The first images once more, as a real dataset."""
    name = "unit-00000.parquet"
    table = shards.read_shard(storage.join(source, name), ["image", "label"])
    shards.write_shard(storage.join(uri, name), table)
    means = {"mean": list(DATA.mean), "std": list(DATA.std), "class_counts": [1] * CLASSES}
    names = {"class_names": list(DATA.class_names), "shards": [(name, len(table))], "fingerprint": "benchmark"}
    shards.save_dataset(shards.Dataset(uri=uri, channels=3, image_size=(SIZE, SIZE), **means, **names))


def spilled_bytes() -> int:
    """What Ray's object store has on disk now."""
    if not ray.is_initialized():
        return 0
    total = 0
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for path in session.glob("**/*spilled*/**/*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size * path.is_file()
    return total


def measure(epochs: int) -> dict[str, Any]:
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PRISM_CACHE"] = storage.join(folder, "cache")
        out = storage.join(folder, "out")
        images, labels = storage.join(out, "recovered"), storage.join(out, "labels")
        write_images(images)
        write_validation(storage.join(folder, "val"), images)
        teachers = {}
        for name, width in WIDTHS.items():
            spec = TeacherSpec(arch="builtin:convnet_d3", kwargs={"width": width})
            weights = storage.join(out, "teachers", name, "weights.safetensors")
            save_weights(weights, build_network(spec, CLASSES, 3, seed=1).state_dict())
            teachers[name] = spec.model_copy(update={"weights": weights})
        options = RelabelOptions(teachers=list(WIDTHS), epochs=epochs)
        units = plan_units(COUNT, CLASSES, options)
        student = NetworkSpec(arch="builtin:convnet_d3", kwargs={"width": 4})
        protocol = Protocol(batch=100, val_every=epochs)
        jobs = plan_jobs(
            EvaluateOptions(students={"conv": student}, seeds=[0], protocol=protocol), "prism", recipe="prism",
            images_uri=images, labels_uri=labels, epochs=epochs, ipc=IPC, inputs_sha="benchmark",
        )  # fmt: skip
        sampler = Sampler()
        with ray_session(SessionOptions(num_cpus=2, object_store_mb=OBJECT_STORE_MIN // MB)):
            sampler.start()

            def timed(phase: str, rows: Any) -> None:
                sampler.phase, start = phase, time.monotonic()
                for row in rows():
                    assert not row["error"], row
                seconds[phase] = round(time.monotonic() - start, 1)

            starts = storage.join(out, "progress", "relabel")
            stages = relabel_stages(labels, images, teachers, DATA, options, 0, "benchmark", ActorResources(), starts)
            timed("relabel", lambda: run_ray(relabel_rows(units), stages))
            timed("train", lambda: train_students(out, jobs, DATA, TrainResources()))
            val = storage.join(folder, "val")
            timed("validate", lambda: validate_students(out, jobs, DATA, val, ActorResources(), run_ray))
            sampler.phase = "end"
        total = sum(storage.list_files(labels).values())
    table = []
    for (phase, name), peak in sorted(sampler.peaks.items()):
        if phase in seconds:
            course = sampler.courses[phase, name]
            middle, last = (max(course[k * len(course) // 4 : (k + 1) * len(course) // 4 or 1]) for k in (1, 3))
            table.append(
                {"phase": phase, "process": name, "processes": peak["processes"]}
                | {f"peak_{key}_mb": round(peak[key] / MB) for key in ("rss", "own")}
                | {"own_mb_second_quarter": round(middle / MB), "own_mb_last_quarter": round(last / MB)}
            )
    return {
        "epochs": epochs,
        "shards": len(units),
        "labels_mb": round(total / MB),
        "object_store_mb": OBJECT_STORE_MIN // MB,
        "labels_over_object_store": round(total / OBJECT_STORE_MIN, 2),
        "spilled_peak_mb": {phase: round(most / MB) for phase, most in sampler.spilled.items() if phase in seconds},
        "seconds": seconds,
        "processes": table,
    }


def main(epochs: list[int]) -> None:
    if len(epochs) == 1:
        with contextlib.redirect_stdout(sys.stderr):  # Progress is shown there.
            result = measure(epochs[0])
        print(json.dumps(result, indent=1))
        return
    runs = [json.loads(subprocess.check_output([sys.executable, __file__, str(each)])) for each in epochs]
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "runs": runs}, indent=1))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [4, 17])
