"""Tells whether gradients are finite, before a step uses them."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import common_dtype, cut_into_parts
from keras_gdopt.optimizers.dense_step import is_sparse, total_square
from keras_gdopt.tensor import Tensor


def has_finite_norm(gradients: Sequence[Any]) -> Tensor:
    """Whether the norm of all gradients together is finite; a scalar.

    In float32 it is not where entries are above 1e19, even if all are finite. Clipping by the norm
    would then turn them into NaN.

    Args:
        gradients: Dense tensors or `tf.IndexedSlices`; at least one.
    """
    # Twice the square, as dense gradients and rows are looked at in turn, and clipped together.
    return tf.math.is_finite(2.0 * total_square(gradients, common_dtype(gradients)))


def all_finite(gradients: Sequence[Any]) -> Tensor:
    """Whether all entries of all gradients are finite; a scalar.

    Args:
        gradients: Dense tensors or `tf.IndexedSlices`; at least one.
    """
    return tf.reduce_all(tf.stack([_is_finite(gradient) for gradient in gradients]))


def all_finite_by_squares(gradients: Sequence[Tensor]) -> Tensor:
    """As `all_finite`, with fewer operations, for small dense gradients outside of XLA.

    A sum of squares is one operation. Where it overflows, gradients may still be finite.
    """
    square = tf.add_n([tf.cast(tf.nn.l2_loss(value), tf.float32) for value in gradients])
    return tf.cond(
        tf.math.is_finite(square), lambda: tf.constant(True), lambda: all_finite(gradients)
    )


def _is_finite(gradient: Any) -> Tensor:
    """Whether all entries of one gradient are finite."""
    if is_sparse(gradient):
        return tf.reduce_all(tf.math.is_finite(gradient.values))
    parts, rest = cut_into_parts(tf.math.is_finite(gradient))
    found = tf.reduce_all(functools.reduce(operator.and_, parts))
    return found if rest is None else found & tf.reduce_all(rest)
