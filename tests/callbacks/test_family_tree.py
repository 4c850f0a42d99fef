"""A family that is small enough to be worked out by hand."""

import io

import numpy as np
import pytest

from keras_gdopt.callbacks import family_tree
from keras_gdopt.callbacks.family_tree import Generation
from keras_gdopt.gadam import Lineage


@pytest.fixture
def family():
    """Two members over three generations; 3, 5 and 6 were born and died at once.

    start   0  1
    0       2  1      2 is a child of 0 and 1
    1       2  4      4 is a child of 2 twice
    2       7  4      7 is a child of 4 and 2
    """
    lineage = Lineage()
    for _ in range(2):
        lineage.born(0)
    survivors = [[0, 1], [2, 1], [2, 4], [7, 4]]
    parents = [[[0, 1], [1, 1]], [[2, 2], [2, 1]], [[4, 4], [4, 2]]]
    losses = {0: 4.0, 1: 3.0, 2: 1.0, 3: 9.0, 4: 2.0, 5: 9.0, 6: 9.0, 7: 0.5}
    for generation, of_children in enumerate(parents):
        for pair in of_children:
            lineage.born(
                generation + 1, parents=pair, crossover_probability=0.25, mutated_entries=3
            )
        before = [*survivors[generation], len(lineage) - 2, len(lineage) - 1]
        for identity in before:
            survives = identity in survivors[generation + 1]
            lineage.selected(identity, generation, losses[identity], survives)
    return lineage


GENERATIONS = [
    Generation(-1, [0, 1], [np.nan, np.nan]),
    Generation(0, [2, 1], [1.0, 3.0]),
    Generation(1, [2, 4], [1.0, 2.0]),
    Generation(2, [7, 4], [0.5, 2.0]),
]


def test_generations_are_ranked_by_fitness(family):
    found = family_tree.last_generations(family)
    assert [(g.number, g.identities) for g in found] == [
        (g.number, g.identities) for g in GENERATIONS
    ]
    assert found[1:] == GENERATIONS[1:]
    ranked = family_tree.ranked(3, [5, 6, 7, 8], [np.nan, 2.0, np.inf, 1.0])
    assert ranked.identities == [8, 6, 5, 7]


def test_only_the_last_generations_are_shown():
    lineage = Lineage()
    for identity in range(2):
        lineage.born(0)
        for generation in range(20):
            lineage.selected(identity, generation, 1.0 + identity, True)
    shown = family_tree.last_generations(lineage)
    assert [g.number for g in shown] == list(range(19 - family_tree.GENERATIONS, 20))


def test_shares_in_the_winners_weights(family):
    """7 has a quarter from 4, which is 2's alone, and the rest from 2; 2 a quarter from 0."""
    assert family_tree.shares(family, GENERATIONS) == [
        {0: 0.25, 1: 0.75},
        {2: 1.0},
        {4: 0.25, 2: 0.75},
        {7: 1.0},
    ]


def test_the_table_names_parents(family):
    assert family_tree.table(family, GENERATIONS[1]).splitlines()[2:] == [
        "| 1 | #2 | 1 | 0 | #0 × #1 | 25% | 3 |",
        "| 2 | #1 | 3 | the start | – | – | – |",
    ]
    assert len(family_tree.table(family, GENERATIONS[3], rows=1).splitlines()) == 3


def test_the_picture_leads_from_each_member_to_where_it_comes_from(family, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import collections
    from PIL import Image

    drawn = []

    class Spy(collections.LineCollection):
        def __init__(self, segments, **kwargs):
            drawn.append((segments, kwargs["linewidths"]))
            super().__init__(segments, **kwargs)

    monkeypatch.setattr(collections, "LineCollection", Spy)
    picture = Image.open(io.BytesIO(family_tree.drawn(family, GENERATIONS)))
    (lines, _), (highlighted, widths) = drawn
    xs = sorted({line[0][0] for line in lines} | {line[-1][0] for line in lines})
    ys = sorted({line[0][1] for line in lines} | {line[-1][1] for line in lines}, reverse=True)

    def members(line):
        """From and to whom a line leads."""
        ends = [(xs.index(x), ys.index(y)) for x, y in (line[0], line[-1])]
        return tuple(GENERATIONS[column].identities[rank] for column, rank in ends)

    assert [members(line) for line in lines] == [
        (0, 2), (1, 2), (1, 1),
        (2, 2), (2, 4),
        (4, 7), (2, 7), (4, 4),
    ]  # fmt: skip
    assert [members(line) for line in highlighted] == [
        (0, 2), (1, 2), (2, 2), (2, 4), (4, 7), (2, 7),
    ]  # fmt: skip
    # The width's part above the least one goes with the root of the share.
    parts = (np.array(widths) - 0.6) ** 2
    np.testing.assert_allclose(parts / parts[1], np.array([1, 3, 3, 1, 1, 3]) / 3)
    assert picture.format == "PNG"
    colors = {color[:3] for _, color in picture.convert("RGB").getcolors()}
    orange = np.array([0xE8, 0x59, 0x0C])
    assert min(np.abs(np.array(color) - orange).max() for color in colors) < 24
