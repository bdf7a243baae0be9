"""What is refused in a space before a search starts; each check returns one sentence for each thing that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import UserError
from cluster.rng import generator
from pipeline.config import Config
from pipeline.loading import InvalidConfig, Problem, one_line, plain
from pipeline.search.axes import Choice, Number, Params, Subset, Suggests, same
from pipeline.search.fields import (
    CLASSES,
    LABELLERS,
    LOGIT_TEACHERS,
    POOLS,
    SELECTION,
    Values,
    check_variable,
    did_you_mean,
    known_paths,
    overlap,
    overrides,
    rung_fields,
    value_at,
)

if TYPE_CHECKING:
    from pipeline.search.space import Space, Variable

# Points that are tried beside the ends of every axis.
DRAWS = 64


def refuse(problems: Sequence[str]) -> None:
    """Stop where there are any.

    Raises:
        UserError: a line for each.
    """
    if problems:
        raise UserError("\n".join(problems))


def is_value(path: str, wanted: Any, value: Any) -> bool:
    """Whether a field has the wanted value; the order of a pool does not matter."""
    if path in POOLS and isinstance(wanted, list) and isinstance(value, list):
        return sorted(map(str, wanted)) == sorted(map(str, value))
    return same(wanted, value)


def overlaps(paths: Sequence[str]) -> list[str]:
    """No field is searched as itself and as a part of another one."""
    return [
        f"search.space.{max(pair, key=len)}: lies within {min(pair, key=len)}, which is searched too; remove one"
        for pair in combinations(paths, 2)
        if overlap(*pair)
    ]


def conditions(config: Config, variables: Sequence[Variable]) -> list[str]:
    """Conditions name other fields and values that occur; no variable is without a say everywhere."""
    base, paths = plain(config), known_paths(config)
    problems = []
    for variable in variables:
        where = f"search.space.{variable.path}"
        for path, values in variable.when.items():
            if path not in paths:
                hint = did_you_mean(path, paths) or "; a field is named by its whole path, e.g. recover.selection"
                problems.append(f"{where}.when: {path} is an unknown field{hint}")
            elif overlap(path, variable.path):
                problems.append(f"{where}.when: {path} is the field itself; remove the condition")
            elif isinstance(value_at(base, path), dict):
                problems.append(f"{where}.when: {path} is a section; name one of its fields")
            elif not values:
                problems.append(f"{where}.when: {path} has no values, so it is never suggested; give at least one")
            else:
                problems += [
                    f"{where}.when: {path} is never {one_line(value)}; it {_what_occurs(path, base, variables)}"
                    for value in values
                    if not _occurs(path, value, base, variables)
                ]
        if variable.path == LOGIT_TEACHERS and all(
            value == "round_robin" for value in _all_values(SELECTION, base, variables)
        ):
            problems.append(f"{where}: {SELECTION} is always round_robin, which takes the pool for them; remove it")
        if variable.prior_of and not any(variable.prior_of in pool for pool in _all_values(LABELLERS, base, variables)):
            problems.append(f"{where}: {variable.prior_of} is never in {LABELLERS}; add it there or remove this")
    return problems


def _over(path: str, variables: Sequence[Variable]) -> Variable | None:
    """The variable that sets a field, itself or with the section that it is in."""
    return next((v for v in variables if f"{path}.".startswith(f"{v.path}.")), None)


def _all_values(path: str, base: dict[str, Any], variables: Sequence[Variable]) -> list[Any]:
    """Values that a field may take; of a range its ends, of subsets the teachers and all of them."""
    over = _over(path, variables)
    if over is None:
        return [value_at(base, path)]
    values = over.axis.ends()
    if over.path != path:
        inside = path.removeprefix(f"{over.path}.")
        values = [value_at(value, inside) for value in values]
    # Where it is not suggested, it is as it was.
    return [*values, value_at(base, path)] if over.when else values


def _occurs(path: str, value: Any, base: dict[str, Any], variables: Sequence[Variable]) -> bool:
    """Whether a field, searched or not, may have a value."""
    if is_value(path, value, value_at(base, path)):
        return True
    over = _over(path, variables)
    if over is None or (isinstance(over.axis, Number) and not over.axis.whole):
        # No draw meets a given fraction.
        return False
    if isinstance(over.axis, Choice):
        return any(is_value(path, value, known) for known in _all_values(path, base, variables))
    return over.axis.params(value) is not None


def _what_occurs(path: str, base: dict[str, Any], variables: Sequence[Variable]) -> str:
    """The end of a sentence on a value that does not occur."""
    over = _over(path, variables)
    if over is None:
        return f"is {one_line(value_at(base, path))} and not searched; correct the condition or search {path}"
    if isinstance(over.axis, Number) and not over.axis.whole:
        return "is drawn from a range of fractions, where no one value is met; give it a choice or remove this"
    if isinstance(over.axis, Number):
        return f"is a whole number from {over.axis.low} to {over.axis.high}; correct the condition"
    if isinstance(over.axis, Subset):
        return f"is a subset of {', '.join(over.axis.members)}; correct the condition"
    values = dict.fromkeys(one_line(value) for value in _all_values(path, base, variables))
    return f"is one of {', '.join(values)}; correct the condition"


def own_values(space: Space) -> list[str]:
    """Trial 0 is the configuration itself, so its values are in the space."""
    problems = []
    base = plain(space.config)
    for variable in space.variables:
        own, axis = value_at(base, variable.path), variable.axis
        if not space.counts(variable, {}) or axis.params(own) is not None:
            continue
        where = f"search.space.{variable.path}: the configuration itself, which is trial 0, has {one_line(own)},"
        if isinstance(axis, Subset):
            outside = ", ".join(name for name in own if name not in axis.members)
            problems.append(f"{where} but {outside} is not in subset; name it there or take it out of {variable.path}")
        elif isinstance(axis, Choice):
            problems.append(f"{where} which is not in choice; add it or set {variable.path} to one of the choices")
        elif isinstance(axis, Number):
            bounds = one_line([axis.low, axis.high])
            if isinstance(own, int | float):
                inside = "no whole number in" if axis.whole else "not in"
                which = f"which is {inside} {bounds}; widen the bounds or change"
            else:
                which = f"which is no number; choose one in {bounds} for"
            problems.append(f"{where} {which} {variable.path}")
    return problems


def rungs(space: Space, given: Sequence[dict[str, Any]]) -> list[str]:
    """Rungs set fields that may vary, that are not searched, and to valid values."""
    problems: list[str] = []
    for number, rung in enumerate(given):
        where = f"search.rungs.{number}"
        fields = rung_fields(rung)
        before = len(problems)
        for path in fields:
            try:
                check_variable(path, space.config)
            except UserError as error:
                problems.append(f"{where}.{error}")
                continue
            searched = [variable.path for variable in space.variables if overlap(variable.path, path)]
            if searched:
                problems.append(f"{where}.{path}: {searched[0]} is searched; take it out of the rung or of the space")
        if len(problems) == before:
            problems += _rung_problems(space.config, where, fields)
    return problems


def rung_classes(given: Sequence[dict[str, Any]], num_classes: int) -> list[str]:
    """Rungs measure on whole numbers of the data's classes that do not fall."""
    problems: list[str] = []
    before = 0
    for number, rung in enumerate(given):
        where = f"search.rungs.{number}.{CLASSES}"
        count = rung.get(CLASSES, num_classes)
        if type(count) is not int or not 2 <= count <= num_classes:
            problems.append(
                f"{where}: {one_line(count)} is given, but it must be a whole number from 2 to {num_classes}, which is "
                "how many the data have; correct it, or leave it out for all"
            )
        elif count < before:
            problems.append(
                f"{where}: {count} is less than the {before} of the rung before, but rungs go from cheap to dear; "
                "raise it or change their order"
            )
        else:
            before = count
    return problems


def _rung_problems(config: Config, where: str, fields: Values) -> list[str]:
    """What the models have against the configuration at a rung."""
    problems: list[str] = []
    for field, sentence in _refusals(partial(overrides, config), fields):
        if any(f"{field}.".startswith(f"{path}.") for path in fields):
            problems.append(f"{where}.{sentence}")
        else:
            at_fault = _needed(partial(overrides, config), fields, sentence)
            problems.append(f"{where}.{_together(at_fault)} cannot run: {sentence}")
    return problems


def reachable(space: Space, given: Sequence[dict[str, Any]]) -> list[str]:
    """Points that a trial may be are valid configurations, in full and at every rung.

    Tried are the ends of every axis with the others as in trial 0, and ``DRAWS`` drawn points, half of whose numbers
    are ends. Of values that fail together, one example is reported.
    """
    problems: dict[str, str] = {}
    at_rungs = [("", {}), *((f" (rung {number})", rung_fields(rung)) for number, rung in enumerate(given) if rung)]
    for point in _points(space):
        for rung, fields in at_rungs:
            values = {**point, **fields}
            refusals = _refusals(partial(_at, space, fields), values)
            if refusals:
                sentence = refusals[0].sentence
                at_fault = _needed(partial(_at, space, fields), values, sentence)
                where = rung if at_fault.keys() & fields.keys() else ""
                problems.setdefault(
                    f"{list(at_fault)}", f"search.space.{_together(at_fault)}{where} cannot run: {sentence}"
                )
    return list(problems.values())


def _at(space: Space, rung: Values, values: Values) -> Config:
    """The configuration at a point and then a rung, the fields of both in ``values``."""
    at_rung = {path: value for path, value in values.items() if path in rung}
    return overrides(
        space.apply({path: value for path, value in values.items() if path not in rung}),
        at_rung,
    )


def _refusals(make: Callable[[Values], Config], values: Values) -> Sequence[Problem]:
    try:
        make(values)
    except InvalidConfig as error:
        return error.problems
    return []


def _needed(make: Callable[[Values], Config], values: Values, sentence: str) -> Values:
    """Of values that are refused with a sentence, those that it takes."""
    for path in values:
        fewer = {other: value for other, value in values.items() if other != path}
        if any(problem.sentence == sentence for problem in _refusals(make, fewer)):
            values = fewer
    return values


def _together(values: Values) -> str:
    (path, value), *others = values.items()
    words = ", ".join(f"{other} = {one_line(value)}" for other, value in others)
    return f"{path}: {one_line(value)}" + (f" with {words}" if words else "")


def _points(space: Space) -> Iterator[Values]:
    """Points of the space, each once."""
    defaults = space.defaults()
    trials: list[Suggests] = [
        _Given({**defaults, **(variable.axis.params(value) or {})})
        for variable in space.variables
        for value in variable.axis.ends()
    ]
    trials += [_Drawn(generator(0, "points of the search space", number)) for number in range(DRAWS)]
    seen = set()
    for trial in trials:
        point = space.point(space.suggest(trial))
        key = json.dumps(point, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield point


class _Given:
    """A trial that takes the params it is given, and of others the first value."""

    def __init__(self, params: Params):
        self.params = params

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.params.get(name, choices[0])

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self.params.get(name, low))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self.params.get(name, low))


class _Drawn:
    """A trial that draws; of numbers every second is a bound, where rules that involve several fields break first."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float([low, high, *self.rng.uniform(low, high, 2)][int(self.rng.integers(4))])

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int([low, high, *self.rng.integers(low, high + 1, 2)][int(self.rng.integers(4))])
