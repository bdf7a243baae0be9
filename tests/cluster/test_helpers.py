"""Actors of an actor find room together, or keep none of it."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
import ray
import ray.cloudpickle

from cluster import helpers, preemption
from cluster.errors import HelperLost
from cluster.helpers import Helpers

# Ray's workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Holder:
    """Tells what it was made with."""

    def __init__(self, value: int):
        self.value = value

    def plus(self, other: int) -> int:
        return self.value + other


def pair() -> Helpers:
    return Helpers({"a": (Holder, {"value": 1}), "b": (Holder, {"value": 2})}, cpus=0.9, gpus=0, threads=1)


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0))


@pytest.mark.ray
def test_who_does_not_find_room_for_all_keeps_none(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two makers that each held a part of what the other needs would wait for ever."""
    monkeypatch.setattr(helpers, "PATIENCE_S", 4.0)
    monkeypatch.setattr(helpers.random, "uniform", lambda low, high: 3.0)
    monkeypatch.setattr(Helpers, "held", (0.0, 0))
    other: Any = ray.remote(Holder).options(num_cpus=0.9).remote(0)
    assert ray.get(other.plus.remote(1)) == 1
    made: list[Helpers] = []
    maker = threading.Thread(target=lambda: made.append(pair()), daemon=True)
    maker.start()
    seen = []
    end = time.monotonic() + 60
    # One of the two has room beside the other's; it comes, and goes again.
    while not (seen and max(seen) > 1.0 and min(seen) < 0.5 and seen[-1] > 1.0) and time.monotonic() < end:
        seen.append(free_cpus())
        time.sleep(0.2)
    assert min(seen) < 0.5
    assert seen[-1] > 1.0
    assert not made
    # On a busy machine two actors take longer to start than one was waited for above.
    monkeypatch.setattr(helpers, "PATIENCE_S", 60.0)
    ray.kill(other)
    maker.join(120)
    (both,) = made
    assert [both.call(name, "plus", 10)() for name in "ab"] == [11, 12]
    assert Helpers.held == (0.0, 2)
    for actor in both._actors.values():
        ray.kill(actor)

    def ask_until(end: float) -> None:
        while time.monotonic() < end:
            both.call("a", "plus", 1)()

    # A kill is a message; what is asked before it arrives is answered.
    with pytest.raises(HelperLost, match="an actor of this unit's teachers died"):
        ask_until(time.monotonic() + 60)


@pytest.mark.ray
def test_a_notice_ends_the_wait(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "noticed", lambda: True)
    with pytest.raises(HelperLost, match="about to be taken away"):
        pair()
