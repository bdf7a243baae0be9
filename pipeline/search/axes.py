"""The ways in which one field may vary: a subset of teachers, one of several values, a number in a range."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Params = dict[str, Any]
"""What a trial records: name → bool, number, text or None."""


class Suggests(Protocol):
    """What is used of Optuna's trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number between the bounds."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number between the bounds, both included."""


class Axis(Protocol):
    """Values of one field."""

    @property
    def path(self) -> str:
        """Of the field."""

    def suggest(self, trial: Suggests) -> Params:
        """Ask the trial for a value; returns what it recorded."""

    def value(self, params: Params) -> Any:
        """The value that the field takes."""

    def params(self, value: Any) -> Params | None:
        """What a trial with that value records; None where it is no value of the axis."""

    def ends(self) -> list[Any]:
        """Values between or among which all others lie."""


def same(one: Any, other: Any) -> bool:
    """Whether two values of the configuration are equal; true is not 1, 1.0 is."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


@dataclass(frozen=True)
class Subset:
    """A non-empty subset of teachers: a switch for each, ``PATH.NAME``; the last is in where no earlier one is.

    Then it is in without being suggested, so that every suggestion is a pool and each pool is one suggestion.
    """

    path: str
    members: tuple[str, ...]

    def suggest(self, trial: Suggests) -> Params:
        """Ask the trial for a value; returns what it recorded."""
        params: Params = {}
        for name in self._asked(params):
            params[name] = trial.suggest_categorical(name, [False, True])
        return params

    def value(self, params: Params) -> list[str]:
        """The pool, in the order of the members."""
        found = [name for name in self.members if params.get(f"{self.path}.{name}", False)]
        return found or [self.members[-1]]

    def params(self, value: Any) -> Params | None:
        """What a trial with that pool, in any order, records; None where another teacher is in it."""
        if not isinstance(value, list) or not value or not all(name in self.members for name in value):
            return None
        params: Params = {}
        for name in self._asked(params):
            params[name] = name.removeprefix(f"{self.path}.") in value
        return params

    def ends(self) -> list[list[str]]:
        """Each teacher alone, and all."""
        return [*([name] for name in self.members), list(self.members)]

    def _asked(self, params: Params) -> Iterator[str]:
        """Names to suggest in turn; the last only where ``params``, filled meanwhile, has an earlier one in."""
        *earlier, last = (f"{self.path}.{name}" for name in self.members)
        yield from earlier
        if any(params.values()):
            yield last


@dataclass(frozen=True)
class Choice:
    """One of several values.

    A trial records what can be read in a table and stored by Optuna: a scalar as it is, a pool of one teacher by its
    name, other lists and sections as JSON.
    """

    path: str
    values: tuple[Any, ...]

    def suggest(self, trial: Suggests) -> Params:
        """Ask the trial for a value; returns what it recorded."""
        return {self.path: trial.suggest_categorical(self.path, [label(value) for value in self.values])}

    def value(self, params: Params) -> Any:
        """The value that is meant."""
        return next(value for value in self.values if same(label(value), params[self.path]))

    def params(self, value: Any) -> Params | None:
        """What a trial with that value records; None where it is not among them."""
        return next(({self.path: label(known)} for known in self.values if same(known, value)), None)

    def ends(self) -> list[Any]:
        """All."""
        return list(self.values)


def label(value: Any) -> Any:
    """A value as a trial records it."""
    if not isinstance(value, list | dict):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Number:
    """A number between two bounds, both included.

    Attributes:
        path: of the field.
        low, high: bounds.
        log: its logarithm is uniform.
        whole: whole numbers only.
    """

    path: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Suggests) -> Params:
        """Ask the trial for a value; returns what it recorded."""
        if self.whole:
            return {self.path: trial.suggest_int(self.path, int(self.low), int(self.high))}
        return {self.path: trial.suggest_float(self.path, self.low, self.high, log=self.log)}

    def value(self, params: Params) -> float:
        """The number."""
        return int(params[self.path]) if self.whole else float(params[self.path])

    def params(self, value: Any) -> Params | None:
        """What a trial with that value records; None where it is no number between the bounds."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        if not self.whole:
            return {self.path: float(value)}
        return {self.path: int(value)} if value == int(value) else None

    def ends(self) -> list[float]:
        """The bounds."""
        return [self.low, self.high]
