"""Lengths and angles of vectors whose squares over- or underflow, and matrices by products."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_gdopt.tensor import Tensor


def norm(vector: Tensor) -> Tensor:
    """The Euclidean norm; finite if the result is."""
    largest = tf.reduce_max(tf.abs(vector))
    scaled = tf.math.divide_no_nan(vector, largest)
    length = largest * tf.sqrt(tf.reduce_sum(scaled**2))
    # A NaN is no maximum.
    return tf.where(tf.math.is_finite(largest), length, tf.reduce_sum(tf.abs(vector)))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of the angle between two vectors; 0 if one is 0."""
    return tf.reduce_sum(
        tf.math.divide_no_nan(one, norm(one)) * tf.math.divide_no_nan(other, norm(other))
    )


def symmetric_matrix(product: Callable[[Tensor], Tensor], size: int, dtype: Any) -> Tensor:
    """The matrix of which only products are known, from one for each of its columns.

    Args:
        product: The matrix times a vector.
        size: Of the vector.
        dtype: Of the vector.
    """
    columns = tf.map_fn(
        lambda place: product(tf.one_hot(place, size, dtype=dtype)),
        tf.range(size),
        fn_output_signature=tf.TensorSpec((size,), dtype),
    )
    return 0.5 * (columns + tf.transpose(columns))
