"""The documents say what the code does: links, commands, fields, configurations and snippets hold."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer.main

from cluster import shards
from cluster.errors import UserError
from pipeline.cli import app
from pipeline.config import Config
from pipeline.loading import RESERVED, apply_overrides, merge, parse_yaml, recipe_names, resolve
from pipeline.starter import STARTER
from stages.images import encode_png
from stages.relabel.options import RelabelOptions
from stages.relabel.store import write_labels
from stages.relabel.unit import plan_units
from stages.relabel.views import draw_views
from stages.teachers.build import bn_layers, build_network
from stages.teachers.networks import NETWORKS
from stages.teachers.options import NetworkSpec, TeacherSpec
from stages.teachers.weights import apply_weights, load_state

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "pipeline").rglob("*.md")])
COMPLETE = "# complete configuration"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

each_doc = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Everything set as code: the lines of fenced blocks, and inline spans."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in fenced for line in block.replace("\\\n", " ").splitlines()] + [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)
    ]


def calls(text: str) -> Iterator[list[str]]:
    """Words of every ``prism …`` call in code."""
    for line in code(text):
        for call in re.findall(r"(?:^|[\s/])prism (.*)", line.split("#")[0]):
            yield shlex.split(call)


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub makes of a document's headings."""
    text = re.sub(r"^```\w*\n.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


def complete_configurations() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), block)
        for path in DOCS
        for block in blocks(path.read_text(), "yaml")
        if block.startswith(COMPLETE)
    ]


@each_doc
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert found.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


@each_doc
def test_no_place_of_a_machine(path):
    found = re.findall(r"(?<![\w.~:/>])/(?:home|root|work|tmp|Users|mnt|opt|srv|var)/\S*", path.read_text())
    assert not found


@each_doc
def test_commands_and_options_exist(path):
    for words in calls(path.read_text()):
        name = words[0]
        if not re.fullmatch(r"[a-z]+", name):
            continue
        assert name in COMMANDS, f"prism {name}"
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {w.partition("=")[0] for w in words if w.startswith("--")} <= options, words


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `prism"))
    assert {name for name in COMMANDS if not re.search(rf"`(prism )?{name}\b", table)} == set()


@each_doc
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for line in code(path.read_text()) for name in re.findall(r"(?:^|&& )make ([a-z-]+)", line)}
    assert named <= targets


@functools.cache
def generator() -> ModuleType:
    """``docs/generate_configuration.py`` as a module."""
    spec = importlib.util.spec_from_file_location("generate_configuration", ROOT / "docs" / "generate_configuration.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def known_fields() -> re.Pattern[str]:
    """Matches the full name of every section and field; a free name (a teacher's) may be any."""
    names = [
        f"{path}.{info.alias or field}".lstrip(".")
        for path, model, _ in generator().sections(Config)
        for field, info in model.model_fields.items()
    ]
    free = {"NAME": "[^.]+", "FIELD": "[a-z_.]+"}
    return re.compile("|".join(re.sub("NAME|FIELD", lambda key: free[key[0]], re.escape(name)) for name in names))


def field_exists(name: str) -> bool:
    searched = name.removeprefix("search.space.")
    return known_fields().fullmatch(name) is not None or known_fields().fullmatch(searched) is not None


@each_doc
def test_fields_exist(path):
    if path.parent.name == "adr":
        pytest.skip("a record of its time")
    sections = "data|teachers|squeeze|recover|relabel|evaluate|resources|search"
    for span in code(path.read_text()):
        for name in re.findall(rf"(?:^|\s)((?:{sections})(?:\.[a-z_]+)+)(?=$|[\s=:,])", span):
            if name.rpartition(".")[2] in ("py", "yaml", "md"):
                continue
            assert name in RESERVED or field_exists(name), name


def test_fields_exist_can_fail():
    assert field_exists("recover.crop.min_scale")
    assert field_exists("teachers.resnet18.key_map")
    assert field_exists("search.space.recover.r_bn")
    assert field_exists("search.space.recover.r_bn.log")
    assert not field_exists("search.space.recover.r_b")
    assert not field_exists("search.space.recover.r_bn.lgo")
    assert not field_exists("recover.r_b")
    assert not field_exists("recover.crop.scale")


@pytest.mark.parametrize(("where", "text"), complete_configurations())
def test_complete_configurations_resolve(where, text):
    assert resolve(parse_yaml(text, where)).teachers


def fragments() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), block)
        for path in DOCS
        for block in blocks(path.read_text(), "yaml")
        if not block.startswith(COMPLETE)
    ]


@pytest.mark.parametrize(("where", "text"), fragments())
def test_fragments_fit_the_readme_configuration(where, text):
    example = parse_yaml(blocks((ROOT / "README.md").read_text(), "yaml")[0], "README.md")
    assert resolve(merge(example, parse_yaml(text, where))).teachers


def test_readme_has_a_complete_configuration():
    assert "README.md" in [where for where, _ in complete_configurations()]


@each_doc
def test_overrides_resolve(path):
    """``key=value`` words of shown calls fit the README's configuration."""
    example = parse_yaml(blocks((ROOT / "README.md").read_text(), "yaml")[0], "README.md")
    for words in calls(path.read_text()):
        overrides = [w for w in words[1:] if "=" in w and not w.startswith(("--", "[", "key="))]
        if overrides:
            assert resolve(apply_overrides(example, overrides)).out


def test_the_comparison_of_methods_is_fair():
    """The two commands give students of the same protocol labels of the same kind."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    shown = [words for words in calls(text[text.index("**Comparing methods.**") :]) if words[0] == "run"]
    one, other = (
        resolve(apply_overrides(parse_yaml(STARTER, "prism.yaml"), [w for w in words if "=" in w]))
        for words in shown[:2]
    )
    assert (one.recipe, other.recipe) == ("prism", "sre2l")
    assert (one.relabel, one.evaluate, one.teachers) == (other.relabel, other.evaluate, other.teachers)
    assert one.recover.init == other.recover.init == "real"


def test_wrong_override_would_be_seen():
    example = parse_yaml(blocks((ROOT / "README.md").read_text(), "yaml")[0], "README.md")
    with pytest.raises(UserError):
        resolve(apply_overrides(example, ["recover.r_b=1"]))


def test_configuration_reference_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == generator().generate(), (
        "docs/configuration.md is not current: python docs/generate_configuration.py"
    )


def test_every_recipe_is_explained():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in recipe_names() if f"| `{name}` |" not in text] == []


def test_built_in_networks_are_listed_with_their_arguments():
    rows = re.findall(r"^\| `builtin:(\w+)` \|(.*)$", (ROOT / "docs" / "teachers.md").read_text(), re.MULTILINE)
    listed = {name: dict(re.findall(r"`(\w+)=([^`]+)`", rest)) for name, rest in rows}
    expected = {
        name: {
            p.name: str(p.default)
            for p in inspect.signature(factory).parameters.values()
            if p.name not in ("num_classes", "in_chans")
        }
        for name, factory in NETWORKS.items()
    }
    assert listed == expected


def worked_examples() -> list[TeacherSpec]:
    """Teachers of ``docs/teachers.md`` with published weights."""
    shown = [
        parse_yaml(block, "docs/teachers.md") for block in blocks((ROOT / "docs" / "teachers.md").read_text(), "yaml")
    ]
    specs = [spec for block in shown for spec in block["teachers"].values()]
    return [TeacherSpec(**spec) for spec in specs if "examples/networks.py" in spec["arch"]]


def test_worked_examples_fit_the_published_weights(shared_data):
    specs = worked_examples()
    assert len(specs) == 3
    for spec in specs:
        (found,) = (shared_data / "checkpoints").rglob(spec.weights)
        source, _, factory = spec.arch.rpartition(":")
        arch = source.replace("user:", f"user:{ROOT}/") + f":{factory}"
        network = build_network(NetworkSpec(arch=arch, kwargs=spec.kwargs), spec.num_outputs or 10, 3)
        apply_weights(network, load_state(str(found)), spec.key_map, spec.weights)


def test_shown_factory_is_a_bn_teacher(tmp_path):
    (shown,) = blocks((ROOT / "docs" / "teachers.md").read_text(), "python")
    (tmp_path / "mymodels.py").write_text(shown)
    network = build_network(NetworkSpec(arch=f"user:{tmp_path}/mymodels.py:make_net"), 4, 3)
    assert len(bn_layers(network)) == 1
    assert network.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


def test_examples_and_recipes_are_named_as_they_are():
    """Files of the repository that documents name in code exist."""
    for path in DOCS:
        for span in code(path.read_text()):
            for name in re.findall(
                r"(?:^|\s)((?:pipeline|stages|cluster|tests|docs|examples)/[\w./-]+\.\w+)(?=$|\s)", span
            ):
                assert (ROOT / name).exists() or "NAME" in name, f"{path.name}: {name}"


@pytest.fixture
def small_run(tmp_path, monkeypatch) -> Path:
    """``runs/mine`` with distilled images and labels, as the stages write them."""
    classes, ipc, size = ["cat", "dog", "owl"], 2, 32
    rng = np.random.default_rng(0)
    out = tmp_path / "runs" / "mine"
    for index in range(ipc):
        rows = [
            {
                "image": {
                    "bytes": encode_png(rng.integers(0, 256, (3, size, size), dtype=np.uint8)),
                    "path": f"{label:05d}/{index:05d}.png",
                },
                "label": label,
                "image_id": index * len(classes) + label,
                "ipc": index,
                "bn_teachers": ["resnet18"],
            }
            for label in range(len(classes))
        ]
        schema = shards.image_schema(classes, shards.RECOVERED_FIELDS, {"unit": {"ipc": index}})
        table = pa.Table.from_pylist(rows, schema=schema)
        shards.write_shard(str(out / "recovered" / f"unit-{index:05d}-00000.parquet"), table)
    options = RelabelOptions(epochs=2, batch=4)
    count = ipc * len(classes)
    for unit in plan_units(count, len(classes), options):
        views = [draw_views(0, e, count, size, options) for e in range(unit.epoch_start, unit.epoch_stop)]
        logits = rng.standard_normal((unit.num_rows, len(classes))).astype(np.float16)
        metadata = {"class_names": classes, "identity": "x", "seed": 0}
        write_labels(str(out / "labels" / "distilled"), unit, views, logits, options.batch, metadata)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return out


SNIPPETS = blocks((ROOT / "docs" / "storage.md").read_text(), "python")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_storage_snippets_run(snippet, small_run):
    if "datasets" in snippet:
        pytest.importorskip("datasets")
    exec(compile(snippet, "docs/storage.md", "exec"), {})


def test_storage_columns_are_those_of_the_files(small_run):
    text = (ROOT / "docs" / "storage.md").read_text()
    for folder, section in (("recovered", "## Image shards"), ("labels/distilled", "## Label shards")):
        part = text[text.index(section) :].split("\n## ")[0] if section in text else ""
        rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", part, re.MULTILINE))
        schema = shards.read_shard(str(next((small_run / folder).glob("*.parquet")))).schema
        assert list(rows) == schema.names
        for field in schema:
            kind = re.sub(r" not null|(?<=<)(item|element): ", "", str(field.type))
            assert rows[field.name].replace("[classes]", "[3]") == kind, field
