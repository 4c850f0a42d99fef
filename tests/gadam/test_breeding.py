"""Children of whole members: what comes from whom."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_gdopt.gadam import genetics, keys
from keras_gdopt.gadam.breeding import Breeding, Plan
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members

LOSSES = [3.0, 1.0, 2.0, np.nan, 5.0]
SIZE = len(LOSSES)


class Brood(NamedTuple):
    weights: list
    mutated_entries: np.ndarray
    plan: Plan


def _members():
    """Every entry of a member, and its state, is its number and 10."""
    numbers = tf.range(SIZE, dtype=tf.float32) + 10.0
    weights = [
        tf.tile(numbers[:, None, None], [1, 40, 50]),
        tf.tile(numbers[:, None], [1, 2000]),
    ]
    return Members(weights, [numbers, -numbers], [], tf.zeros(SIZE, tf.int64))


def _brood(mutation_rate=0.2, generation=3, seed=7, mutation="uniform"):
    breeding = Breeding(
        mutation_rate=mutation_rate, mutation=mutation, mutation_stddev=0.01, seed=seed
    )
    members = _members()
    plan = breeding.plan(LOSSES, generation)
    weights, mutated = breeding.children(plan, members.weights, members.weights)
    return Brood(weights, mutated, plan)


def test_entries_come_from_the_parents_or_are_mutated():
    brood = _brood()
    for child in range(SIZE):
        first, second = brood.plan.parents[child] + 10.0
        entries = np.concatenate([weight[child].numpy().flatten() for weight in brood.weights])
        assert np.all(np.isin(entries[entries >= 10.0], [first, second]))
        mutated = np.sum(entries < 10.0)
        assert mutated == brood.mutated_entries[child]
        rate = float(brood.plan.mutation_probabilities[child])
        assert abs(mutated - 4000 * rate) <= 5 * np.sqrt(4000 * rate * (1 - rate))
        if first != second:
            kept = entries[entries >= 10.0]
            share = float(brood.plan.crossover_probabilities[child])
            deviation = np.sqrt(share * (1 - share) / len(kept))
            assert abs(np.mean(kept == first) - share) <= 5 * deviation


def test_state_comes_whole_from_the_fitter_parent():
    found = set()
    for generation in range(6):
        brood = _brood(generation=generation)
        for child, (first, second) in enumerate(brood.plan.parents):
            fitter = first if LOSSES[first] <= LOSSES[second] else second
            assert brood.plan.fitter[child] == fitter
            found.add((first > second, LOSSES[first] < LOSSES[second]))
    assert len(found) >= 4  # either parent was the fitter one, in either order


def test_under_truncation_the_fitter_half_are_the_parents():
    """With Eq. 44-48 of their losses alone, 1, 2 and 3: see `test_genetics`, where they are
    worked by hand."""
    breeding = Breeding(
        mutation_rate=0.1, mutation="uniform", mutation_stddev=0.01, seed=7, selection="truncation"
    )
    of_member = {1: 0.50648039, 2: 0.30719589, 0: 0.18632372}
    weights = {1: 1.0, 2: np.exp(-0.5), 0: np.exp(-1.0)}
    chosen = np.zeros(SIZE)
    for generation in range(400):
        plan = breeding.plan(LOSSES, generation)
        for member in range(SIZE):
            assert abs(plan.probabilities[member] - of_member.get(member, 0.0)) < 1e-7
            chosen[member] += np.sum(plan.parents == member)
        for child, (i, j) in enumerate(plan.parents):
            expected = weights[i] / (weights[i] + weights[j])
            assert abs(plan.crossover_probabilities[child] - expected) < 1e-12
            expected = max(0.1 * (1 - of_member[i] - of_member[j]), 0.0)
            assert abs(plan.mutation_probabilities[child] - expected) < 1e-8
    # 4,000 draws: five deviations are at most 0.04.
    shares = [of_member.get(member, 0.0) for member in range(SIZE)]
    np.testing.assert_allclose(chosen / chosen.sum(), shares, atol=0.04)


def test_state_comes_from_the_first_of_parents_that_are_as_fit():
    breeding = Breeding(mutation_rate=0.0, mutation="uniform", mutation_stddev=0.01, seed=7)
    plan = breeding.plan([2.0] * SIZE, 3)
    assert any(first != second for first, second in plan.parents)
    np.testing.assert_array_equal(plan.fitter, plan.parents[:, 0])


def test_the_masks_of_variables_and_of_children_differ():
    brood = _brood(mutation_rate=1.0)
    masks = [np.stack([w[child].numpy().flatten() < 10.0 for w in brood.weights])
             for child in range(SIZE)]  # fmt: skip
    for child, mask in enumerate(masks):
        rate = float(brood.plan.mutation_probabilities[child])
        if 0.01 < rate < 0.99:
            assert np.any(mask[0] != mask[1])
            assert all(np.any(mask != other) for other in masks[:child])


def test_parents_and_masks_depend_on_seed_and_generation():
    def entries(**kwargs):
        return _brood(**kwargs).weights[1].numpy()

    np.testing.assert_array_equal(entries(), entries())
    assert np.any(entries() != entries(seed=8))
    assert np.any(entries() != entries(generation=4))


def test_a_child_can_be_made_from_its_own_key_alone():
    """As a worker does that has only the parents of some children."""
    brood, children = _brood(), [3, 1]
    breeding = Breeding(mutation_rate=0.2, mutation="uniform", mutation_stddev=0.01, seed=7)
    first, second = (
        [tf.gather(weight, brood.plan.parents[children, of]) for weight in _members().weights]
        for of in (0, 1)
    )
    alone, mutated = breeding.children(brood.plan, first, second, children)
    np.testing.assert_array_equal(mutated, brood.mutated_entries[children])
    for weight, received in zip(brood.weights, alone, strict=True):
        np.testing.assert_array_equal(tf.gather(weight, children), received)


def test_the_masks_are_those_of_the_children_s_keys():
    brood = _brood(mutation_rate=0.0)
    assert any(first != second for first, second in brood.plan.parents)  # else any mask would do
    for child in range(SIZE):
        first, second = (float(parent) + 10.0 for parent in brood.plan.parents[child])
        key = tf.constant(keys.key(7, 3, Phase.CROSS_OVER, child))
        for index, weight in enumerate(brood.weights):
            shape = weight.shape[1:]
            alone = genetics.crossover(
                tf.fill(shape, first),
                tf.fill(shape, second),
                brood.plan.crossover_probabilities[child],
                genetics.another_key(key, (index + 1) << 4),
            )
            np.testing.assert_array_equal(weight[child], alone)


def test_normal_mutations_have_the_given_deviation():
    brood = _brood(mutation_rate=1.0, mutation="normal")
    entries = np.concatenate([weight.numpy().flatten() for weight in brood.weights])
    mutated = entries[entries < 5.0]
    assert len(mutated) > 5000
    assert abs(mutated.std() / 0.01 - 1) < 0.05
