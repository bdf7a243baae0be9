"""Configuration: what is accepted, and the words of every refusal."""

from __future__ import annotations

import pickle

import pytest
import yaml

from cluster.errors import UserError
from pipeline.loading import (
    InvalidConfig,
    apply_overrides,
    dump_yaml,
    load_config,
    parse_yaml,
    plain,
    recipe_names,
    resolve,
    validated,
)
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


@pytest.mark.parametrize(("section", "path"), [("relabel", ("relabel",)), ("evaluate", ("protocol",))])
def test_what_was_made_before_there_was_a_choice_of_precision_stays_valid(section, path):
    def known(**change):
        fields = {"relabel": change} if section == "relabel" else {"evaluate": {"protocol": change}}
        config = resolve({**minimal(), **fields})
        value = config.identity() if section == "relabel" else config.evaluation()
        for key in path:
            value = value[key]
        return value

    assert "precision" not in known()
    assert known(precision="tf32") == known()
    assert known(precision="bf16")["precision"] == "bf16"


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
        ({"recover": {"precision": "fp16"}}, ["recover.precision: 'fp16'", "fp32", "bf16"]),
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
        ({"relabel": {"priors": 5}}, ["relabel.priors: 5", "a section of names"]),
        ({"recover": {"betas": [0.5]}}, ["recover.betas: [0.5] has too few entries"]),
        ({"recover": {"betas": [0.5, 0.6, 0.7]}}, ["recover.betas: [0.5, 0.6, 0.7] has too many entries"]),
        (
            {"teachers": {"kwargs": {"arch": "builtin:resnet10", "key_map": {"strip_prefx": ""}}}},
            ["teachers.kwargs.key_map.strip_prefx", "did you mean strip_prefix"],
        ),
        (
            {"teachers": {"weights": {"arch": "builtin:resnet10", "ach": 1}}},
            ["teachers.weights.ach", "did you mean arch"],
        ),
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


def search(space=None, **options):
    return minimal(search={"space": space or {"recover.r_bn": {"log": [0.1, 100]}}, **options})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (minimal(search={"trials": 3}), "search.space: is required and not given"),
        (minimal(search={"space": {}}), "search: space is empty; name at least one field, e.g. "),
        (minimal(search=[]), "search: [] is given, but it must be a section; its fields: trials, space, "),
        (search(trails=3), "search.trails: unknown field; did you mean trials?"),
        (search(trials=0), "search.trials: 0 is given, but it must be greater than or equal to 1"),
        (search(sampler="tp"), "search.sampler: 'tp' is not allowed; choose from tpe or random"),
        (search(split={"per_clas": 1}), "search.split.per_clas: unknown field; did you mean per_class?"),
        (search(rungs=[]), "search.rungs: [] has too few entries"),
        (search(rungs=[5]), "search.rungs.0: 5 is given, but it must be a section of names"),
        (search(objectives=["gpu_seconds"]), "search: objectives must be [top1_last] or [top1_last, gpu_seconds]"),
        (search({"recover.r_bn": {"lgo": [1, 2]}}), "search.space.recover.r_bn.lgo: unknown field; did you mean log?"),
        (search({"recover.r_bn": {}}), "search.space.recover.r_bn: nothing is given; give one of subset, choice, "),
        (search({"recover.r_bn": {"log": [1]}}), "search.space.recover.r_bn.log: [1] has too few entries"),
        (search({"recover.r_bn": {"log": [2, 1]}}), "search.space.recover.r_bn: log: [2, 1] is empty; the first "),
        (
            search({"recover.bn_teachers": {"subset": "al"}}),
            "search.space.recover.bn_teachers.subset: 'al' is given, but it must be a list of teachers or all",
        ),
        (
            search({"recover": {"r_bn": {"log": [1, 2]}}}),
            "search.space.recover: one key names a field by its whole path, e.g. recover.r_bn: {log: [0.1, 100]}",
        ),
    ],
)
def test_refusals_of_a_search_are_one_sentence(value, words):
    with pytest.raises(UserError) as error:
        resolve(value)
    assert str(error.value).startswith(words)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.exit_code == 2


def test_a_search_is_kept_and_is_not_part_of_a_runs_identity(tmp_path):
    config = resolve(search(trials=5))
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(str(path)) == config
    assert config.sha256() == resolve(minimal()).sha256()
    assert load_config(str(path), ["search.trials=7"]).search.trials == 7
    assert "search: null\n" in dump_yaml(resolve(minimal()))


def test_overrides_of_a_search_name_a_field_by_its_path():
    given = search({"recover.r_bn": {"log": [1, 2], "when": {"recover.flip": [True]}}, "recover.lr": {"log": [1, 2]}})
    words = ["search.space.recover.r_bn.log=[2, 3]", "search.space.recover.lr={choice: [1]}"]
    space = resolve(apply_overrides(given, [*words, "search.space.recover.crop.min_scale.choice=[0.5]"])).search.space
    assert list(space) == ["recover.r_bn", "recover.lr", "recover.crop.min_scale"]
    assert (space["recover.r_bn"].log, space["recover.r_bn"].when) == ((2, 3), {"recover.flip": [True]})
    assert (space["recover.lr"].choice, space["recover.lr"].log) == ([1], None)


def test_what_is_wrong_can_be_told_apart_and_survives_the_way_between_processes():
    value = plain(resolve(minimal()))
    value["recover"] |= {"ipc": 0, "lr": -1}
    with pytest.raises(InvalidConfig) as error:
        validated(value)
    assert [problem.field for problem in error.value.problems] == ["recover.ipc", "recover.lr"]
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) == "\n".join(problem.sentence for problem in error.value.problems)
    assert again.problems == error.value.problems


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
