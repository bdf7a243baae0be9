"""Configuration: what is accepted, and the words of every refusal."""

from __future__ import annotations

import pytest
import yaml

from cluster.errors import UserError
from pipeline.loading import apply_overrides, dump_yaml, load_config, parse_yaml, recipe_names, resolve
from pipeline.paths import absolute


def minimal(**sections):
    value = {
        "out": "runs/x",
        "data": {"image_size": 32, "num_classes": 10},
        "teachers": {"a": {"arch": "builtin:resnet10"}, "b": {"arch": "builtin:convnet_d3"}},
    }
    for key, section in sections.items():
        old = value.get(key)
        value[key] = {**old, **section} if isinstance(old, dict) and isinstance(section, dict) else section
    return value


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_resolves_at_small_and_large_sizes(recipe):
    for size in (28, 32, 64, 224):
        config = resolve(minimal(recipe=recipe, data={"image_size": size}))
        assert config.recover.logit_teachers == ["a"]


def test_recipe_defaults_depend_on_resolution_and_given_values_win():
    small = resolve(minimal())
    large = resolve(minimal(data={"image_size": 224}))
    assert small.recover.r_bn > large.recover.r_bn == 0.01
    assert large.recover.iterations == 4000
    assert large.recover.stagger.drop == 500
    assert resolve(minimal(recover={"r_bn": 0.7})).recover.r_bn == 0.7


def test_published_recipe_keeps_the_published_settings_at_every_size():
    for size in (32, 224):
        recover = resolve(minimal(recipe="prism_published", data={"image_size": size})).recover
        assert (recover.r_bn, recover.iterations, recover.lr, recover.roll) == (0.01, 4000, 0.05, 32)
        assert recover.allow_null_bn
        assert (recover.stagger.drop, recover.stagger.modulo) == (500, 8)


def test_sre2l_has_one_teacher_for_everything():
    config = resolve(minimal(recipe="sre2l"))
    assert config.recover.logit_teachers == config.recover.bn_teachers == config.relabel.teachers == ["a"]


def test_overrides_come_after_the_file_and_are_typed():
    value = apply_overrides(minimal(), ["recover.r_bn=5e-2", "recover.crop.min_scale=0.5", "evaluate.seeds=[4, 5]"])
    config = resolve(value)
    assert config.recover.r_bn == 0.05
    assert config.recover.crop.min_scale == 0.5
    assert config.evaluate.seeds == [4, 5]


def test_resolved_config_is_itself_a_config(tmp_path):
    config = resolve(minimal(recover={"r_bn": 0.3}))
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    again = load_config(str(path))
    assert again == config
    assert again.sha256() == config.sha256()


def test_identity_ignores_place_and_machine_but_not_method():
    base = resolve(minimal())
    same = resolve(minimal(out="elsewhere", name="n", resources={"recover": {"actors": 3}}, evaluate={"seeds": [9]}))
    other = resolve(minimal(recover={"lr": 0.06}))
    assert same.sha256() == base.sha256()
    assert other.sha256() != base.sha256()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"recover": {"r_bnn": 1}}, ["recover.r_bnn", "did you mean r_bn"]),
        ({"recoverr": {}}, ["recoverr", "did you mean recover"]),
        ({"teachers": {"a": {"arc": "x"}}}, ["teachers.a.arc", "did you mean arch"]),
        ({"recover": {"r_bn": "much"}}, ["recover.r_bn", "'much'", "number"]),
        ({"recover": {"iterations": 1.5}}, ["recover.iterations", "1.5", "integer"]),
        ({"recover": {"iterations": 0}}, ["recover.iterations", "greater than or equal to 1"]),
        ({"recover": {"selection": "per_indx"}}, ["recover.selection", "per_index", "round_robin"]),
        ({"recover": {"bn_teachers": ["a", "c"]}}, ["recover.bn_teachers", "'c'", "a, b"]),
        ({"recover": {"logit_teachers": ["a", "b"]}}, ["recover.logit_teachers", "one primary"]),
        ({"recover": {"selection": "round_robin"}}, ["round_robin", "bn_teachers"]),
        ({"recover": {"stagger": {"drop": 500, "modulo": 8}}}, ["stagger", "leaves none"]),
        ({"recover": {"statistics": "class"}}, ["recover.statistics", "reserved"]),
        ({"recover": {"precision": "fp32"}}, ["recover.precision", "reserved"]),
        ({"recover": {"ipc": True}}, ["recover.ipc: True", "integer"]),
        ({"recover": {"ipc": "10"}}, ["recover.ipc: '10'", "integer"]),
        ({"recover": {"flip": "no"}}, ["recover.flip: 'no'", "boolean"]),
        ({"recover": {"bn_teachers": "a"}}, ["recover.bn_teachers: 'a'", "list"]),
        ({"resources": {"recover": {"actors": "x"}}}, ["resources.recover.actors: 'x'", "integer"]),
        ({"teachers": {"listnet": {"arch": "builtin:resnet10", "w": 1}}}, ["teachers.listnet.w: unknown field"]),
        ({"recover": 5}, ["recover: 5", "section", "ipc, "]),
        ({"teachers": 5}, ["teachers: 5", "section of names", "arch, "]),
        ({"data": {"image_size": "224"}}, ["data.image_size", "'224'", "integer"]),
        ({"data": {"image_size": True}}, ["data.image_size", "integer"]),
        ({"relabel": {"priors": {"c": 3}}}, ["relabel.priors", "'c'"]),
        ({"search": {"trials": 3}}, ["search", "reserved"]),
        ({"recipe": "prsm"}, ["recipe", "'prsm'", "did you mean prism"]),
        ({"relabel": {"ensemble": "prior_softmax"}}, ["relabel.priors", "a, b"]),
        ({"relabel": {"mix": {"kind": "cutmixx"}}}, ["relabel.mix.kind", "cutmix"]),
        ({"data": {"mean": [0.5]}}, ["data", "mean has 1 values", "channels = 3"]),
        ({"evaluate": {"seeds": [1, 1]}}, ["evaluate.seeds", "twice"]),
        ({"resources": {"recover": {"actors": [3, 1]}}}, ["resources.recover", "min"]),
    ],
)
def test_refusals_name_the_field_and_the_remedy(sections, words):
    with pytest.raises(UserError) as error:
        resolve(minimal(**sections))
    for word in words:
        assert word in str(error.value), str(error.value)
    assert error.value.exit_code == 2


def test_missing_required_fields_are_named():
    with pytest.raises(UserError, match=r"data\.image_size: is required"):
        resolve({"out": "x", "data": {}, "teachers": {"a": {"arch": "builtin:resnet10"}}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("a: 1\na: 2", "given twice"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_yaml_is_data_only(text, words):
    with pytest.raises(UserError, match=words):
        parse_yaml(text, "file.yaml")


def test_yaml_merge_keys_work():
    assert parse_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", "f")["y"] == {"a": 1, "b": 3}


def test_missing_file_points_to_init(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="prism init"):
        load_config(str(tmp_path / "file" / "config.yaml"))
    with pytest.raises(UserError, match="prism init"):
        load_config(str(tmp_path / "none.yaml"))


def test_starter_config_is_valid():
    from pipeline.starter import STARTER

    assert resolve(yaml.safe_load(STARTER)).recover.ipc == 10


def test_bad_override_words():
    with pytest.raises(UserError, match="key=value"):
        apply_overrides({}, ["recover"])
    with pytest.raises(UserError, match="not a section"):
        apply_overrides({"seed": 1}, ["seed.x=1"])


def test_files_of_a_users_code_are_found_from_every_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = absolute(
        resolve(
            minimal(
                teachers={"a": {"arch": "user:nets.py:one", "weights": "w.pt"}, "b": {"arch": "user:package.nets:two"}},
                evaluate={"students": {"s": {"arch": "user:sub/nets.py:three"}, "t": {"arch": "timm:resnet18"}}},
            )
        )
    )
    assert {n: s.arch for n, s in config.evaluate.students.items()} == {
        "s": f"user:{tmp_path}/sub/nets.py:three",
        "t": "timm:resnet18",
    }
    assert {n: (s.arch, s.weights) for n, s in config.teachers.items()} == {
        "a": (f"user:{tmp_path}/nets.py:one", f"{tmp_path}/w.pt"),
        "b": ("user:package.nets:two", None),
    }
