"""Every mistake in a space or a rung is one sentence, said before anything starts."""

from __future__ import annotations

import pytest
from spaces_of_search import R_BN, WITH_BN, configuration, space_of, when

from cluster.errors import UserError
from pipeline.search.fields import FIXED
from pipeline.search.space import make_space


def refusal(space, rungs=None, **sections):
    with pytest.raises(UserError) as error:
        space_of(space, rungs, **sections)
    assert error.value.exit_code == 2
    return str(error.value)


ROBIN = {"selection": "round_robin", "logit_teachers": ["conv", "res"]}
OWN = "the configuration itself, which is trial 0, has"


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"recover.rbn": {"log": [1, 9]}}, "recover.rbn: unknown field; did you mean recover.r_bn?"),
        ({"r_bn": {"log": [1, 9]}}, "r_bn: unknown field; did you mean recover.r_bn?"),
        ({"relabel.chunk": {"choice": [1]}}, "relabel.chunk: unknown field; did you mean recover.chunk?"),
        ({"xyz": {"choice": [1]}}, "xyz: unknown field; a field is named by its whole path, e.g. recover.r_bn"),
        ({"relabel": {"choice": [1]}}, "relabel: is a section; name one of its fields, e.g. relabel.teachers"),
        (
            {"recover.statistics": {"choice": ["global"]}},
            "recover.statistics is reserved and not built in this version; remove it",
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
            10,
        )
    assert str(error.value) == (
        "search.space.recover.bn_teachers: no teacher has BatchNorm layers, so the pool is empty; remove it"
    )
    with pytest.raises(UserError, match="search: is not given; say what to vary"):
        make_space(configuration(), WITH_BN, 10)


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
        ({"recover.match": "bn"}, "recover.match is reserved and not built in this version; remove it"),
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


HOW_MANY = (
    "it must be a whole number from 2 to 10, which is how many the data have; correct it, or leave it out for all"
)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1, "1"), (-3, "-3"), (11, "11"), (2.0, "2.0"), ("2", "'2'"), (True, "true"), (None, "null"), ([2], "[2]")],
)
def test_a_rungs_classes_are_some_of_the_datas(count, shown):
    assert refusal(R_BN, [{"classes": count}, {}]) == f"search.rungs.0.classes: {shown} is given, but {HOW_MANY}"


def test_a_rungs_classes_do_not_fall():
    assert refusal(R_BN, [{"classes": 5}, {"recover.ipc": 1, "classes": 4}]) == (
        "search.rungs.1.classes: 4 is less than the 5 of the rung before, but rungs go from cheap to dear; raise it or "
        "change their order"
    )
    assert "search.rungs.1.classes: 9 is less than the 10 of the rung before" in refusal(R_BN, [{}, {"classes": 9}])
    for rungs in ([{"classes": 2}, {"classes": 2}, {"classes": 10}], [{}, {"classes": 10}], [{"classes": 4}]):
        space_of(R_BN, rungs)


def test_classes_stand_beside_other_mistakes_and_are_no_field():
    lines = refusal(R_BN, [{"classes": 11, "recover.iteration": 5}]).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["search.rungs.0.recover.iteration", "search.rungs.0.classes"]
    assert refusal({"classes": {"choice": [2, 3]}}).startswith("search.space.classes: unknown field")


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
