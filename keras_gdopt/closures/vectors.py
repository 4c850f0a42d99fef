"""Norms and angles of vectors whose squares over- or underflow; matrices from products."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_gdopt.tensor import Tensor


def norm(vector: Tensor) -> Tensor:
    """The Euclidean norm; finite whenever the exact norm is."""
    largest = tf.reduce_max(tf.abs(vector))
    scaled = tf.math.divide_no_nan(vector, largest)
    length = largest * tf.sqrt(tf.reduce_sum(scaled**2))
    # `reduce_max` need not return NaN where an entry is NaN; a sum does.
    return tf.where(tf.math.is_finite(largest), length, tf.reduce_sum(tf.abs(vector)))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of the angle between two vectors; 0 if either is 0."""
    return tf.reduce_sum(
        tf.math.divide_no_nan(one, norm(one)) * tf.math.divide_no_nan(other, norm(other))
    )


def symmetric_matrix(product: Callable[[Tensor], Tensor], size: int, dtype: Any) -> Tensor:
    """A symmetric matrix, from one product with a vector for each column.

    Args:
        product: The matrix times a vector.
        size: The size of the vector.
        dtype: The dtype of the vector.
    """
    columns = tf.map_fn(
        lambda place: product(tf.one_hot(place, size, dtype=dtype)),
        tf.range(size),
        fn_output_signature=tf.TensorSpec((size,), dtype),
    )
    return 0.5 * (columns + tf.transpose(columns))
