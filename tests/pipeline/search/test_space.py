"""The space of a search: every point is a valid configuration, and what of it counts."""

from __future__ import annotations

import functools
import json
import pickle
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces_of_search import R_BN, WITH_BN, configuration, space_of, when

from cluster.rng import generator
from pipeline.loading import InvalidConfig, plain
from pipeline.search.fields import variable_paths
from pipeline.search.space import overrides


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
law = settings(max_examples=100)


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
recover: ipc logit_teachers bn_teachers selection include_prob max_bn_teachers first_bn_multiplier var_weight bn_norm
    r_bn chunk init iterations stagger stagger.drop stagger.modulo lr betas crop crop.min_scale flip roll batch_augment
    precision
relabel: teachers ensemble priors priors.res priors.conv priors.mob priors.plain.v1 mix mix.kind mix.alpha epochs batch
    crop crop.min_scale flip precision
evaluate.protocol: loss ce_weight temperature optimizer lr momentum weight_decay batch schedule zeta ema precision
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
