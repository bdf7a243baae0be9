"""The probe's workers are real processes, and what ends one of them ends the probe."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from waiting import wait_for

from cluster.errors import RunError, UserError
from stages.data import DataSpec
from stages.recover.occupancy import Sharing, _total, probe, sharings
from stages.recover.options import RecoverOptions
from stages.recover.unit import RecoverUnit
from stages.teachers.options import TeacherSpec

CPU = torch.device("cpu")
DATA = DataSpec(16, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), tuple("abc"))
UNIT = RecoverUnit(
    ipc=0, chunk=0, classes=[0, 1, 2], logit_teachers=["a"], bn_teachers=["a"], iterations=9, seed=0
)  # fmt: skip

MINE = """
import os, time
from torch import nn

class Network(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        {code}
"""


def rate(arch: str, workers: int, turns: int = 1) -> float | None:
    specs = {"a": TeacherSpec(arch=arch)}
    return probe(UNIT, specs, DATA, RecoverOptions(iterations=9), CPU, Sharing(workers, 1), 2, turns)


def mine(folder: Path, code: str) -> str:
    """An architecture with this for its forward pass."""
    (folder / "mine.py").write_text(MINE.format(code=code.strip()))
    return f"user:{folder}/mine.py:Network"


def test_workers_start_together(tmp_path: Path) -> None:
    """Each writes down when it makes a step; one takes a second longer to get ready."""
    code = f"""
        folder = {str(tmp_path)!r}
        try:
            os.mkdir(folder + "/late")
            time.sleep(1)
        except FileExistsError:
            pass
        with open(folder + "/" + str(os.getpid()), "a") as file:
            file.write(str(time.time()) + " ")
        return super().forward(x)
    """
    found = rate(mine(tmp_path, code), 2, turns=3)
    assert found is not None
    assert found > 0
    times = [[float(word) for word in file.read_text().split()] for file in tmp_path.glob("[0-9]*")]
    assert len(times) == 2
    # The last turns, three of two steps, begin after what the other made before them.
    for one, other in (times, times[::-1]):
        assert one[-6] > other[-7]


def test_all_workers_count() -> None:
    workers = []
    for value in (20.0, 30.0, 0.5):
        here, there = multiprocessing.Pipe(duplex=False)
        there.send((value, None))
        workers.append((here, multiprocessing.current_process()))
    assert _total(workers) == 50.5


def test_what_is_wrong_with_a_teacher_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be built"):
        rate(mine(tmp_path, "return x\n\ndef Network(no): pass"), 2)


@pytest.mark.parametrize(
    "line", ["os.kill(os.getpid(), 9)", "raise MemoryError", "raise RuntimeError('cannot allocate memory for it')"]
)
def test_workers_that_find_no_memory(tmp_path: Path, line: str) -> None:
    assert rate(mine(tmp_path, line), 2) is None


@pytest.mark.parametrize(
    ("line", "words"), [("raise ValueError('not for this')", "not for this"), ("os._exit(9)", "exit code 9")]
)
def test_other_failures_are_told(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(RunError, match=words):
        rate(mine(tmp_path, line), 2)


def test_all_cpus_are_used_and_no_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"SC_PHYS_PAGES": 100 * 2**18, "SC_PAGE_SIZE": 2**12}
    monkeypatch.setattr(os, "sysconf", memory.get)
    assert sharings(CPU, 8) == [Sharing(1, 8), Sharing(2, 4), Sharing(4, 2), Sharing(8, 1)]
    assert sharings(CPU, 6) == [Sharing(1, 6), Sharing(3, 2), Sharing(6, 1)]
    assert sharings(CPU, 1) == [Sharing(1, 1)]
    memory["SC_PHYS_PAGES"] = 10 * 2**18
    assert sharings(CPU, 8) == [Sharing(1, 8), Sharing(2, 4), Sharing(4, 2)]
    assert sharings(torch.device("cuda"), 8) == [Sharing(1, 1), Sharing(2, 1), Sharing(4, 1)]


def test_workers_end_with_who_asked(tmp_path: Path) -> None:
    """Killed, it cannot end them."""
    code = f"""
        open({str(tmp_path)!r} + "/" + str(os.getpid()), "w").close()
        time.sleep(600)
        return super().forward(x)
    """
    asking = multiprocessing.get_context("spawn").Process(target=rate, args=(mine(tmp_path, code), 2))
    asking.start()
    wait_for(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2)
    asking.kill()
    asking.join()
    wait_for(lambda: not any(Path("/proc", file.name).exists() for file in tmp_path.glob("[0-9]*")))
