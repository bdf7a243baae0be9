"""The space of a search: what a trial is asked, and the configuration that its answers make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Any

from cluster.errors import UserError
from pipeline.config import Config
from pipeline.loading import InvalidConfig, merge, nearest, one_line, plain, validated
from pipeline.search import checks
from pipeline.search.axes import Axis, Choice, Number, Params, Subset, Suggests, same
from pipeline.search.fields import (
    BN_TEACHERS,
    LABELLERS,
    LOGIT_TEACHERS,
    POOLS,
    PRIORS,
    SELECTION,
    Values,
    changed,
    check_variable,
    overlap,
    overrides,
    value_at,
)
from pipeline.search.options import Dimension

__all__ = ["Space", "Variable", "make_space", "overrides"]


@dataclass(frozen=True)
class Variable:
    """A field that is searched.

    Attributes:
        axis: its values.
        when: path → values; it is suggested only where each of those fields has one of its values.
    """

    axis: Axis
    when: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Of the field."""
        return self.axis.path

    @property
    def prior_of(self) -> str | None:
        """The teacher whose prior it is."""
        return self.path.removeprefix(f"{PRIORS}.") if self.path.startswith(f"{PRIORS}.") else None

    def reads(self) -> set[str]:
        """Paths of the fields that decide on whether it is suggested."""
        paths = set(self.when)
        if self.prior_of:
            paths.add(LABELLERS)
        if self.path == LOGIT_TEACHERS:
            paths.add(SELECTION)
        if LOGIT_TEACHERS in self.when:
            # With round_robin they are the pool.
            paths |= {SELECTION, BN_TEACHERS} - {self.path}
        return paths


class Space:
    """The points that a search may try.

    Every point is a valid configuration by construction: a pool has at least one teacher, fields without a say are
    not suggested, and what follows from them (``fields.changed``) is set with them.

    Attributes:
        config: of which points differ; it is the point of trial 0.
        variables: in the order in which they are suggested: a field after those that its ``when`` names, otherwise
            the order of the file.
    """

    def __init__(self, config: Config, variables: Sequence[Variable]):
        self.config = config
        self._base = plain(config)
        self.variables = _ordered(variables)

    def suggest(self, trial: Suggests) -> Params:
        """Ask a trial for a point; returns the params that it recorded. Optuna's define-by-run function.

        Scalar fields and choices stand under their path, each teacher of a subset as ``PATH.NAME`` → bool.
        """
        params: Params = {}
        point: Values = {}
        for variable in self.variables:
            if self.counts(variable, point):
                recorded = variable.axis.suggest(trial)
                params |= recorded
                point[variable.path] = variable.axis.value(recorded)
        return params

    def point(self, params: Params) -> Values:
        """Path → value of the fields that were suggested; fields without a say at this point are absent."""
        point: Values = {}
        for variable in self.variables:
            if self.counts(variable, point):
                point[variable.path] = variable.axis.value(params)
        return point

    def defaults(self) -> Params:
        """What trial 0, the configuration itself, records."""
        params: Params = {}
        for variable in self.variables:
            if self.counts(variable, {}):
                # Of a space that was made, where every own value is in its axis.
                params |= variable.axis.params(value_at(self._base, variable.path)) or {}
        return params

    def apply(self, point: Values) -> Config:
        """The configuration at a point.

        Raises:
            InvalidConfig: never for a point that this space suggested, as far as ``make_space`` has tried.
        """
        return validated(changed(self._base, point))

    def counts(self, variable: Variable, point: Values) -> bool:
        """Whether a field has a say, by the values of those before it."""
        value = changed(self._base, point)
        if variable.path == LOGIT_TEACHERS and value_at(value, SELECTION) == "round_robin":
            return False
        if variable.prior_of and variable.prior_of not in value_at(value, LABELLERS):
            return False
        return all(
            any(checks.is_value(path, wanted, value_at(value, path)) for wanted in values)
            for path, values in variable.when.items()
        )


def _ordered(variables: Sequence[Variable]) -> list[Variable]:
    """Each after those that it reads, otherwise as given.

    Raises:
        UserError: they go round in a circle.
    """
    before = {
        variable.path: [
            other.path
            for other in variables
            if other is not variable and any(overlap(other.path, path) for path in variable.reads())
        ]
        for variable in variables
    }
    left = list(variables)
    out: list[Variable] = []
    while left:
        placed = {variable.path for variable in out}
        ready = next((variable for variable in left if placed.issuperset(before[variable.path])), None)
        if ready is None:
            circle = [left[0].path]
            while circle[-1] not in circle[:-1]:
                circle.append(next(path for path in before[circle[-1]] if path not in placed))
            circle = circle[circle.index(circle[-1]) :]
            raise UserError(
                f"search.space.{circle[0]}: whether it is suggested depends on itself, {' → '.join(circle)}; "
                "remove one of the conditions"
            )
        left.remove(ready)
        out.append(ready)
    return out


def make_space(config: Config, bn_candidates: Sequence[str], num_classes: int) -> Space:
    """The space of a configuration's ``search`` section, checked before anything starts.

    Args:
        config: resolved, with a ``search`` section.
        bn_candidates: teachers that can give a BN loss, in the configuration's order.
        num_classes: of the data.

    Raises:
        UserError: one sentence for each thing that is wrong, with the field and the remedy.
    """
    options = config.search
    if options is None:
        raise UserError("search: is not given; say what to vary, e.g. {space: {recover.r_bn: {log: [0.1, 100]}}}")
    problems: list[str] = []
    variables: list[Variable] = []
    for path, dimension in options.space.items():
        try:
            variables.append(_variable(path, dimension, config, bn_candidates))
        except UserError as error:
            problems += str(error).splitlines()
    checks.refuse(problems)
    checks.refuse(checks.overlaps([variable.path for variable in variables]))
    checks.refuse(checks.conditions(config, variables))
    space = Space(config, variables)
    of_rungs = [*checks.rungs(space, options.rungs), *checks.rung_classes(options.rungs, num_classes)]
    checks.refuse([*checks.own_values(space), *of_rungs])
    checks.refuse(checks.reachable(space, options.rungs))
    return space


def _variable(path: str, dimension: Dimension, config: Config, bn_candidates: Sequence[str]) -> Variable:
    """A dimension of the file, whose values its field takes.

    Raises:
        UserError: one sentence for each thing that is wrong.
    """
    try:
        check_variable(path, config)
    except UserError as error:
        raise UserError(f"search.space.{error}") from None
    axis = _axis(path, dimension, config, bn_candidates)
    own = value_at(plain(config), path)
    if isinstance(axis, Number) and not axis.whole and isinstance(own, int) and not isinstance(own, bool):
        low, high = ceil(axis.low), floor(axis.high)
        integer = f"integer: {one_line([low, high])}" if low < high else "integer"
        raise UserError(
            f"search.space.{path}: {dimension.kind} gives fractions, but {path} is a whole number; "
            f"give {integer} in place of {dimension.kind}"
        )
    problems = [sentence for value in axis.ends() for sentence in _value_problems(path, value, config)]
    if isinstance(axis, Number):
        # Where it is no number at all, both bounds are refused alike.
        del problems[1:]
    checks.refuse(list(dict.fromkeys(problems)))
    return Variable(axis, {name: [_value(name, value) for value in values] for name, values in dimension.when.items()})


def _axis(path: str, dimension: Dimension, config: Config, bn_candidates: Sequence[str]) -> Axis:
    if dimension.subset is not None:
        return _subset(path, dimension.subset, config, bn_candidates)
    if dimension.choice is not None:
        return _choice(path, dimension.choice, config, bn_candidates)
    if dimension.integer is not None:
        return Number(path, *dimension.integer, whole=True)
    low, high = dimension.log or dimension.uniform or (0.0, 0.0)
    return Number(path, low, high, log=dimension.log is not None)


def _subset(path: str, names: list[str] | str, config: Config, bn_candidates: Sequence[str]) -> Subset:
    if path not in POOLS:
        raise UserError(
            f"search.space.{path}: subset is for a list of teachers ({', '.join(POOLS)}); give choice, log, uniform or "
            "integer"
        )
    if path == LOGIT_TEACHERS:
        raise UserError(f"search.space.{path}: there is one primary teacher; give choice in place of subset")
    if isinstance(names, str):
        names = list(bn_candidates) if path == BN_TEACHERS else list(config.teachers)
        if not names:
            raise UserError(f"search.space.{path}: no teacher has BatchNorm layers, so the pool is empty; remove it")
    _check_pool(path, names, config, bn_candidates)
    # The own pool first and as it is, so that trial 0 is the configuration to the letter; the first labeller leads.
    own: list[str] = value_at(plain(config), path)
    return Subset(path, tuple([name for name in own if name in names] + [name for name in names if name not in own]))


def _choice(path: str, given: list[Any], config: Config, bn_candidates: Sequence[str]) -> Choice:
    base = value_at(plain(config), path)
    values: list[Any] = []
    for value in given:
        value = _value(path, value)
        if path in POOLS and isinstance(value, list):
            if not value:
                raise UserError(f"search.space.{path}: choice has an empty pool; give it at least one teacher")
            _check_pool(path, [name for name in value if isinstance(name, str)], config, bn_candidates)
        if isinstance(value, dict) and isinstance(base, dict):
            value = merge(base, value)
        if any(same(value, other) for other in values):
            raise UserError(f"search.space.{path}: choice has {one_line(value)} twice; remove one")
        values.append(value)
    return Choice(path, tuple(values))


def _value(path: str, value: Any) -> Any:
    """A value as the file may write it: one teacher stands for a pool of one."""
    return [value] if path in POOLS and isinstance(value, str) else value


def _check_pool(path: str, names: list[str], config: Config, bn_candidates: Sequence[str]) -> None:
    for name in names:
        if name not in config.teachers:
            hint = nearest(name, list(config.teachers)) or f"; defined: {', '.join(config.teachers)}"
            raise UserError(f"search.space.{path}: {name!r} is not under teachers{hint}")
        if path == BN_TEACHERS and name not in bn_candidates and not config.recover.allow_null_bn:
            raise UserError(
                f"search.space.{path}: {name} ({config.teachers[name].arch}) has no BatchNorm layer whose statistics "
                "could be matched; take it out"
            )


def _value_problems(path: str, value: Any, config: Config) -> list[str]:
    """What the field itself, apart from the others, has against a value."""
    try:
        overrides(config, {path: value})
    except InvalidConfig as error:
        return [
            f"search.space.{problem.sentence}"
            for problem in error.problems
            if f"{problem.field}.".startswith(f"{path}.")
        ]
    return []
