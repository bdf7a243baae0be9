"""Fields of the configuration by their paths: which may vary, and a configuration with some of them changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.errors import UserError
from pipeline.config import Config
from pipeline.loading import TEACHER_LISTS, merge, nearest, plain, refuse_reserved, validated

Values = dict[str, Any]
"""Path of a field → its value."""
POOLS = [".".join(path) for path in TEACHER_LISTS]
LOGIT_TEACHERS, BN_TEACHERS, LABELLERS = POOLS
SELECTION = "recover.selection"
PRIORS = "relabel.priors"
# Of a rung: how many of the data's classes. No field of the configuration, whose data are the same in all trials.
CLASSES = "classes"
# What is the same in all trials and at all rungs, with everything below it, and why.
FIXED = {
    "name": "it only names the run",
    "recipe": "what it sets is in the configuration already; name those fields",
    "seed": "trials that differ in it differ by chance",
    "out": "the search lies there",
    "provenance": "it only says what a run was made from",
    "data": "trials are compared on the same images",
    "teachers": "they are trained once for all trials, which differ in the pools",
    "squeeze": "teachers are trained once for all trials",
    "recover.allow_null_bn": "it says which teachers a pool may have at all",
    "recover.checkpoint_every": "it changes no result",
    "recover.compile": "it says how long a trial takes, not what it finds",
    "evaluate.students": "trials are compared on the same students",
    "evaluate.seeds": "search.seeds are those of the trials",
    "evaluate.baselines": "trials are compared with each other",
    "evaluate.draws": "trials are compared with each other",
    "evaluate.protocol.name": "it only names the protocol",
    "evaluate.protocol.val_every": "it changes no result",
    "resources": "it says how long a trial takes, not what it finds",
    "search": "it is the search itself",
}


def split(path: str) -> list[str]:
    """Keys on the way to a field; a teacher's name, which ends the path of its prior, may have dots of its own."""
    if path.startswith(f"{PRIORS}."):
        return [*PRIORS.split("."), path.removeprefix(f"{PRIORS}.")]
    return path.split(".")


def value_at(value: dict[str, Any], path: str) -> Any:
    """The value of a field in a configuration of plain values; None where there is none."""
    node: Any = value
    for key in split(path):
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    return node


def nested(values: Values) -> dict[str, Any]:
    """Path → value as sections; later ones win."""
    out: dict[str, Any] = {}
    for path, value in values.items():
        for key in reversed(split(path)):
            value = {key: value}
        out = merge(out, value)
    return out


def flat(values: dict[str, Any], path: str = "") -> Values:
    """Path → value of each field in sections, whose keys may be paths themselves."""
    out: Values = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        out |= flat(value, name) if isinstance(value, dict) and value else {name: value}
    return out


def rung_fields(rung: dict[str, Any]) -> Values:
    """Path → value of the fields that a rung sets."""
    return {path: value for path, value in flat(rung).items() if path != CLASSES}


def changed(value: dict[str, Any], values: Values) -> dict[str, Any]:
    """A configuration of plain values with fields set, unchecked, and with what follows for others.

    Sections merge, everything else is replaced, as in a file. ``round_robin`` takes the pool as logit teachers;
    priors of teachers that do not label are left out. What ``values`` itself says of these stays.
    """
    out = merge(value, nested(values))
    if value_at(out, SELECTION) == "round_robin" and LOGIT_TEACHERS not in values:
        out = merge(out, nested({LOGIT_TEACHERS: value_at(out, BN_TEACHERS)}))
    priors, labellers = value_at(out, PRIORS), value_at(out, LABELLERS)
    if isinstance(priors, dict) and isinstance(labellers, list):
        kept = {name: p for name, p in priors.items() if name in labellers or f"{PRIORS}.{name}" in values}
        out["relabel"] = {**out["relabel"], "priors": kept}
    return out


def overrides(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with fields set, as ``changed`` does it.

    Args:
        config: resolved; its recipe's defaults are not applied again.
        values: path or section → value.

    Raises:
        InvalidConfig: one sentence for each thing that is wrong.
    """
    return validated(changed(plain(config), flat(values)))


def overlap(one: str, other: str) -> bool:
    """Whether two paths are the same, or one leads to a part of the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def known_paths(config: Config) -> list[str]:
    """Paths of all sections and fields but the search's own, with a prior for each teacher."""

    def walk(value: dict[str, Any], path: str = "") -> Iterator[str]:
        for key, child in value.items():
            yield path + key
            if isinstance(child, dict):
                yield from walk(child, f"{path}{key}.")

    base = {key: section for key, section in plain(config).items() if key != "search"}
    return list(dict.fromkeys([*walk(base), *(f"{PRIORS}.{name}" for name in config.teachers)]))


def variable_paths(config: Config) -> list[str]:
    """Paths that a search may vary: fields, and sections below the top level."""
    return [path for path in known_paths(config) if "." in path and not _fixed(path)]


def _fixed(path: str) -> str | None:
    return next((field for field in FIXED if f"{path}.".startswith(f"{field}.")), None)


def did_you_mean(path: str, paths: Sequence[str]) -> str:
    """The end of a sentence on an unknown path."""
    leaf = path.rpartition(".")[2]
    # A field in the wrong section is rather moved than renamed.
    moved = next((known for known in paths if known.rpartition(".")[2] == leaf), None)
    return f"; did you mean {moved}?" if moved else nearest(path, paths)


def check_variable(path: str, config: Config) -> None:
    """A search may vary the field.

    Raises:
        UserError: it is unknown, reserved or fixed; the sentence begins with the path.
    """
    fixed = _fixed(path)
    if fixed:
        raise UserError(f"{path}: cannot vary within a search, since {FIXED[fixed]}; remove it")
    refuse_reserved({path: None})
    paths = variable_paths(config)
    if path in paths:
        return
    if path in Config.model_fields:
        inside = [known for known in paths if known.startswith(f"{path}.")]
        raise UserError(f"{path}: is a section; name one of its fields, e.g. {inside[0]}")
    raise UserError(
        f"{path}: unknown field"
        + (did_you_mean(path, paths) or "; a field is named by its whole path, e.g. recover.r_bn")
    )
