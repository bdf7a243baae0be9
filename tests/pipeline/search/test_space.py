"""The space of a search: every point is a valid configuration, and every mistake is one sentence."""

from __future__ import annotations

import functools
import json
import pickle
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from cluster.rng import generator
from pipeline.loading import InvalidConfig, merge, plain, resolve
from pipeline.search.fields import FIXED, variable_paths
from pipeline.search.space import make_space, overrides

WITH_BN = ["res", "conv", "mob"]
R_BN = {"recover.r_bn": {"log": [0.1, 100]}}


def configuration(space=None, rungs=None, **sections):
    value = {
        "out": "runs/x",
        "data": {"image_size": 32, "num_classes": 10},
        "teachers": {
            "res": {"arch": "builtin:resnet10"},
            "conv": {"arch": "builtin:convnet_d3"},
            "mob": {"arch": "builtin:mobilenetv2"},
            "plain.v1": {"arch": "builtin:alexnet"},
        },
        "recover": {"bn_teachers": ["conv", "res"]},
        "relabel": {"teachers": ["res", "conv"]},
        "search": space and {"space": space, "rungs": rungs or [{}]},
    }
    return resolve(merge(value, sections))


def space_of(space, rungs=None, **sections):
    return make_space(configuration(space, rungs, **sections), WITH_BN)


class Answers:
    """A trial that gives the answers that ``ask`` finds, and keeps them."""

    def __init__(self, ask):
        self.ask = ask
        self.recorded = {}

    def keep(self, name, value):
        assert name not in self.recorded, f"{name} is asked twice"
        self.recorded[name] = value
        return value

    def suggest_categorical(self, name, choices):
        # What Optuna stores, and tells apart by ==.
        assert all(choice is None or isinstance(choice, bool | int | float | str) for choice in choices)
        assert len(set(choices)) == len(choices)
        return self.keep(name, self.ask(name, st.sampled_from(choices)))

    def suggest_float(self, name, low, high, *, log=False):
        return self.keep(name, self.ask(name, st.floats(low, high)))

    def suggest_int(self, name, low, high):
        return self.keep(name, self.ask(name, st.integers(low, high)))


# Fields whose values go together, whichever of them are searched.
CATALOGUE = {
    "pool": {"recover.bn_teachers": {"subset": "all"}},
    "pools": {"recover.bn_teachers": {"choice": [["conv", "res"], "mob", ["res", "conv", "mob"]]}},
    "labellers": {"relabel.teachers": {"subset": "all"}},
    "prior": {"relabel.priors.res": {"uniform": [10, 90]}},
    "selection": {"recover.selection": {"choice": ["per_index", "round_robin", "fixed", "per_step"]}},
    "primary": {"recover.logit_teachers": {"choice": ["res", "plain.v1"]}},
    "weight": R_BN,
    "probability": {
        "recover.include_prob": {"uniform": [0, 1], "when": {"recover.selection": ["per_index", "per_step"]}}
    },
    "slots": {"recover.max_bn_teachers": {"integer": [1, 4], "when": {"recover.include_prob": [0.5]}}},
    "steps": {"recover.iterations": {"integer": [200, 400]}},
    "stagger": {"recover.stagger": {"choice": [{"drop": 0}, {"drop": 20, "modulo": 4}]}},
    "betas": {"recover.betas": {"choice": [[0.5, 0.9], [0.9, 0.999]]}},
    "average": {"evaluate.protocol.ema": {"choice": [None, 0.9]}},
    "temperature": {"evaluate.protocol.temperature": {"integer": [1, 20], "when": {"recover.stagger.drop": [0]}}},
}


@functools.cache
def catalogue_space(names: tuple[str, ...]):
    space = {}
    for name in names:
        # Of the two ways in which the pool may vary, the first.
        space = {**CATALOGUE[name], **space}
    sections = {"relabel": {"priors": {"res": 50.0, "conv": 60.0}}}
    if "probability" in names and "selection" not in names:
        space["recover.include_prob"] = {"uniform": [0, 1]}
    if "probability" in names and "slots" in names:
        space["recover.include_prob"] = {"choice": [0.2, 0.5], "when": space["recover.include_prob"].get("when", {})}
    return space_of(space, [{"recover.ipc": 1, "relabel": {"epochs": 10}}, {"relabel.epochs": 20}], **sections)


# Making a space takes longer than all else, so these few serve every test.
PICKS = [tuple(generator(0, "spaces", n).permutation(sorted(CATALOGUE))[: n % 6 + 2].tolist()) for n in range(20)]
spaces = st.sampled_from([*PICKS, tuple(CATALOGUE), tuple(reversed(CATALOGUE))]).map(catalogue_space)
law = settings(max_examples=100, deadline=None)


@law
@given(spaces, st.data())
def test_every_suggested_point_is_a_valid_configuration(space, data):
    trial = Answers(lambda name, choices: data.draw(choices))
    params = space.suggest(trial)
    assert params == trial.recorded
    point = space.point(params)
    config = space.apply(point)
    for pool in (config.recover.bn_teachers, config.relabel.teachers):
        assert pool
        assert len(set(pool)) == len(pool)
    assert "plain.v1" not in config.recover.bn_teachers
    for rung in space.config.search.rungs:
        assert overrides(config, rung).relabel.epochs in (10, 20)
    # A trial with the same answers is the same point, and what a table keeps of it suffices.
    assert space.suggest(Answers(lambda name, choices: params[name])) == params
    assert space.apply(json.loads(json.dumps(point))) == config
    assert space.point(json.loads(json.dumps(params))) == point


@law
@given(spaces, st.data())
def test_only_the_fields_of_the_point_change(space, data):
    point = space.point(space.suggest(Answers(lambda name, choices: data.draw(choices))))
    before, after = leaves(plain(space.config)), leaves(plain(space.apply(point)))
    for path, value in point.items():
        if isinstance(value, dict):
            assert {key: after[f"{path}.{key}"] for key in value} == value
        else:
            assert after[path] == value
    follows = {path for path in before if path.startswith("relabel.priors.")}
    if "round_robin" in after.values():
        follows.add("recover.logit_teachers")
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert all(path in follows or path in point or path.rpartition(".")[0] in point for path in changed)


def leaves(value, path=""):
    out = {}
    for key, child in value.items():
        out |= leaves(child, f"{path}{key}.") if isinstance(child, dict) else {path + key: child}
    return out


@law
@given(spaces, st.data())
def test_a_field_without_a_say_is_absent(space, data):
    params = space.suggest(Answers(lambda name, choices: data.draw(choices)))
    point = space.point(params)
    config = space.apply(point)
    searched = space.config.search.space
    robin = config.recover.selection == "round_robin"
    if robin:
        assert config.recover.logit_teachers == config.recover.bn_teachers
    expected = {
        "recover.logit_teachers": not robin,
        "relabel.priors.res": "res" in config.relabel.teachers,
        "evaluate.protocol.temperature": config.recover.stagger.drop == 0,
        "recover.max_bn_teachers": config.recover.include_prob == 0.5,
    }
    if searched.get("recover.include_prob") and searched["recover.include_prob"].when:
        expected["recover.include_prob"] = config.recover.selection in ("per_index", "per_step")
    for path in searched:
        assert (path in point) == expected.get(path, True), path
        assert any(name == path or name.startswith(f"{path}.") for name in params) == (path in point)
    assert set(config.relabel.priors) == {"res", "conv"} & set(config.relabel.teachers)


@law
@given(spaces)
def test_trial_0_is_the_configuration_itself(space):
    defaults = space.defaults()
    assert space.suggest(Answers(lambda name, choices: defaults[name])) == defaults
    assert space.apply(space.point(defaults)) == space.config


def test_trial_0_records_only_what_has_a_say_in_it():
    others = {"recover.include_prob": {"uniform": [0, 1], "when": {"recover.selection": ["per_step"]}}}
    space = space_of({"recover.selection": {"choice": ["fixed", "per_step", "per_index"]}, **others})
    assert space.defaults() == {"recover.selection": "per_index"}


def test_the_order_of_a_pool_does_not_matter_to_a_condition():
    condition = {"recover.bn_teachers": [["res", "conv"], "mob"]}
    space = space_of(when(condition, **{"recover.bn_teachers": {"subset": "all"}}))
    assert "recover.r_bn" in space.defaults()
    for pool, has_a_say in ((["mob"], True), (["res"], False), (["conv", "mob"], False)):
        params = {f"recover.bn_teachers.{name}": name in pool for name in WITH_BN} | {"recover.r_bn": 1.0}
        assert ("recover.r_bn" in space.point(params)) == has_a_say


def every_trial(space):
    """Params of all trials of a space of switches."""
    open_ends = [()]
    while open_ends:
        given = list(open_ends.pop())
        answers = iter(given)

        def ask(name, choices, answers=answers, given=given):
            answer = next(answers, None)
            if answer is None:
                open_ends.append((*given, True))
                answer = False
                given.append(answer)
            return answer

        yield space.suggest(Answers(ask))


@pytest.mark.parametrize("members", [["conv"], ["res", "conv"], ["mob", "res", "conv"]])
def test_every_pool_is_one_suggestion(members):
    pool = [name for name in ("conv", "res") if name in members]
    space = space_of({"recover.bn_teachers": {"subset": members}}, recover={"bn_teachers": pool})
    found = [tuple(sorted(space.point(params)["recover.bn_teachers"])) for params in every_trial(space)]
    subsets = chain(*(combinations(sorted(members), count) for count in range(1, len(members) + 1)))
    assert sorted(found) == sorted(subsets)


def test_pools_of_one_and_of_all_and_their_order():
    space = space_of({"recover.bn_teachers": {"subset": "all"}, "relabel.teachers": {"subset": "all"}})
    # The configuration's own teachers lead, in its order.
    assert space.point(space.suggest(Answers(lambda name, choices: True))) == {
        "recover.bn_teachers": ["conv", "res", "mob"],
        "relabel.teachers": ["res", "conv", "mob", "plain.v1"],
    }
    params = space.suggest(Answers(lambda name, choices: False))
    assert "recover.bn_teachers.mob" not in params
    assert params["recover.bn_teachers.res"] is False
    assert space.point(params) == {"recover.bn_teachers": ["mob"], "relabel.teachers": ["plain.v1"]}


def test_a_field_comes_after_those_that_it_depends_on_and_otherwise_in_the_order_of_the_file():
    space = space_of(
        {
            "recover.r_bn": {"log": [0.1, 100], "when": {"recover.flip": [True]}},
            "recover.logit_teachers": {"choice": ["res", "conv"]},
            "recover.lr": {"log": [0.01, 1]},
            "recover.flip": {"choice": [True, False], "when": {"recover.selection": ["per_index"]}},
            "recover.selection": {"choice": ["per_index", "round_robin"]},
        }
    )
    assert [variable.path for variable in space.variables] == [
        "recover.lr",
        "recover.selection",
        "recover.logit_teachers",
        "recover.flip",
        "recover.r_bn",
    ]


def test_params_are_readable_where_values_are_lists_or_sections():
    space = space_of(
        {
            "recover.bn_teachers": {"choice": ["res", ["conv", "res"]]},
            "recover.stagger": {"choice": [{"drop": 0}, {"modulo": 3, "drop": 5}]},
            "evaluate.protocol.ema": {"choice": [None, 0.5]},
        }
    )
    assert space.defaults() == {
        "recover.bn_teachers": '["conv", "res"]',
        "recover.stagger": '{"drop": 0, "modulo": 1}',
        "evaluate.protocol.ema": None,
    }
    params = {"recover.bn_teachers": "res", "recover.stagger": '{"drop": 5, "modulo": 3}', "evaluate.protocol.ema": 0.5}
    assert space.point(params) == {
        "recover.bn_teachers": ["res"],
        "recover.stagger": {"drop": 5, "modulo": 3},
        "evaluate.protocol.ema": 0.5,
    }


def test_priors_follow_the_labellers():
    space = space_of(
        {
            "relabel.teachers": {"subset": ["res", "conv", "plain.v1"]},
            "relabel.priors.plain.v1": {"uniform": [10, 90]},
        },
        relabel={"ensemble": "prior_softmax", "priors": {"res": 50, "conv": 60}},
    )
    assert "relabel.priors.plain.v1" not in space.defaults()
    point = {"relabel.teachers": ["conv", "plain.v1"], "relabel.priors.plain.v1": 30.5}
    assert space.apply(point).relabel.priors == {"conv": 60.0, "plain.v1": 30.5}


def test_the_published_arithmetic_may_search_teachers_without_batchnorm():
    given = {"recover.bn_teachers": {"subset": ["conv", "res", "plain.v1"]}}
    space = space_of(given, recover={"allow_null_bn": True})
    assert space.apply({"recover.bn_teachers": ["plain.v1"]}).recover.bn_teachers == ["plain.v1"]


def test_overrides_are_typed_and_checked_and_apply_no_recipe():
    config = configuration()
    changed = overrides(config, {"recover.stagger.drop": 3, "relabel": {"epochs": 7}, "recover.betas": [0.1, 0.2]})
    assert (changed.recover.stagger.drop, changed.relabel.epochs, changed.recover.betas) == (3, 7, (0.1, 0.2))
    # The recipe would set 224 px's fields.
    large = overrides(config, {"data.image_size": 224})
    assert large.recover == config.recover
    robin = overrides(config, {"recover.selection": "round_robin"})
    assert robin.recover.logit_teachers == robin.recover.bn_teachers == ["conv", "res"]
    for values, words in (
        ({"recover.iterations": 1.0}, "recover.iterations: 1.0 is given, but it must be a valid integer"),
        ({"recover.iteration": 1}, "recover.iteration: unknown field; did you mean iterations?"),
        ({"recover": 1}, "recover: 1 is given, but it must be a section"),
        ({"relabel.priors.mob": 1}, "relabel.priors names 'mob', which is not in relabel.teachers; remove it"),
        ({"recover.selection": "round_robin", "recover.logit_teachers": ["res"]}, "recover.logit_teachers must equal"),
    ):
        with pytest.raises(InvalidConfig) as error:
            overrides(config, values)
        assert str(error.value).startswith(words)


VARIABLE = """
recover: ipc logit_teachers bn_teachers selection include_prob max_bn_teachers first_bn_multiplier var_weight r_bn chunk
    init iterations stagger stagger.drop stagger.modulo lr betas crop crop.min_scale flip roll batch_augment
relabel: teachers ensemble priors priors.res priors.conv priors.mob priors.plain.v1 mix mix.kind mix.alpha epochs batch
    crop crop.min_scale flip
evaluate.protocol: loss ce_weight temperature optimizer lr momentum weight_decay batch schedule zeta ema
"""


def test_what_may_vary():
    """A new field of these sections must be thought of here."""
    expected = ["evaluate.protocol"]
    for word in VARIABLE.split():
        if word.endswith(":"):
            section = word.removesuffix(":")
        else:
            expected.append(f"{section}.{word}")
    assert sorted(variable_paths(configuration())) == sorted(expected)


def refusal(space, rungs=None, **sections):
    with pytest.raises(UserError) as error:
        space_of(space, rungs, **sections)
    assert error.value.exit_code == 2
    return str(error.value)


ROBIN = {"selection": "round_robin", "logit_teachers": ["conv", "res"]}
OWN = "the configuration itself, which is trial 0, has"


def when(conditions, **others):
    return {"recover.r_bn": {"log": [0.1, 100], "when": conditions}, **others}


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"recover.rbn": {"log": [1, 9]}}, "recover.rbn: unknown field; did you mean recover.r_bn?"),
        ({"r_bn": {"log": [1, 9]}}, "r_bn: unknown field; did you mean recover.r_bn?"),
        ({"relabel.chunk": {"choice": [1]}}, "relabel.chunk: unknown field; did you mean recover.chunk?"),
        ({"xyz": {"choice": [1]}}, "xyz: unknown field; a field is named by its whole path, e.g. recover.r_bn"),
        ({"relabel": {"choice": [1]}}, "relabel: is a section; name one of its fields, e.g. relabel.teachers"),
        (
            {"recover.bn_norm": {"choice": ["none"]}},
            "recover.bn_norm is reserved and not built in this version; remove it",
        ),
        # Kinds.
        (
            {"recover.r_bn": {"subset": "all"}},
            "recover.r_bn: subset is for a list of teachers (recover.logit_teachers, recover.bn_teachers, "
            "relabel.teachers); give choice, log, uniform or integer",
        ),
        (
            {"recover.logit_teachers": {"subset": "all"}},
            "recover.logit_teachers: there is one primary teacher; give choice in place of subset",
        ),
        (
            {"recover.iterations": {"uniform": [9.5, 400]}},
            "recover.iterations: uniform gives fractions, but recover.iterations is a whole number; "
            "give integer: [10, 400] in place of uniform",
        ),
        (
            {"recover.ipc": {"uniform": [0.2, 0.8]}},
            "recover.ipc: uniform gives fractions, but recover.ipc is a whole number; give integer in place of uniform",
        ),
        (
            {"recover.init": {"log": [1, 2]}},
            "recover.init: 1.0 is not allowed; choose from noise or real",
        ),
        ({"recover.flip": {"integer": [0, 1]}}, "recover.flip: 0 is given, but it must be a valid boolean"),
        # Pools.
        (
            {"recover.bn_teachers": {"subset": ["cnv", "res"]}},
            "recover.bn_teachers: 'cnv' is not under teachers; did you mean conv?",
        ),
        (
            {"relabel.teachers": {"choice": ["zzz"]}},
            "relabel.teachers: 'zzz' is not under teachers; defined: res, conv, mob, plain.v1",
        ),
        (
            {"recover.bn_teachers": {"subset": ["conv", "res", "plain.v1"]}},
            "recover.bn_teachers: plain.v1 (builtin:alexnet) has no BatchNorm layer whose statistics could be matched; "
            "take it out",
        ),
        (
            {"recover.bn_teachers": {"choice": [["conv", "res"], []]}},
            "recover.bn_teachers: choice has an empty pool; give it at least one teacher",
        ),
        (
            {"recover.bn_teachers": {"choice": [["conv", "res"], "res", ["res"]]}},
            "recover.bn_teachers: choice has [res] twice; remove one",
        ),
        (
            {"recover.bn_teachers": {"choice": [["conv", "res"], ["res", "res"]]}},
            "recover.bn_teachers: [res, res] cannot run: recover.bn_teachers names a teacher twice; remove the second",
        ),
        # Values.
        (
            {"recover.include_prob": {"uniform": [0, 1.5]}},
            "recover.include_prob: 1.5 is given, but it must be less than or equal to 1",
        ),
        (
            {"recover.iterations": {"integer": [0, 400]}},
            "recover.iterations: 0 is given, but it must be greater than or equal to 1",
        ),
        (
            {"recover.selection": {"choice": ["per_index", "per_indx"]}},
            "recover.selection: 'per_indx' is not allowed; choose from fixed, per_index, per_step or round_robin",
        ),
        (
            {"recover.betas": {"choice": [[0.5, 0.9], [0.5, 1.5]]}},
            "recover.betas.1: 1.5 is given, but it must be less than 1",
        ),
        (
            {"recover.crop": {"choice": [{"min_scal": 0.5}]}},
            "recover.crop.min_scal: unknown field; did you mean min_scale?",
        ),
        # Trial 0.
        (
            {"recover.r_bn": {"log": [0.1, 1]}},
            f"recover.r_bn: {OWN} 10.0, which is not in [0.1, 1.0]; widen the bounds or change recover.r_bn",
        ),
        (
            {"recover.lr": {"integer": [1, 2]}},
            f"recover.lr: {OWN} 0.05, which is no whole number in [1, 2]; widen the bounds or change recover.lr",
        ),
        (
            {"evaluate.protocol.ema": {"uniform": [0.1, 0.9]}},
            f"evaluate.protocol.ema: {OWN} null, which is no number; choose one in [0.1, 0.9] for "
            "evaluate.protocol.ema",
        ),
        (
            {"recover.r_bn": {"choice": [1, 2]}},
            f"recover.r_bn: {OWN} 10.0, which is not in choice; add it or set recover.r_bn to one of the choices",
        ),
        (
            {"recover.bn_teachers": {"subset": ["res", "mob"]}},
            f"recover.bn_teachers: {OWN} [conv, res], but conv is not in subset; name it there or take it out of "
            "recover.bn_teachers",
        ),
        # Conditions.
        (
            when({"recover.selektion": ["fixed"]}),
            "recover.r_bn.when: recover.selektion is an unknown field; did you mean recover.selection?",
        ),
        (when({"recover.r_bn": [1]}), "recover.r_bn.when: recover.r_bn is the field itself; remove the condition"),
        (
            when({"recover.crop": [1]}),
            "recover.r_bn.when: recover.crop is a section; name one of its fields",
        ),
        (
            when({"recover.selection": []}),
            "recover.r_bn.when: recover.selection has no values, so it is never suggested; give at least one",
        ),
        (
            when({"recover.selection": ["per_index", "fixed"]}),
            "recover.r_bn.when: recover.selection is never fixed; it is per_index and not searched; correct the "
            "condition or search recover.selection",
        ),
        (
            when({"recover.selection": ["fixd"]}, **{"recover.selection": {"choice": ["per_index", "fixed"]}}),
            "recover.r_bn.when: recover.selection is never fixd; it is one of per_index, fixed; correct the condition",
        ),
        (
            when({"recover.iterations": [300, 7]}, **{"recover.iterations": {"integer": [200, 400]}}),
            "recover.r_bn.when: recover.iterations is never 7; it is a whole number from 200 to 400; correct the "
            "condition",
        ),
        (
            when({"recover.lr": [0.06]}, **{"recover.lr": {"log": [0.01, 1]}}),
            "recover.r_bn.when: recover.lr is never 0.06; it is drawn from a range of fractions, where no one value "
            "is met; give it a choice or remove this",
        ),
        (
            when({"relabel.teachers": [["res", "mob"]]}, **{"relabel.teachers": {"subset": ["res", "conv"]}}),
            "recover.r_bn.when: relabel.teachers is never [res, mob]; it is a subset of res, conv; correct the "
            "condition",
        ),
        (
            when({"recover.lr": [0.05]}, **{"recover.lr": {"choice": [0.05, 1], "when": {"recover.r_bn": [10]}}}),
            "recover.r_bn: whether it is suggested depends on itself, recover.r_bn → recover.lr → recover.r_bn; "
            "remove one of the conditions",
        ),
        (
            {
                "recover.logit_teachers": {"choice": ["res", "mob"]},
                "recover.selection": {
                    "choice": ["per_index", "round_robin"],
                    "when": {"recover.logit_teachers": [["res"]]},
                },
            },
            "recover.logit_teachers: whether it is suggested depends on itself, recover.logit_teachers → "
            "recover.selection → recover.logit_teachers; remove one of the conditions",
        ),
        (
            {"relabel.priors.mob": {"uniform": [1, 2]}},
            "relabel.priors.mob: mob is never in relabel.teachers; add it there or remove this",
        ),
        # Several fields.
        (
            {"recover.stagger": {"choice": [{"drop": 0}]}, "recover.stagger.drop": {"integer": [0, 2]}},
            "recover.stagger.drop: lies within recover.stagger, which is searched too; remove one",
        ),
        (
            {"relabel.ensemble": {"choice": ["frobenius_mean", "prior_softmax"]}},
            "relabel.ensemble: prior_softmax cannot run: relabel.priors lacks res, conv, which ensemble: "
            "prior_softmax needs",
        ),
    ],
)
def test_mistakes_in_a_space(space, sentence):
    assert refusal(space) == f"search.space.{sentence}"


@pytest.mark.parametrize("path", FIXED)
def test_fields_that_may_not_vary(path):
    for field in (path, f"{path}.part"):
        for sentence in (refusal({field: {"choice": [1]}}), refusal(R_BN, [{field: 1}])):
            assert sentence in (
                f"search.{where}.{field}: cannot vary within a search, since {FIXED[path]}; remove it"
                for where in ("space", "rungs.0")
            )


def test_round_robin_has_no_logit_teachers_to_search():
    assert refusal({"recover.logit_teachers": {"choice": ["res"]}}, recover=ROBIN) == (
        "search.space.recover.logit_teachers: recover.selection is always round_robin, which takes the pool for them; "
        "remove it"
    )
    selection = {"recover.selection": {"choice": ["round_robin", "fixed"]}}
    assert refusal(selection, recover=ROBIN) == (
        "search.space.recover.selection: fixed cannot run: recover.logit_teachers has 2 names; selection: fixed has "
        "one primary teacher"
    )
    # With one to take, the others go together.
    space = space_of({**selection, "recover.logit_teachers": {"choice": ["mob"]}}, recover=ROBIN)
    assert space.defaults() == {"recover.selection": "round_robin"}


def test_no_teacher_for_a_pool():
    with pytest.raises(UserError) as error:
        make_space(
            configuration({"recover.bn_teachers": {"subset": "all"}}),
            [],
        )
    assert str(error.value) == (
        "search.space.recover.bn_teachers: no teacher has BatchNorm layers, so the pool is empty; remove it"
    )
    with pytest.raises(UserError, match="search: is not given; say what to vary"):
        make_space(configuration(), WITH_BN)


def test_values_that_only_fail_together_are_found_and_named():
    stagger = {"recover.stagger.drop": {"integer": [0, 110]}, "recover.stagger.modulo": {"integer": [1, 4]}}
    # 110 × 3 of 300 steps: neither bound fails alone.
    sentence = refusal(stagger)
    assert sentence.startswith("search.space.recover.stagger.drop: ")
    assert " with recover.stagger.modulo = 4 cannot run: recover: stagger drops " in sentence
    assert "r_bn" not in refusal({**R_BN, **stagger})
    at_rung = {"recover.stagger.drop": {"integer": [0, 20]}, "recover.stagger.modulo": {"integer": [1, 4]}}
    sentence = refusal(at_rung, [{"recover.iterations": 55, "recover.ipc": 1}])
    assert " with recover.stagger.modulo = 4, recover.iterations = 55 (rung 0) cannot run: " in sentence
    assert space_of(at_rung, [{"recover.iterations": 61}])


def test_every_choice_is_tried():
    steps = [*range(107, 307), 106]
    staggered = {"recover": {"iterations": 107, "stagger": {"drop": 53, "modulo": 3}}}
    assert refusal({"recover.iterations": {"choice": steps}}, **staggered).startswith(
        "search.space.recover.iterations: 106 cannot run: recover: stagger drops 53 × 2 steps from iterations = 106"
    )


@pytest.mark.parametrize(
    ("rung", "sentence"),
    [
        ({"recover.iteration": 1}, "recover.iteration: unknown field; did you mean recover.iterations?"),
        ({"recover": {"iteration": 1}}, "recover.iteration: unknown field; did you mean recover.iterations?"),
        ({"recover.iterations": 0}, "recover.iterations: 0 is given, but it must be greater than or equal to 1"),
        ({"recover.crop": 5}, "recover.crop: 5 is given, but it must be a section; its fields: min_scale"),
        ({"recover": 5}, "recover: is a section; name one of its fields, e.g. recover.ipc"),
        ({"recover.bn_norm": "none"}, "recover.bn_norm is reserved and not built in this version; remove it"),
        ({"recover": {"r_bn": 1}}, "recover.r_bn: recover.r_bn is searched; take it out of the rung or of the space"),
        (
            {"recover.stagger": {"drop": 3, "modulo": 101}, "recover.ipc": 1},
            "recover.stagger.drop: 3 with recover.stagger.modulo = 101 cannot run: recover: stagger drops 3 × 100 "
            "steps from iterations = 300, which leaves none; lower stagger.drop or raise iterations",
        ),
    ],
)
def test_mistakes_in_a_rung(rung, sentence):
    assert refusal(R_BN, [{"recover.ipc": 1}, rung]) == f"search.rungs.1.{sentence}"


def test_a_rung_may_not_set_what_is_searched_in_parts():
    stagger = {"recover.stagger.drop": {"integer": [0, 4]}}
    assert refusal(stagger, [{"recover.stagger": {"drop": 0, "modulo": 1}}]) == (
        "search.rungs.0.recover.stagger.drop: recover.stagger.drop is searched; take it out of the rung or of the space"
    )
    assert space_of(stagger, [{"recover.stagger": {"modulo": 2}}])
    whole = {"recover.stagger": {"choice": [{"drop": 0, "modulo": 1}, {"drop": 1, "modulo": 2}]}}
    assert refusal(whole, [{"recover.stagger.drop": 1}]) == (
        "search.rungs.0.recover.stagger.drop: recover.stagger is searched; take it out of the rung or of the space"
    )


def test_all_mistakes_are_said_at_once():
    lines = refusal({"recover.rbn": {"log": [1, 2]}, "seed": {"choice": [1]}, "recover.lr": {"log": [1, 2]}})
    assert [line.split(": ")[0] for line in lines.splitlines()] == ["search.space.recover.rbn", "search.space.seed"]


@settings(law, max_examples=25)
@given(spaces)
def test_a_space_can_be_kept_with_a_searchers_state(space):
    again = pickle.loads(pickle.dumps(space.suggest)).__self__
    assert again.defaults() == space.defaults()
    assert again.apply(again.point(again.defaults())) == space.config


def test_optuna_takes_the_space_as_it_is():
    optuna = pytest.importorskip("optuna")
    from ray.tune.search.optuna import OptunaSearch

    space = catalogue_space(tuple(sorted(CATALOGUE)))
    searcher = OptunaSearch(
        space=space.suggest,
        metric="top1",
        mode="max",
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=3),
        points_to_evaluate=[space.defaults()],
    )
    points = []
    for number in range(12):
        params = searcher.suggest(str(number))
        points.append(space.point(params))
        config = space.apply(points[-1])
        searcher.on_trial_complete(
            str(number), {"top1": float(len(config.recover.bn_teachers)), "training_iteration": 1}
        )
    assert space.apply(points[0]) == space.config
    assert len({json.dumps(point) for point in points}) == 12
