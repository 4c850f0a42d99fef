"""Tells whether gradients are finite, before a step uses them."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from keras_gdopt.optimizers.dense_step import is_sparse
from keras_gdopt.tensor import Tensor


def all_finite(gradients: Iterable[Any]) -> Tensor:
    """Whether all entries of all gradients are finite; a scalar.

    Args:
        gradients: Dense tensors or `tf.IndexedSlices`.
    """
    values = [gradient.values if is_sparse(gradient) else gradient for gradient in gradients]
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in values]))
