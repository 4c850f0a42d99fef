"""Systems of equations with a damped matrix of second derivatives."""

from typing import Any

import numpy as np
import tensorflow as tf

Tensor = Any


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonal of a matrix."""
    return tf.linalg.diag_part(matrix)


def with_unit_diagonal(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The damped matrix in units of each weight's own curvature, and these units.

    What is rounding in it depends neither on the units of the loss nor on those of features.
    """
    damped = tf.linalg.set_diag(matrix, diagonal(matrix) + damping)
    curvatures = tf.abs(diagonal(damped))
    scale = tf.sqrt(tf.where(curvatures > 0, curvatures, 1.0))
    return damped / scale[:, None] / scale[None, :], scale


def solve_damped(matrix: Tensor, damping: Tensor, right: Tensor, *, is_compiled: bool) -> Tensor:
    """The solution with a positive semidefinite matrix plus a multiple of the identity.

    Where the damping is less than rounding, it is of rounding's size in units of each weight's
    own curvature. Where the damped matrix is not positive definite, the solution is not finite.
    """
    scaled, scale = with_unit_diagonal(matrix, damping)
    least = 4 * matrix.shape[0] * np.finfo(matrix.dtype.as_numpy_dtype).eps
    ridge = tf.maximum(least - damping / scale**2, 0.0)
    scaled = tf.linalg.set_diag(scaled, diagonal(scaled) + ridge)
    right = right / scale
    if is_compiled:  # there a decomposition that fails returns NaN, and elsewhere it raises
        factor = tf.linalg.cholesky(scaled)
        return tf.linalg.cholesky_solve(factor, right[:, None])[:, 0] / scale
    values, vectors = tf.linalg.eigh(scaled)
    parts = tf.linalg.matvec(vectors, right, transpose_a=True) / values
    parts = tf.where(values > 0, parts, np.nan)
    return tf.linalg.matvec(vectors, parts) / scale
