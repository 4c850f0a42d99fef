"""Eq. 44-50: numbers worked by hand, transcriptions, frequencies, and the same compiled."""

import numpy as np
import pytest
import tensorflow as tf

from keras_gdopt.gadam import genetics, keys
from keras_gdopt.gadam.keys import Phase
from tests.reference import gadam as reference

KEY = tf.constant(keys.key(1, 0, Phase.CROSS_OVER))


def _both(function, *args, **kwargs):
    """The results without and with XLA."""
    plain = tf.function(lambda *a: function(*a, **kwargs), jit_compile=False)
    compiled = tf.function(lambda *a: function(*a, **kwargs), jit_compile=True)
    return plain(*args), compiled(*args)


# --- the equations -----------------------------------------------------------------------


def test_probabilities_worked_by_hand():
    """L = 1, 2, 3 is 0, 1/2, 1 normalized; e^-1/2 = 0.60653066, e^-1 = 0.36787944."""
    losses, parents = tf.constant([1.0, 2.0, 3.0]), tf.constant([[0, 2], [2, 2], [1, 0]])
    chosen = genetics.selection_probabilities(losses)
    np.testing.assert_allclose(chosen, [0.50648039, 0.30719589, 0.18632372], rtol=1e-7)
    crossed = genetics.crossover_probabilities(losses, parents)
    np.testing.assert_allclose(crossed, [0.73105858, 0.5, 0.37754067], rtol=1e-7)
    mutated = genetics.mutation_probabilities(0.1, chosen, parents)
    np.testing.assert_allclose(mutated, [0.030719589, 0.062735256, 0.018632372], rtol=1e-7)


@pytest.mark.parametrize("count", [2, 5, 64])
def test_probabilities_equal_their_equations(count, rng):
    losses = rng.exponential(size=count)
    parents = rng.integers(count, size=(40, 2))
    chosen = genetics.selection_probabilities(tf.constant(losses))
    np.testing.assert_allclose(chosen, reference.selection_probabilities(losses), rtol=1e-13)
    crossed = genetics.crossover_probabilities(tf.constant(losses), parents)
    expected = [reference.crossover_probability(losses, i, j) for i, j in parents]
    np.testing.assert_allclose(crossed, expected, rtol=1e-13)
    mutated = genetics.mutation_probabilities(0.3, chosen, parents)
    expected = [reference.mutation_probability(0.3, losses, i, j) for i, j in parents]
    np.testing.assert_allclose(mutated, expected, rtol=1e-12)


def test_equal_losses_give_equal_chances():
    chosen = genetics.selection_probabilities(tf.constant([2.5, 2.5, 2.5, 2.5]))
    np.testing.assert_array_equal(chosen, [0.25] * 4)


def test_one_good_member_among_bad_ones():
    """The worst loss is 1 normalized, however far away it is: e to 1 against each."""
    chosen = genetics.selection_probabilities(tf.constant([1e-3, 1e30, 1e30, 1e30]))
    np.testing.assert_allclose(chosen[0] / chosen[1], np.e, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_never_chosen(bad):
    losses = tf.constant([1.0, bad, 3.0, bad])
    chosen = genetics.selection_probabilities(losses).numpy()
    np.testing.assert_allclose(chosen, [0.73105858, 0.0, 0.26894142, 0.0], rtol=1e-7)
    for number in range(50):
        key = tf.constant(keys.key(1, number, Phase.SELECT))
        assert set(np.unique(genetics.chosen_parents(chosen, key))) <= {0, 2}


def test_losses_near_the_largest_number_do_not_overflow():
    chosen = genetics.selection_probabilities(tf.constant([-1.7e308, 1.7e308], tf.float64))
    np.testing.assert_allclose(chosen[0] / chosen[1], np.e, rtol=1e-12)


def test_a_mutation_probability_is_never_negative():
    """A parent chosen twice, with a probability above one half."""
    chosen = tf.constant([0.7, 0.3], tf.float64)
    assert genetics.mutation_probabilities(1.0, chosen, tf.constant([[0, 0]])).numpy() == [0.0]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.0, 1.0, 3.0, 2.0], [np.inf, 1.0, np.inf, 2.0]),
        ([5.0, 1.0, 3.0, 2.0, 4.0], [np.inf, 1.0, 3.0, 2.0, np.inf]),
        ([2.0, 2.0, 2.0, 2.0], [2.0, 2.0, np.inf, np.inf]),
        ([np.nan, 7.0, -np.inf, np.inf], [np.inf, 7.0, np.inf, np.inf]),
        ([np.inf, np.nan, 6.0, 5.0], [np.inf, np.inf, 6.0, 5.0]),
    ],
)
def test_truncation_keeps_the_losses_of_the_fitter_half(losses, expected):
    for dtype in (tf.float32, tf.float64):
        for kept in _both(genetics.truncated, tf.constant(losses, dtype)):
            found = np.where(np.isfinite(kept), kept, np.inf)  # of them none can be a parent
            np.testing.assert_array_equal(found, expected)


# --- who survives ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "children", "expected"),
    [
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0, 1, 2]),
        ([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], [3, 4, 5]),
        ([1.0, 9.0, 8.0], [7.0, 0.5, 10.0], [0, 3, 4]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0, 1, 2]),
        ([np.nan, 1.0, np.inf], [2.0, np.nan, np.nan], [0, 1, 3]),
        ([np.nan, np.nan, 5.0], [np.nan, np.nan, np.nan], [0, 1, 2]),
    ],
)
def test_the_fittest_survive_and_children_come_where_parents_died(parents, children, expected):
    for places in _both(genetics.surviving, tf.constant(parents), tf.constant(children)):
        np.testing.assert_array_equal(places, expected)


def test_survivors_are_the_lowest_losses(rng):
    for _ in range(20):
        parents, children = rng.normal(size=(2, 9))
        places = genetics.surviving(tf.constant(parents), tf.constant(children)).numpy()
        both = np.concatenate([parents, children])
        np.testing.assert_array_equal(np.sort(both[places]), np.sort(both)[:9])
        stays = places < 9
        np.testing.assert_array_equal(places[stays], np.arange(9)[stays])
        assert len(set(places)) == 9


# --- frequencies -------------------------------------------------------------------------

ENTRIES = 10**6


def _within_five_deviations(count, probability, draws):
    """Fails by chance once in 1.7 million times. With a million draws a probability that is
    off by 0.005 (ten deviations at one half) is found with a probability above 0.9999997."""
    deviation = np.sqrt(draws * probability * (1 - probability))
    return abs(count - draws * probability) <= 5 * deviation


@pytest.mark.parametrize("probability", [0.5, 0.73105858, 0.05, 1 / 3])
def test_entries_come_from_the_first_parent_as_often_as_the_probability_says(probability):
    child = genetics.crossover(tf.ones(ENTRIES), tf.zeros(ENTRIES), probability, KEY)
    assert _within_five_deviations(float(tf.reduce_sum(child)), probability, ENTRIES)


@pytest.mark.parametrize("probability", [0.01, 0.3])
def test_entries_mutate_as_often_as_the_probability_says(probability):
    child, count = genetics.mutate(tf.fill([ENTRIES], 7.0), probability, KEY)
    assert int(count) == int(tf.reduce_sum(tf.cast(child != 7.0, tf.int32)))
    assert _within_five_deviations(int(count), probability, ENTRIES)


@pytest.mark.parametrize(("mutation", "mean", "stddev"), [("uniform", 0.5, 12**-0.5),
                                                           ("normal", 0.0, 0.25)])  # fmt: skip
def test_mutated_entries_have_their_distribution(mutation, mean, stddev):
    child, count = genetics.mutate(
        tf.fill([ENTRIES], 7.0), 1.0, KEY, mutation=mutation, stddev=0.25
    )
    child = child.numpy().astype("float64")
    assert int(count) == ENTRIES
    assert abs(child.mean() - mean) < 5 * stddev / np.sqrt(ENTRIES)
    assert abs(child.std() - stddev) < 5 * stddev / np.sqrt(ENTRIES)
    ordered = np.sort(child)
    if mutation == "uniform":
        assert ordered[0] >= 0.0
        assert ordered[-1] < 1.0
        expected = (np.arange(ENTRIES) + 0.5) / ENTRIES
    else:
        grid = np.linspace(-1.0, 1.0, 41)
        expected, ordered = _normal_cdf(grid / 0.25), np.searchsorted(ordered, grid) / ENTRIES
    # Kolmogorov and Smirnov's distance: above 0.0025 once in 100,000 times.
    assert np.max(np.abs(ordered - expected)) < 0.0025


def _normal_cdf(x):
    return 0.5 * (1 + tf.math.erf(tf.constant(x / np.sqrt(2.0))).numpy())


def test_mutations_of_bfloat16_weights_are_finite():
    weights = tf.zeros(ENTRIES, tf.bfloat16)
    for mutation in ("uniform", "normal"):
        child, _ = genetics.mutate(weights, 1.0, KEY, mutation=mutation)
        assert child.dtype == tf.bfloat16
        assert np.all(np.isfinite(child.numpy().astype("float32")))


@pytest.mark.parametrize("probability", [0.0, 1.0])
@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_what_is_impossible_never_happens_and_what_is_certain_always(
    bits, probability, monkeypatch
):
    """Not even with the least and the largest of the integers that are drawn."""
    monkeypatch.setattr(
        genetics, "_bits", lambda shape, key: tf.fill(shape, tf.constant(bits, tf.uint32))
    )
    first, second = tf.ones(ENTRIES), tf.zeros(ENTRIES)
    child = genetics.crossover(first, second, probability, KEY)
    np.testing.assert_array_equal(child, np.full(ENTRIES, probability))
    _, count = genetics.mutate(first, probability, KEY)
    assert int(count) == ENTRIES * probability


def test_parents_are_drawn_with_replacement_and_independently():
    probabilities = tf.constant([0.5, 0.3, 0.2], tf.float64)
    draws, table = 30_000, np.zeros((3, 3))
    drawn = tf.function(
        lambda ks: tf.map_fn(
            lambda key: genetics.chosen_parents(probabilities, key),
            ks,
            fn_output_signature=tf.int32,
        )
    )
    all_keys = np.stack([keys.key(3, number, Phase.SELECT) for number in range(draws // 3)])
    for i, j in drawn(tf.constant(all_keys)).numpy().reshape(-1, 2):
        table[i, j] += 1
    for i, first in enumerate(probabilities.numpy()):
        for j, second in enumerate(probabilities.numpy()):
            assert _within_five_deviations(table[i, j], first * second, draws)


# --- keys --------------------------------------------------------------------------------


def test_compiled_or_not_the_same_parents_masks_and_mutations(rng):
    a, b = tf.constant(rng.normal(size=(2, 37, 5)).astype("float32"))
    probabilities = genetics.selection_probabilities(tf.constant(rng.normal(size=32)))
    np.testing.assert_array_equal(*_both(genetics.chosen_parents, probabilities, KEY))
    np.testing.assert_array_equal(*_both(genetics.crossover, a, b, tf.constant(0.4), KEY))
    (plain, count), (compiled, compiled_count) = _both(genetics.mutate, a, tf.constant(0.4), KEY)
    np.testing.assert_array_equal(plain, compiled)
    assert int(count) == int(compiled_count)
    (plain, _), (compiled, _) = _both(genetics.mutate, a, tf.constant(0.4), KEY, mutation="normal")
    np.testing.assert_array_equal(plain == a, compiled == a)
    np.testing.assert_allclose(plain, compiled, rtol=1e-5, atol=1e-6)


def test_each_key_gives_other_draws():
    found = {
        tuple(keys.key(seed, generation, phase, member))
        for seed in (0, 1)
        for generation in range(3)
        for phase in Phase
        for member in range(4)
    }
    assert len(found) == 2 * 3 * len(Phase) * 4
    assert tuple(keys.key(5, 2, Phase.MUTATE, 1)) == tuple(keys.key(5, 2, Phase.MUTATE, 1))


def test_masks_of_other_keys_are_independent():
    first, second = tf.ones(ENTRIES), tf.zeros(ENTRIES)
    masks = [
        genetics.crossover(first, second, 0.5, genetics.another_key(KEY, number)).numpy()
        for number in (0, 16, 32)
    ]
    for i in range(3):
        for j in range(i):
            assert _within_five_deviations(np.sum(masks[i] == masks[j]), 0.5, ENTRIES)
