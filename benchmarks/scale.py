"""What the driver costs at the size of ImageNet: planning, resuming, and memory and time a unit.

    python benchmarks/scale.py plan > benchmarks/results/scale_plan.json
    python benchmarks/scale.py resume [s3://BUCKET/PREFIX] [UNITS] > benchmarks/results/scale_resume.json
    python benchmarks/scale.py driver [UNITS] > benchmarks/results/scale_driver.json

``plan`` times the command ``prism plan`` for ImageNet-1K × IPC 200 and ImageNet-21K × IPC 20, and finding the initial
images of the latter among 14 million. ``resume`` commits small objects as units and finds out, as a resume does, that
all are there; without a bucket on the loopback server of moto, which is far slower than a real store. ``driver`` pushes
units that do nothing through the real Ray Data path.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from cluster.classes import ClassIndex
from cluster.ledger import Ledger, content_key
from cluster.resources import ActorResources, SessionOptions
from cluster.runner import ActorStage, Row, run_ray
from cluster.session import ray_session

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "imagenet1k.yaml"
SIZES = {
    "imagenet-1k, ipc 200": ["recover.ipc=200"],
    "imagenet-21k, ipc 20": ["recover.ipc=20", "data.num_classes=10450"],
}


def resident_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def peak_rss(into: dict[str, Any]) -> Iterator[None]:
    """Highest resident memory of this process during the body."""
    peak, stop = [resident_mb()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], resident_mb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        into["peak_rss_mb"] = round(peak[0], 1)


def timed(action: Callable[[], object]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    start = time.perf_counter()
    with peak_rss(found):
        action()
    return {"seconds": round(time.perf_counter() - start, 2), **found}


def plan() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, words in SIZES.items():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipeline", "plan", str(CONFIG), *words], check=True, stdout=sys.stderr)
        # Of the largest child so far: the sizes differ by little.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        result[name] = {"seconds": round(time.perf_counter() - start, 2), "peak_rss_mb": round(peak, 1)}
    classes, images = 10_450, 14_000_000
    labels = np.array_split(np.sort(np.random.default_rng(0).integers(0, classes, images)), 2_000)

    def sources() -> None:
        index = ClassIndex(labels, classes)
        for ipc in range(20):
            for label in range(classes):
                index.locate(label, ipc)

    before = resident_mb()
    result["initial images of imagenet-21k, ipc 20"] = {**timed(sources), "rss_before_mb": round(before, 1)}
    return result


def resume(uri: str | None, units: int) -> dict[str, Any]:
    if uri is None:
        import boto3
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        boto3.client("s3").create_bucket(Bucket="prism-scale")
    where = uri or "s3://prism-scale/run"
    folder, records = storage.join(where, "recovered"), storage.join(where, "progress", "ledger", "recover")
    wanted = {f"unit-{i // 100:05d}-{i % 100:05d}": content_key(i) for i in range(units)}
    there = {name.removesuffix(".parquet") for name in storage.list_files(folder)}
    with ThreadPoolExecutor(32) as pool, Ledger(records, [folder]) as ledger:
        todo = [unit for unit in wanted if unit not in there]
        list(pool.map(lambda unit: storage.write_bytes(storage.join(folder, f"{unit}.parquet"), b"unit"), todo))
        for unit, key in wanted.items():
            ledger.add(unit, key, [4])

    def never(unit: str) -> bool:
        raise AssertionError(f"{unit} was opened")

    def scan() -> None:
        assert Ledger(records, [folder]).committed(wanted, never) == set(wanted)

    listing = timed(lambda: storage.list_files(folder))
    return {"store": "moto" if uri is None else "given", "units": units, "listing": listing, "resume": timed(scan)}


class Nothing:
    """A stage that does nothing."""

    def __call__(self, row: Row) -> Row:
        return {"id": row["id"], "error": "", "seconds": 0.0}


def driver(units: int) -> dict[str, Any]:
    stage = ActorStage("nothing", Nothing, {}, ActorResources(actors=2, gpus=0))
    out: dict[str, Any] = {"runs": []}
    with ray_session(SessionOptions(num_cpus=2, object_store_mb=200)):
        for count in (100, units):
            # About what a unit of 100 classes with its sources takes.
            rows: list[Row] = [{"id": f"unit-{i:05d}", "error": "", "unit": "x" * 2000} for i in range(count)]
            done = []

            def push(rows: list[Row] = rows, done: list[Row] = done) -> None:
                done += run_ray(rows, [stage])

            out["runs"].append({"units": count, **timed(push)})
            assert len(done) == count
    small, large = out["runs"]
    out["growth_mb"] = round(large["peak_rss_mb"] - small["peak_rss_mb"], 1)
    out["ms_per_unit"] = round(1000 * (large["seconds"] - small["seconds"]) / (units - 100), 2)
    return out


def main(what: str, *words: str) -> None:
    numbers = [int(word) for word in words if word.isdigit()]
    uris = [word for word in words if not word.isdigit()]
    if what == "plan":
        result = plan()
    elif what == "resume":
        result = resume(uris[0] if uris else None, numbers[0] if numbers else 100_000)
    else:
        result = driver(numbers[0] if numbers else 10_000)
    print(json.dumps({**result, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
