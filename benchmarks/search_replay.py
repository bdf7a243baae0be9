"""Does a search by TPE and successive halving find with less work what random search finds?

    python benchmarks/search_replay.py record /tmp/replay > benchmarks/results/search_replay.json    # long; resumable
    python benchmarks/search_replay.py play benchmarks/results/search_replay.json

``record`` measures every point of a grid at every rung, by the jobs of a search, on a split of the demo's training
images (``search_replay.yaml``). ``play`` drives the search's own sampler, halving and ladder against that table, where
a number that is suggested counts as the nearest of the grid: nothing is trained. Random search measures its trials in
full. What counts are the seconds of jobs, each once, until a point has been measured in full that is as good as
the best of a whole random search of other seeds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from cluster import storage
from cluster.tune import Halving, Sampler, run_here
from pipeline.loading import load_config
from pipeline.paths import absolute
from pipeline.preflight import preflight
from pipeline.search.bench import Bench
from pipeline.search.ladder import Ladder
from pipeline.search.measure import measure
from pipeline.search.run import Search, final_config
from pipeline.search.trial import PREPARED, Trial

CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "search_replay.yaml")
LEVELS = {
    "evaluate.protocol.lr": [0.0005, 0.0015, 0.005, 0.015, 0.05, 0.15, 0.5],
    "recover.r_bn": [0.1, 10.0, 1000.0],
    "relabel.crop.min_scale": [0.1, 0.5, 0.9],
}
SEARCHES = 200

Point = dict[str, Any]


def make(out: str) -> Search:
    """The search of ``search_replay.yaml``."""
    config = absolute(load_config(CONFIG, [f"out={out}"]))
    assert config.search is not None
    return Search(config, config.search, preflight(final_config(config, config.search)), serial=True)


def measured_by(search: Search) -> dict[str, Any]:
    """What the figures of the table depend on, beside the points."""
    sections = {"seed", "recover", "relabel", "evaluate", "teachers", "squeeze"}
    config = search.config.model_dump(mode="json", include=sections)
    return (
        config
        | {"images": search.ready.train.fingerprint}
        | search.options.model_dump(mode="json", include={"rungs", "seeds", "split"})
    )


def grid() -> list[Point]:
    """All levels with each other."""
    return [dict(zip(LEVELS, levels, strict=True)) for levels in itertools.product(*LEVELS.values())]


def _measure(root: str, bench: Bench, point: Point, rung: int, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    # In a folder of its own: what a job costs must not depend on which was first to recover images that both want.
    alone = os.path.join(root, "alone", name)
    os.makedirs(alone, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.symlink(os.path.join(root, PREPARED), os.path.join(alone, PREPARED))
    return measure(alone, bench.config(point, rung), name).model_dump(mode="json")


def record(folder: str) -> dict[str, Any]:
    """The table: point, rung, accuracy of every seed, seconds."""
    found = make(folder)
    bench = found.prepare()
    jobs = list(itertools.product(grid(), range(len(bench.rungs))))
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        waiting = [
            pool.submit(_measure, found.root, bench, point, rung, f"grid-{index}")
            for index, (point, rung) in enumerate(jobs)
        ]
        for (point, rung), job in zip(jobs, waiting, strict=True):
            measured = job.result()
            rows.append({"point": point, "rung": rung} | {k: measured[k] for k in ("top1", "top1_seeds", "seconds")})
            print(len(rows), "of", len(jobs), rows[-1], file=sys.stderr, flush=True)
    environment = {"cpus": os.cpu_count(), "torch": torch.__version__, "machine": platform.machine()}
    return {"rows": rows, "measured_by": measured_by(found), "environment": environment}


@dataclass(frozen=True)
class Replay:
    """Searches against a table.

    Attributes:
        table: of ``record``.
    """

    table: dict[str, Any]

    @cached_property
    def search(self) -> Search:
        """What is searched."""
        return make("unused")

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Point and rung → what was measured."""
        return {self._key(row["point"], row["rung"]): row for row in self.table["rows"]}

    @cached_property
    def seconds(self) -> list[float]:
        """Mean of each rung: all its jobs are the same work, and what else the machine did is no matter of points."""
        rungs = range(len(self.search.options.rungs))
        return [statistics.fmean(row["seconds"] for row in self.table["rows"] if row["rung"] == rung) for rung in rungs]

    def snapped(self, point: Point) -> Point:
        """The point of the grid that a suggestion counts as: the nearest, as the space measures it."""

        def distance(path: str, level: float) -> float:
            logarithmic = self.search.options.space[path].log
            return abs(math.log(level / point[path]) if logarithmic else level - point[path])

        return {path: min(levels, key=partial(distance, path)) for path, levels in LEVELS.items()}

    @staticmethod
    def _key(point: Point, rung: int) -> str:
        return json.dumps([point, rung], sort_keys=True)

    def play(self, kind: str, halving: bool, seed: int) -> list[tuple[float, float]]:
        """One search: (seconds so far, accuracy) of every job at the last rung, in order.

        Args:
            kind: of the sampler.
            halving: climb all rungs; else each trial is measured in full at once.
            seed: of the sampler.
        """
        options, space = self.search.options, self.search.space
        first = 0 if halving else len(options.rungs) - 1
        rungs = len(options.rungs) - first
        sampler = Sampler(space.suggest, space.defaults(), kind, {"top1": "max"}, options.trials, seed)

        def planned(point: Point, rung: int) -> tuple[float, float]:
            return self.seconds[first + rung], self.seconds[first + rung]

        def observe(trial: Trial) -> None:
            sampler.observe(trial.number, {"top1": trial.rungs[-1].top1} if trial.state != "failed" else None)

        ladder = Ladder(
            sampler.suggest,
            observe,
            Halving(rungs, options.reduction_factor).goes_on,
            lambda params: self.snapped(space.point(params)),
            planned,
            trials=options.trials,
            rungs=rungs,
            parallel=options.parallel or 1,
        )
        known: set[str] = set()
        spent, curve = 0.0, []

        def work(job: dict[str, Any]) -> dict[str, Any]:
            nonlocal spent
            key = self._key(job["point"], first + job["rung"])
            row = self.rows[key]
            if key not in known:
                known.add(key)
                spent += self.seconds[first + job["rung"]]
            if job["rung"] == rungs - 1:
                curve.append((spent, row["top1"]))
            return {"top1": row["top1"], "top1_seeds": row["top1_seeds"], "seconds": self.seconds[first + job["rung"]]}

        run_here(work, ladder)
        return curve + [(spent, -math.inf)]

    @cached_property
    def targets(self) -> list[tuple[float, float]]:
        """Best accuracy and seconds of random searches in full, one for each seed of a search; its own seeds differ."""
        found = [self.play("random", halving=False, seed=SEARCHES + seed) for seed in range(SEARCHES)]
        return [(max(value for _, value in curve), curve[-1][0]) for curve in found]

    def share(self, seed: int, kind: str = "tpe", halving: bool = True) -> float:
        """Seconds until a search has what random search found, over the seconds of that whole random search.

        Args:
            seed: of the search, below ``SEARCHES``.
            kind: of its sampler.
            halving: see ``play``.

        Returns:
            Infinity where it ends without.
        """
        best, seconds = self.targets[seed]
        return next((spent for spent, value in self.play(kind, halving, seed) if value >= best), math.inf) / seconds

    def shares(self, kind: str = "tpe", halving: bool = True) -> list[float]:
        """Of all searches, ascending."""
        return sorted(self.share(seed, kind, halving) for seed in range(SEARCHES))


def main(command: str, where: str) -> None:
    if command == "record":
        with contextlib.redirect_stdout(sys.stderr):
            table = record(where)
        print(json.dumps(table))
        return
    replay = Replay(storage.read_json(where))
    for kind, halving in itertools.product(("tpe", "random"), (True, False)):
        shares = replay.shares(kind, halving)
        # 95 % interval of a median: it lies between these, if the number below it is binomial.
        rank = math.ceil(0.98 * math.sqrt(SEARCHES))
        low, high = shares[SEARCHES // 2 - rank], shares[SEARCHES // 2 + rank]
        in_half = statistics.fmean(share <= 0.5 for share in shares)
        never = statistics.fmean(share == math.inf for share in shares)
        words = f"{kind} {'with' if halving else 'without'} halving"
        median = f"{statistics.median(shares):.2f} ({low:.2f}-{high:.2f})"
        print(f"{words:<24} {median}, {in_half:.0%} in half, {never:.0%} never")


if __name__ == "__main__":
    main(*sys.argv[1:])
