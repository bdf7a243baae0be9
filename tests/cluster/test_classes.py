"""Where images of a class lie, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.classes import ClassIndex

LABELS = st.lists(st.lists(st.integers(0, 4), max_size=20), max_size=6)


@given(LABELS)
def test_every_image_is_found_in_the_datas_order(labels):
    index = ClassIndex([np.array(column, dtype=np.int64) for column in labels], 5)
    for label in range(5):
        expected = [(s, r) for s, column in enumerate(labels) for r, found in enumerate(column) if found == label]
        assert index.count(label) == len(expected)
        assert [index.locate(label, i) for i in range(len(expected))] == expected


@given(LABELS, st.integers(0, 2**40), st.data())
def test_drawn_images_are_different_ones_of_the_class(labels, seed, data):
    index = ClassIndex([np.array(column, dtype=np.int64) for column in labels], 5)
    flat = ClassIndex([[label for column in labels for label in column]], 5)
    for label in range(5):
        number = data.draw(st.integers(0, index.count(label)))
        drawn = index.draw(label, number, seed, "test")
        assert len(set(drawn)) == number
        assert all(labels[shard][row] == label for shard, row in drawn)
        starts = np.cumsum([0, *map(len, labels)])
        assert [(0, int(starts[s]) + r) for s, r in drawn] == flat.draw(label, number, seed, "test")
        with pytest.raises(ValueError):
            index.draw(label, index.count(label) + 1, seed, "test")


def test_an_image_too_many_is_refused():
    index = ClassIndex([[0, 1], [1]], 3)
    with pytest.raises(IndexError, match="class 1 has 2 images"):
        index.locate(1, 2)
    assert index.count(2) == 0
