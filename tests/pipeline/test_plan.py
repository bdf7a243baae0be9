"""The work plan: a pure function of configuration and seed, with the published counts."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.loading import load_config, resolve
from pipeline.plan import make_plan, passes_per_step, save_plan, with_sources

ZOO = ["resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5", "alexnet"]


def published(**recover):
    return resolve(
        {
            "recipe": "prism_published",
            "out": "x",
            "data": {"image_size": 224, "num_classes": 1000},
            "teachers": {name: {"arch": f"torchvision:{name}"} for name in ZOO},
            "recover": recover,
        }
    )


def test_imagenet_example_is_the_published_plan():
    config = load_config("examples/imagenet1k.yaml")
    units = make_plan(config, 1000)
    assert len(units) == 100
    assert [u.iterations for u in units if u.chunk == 0] == [
        4000,
        3500,
        3000,
        2500,
        2000,
        1500,
        1000,
        500,
        4000,
        3500,
    ]
    assert sum(u.iterations for u in units if u.chunk == 3) == 25_500
    assert all(len(u.classes) == 100 for u in units)
    assert list(config.teachers) == ZOO


@pytest.mark.parametrize(("ipc", "steps"), [(10, 25_500), (50, 115_500), (100, 229_000), (200, 450_000)])
def test_stagger_sums_of_the_literature(ipc, steps):
    units = make_plan(published(ipc=ipc), 100)
    assert sum(u.iterations for u in units) == steps


def test_subsets_follow_the_published_law():
    units = make_plan(published(ipc=4000), 100)
    extras = [tuple(u.bn_teachers[1:]) for u in units]
    assert {u.bn_teachers[0] for u in units} == {"resnet18"}
    assert all(len(set(e)) == len(e) and "resnet18" not in e for e in extras)
    n = len(units)
    # Binomial(3, ½) extras; each of the four others with probability 1.5 / 4.
    for k, p in enumerate([1 / 8, 3 / 8, 3 / 8, 1 / 8]):
        assert abs(sum(len(e) == k for e in extras) / n - p) < 4 * np.sqrt(p * (1 - p) / n)
    for name in ZOO[1:]:
        assert abs(sum(name in e for e in extras) / n - 0.375) < 4 * np.sqrt(0.375 * 0.625 / n)
    assert len({frozenset(e) for e in extras}) == 15


def test_a_subset_belongs_to_its_index_not_to_chunk_or_count():
    few, many = make_plan(published(ipc=3), 1000), make_plan(published(ipc=20), 1000)
    assert [u for u in many if u.ipc < 3] == few
    for _, same in itertools.groupby(many, key=lambda u: u.ipc):
        assert len({tuple(u.bn_teachers) for u in same}) == 1


def test_seeds_differ_between_units_and_runs():
    config = published(ipc=20)
    seeds = [u.seed for u in make_plan(config, 1000)]
    assert len(set(seeds)) == len(seeds)
    other = config.model_copy(update={"seed": 1})
    assert not set(seeds) & {u.seed for u in make_plan(other, 1000)}


def test_last_chunk_holds_the_rest():
    units = make_plan(published(ipc=1, chunk=30), 100)
    assert [len(u.classes) for u in units] == [30, 30, 30, 10]
    assert list(itertools.chain(*(u.classes for u in units))) == list(range(100))


@pytest.mark.parametrize("selection", ["fixed", "per_step", "round_robin"])
def test_other_selections_carry_the_pool(selection):
    names = {"logit_teachers": ZOO} if selection == "round_robin" else {}
    units = make_plan(published(ipc=4, selection=selection, **names), 100)
    assert all(u.bn_teachers == ZOO for u in units)


def test_expected_passes():
    config = published(ipc=1, selection="per_step")
    share = passes_per_step(make_plan(config, 10)[0], config)
    assert share["resnet18"] == 1
    assert all(share[n] == pytest.approx(0.375) for n in ZOO[1:])
    config = published(ipc=1, selection="round_robin", logit_teachers=ZOO)
    assert sum(passes_per_step(make_plan(config, 10)[0], config).values()) == pytest.approx(1)


def test_sources_are_the_ith_images_in_data_order():
    config = published(ipc=2, chunk=2)
    labels = [[0, 0, 1], [1, 2, 2, 2]]
    units = with_sources(make_plan(config, 3), labels, 3)
    found = {(u.ipc, c): s for u in units for c, s in zip(u.classes, u.sources, strict=True)}
    assert found == {
        (0, 0): (0, 0),
        (1, 0): (0, 1),
        (0, 1): (0, 2),
        (1, 1): (1, 0),
        (0, 2): (1, 1),
        (1, 2): (1, 2),
    }


def test_plan_file_has_a_row_per_unit(tmp_path):
    units = make_plan(published(ipc=3), 1000)
    save_plan(str(tmp_path), units)
    rows = pq.read_table(tmp_path / "plan.parquet").to_pylist()
    assert [r["unit"] for r in rows] == [u.id for u in units]
    assert collections.Counter(r["iterations"] for r in rows) == {4000: 10, 3500: 10, 3000: 10}
    save_plan(str(tmp_path / "again"), units)
    assert (tmp_path / "plan.parquet").read_bytes() == (tmp_path / "again" / "plan.parquet").read_bytes()
