"""A unit that was cut short goes on from its kept state and ends in the same bits; foreign and damaged files do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_recover_core import DATA, Tiny, images, unit

from cluster.errors import RunError
from stages.recover.core import LOG_EVERY, RecoveredUnit, recover_unit
from stages.recover.options import RecoverOptions
from stages.recover.state import RecoveryState
from stages.recover.unit import RecoverUnit

KEY = {"identity": "i", "unit": {"seed": 11, "classes": [0, 2]}}
POOL = ["a", "b", "c"]


@pytest.fixture
def teachers() -> dict[str, Any]:
    return {"a": Tiny(0), "b": Tiny(1), "c": Tiny(2)}


def states(u: RecoverUnit, teachers: dict[str, Any], options: RecoverOptions) -> tuple[dict[int, bytes], RecoveredUnit]:
    """The file after every step of an undisturbed unit, and its result."""
    kept: dict[int, bytes] = {}

    def keep(done: int, snapshot: Callable[[], RecoveryState]) -> None:
        kept[done] = snapshot().to_bytes(KEY)

    return kept, recover_unit(u, images(), teachers, options, DATA, "cpu", on_state=keep)


@pytest.mark.parametrize("selection", ["fixed", "per_step", "round_robin"])
@pytest.mark.parametrize("init", ["real", "noise"])
def test_goes_on_to_the_same_bits(teachers: dict[str, Any], selection: Any, init: str) -> None:
    steps = LOG_EVERY + 5
    logit = POOL if selection == "round_robin" else ["a"]
    u = unit(iterations=steps, logit_teachers=logit, bn_teachers=POOL)
    options = RecoverOptions(selection=selection, roll=3)
    kept, whole = states(u, teachers, options)
    assert sorted(kept) == list(range(1, steps))  # not after the last: the shard is about to be there
    start = images() if init == "real" else None
    for done in (1, 2, LOG_EVERY, LOG_EVERY + 1, steps - 1):
        state = RecoveryState.from_bytes(kept[done], KEY)
        assert state is not None
        assert state.step == done
        calls: list[int] = []
        again = recover_unit(
            u, start, teachers, options, DATA, "cpu", on_step=lambda n, _, calls=calls: calls.append(n), state=state
        )
        assert calls == list(range(done + 1, steps + 1))
        assert torch.equal(again.pixels, whole.pixels)
        assert (again.log, again.loss_bn, again.loss_ce) == (whole.log, whole.loss_bn, whole.loss_ce)


def test_keeping_changes_nothing_and_a_state_can_be_used_twice(teachers: dict[str, Any]) -> None:
    plain = recover_unit(unit(), images(), teachers, RecoverOptions(), DATA, "cpu")
    kept, whole = states(unit(), teachers, RecoverOptions())
    assert torch.equal(plain.pixels, whole.pixels)
    state = RecoveryState.from_bytes(kept[3], KEY)
    for _ in range(2):
        again = recover_unit(unit(), images(), teachers, RecoverOptions(), DATA, "cpu", state=state)
        assert torch.equal(again.pixels, whole.pixels)


def test_a_step_that_was_not_finite_is_remembered(teachers: dict[str, Any]) -> None:
    kept, _ = states(unit(iterations=20), teachers, RecoverOptions())
    state = RecoveryState.from_bytes(kept[9], KEY)
    assert state is not None
    assert state.first_bad == 20
    bad = RecoveryState(**{**vars(state), "first_bad": 4})
    again = RecoveryState.from_bytes(bad.to_bytes(KEY), KEY)
    with pytest.raises(RunError, match="step 4 of 20"):
        recover_unit(unit(iterations=20), images(), teachers, RecoverOptions(), DATA, "cpu", state=again)


def test_equal_states_are_equal_bytes(teachers: dict[str, Any]) -> None:
    one, _ = states(unit(), teachers, RecoverOptions())
    two, _ = states(unit(), teachers, RecoverOptions())
    assert one == two


@pytest.mark.parametrize(
    "key", [{**KEY, "identity": "j"}, {**KEY, "unit": {"seed": 12, "classes": [0, 2]}}, {"identity": "i"}]
)
def test_another_identity_or_unit_is_ignored(teachers: dict[str, Any], key: dict[str, Any]) -> None:
    kept, _ = states(unit(), teachers, RecoverOptions())
    assert RecoveryState.from_bytes(kept[2], key) is None
    assert RecoveryState.from_bytes(kept[2], {**KEY, "unit": {"seed": 11, "classes": (0, 2)}}) is not None


def test_a_damaged_file_is_ignored(teachers: dict[str, Any]) -> None:
    kept, _ = states(unit(), teachers, RecoverOptions())
    content = kept[2]
    assert RecoveryState.from_bytes(content, KEY)
    for damaged in (b"", content[:7], content[:100], content[:-1], b"\x80\x04N.", b"{}" * 50):
        assert RecoveryState.from_bytes(damaged, KEY) is None
    for at in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        found = RecoveryState.from_bytes(bytes(flipped), KEY)
        # Spaces that pad the header say nothing.
        assert found is None or content[at : at + 1] == b" "
