r"""The genetics of Gadam: one pure function for each equation of Zhang 2019, section 6.1.

All functions consist of TensorFlow operations with static shapes; they run on any device and
can be compiled. A random draw depends on a key, a pair of integers. It is an integer that is
compared with integer thresholds, so that parents, masks and mutated entries are the same,
compiled or not. (Philox gives the same 32 bits everywhere; the floats that TensorFlow and XLA
make of them differ.)
"""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_gdopt.tensor import Tensor

_ALL = 2.0**32  # the number of values of 32 bits


def normalized_losses(losses: Tensor) -> Tensor:
    r"""Scales fitness losses to the range from 0, the best, to 1, the worst (below Eq. 44).

    $$\hat L_i = (L_i - \min L) / (\max L - \min L)$$

    Args:
        losses: Fitness losses, of shape `(g,)`. At least one must be finite.

    Returns:
        A float64 tensor of shape `(g,)`: infinite for losses that are not finite, and 0 for the
        others if they are all equal.
    """
    losses = tf.cast(losses, tf.float64)
    finite = tf.math.is_finite(losses)
    infinity = tf.constant(np.inf, tf.float64)
    best = tf.reduce_min(tf.where(finite, losses, infinity))
    worst = tf.reduce_max(tf.where(finite, losses, -infinity))
    # Halved first, because the difference of two large losses may overflow.
    spread = worst / 2 - best / 2
    normalized = tf.math.divide_no_nan(losses / 2 - best / 2, spread)
    return tf.where(finite, normalized, infinity)


def selection_probabilities(losses: Tensor) -> Tensor:
    r"""The probability that each member is drawn as a parent (Eq. 45).

    $$P_i = \exp(-\hat L_i) / \sum_j \exp(-\hat L_j)$$

    Args:
        losses: Fitness losses, of shape `(g,)`. At least one must be finite.

    Returns:
        A float64 tensor of shape `(g,)`; 0 for losses that are not finite.
    """
    weights = tf.exp(-normalized_losses(losses))
    return weights / tf.reduce_sum(weights)


def truncated(losses: Tensor) -> Tensor:
    """Keeps the losses of the fitter half, and makes the others infinite (truncation selection).

    Half of an odd number is rounded up. Between equal losses the first one wins.

    Args:
        losses: Fitness losses, of shape `(g,)`.

    Returns:
        A tensor of the same dtype and shape.
    """
    is_fitter = _are_fittest(losses, (losses.shape[0] + 1) // 2)
    return tf.where(is_fitter, losses, tf.constant(np.inf, losses.dtype))


def chosen_parents(probabilities: Tensor, key: Tensor) -> Tensor:
    """Draws two parents, with replacement, for each of g children.

    A draw is an integer of 32 random bits; the cumulative probabilities, scaled to integers,
    divide their range among the members.

    Args:
        probabilities: The probability of each member, of shape `(g,)`.
        key: Two integers.

    Returns:
        The parents' indices, an int32 tensor of shape `(g, 2)`.
    """
    count = probabilities.shape[0]
    bounds = tf.cumsum(tf.cast(probabilities, tf.float64)) * _ALL
    # The last member that can be drawn gets what rounding left over.
    last = tf.reduce_max(tf.where(probabilities > 0, tf.range(count), 0))
    bounds = tf.where(tf.range(count) >= last, tf.constant(_ALL, tf.float64), bounds)
    bounds = tf.cast(tf.round(bounds), tf.int64)
    drawn = tf.cast(_bits((count, 2), key), tf.int64)
    return tf.reduce_sum(tf.cast(drawn[..., None] >= bounds, tf.int32), axis=-1)


def crossover_probabilities(losses: Tensor, parents: Tensor) -> Tensor:
    r"""The probability that an entry of a child comes from its first parent (Eq. 46).

    $$p = \exp(-\hat L_i) / (\exp(-\hat L_i) + \exp(-\hat L_j))$$

    Args:
        losses: The fitness losses of the g members.
        parents: The indices i and j of each child's parents, of shape `(children, 2)`.

    Returns:
        A float64 tensor of shape `(children,)`.
    """
    weights = tf.gather(tf.exp(-normalized_losses(losses)), parents)
    return weights[:, 0] / tf.reduce_sum(weights, axis=1)


def mutation_probabilities(mutation_rate: float, probabilities: Tensor, parents: Tensor) -> Tensor:
    r"""The probability that an entry of a child mutates (Eq. 48).

    $$p_q = p_{mut} \cdot (1 - P_i - P_j)$$

    Children of fit parents mutate less. If both parents are the same member, $P_i + P_j$ may
    exceed 1; the result is then 0.

    Args:
        mutation_rate: $p_{mut}$, from 0 to 1.
        probabilities: The members' selection probabilities.
        parents: The indices i and j of each child's parents, of shape `(children, 2)`.

    Returns:
        A float64 tensor of shape `(children,)`.
    """
    of_both = tf.reduce_sum(tf.gather(tf.cast(probabilities, tf.float64), parents), axis=1)
    return mutation_rate * tf.maximum(1.0 - of_both, 0.0)


def crossover(first: Tensor, second: Tensor, probability: Tensor, key: Tensor) -> Tensor:
    """Takes each entry from one parent or the other (Eq. 47).

    Args:
        first: An array of the first parent.
        second: The same array of the second parent.
        probability: The probability that an entry comes from the first parent, a scalar.
        key: Two integers.

    Returns:
        The child's array.
    """
    return tf.where(_happens(first.shape, probability, key), first, second)


def mean(first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    r"""Averages both parents, $p\,\theta_i + (1 - p)\,\theta_j$, in place of Eq. 47.

    Args:
        first: An array of the first parent.
        second: The same array of the second parent.
        probability: The weight p of the first parent (Eq. 46), a scalar.

    Returns:
        The child's array, in the same dtype.
    """
    # A sum in half precision would lose digits of the parents.
    dtype = first.dtype if first.dtype.size >= 4 else tf.float32
    p = tf.cast(probability, dtype)
    return tf.cast(p * tf.cast(first, dtype) + (1 - p) * tf.cast(second, dtype), first.dtype)


def mutate(
    weights: Tensor,
    probability: Tensor,
    key: Tensor,
    *,
    mutation: str = "uniform",
    stddev: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Replaces entries by random numbers (Eq. 49).

    Args:
        weights: An array of a child.
        probability: The probability that an entry mutates, a scalar.
        key: Two integers.
        mutation: `"uniform"` draws from U(0, 1), `"normal"` from N(0, `stddev`²).
        stddev: The standard deviation of the normal distribution.

    Returns:
        The new array, and the number of mutated entries, in int64.
    """
    happens = _happens(weights.shape, probability, key)
    dtype = weights.dtype if weights.dtype.size >= 4 else tf.float32  # holds 24 bits
    drawn = _uniform(weights.shape, another_key(key, 1), dtype)
    if mutation == "normal":
        # Box-Muller, with 1 - u in place of u, because u may be 0.
        angle = 2.0 * np.pi * _uniform(weights.shape, another_key(key, 2), dtype)
        drawn = stddev * tf.sqrt(-2.0 * tf.math.log1p(-drawn)) * tf.cos(angle)
    count = tf.reduce_sum(tf.cast(happens, tf.int64))
    return tf.where(happens, tf.cast(drawn, weights.dtype), weights), count


def surviving(parent_losses: Tensor, child_losses: Tensor) -> Tensor:
    """Selects the g fittest of g parents and their g children.

    A parent that survives keeps its place. Children that survive take the places of the parents
    that do not, in order. Between equal losses, parents go before children; losses that are not
    finite come last.

    Args:
        parent_losses: The parents' losses of one batch, of shape `(g,)`.
        child_losses: The children's losses of the same batch, of shape `(g,)`.

    Returns:
        An int32 tensor of shape `(g,)`: for each place the index of the parent that keeps it, or
        g plus the index of the child that takes it.
    """
    count = parent_losses.shape[0]
    survives = _are_fittest(tf.concat([parent_losses, child_losses], axis=0), count)
    parent_stays, child_comes = survives[:count], survives[count:]
    # The n-th free place goes to the n-th child that survives.
    free_before = tf.cumsum(tf.cast(~parent_stays, tf.int32), exclusive=True)
    children = tf.argsort(tf.where(child_comes, 0, 1), stable=True)
    return tf.where(parent_stays, tf.range(count), count + tf.gather(children, free_before))


def _are_fittest(losses: Tensor, count: int) -> Tensor:
    """Which losses are among the `count` lowest; those that are not finite come last."""
    losses = tf.where(tf.math.is_finite(losses), losses, tf.constant(np.inf, losses.dtype))
    fittest = tf.argsort(losses, stable=True)[:count]
    return tf.reduce_any(fittest[:, None] == tf.range(losses.shape[0]), axis=0)


def _bits(shape: Any, key: Tensor) -> Tensor:
    return tf.random.stateless_uniform(
        shape, key, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )


def _happens(shape: Any, probability: Tensor, key: Tensor) -> Tensor:
    """Draws where an event of this probability happens: nowhere at 0, everywhere at 1."""
    threshold = tf.cast(tf.round(tf.cast(probability, tf.float64) * _ALL), tf.int64)
    return tf.cast(_bits(shape, key), tf.int64) < threshold


def _uniform(shape: Any, key: Tensor, dtype: tf.DType) -> Tensor:
    """Draws from [0, 1), the same compiled or not, because 24 bits are exact in float32."""
    return tf.cast(tf.bitwise.right_shift(_bits(shape, key), 8), dtype) * 2.0**-24


def another_key(key: Tensor, number: int) -> Tensor:
    """Derives a key for another draw; as keys are random, no other draw has the same key."""
    return tf.bitwise.bitwise_xor(key, tf.constant([0, number], key.dtype))
