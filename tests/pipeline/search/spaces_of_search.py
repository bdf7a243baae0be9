"""A configuration with a search, for the tests of its space."""

from __future__ import annotations

from pipeline.loading import merge, resolve
from pipeline.search.space import make_space

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
    return make_space(configuration(space, rungs, **sections), WITH_BN, 10)


def when(conditions, **others):
    return {"recover.r_bn": {"log": [0.1, 100], "when": conditions}, **others}
