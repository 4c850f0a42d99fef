r"""The genetics of Gadam: one pure function for each equation of Zhang 2019, section 6.1.

All are made of TensorFlow operations with static shapes, run on any device, and compile.
What is random is drawn from a key, a pair of integers: as whole numbers that are compared
with whole thresholds, so that parents, masks and mutated entries are the same, compiled or
not. (Philox gives the same 32 bits everywhere; the floats that TensorFlow and XLA make of
them differ.)
"""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_gdopt.tensor import Tensor

_ALL = 2.0**32  # as many numbers as 32 bits can be


def normalized_losses(losses: Tensor) -> Tensor:
    r"""The fitness losses between 0, the best, and 1 (below Eq. 44).

    $$\hat L_i = (L_i - \min L) / (\max L - \min L)$$

    Args:
        losses: Fitness losses, of shape `(g,)`. At least one must be finite.

    Returns:
        In float64; all 0 where all finite losses are equal, and infinite for a loss that
        is not finite.
    """
    losses = tf.cast(losses, tf.float64)
    finite = tf.math.is_finite(losses)
    infinity = tf.constant(np.inf, tf.float64)
    best = tf.reduce_min(tf.where(finite, losses, infinity))
    worst = tf.reduce_max(tf.where(finite, losses, -infinity))
    # Halves: the difference of two large losses may be above the largest number.
    spread = worst / 2 - best / 2
    normalized = tf.math.divide_no_nan(losses / 2 - best / 2, spread)
    return tf.where(finite, normalized, infinity)


def selection_probabilities(losses: Tensor) -> Tensor:
    r"""The probability that each member is chosen as a parent (Eq. 45).

    $$P_i = \exp(-\hat L_i) / \sum_j \exp(-\hat L_j)$$

    Args:
        losses: Fitness losses, of shape `(g,)`. At least one must be finite.

    Returns:
        In float64, of shape `(g,)`; 0 for a loss that is not finite.
    """
    weights = tf.exp(-normalized_losses(losses))
    return weights / tf.reduce_sum(weights)


def truncated(losses: Tensor) -> Tensor:
    """The losses of the fitter half, and infinity for the others (truncation selection).

    The half of an odd number is rounded up; of equal losses the first goes before the others.

    Args:
        losses: Fitness losses, of shape `(g,)`.

    Returns:
        In the same dtype and shape.
    """
    is_fitter = _are_fittest(losses, (losses.shape[0] + 1) // 2)
    return tf.where(is_fitter, losses, tf.constant(np.inf, losses.dtype))


def chosen_parents(probabilities: Tensor, key: Tensor) -> Tensor:
    """Two parents for each of g children, drawn with replacement.

    Args:
        probabilities: Of each member, of shape `(g,)`.
        key: Two integers.

    Returns:
        The members' indices, in int32 and of shape `(g, 2)`.
    """
    count = probabilities.shape[0]
    bounds = tf.cumsum(tf.cast(probabilities, tf.float64)) * _ALL
    # The last one with a chance takes what rounding left over.
    last = tf.reduce_max(tf.where(probabilities > 0, tf.range(count), 0))
    bounds = tf.where(tf.range(count) >= last, tf.constant(_ALL, tf.float64), bounds)
    bounds = tf.cast(tf.round(bounds), tf.int64)
    drawn = tf.cast(_bits((count, 2), key), tf.int64)
    return tf.reduce_sum(tf.cast(drawn[..., None] >= bounds, tf.int32), axis=-1)


def crossover_probabilities(losses: Tensor, parents: Tensor) -> Tensor:
    r"""The probability that an entry of a child comes from its first parent (Eq. 46).

    $$p = \exp(-\hat L_i) / (\exp(-\hat L_i) + \exp(-\hat L_j))$$

    Args:
        losses: Fitness losses of the g members.
        parents: Indices i and j, of shape `(children, 2)`.

    Returns:
        In float64, of shape `(children,)`.
    """
    weights = tf.gather(tf.exp(-normalized_losses(losses)), parents)
    return weights[:, 0] / tf.reduce_sum(weights, axis=1)


def mutation_probabilities(mutation_rate: float, probabilities: Tensor, parents: Tensor) -> Tensor:
    r"""The probability that an entry of a child mutates (Eq. 48).

    $$p_q = p_{mut} \cdot (1 - P_i - P_j)$$

    Children of fit parents mutate less. With one parent twice $P_i + P_j$ may be above 1;
    the result is never below 0.

    Args:
        mutation_rate: $p_{mut}$, from 0 to 1.
        probabilities: The members' selection probabilities.
        parents: Indices i and j, of shape `(children, 2)`.

    Returns:
        In float64, of shape `(children,)`.
    """
    of_both = tf.reduce_sum(tf.gather(tf.cast(probabilities, tf.float64), parents), axis=1)
    return mutation_rate * tf.maximum(1.0 - of_both, 0.0)


def crossover(first: Tensor, second: Tensor, probability: Tensor, key: Tensor) -> Tensor:
    """Takes each entry from one parent or the other (Eq. 47).

    Args:
        first: An array of the first parent.
        second: The array of the second one, of the same shape.
        probability: That an entry comes from the first, a scalar.
        key: Two integers.

    Returns:
        The child's array.
    """
    return tf.where(_happens(first.shape, probability, key), first, second)


def mean(first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    r"""Weighs both parents, $p\,\theta_i + (1 - p)\,\theta_j$, in place of Eq. 47.

    Args:
        first: An array of the first parent.
        second: The array of the second one, of the same shape.
        probability: p, that of `crossover`, a scalar.

    Returns:
        The child's array, in the same dtype.
    """
    # In half precision the sum would lose digits that the parents have.
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
        probability: That an entry mutates, a scalar.
        key: Two integers.
        mutation: `"uniform"` draws from U(0, 1), `"normal"` from N(0, `stddev`²).
        stddev: Standard deviation of the normal distribution.

    Returns:
        The new array, and how many entries mutated, in int64.
    """
    happens = _happens(weights.shape, probability, key)
    dtype = weights.dtype if weights.dtype.size >= 4 else tf.float32  # 24 bits
    drawn = _uniform(weights.shape, another_key(key, 1), dtype)
    if mutation == "normal":
        # Box and Muller's: of 1 - u, so that no logarithm is of 0.
        angle = 2.0 * np.pi * _uniform(weights.shape, another_key(key, 2), dtype)
        drawn = stddev * tf.sqrt(-2.0 * tf.math.log1p(-drawn)) * tf.cos(angle)
    count = tf.reduce_sum(tf.cast(happens, tf.int64))
    return tf.where(happens, tf.cast(drawn, weights.dtype), weights), count


def surviving(parent_losses: Tensor, child_losses: Tensor) -> Tensor:
    """The g fittest of g parents and their g children.

    A parent stays where it is; children come, in their order, where parents died.
    Between equal losses a parent goes before a child, and a loss that is not finite comes
    after all that are.

    Args:
        parent_losses: On one batch, of shape `(g,)`.
        child_losses: On the same batch, of shape `(g,)`.

    Returns:
        For each place an index, in int32 and of shape `(g,)`: below g that of the parent
        there, else g plus a child's.
    """
    count = parent_losses.shape[0]
    survives = _are_fittest(tf.concat([parent_losses, child_losses], axis=0), count)
    parent_stays, child_comes = survives[:count], survives[count:]
    # The n-th place that is free takes the n-th child that survives.
    free_before = tf.cumsum(tf.cast(~parent_stays, tf.int32), exclusive=True)
    children = tf.argsort(tf.where(child_comes, 0, 1), stable=True)
    return tf.where(parent_stays, tf.range(count), count + tf.gather(children, free_before))


def _are_fittest(losses: Tensor, count: int) -> Tensor:
    """Which losses are the `count` lowest, those that are not finite behind all others."""
    losses = tf.where(tf.math.is_finite(losses), losses, tf.constant(np.inf, losses.dtype))
    fittest = tf.argsort(losses, stable=True)[:count]
    return tf.reduce_any(fittest[:, None] == tf.range(losses.shape[0]), axis=0)


def _bits(shape: Any, key: Tensor) -> Tensor:
    return tf.random.stateless_uniform(
        shape, key, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )


def _happens(shape: Any, probability: Tensor, key: Tensor) -> Tensor:
    """Where something happens that has a probability: never at 0, always at 1."""
    threshold = tf.cast(tf.round(tf.cast(probability, tf.float64) * _ALL), tf.int64)
    return tf.cast(_bits(shape, key), tf.int64) < threshold


def _uniform(shape: Any, key: Tensor, dtype: tf.DType) -> Tensor:
    """From [0, 1), the same number compiled or not: 24 bits are exact in float32."""
    return tf.cast(tf.bitwise.right_shift(_bits(shape, key), 8), dtype) * 2.0**-24


def another_key(key: Tensor, number: int) -> Tensor:
    """A key for another draw: keys are themselves random, so it is nobody else's."""
    return tf.bitwise.bitwise_xor(key, tf.constant([0, number], key.dtype))
