"""From a YAML file and ``key=value`` words to a checked ``Config``; every refusal is one sentence."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from cluster import storage
from cluster.errors import UserError
from pipeline.config import Config
from pipeline.search.options import Dimension

# Named by the contract, not built yet: refused by name, never ignored.
RESERVED = {
    "recover.teacher_weight",
    "recover.statistics",
    "recover.match",
    "recover.batch",
    "relabel.bn_mode",
    "relabel.store",
}
RECIPES = importlib.resources.files("pipeline") / "recipes"
# In a recipe, which cannot know the user's teachers: the first one, and all.
PRIMARY, ALL = "$primary", "$all"
TEACHER_LISTS = [("recover", "logit_teachers"), ("recover", "bn_teachers"), ("relabel", "teachers")]


class Problem(NamedTuple):
    """One thing that is wrong with a configuration.

    Attributes:
        field: its path; empty where fields of several sections disagree.
        sentence: for the user, with the path at its beginning where there is one.
    """

    field: str
    sentence: str


class InvalidConfig(UserError):
    """A configuration that its models refuse.

    Attributes:
        problems: of which the message has one line each.
    """

    # Not an argument: an exception that is pickled is made again from its arguments, which are its message.
    problems: Sequence[Problem] = ()


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice, where plain YAML silently keeps the last."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
# YAML 1.1 reads 1e-3 as text; everybody means the number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Parse YAML safely.

    Raises:
        UserError: not YAML; names ``where`` and the line.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None


def read_config_file(uri: str) -> dict[str, Any]:
    """The mapping in a configuration file.

    Raises:
        UserError: missing, unreadable or not a mapping.
    """
    try:
        text = storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{uri}: no such configuration file; `prism init DIR` writes one to start from") from None
    except PermissionError:
        raise UserError(f"{uri}: not readable; fix its rights") from None
    value = parse_yaml(text, uri)
    if not isinstance(value, dict):
        raise UserError(f"{uri}: a configuration is a mapping of sections (name, out, data, …)")
    return value


def apply_overrides(value: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``recover.r_bn=0.05`` sets a field; the right side is YAML.

    Raises:
        UserError: not ``key=value``, or the key goes through something that is not a section.
    """
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"{override!r} is not key=value, e.g. recover.r_bn=0.05")
        *parents, leaf = _keys(key)
        node = value = dict(value)
        for depth, parent in enumerate(parents):
            child = node.get(parent)
            if child is not None and not isinstance(child, dict):
                raise UserError(f"{override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
            node[parent] = dict(child or {})
            node = node[parent]
        node[leaf] = parse_yaml(text, override)
    return value


def _keys(path: str) -> list[str]:
    """Keys on the way to a field; below ``search.space`` one key is the whole path of a field."""
    space = "search.space."
    if not path.startswith(space):
        return path.split(".")
    field, _, kind = path.removeprefix(space).rpartition(".")
    return ["search", "space", *([field, kind] if kind in Dimension.model_fields else [path.removeprefix(space)])]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` wins; sections merge, everything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def recipe_names() -> list[str]:
    """Recipes shipped with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in RECIPES.iterdir() if f.name.endswith(".yaml"))


def recipe_defaults(name: str, image_size: int) -> dict[str, Any]:
    """A recipe's settings at a resolution: its own, then every ``by_image_size`` entry whose ``max`` holds.

    Raises:
        UserError: no such recipe.
    """
    if name not in recipe_names():
        raise UserError(
            f"recipe: {name!r} is unknown{nearest(str(name), recipe_names())}; shipped: {', '.join(recipe_names())}"
        )
    value = parse_yaml((RECIPES / f"{name}.yaml").read_text(), f"recipe {name}")
    for entry in value.pop("by_image_size", []):
        if image_size <= entry.pop("max"):
            value = merge(value, entry)
    value.pop("about", None)
    return value


def resolve(value: dict[str, Any]) -> Config:
    """Recipe defaults under the given values, checked.

    Raises:
        UserError: one sentence for each thing that is wrong.
    """
    refuse_reserved(value)
    recipe = value.get("recipe", Config.model_fields["recipe"].default)
    defaults = recipe_defaults(recipe, _image_size(value))
    merged = merge(defaults, value)
    teachers = list(merged["teachers"]) if isinstance(merged.get("teachers"), dict) else []
    for section, key in TEACHER_LISTS:
        node = merged.get(section)
        if isinstance(node, dict) and isinstance(node.get(key), list):
            merged[section] = {**node, key: _expand(node[key], teachers)}
    return validated(merged)


def validated(value: dict[str, Any]) -> Config:
    """Checked as it is, without a recipe's defaults.

    Raises:
        InvalidConfig: one sentence for each thing that is wrong.
    """
    try:
        # As JSON, where lists may become tuples although `strict` refuses "10", 10.0 and true for a number of steps.
        return Config.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(e) for e in error.errors()))
    invalid = InvalidConfig("\n".join(dict.fromkeys(problem.sentence for problem in problems)))
    invalid.problems = problems
    raise invalid


def _image_size(value: dict[str, Any]) -> int:
    """``data.image_size``, which decides on a recipe's defaults and so is checked before the rest."""
    data = value.get("data")
    if not isinstance(data, dict) or "image_size" not in data:
        raise UserError("data.image_size: is required and not given; it is the side of the distilled images in pixels")
    size = data["image_size"]
    if isinstance(size, bool) or not isinstance(size, int):
        raise UserError(f"data.image_size: {size!r} is given, but it must be an integer")
    return size


def load_config(uri: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run; without a file, the embedded demo's."""
    value = demo_config() if uri is None else read_config_file(uri)
    return resolve(apply_overrides(value, overrides))


def demo_config() -> dict[str, Any]:
    """The embedded demo: its data lies in the package."""
    folder = importlib.resources.files("pipeline") / "demo"
    value = parse_yaml((folder / "demo.yaml").read_text(), "demo")
    value["data"] = {
        **value["data"],
        "train": str(folder / "mnist" / "train"),
        "val": str(folder / "mnist" / "val"),
    }
    return dict(value)


def plain(config: Config) -> dict[str, Any]:
    """A configuration as plain values, which ``validated`` reads back to an equal one."""
    return config.model_dump(mode="json", by_alias=True)


def dump_yaml(config: Config) -> str:
    """A configuration as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=110)


def one_line(value: Any) -> str:
    """A value as YAML for a sentence or a table."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def _expand(names: list[Any], teachers: list[str]) -> list[Any]:
    out: list[Any] = []
    for name in names:
        out += {PRIMARY: teachers[:1], ALL: teachers}.get(name, [name]) if isinstance(name, str) else [name]
    return list(dict.fromkeys(out)) if any(n in (PRIMARY, ALL) for n in names) else out


def refuse_reserved(value: dict[str, Any], path: str = "") -> None:
    """Refuse what the contract names and this version lacks.

    Args:
        value: fields and sections.
        path: of the section that ``value`` is, with a dot at its end.

    Raises:
        UserError: names the field.
    """
    for key, child in value.items():
        name = f"{path}{key}"
        if name in RESERVED:
            raise UserError(f"{name} is reserved and not built in this version; remove it")
        if isinstance(child, dict):
            refuse_reserved(child, f"{name}.")


def nearest(given: str, names: Sequence[str]) -> str:
    """The end of a sentence that asks for the most similar name; empty where there is none."""
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Models inside an annotation such as ``dict[str, TeacherSpec]`` or ``Mix | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for a in typing.get_args(annotation) for m in _models(a)]


def _is_mapping(annotation: Any) -> bool:
    """Whether names under it are free, as in ``dict[str, TeacherSpec]``."""
    return typing.get_origin(annotation) is dict or any(map(_is_mapping, typing.get_args(annotation)))


def _field_names(location: Sequence[int | str]) -> list[str]:
    """Valid names beside the last part of a location in the configuration; none where they are not of models."""
    models: list[type[BaseModel]] = [Config]
    free = False
    for part in location[:-1]:
        found = [info for m in models for name, info in m.model_fields.items() if part in (name, info.alias)]
        # A free key (a teacher's name) stays on the models of its mapping, even where it is called as a field is.
        if found and not free:
            models = [model for info in found for model in _models(info.annotation)]
        free = not free and any(_is_mapping(info.annotation) for info in found)
    return [info.alias or name for model in models for name, info in model.model_fields.items()]


def _problem(error: Any) -> Problem:
    # Without pydantic's own words for the branch of a union, such as `tuple[int, int]`.
    location = [p for p in error["loc"] if not str(p).endswith("]")]
    location = location[:-1] if location[-1:] == ["int"] else location
    field = ".".join(map(str, location))
    return Problem(field, _sentence(field, location, error))


def _sentence(field: str, location: list[int | str], error: Any) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        if location[:2] == ["search", "space"] and location[2] in Config.model_fields:
            return (
                f"{'.'.join(map(str, location[:3]))}: one key names a field by its whole path, e.g. "
                "recover.r_bn: {log: [0.1, 100]}"
            )
        names = _field_names(location)
        return f"{field}: unknown field{nearest(str(location[-1]), names) or '; allowed here: ' + ', '.join(names)}"
    if kind in ("too_short", "too_long") or (kind == "missing" and isinstance(location[-1], int)):
        owner = field.rpartition(".")[0] if kind == "missing" else field
        return f"{owner}: {given!r} has too {'many' if kind == 'too_long' else 'few'} entries"
    if kind == "missing":
        return f"{field}: is required and not given"
    if kind == "value_error":
        reason = str(context.get("error", error["msg"]))
        return f"{field}: {reason}" if field else reason
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "")
        return f"{field}: {given!r} is not allowed; choose from {allowed}"
    if kind in ("model_type", "dict_type"):
        fields = ", ".join(_field_names([*location, ""]))
        what = "a section; its fields: " if kind == "model_type" else "a section of names, each with: "
        return f"{field}: {given!r} is given, but it must be {what + fields if fields else 'a section of names'}"
    wanted = error["msg"].removeprefix("Input should be ").replace("array", "list")
    return f"{field}: {given!r} is given, but it must be {wanted.split(', unable')[0]}"
