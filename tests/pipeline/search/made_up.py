"""A made-up search of 24 trials: a pool that helps, a weight with an optimum, a teacher that does harm."""

from __future__ import annotations

import math
import random

import yaml

from cluster import storage
from pipeline.search.report import FINAL_FILE, SEARCH_FILE, write_search_report
from pipeline.search.table import TRIALS_FILE, write_trials
from pipeline.search.trial import Measured, Trial

POOL = ["convnet", "resnet10", "resnet18", "vgg8"]
SEARCH = {
    "trials": 24,
    "space": {
        "recover.lr": {"uniform": [0.01, 0.2]},
        "recover.r_bn": {"log": [0.001, 1.0]},
        "recover.bn_teachers": {"subset": POOL},
        "recover.logit_teachers": {"choice": POOL},
        "recover.selection": {"choice": ["fixed", "per_index"]},
        "recover.include_prob": {"uniform": [0.1, 0.9], "when": {"recover.selection": ["per_index"]}},
    },
    "rungs": [
        {"recover.iterations": 100, "recover.ipc": 2, "relabel.epochs": 20},
        {"recover.iterations": 300, "recover.ipc": 5, "relabel.epochs": 60},
        {"recover.iterations": 900, "recover.ipc": 10, "relabel.epochs": 150},
    ],
    "seeds": [0, 1],
    "split": {"per_class": 50},
}
FINAL = {
    "default": {"out": "runs/search/default", "top1": {"resnet18": [41.0, 41.6, 40.8]}},
    "winner": {"number": 17, "out": "runs/search/winner", "top1": {"resnet18": [44.1, 43.5, 44.4]}},
}


def measured(top1: float, cost: float, seconds: float = 60.0, units: int = 10, shared: int = 4) -> Measured:
    return Measured(top1=top1, top1_seeds=[top1 - 0.4, top1 + 0.4], gpu_seconds=cost, seconds=seconds, units=units,
                    units_shared=shared)  # fmt: skip


def trials(two_objectives: bool = False) -> list[Trial]:
    """24 of them; three rungs, of which a third goes on from each; or the last rung alone with two objectives."""
    draw = random.Random(0)
    points = []
    for number in range(24):
        pool = [name for name in POOL if draw.random() < 0.55] or ["vgg8"]
        point = {
            "recover.r_bn": 10 ** draw.uniform(-3, 0) if number else 0.01,
            "recover.lr": draw.uniform(0.01, 0.2) if number else 0.05,
            "recover.bn_teachers": pool if number else list(POOL),
            "recover.logit_teachers": [draw.choice(POOL)] if number else ["resnet18"],
            "recover.selection": draw.choice(["fixed", "per_index"]) if number else "per_index",
        }
        if point["recover.selection"] == "per_index":
            point["recover.include_prob"] = draw.uniform(0.1, 0.9) if number else 0.5
        score = (
            30 - 4 * (math.log10(point["recover.r_bn"]) + 1.3) ** 2 + 2.5 * ("resnet18" in point["recover.bn_teachers"])
        )
        score -= 1.5 * ("convnet" in point["recover.bn_teachers"]) - 0.5 * draw.gauss(0, 1)
        points.append((score, point))
    order = sorted(range(24), key=lambda number: -points[number][0])
    out = []
    for number, (score, point) in enumerate(points):
        params = {}
        for field, value in point.items():
            if field == "recover.bn_teachers":
                params |= {f"{field}.{name}": name in value for name in POOL}
            else:
                params[field] = value[0] if field == "recover.logit_teachers" else value
        place = order.index(number)
        reached = 1 if two_objectives else 3 if place < 3 or number == 0 else 2 if place < 9 else 1
        cost = 40.0 * len(point["recover.bn_teachers"]) + 25
        rungs = [
            measured(score + 7 * i, cost * 3**i, 45.0 * 3**i, 4 * 2**i, 2 if number else 0) for i in range(reached)
        ]
        state, reason = "finished" if reached == (1 if two_objectives else 3) else "stopped", ""
        if number in (5, 11):
            state, rungs = "failed", rungs[:1] if number == 5 and not two_objectives else []
            reason = "unit 00001-00000: CUDA out of memory" if number == 5 else "teacher vgg8: <weights> & card differ"
        out.append(Trial(number=number, params=params, point=point, rungs=rungs, state=state, reason=reason))
    return out


def write(out: str, rows: list[Trial] | None, search: dict | None = None, final: dict | None = None) -> str:
    """Files of a search under ``out``, and its report, whose path is returned."""
    config = {
        "name": "pools for <CIFAR-10>",
        "recipe": "prism",
        "seed": 0,
        "out": "runs/search",
        "search": {**SEARCH, **(search or {})},
    }
    storage.write_bytes(storage.join(out, SEARCH_FILE), yaml.safe_dump(config, sort_keys=False).encode())
    if rows is not None:
        write_trials(storage.join(out, TRIALS_FILE), rows)
    if final is not None:
        storage.write_json(storage.join(out, FINAL_FILE), final)
    return write_search_report(out)
