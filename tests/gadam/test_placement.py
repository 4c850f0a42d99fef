"""Where members are trained: little moves, and no shard has too many."""

import math

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from keras_gdopt.gadam.cluster import placement

SIZES = [(8, 1), (8, 2), (10, 4), (16, 4), (9, 3), (64, 8)]


def _counts(placed, shards):
    return np.bincount(placed, minlength=shards)


@pytest.mark.parametrize(("size", "shards"), SIZES)
def test_as_many_as_possible_stay_at_home(size, shards, rng):
    capacity = math.ceil(size / shards)
    for _ in range(20):
        homes = rng.integers(0, shards, size).tolist()
        placed = placement.balanced(homes, shards, capacity)
        assert _counts(placed, shards).max() <= capacity
        stay = np.minimum(_counts(homes, shards), capacity).sum()
        assert np.sum(np.array(placed) == homes) == stay


@pytest.mark.parametrize(("size", "shards"), SIZES)
def test_children_are_put_where_least_has_to_be_moved(size, shards, rng):
    capacity = math.ceil(size / shards)
    moved = fewest = 0
    for _ in range(20):
        homes = rng.permutation(np.arange(size) % shards).tolist()
        parents = rng.integers(0, size, (size, 2)).tolist()
        placed = placement.of_children(parents, homes, shards, capacity)
        assert _counts(placed, shards).max() <= capacity
        cost = np.array(
            [[len({p for p in pair if homes[p] != shard}) for shard in range(shards)]
             for pair in parents]
        )  # fmt: skip
        moved += sum(cost[child, shard] for child, shard in enumerate(placed))
        places = np.repeat(cost, capacity, axis=1)
        fewest += places[linear_sum_assignment(places)].sum()
        assert placed == placement.of_children(parents, homes, shards, capacity)
    assert moved <= 1.1 * fewest
    assert moved <= 20 * size  # g members a generation, in the mean
