"""Linear systems with a damped matrix of second derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from keras_gdopt.closures.vectors import cosine, norm
from keras_gdopt.optimizers.arithmetic import machine_epsilon
from keras_gdopt.tensor import Tensor


class Solution(NamedTuple):
    """The solution of a damped system."""

    vector: Tensor
    product: Tensor
    """The undamped matrix times the vector."""
    iterations: Tensor
    """Iterations of conjugate gradient; int32."""


class DampedSystem(Protocol):
    """A symmetric positive semidefinite matrix, in any representation, and a right-hand side."""

    @property
    def largest(self) -> Tensor:
        """The largest entry of the diagonal, or an estimate of it."""

    def solve(self, damping: Tensor) -> Solution:
        """Solves with the matrix plus `damping` times the identity.

        Args:
            damping: A scalar above 0.
        """


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonal of a matrix."""
    return tf.linalg.diag_part(matrix)


def with_unit_diagonal(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The damped matrix scaled to a unit diagonal, and the scale of each weight.

    The scaled matrix, and so its rounding, depends neither on the units of the loss nor on those
    of the features.
    """
    damped = tf.linalg.set_diag(matrix, diagonal(matrix) + damping)
    curvatures = tf.abs(diagonal(damped))
    scale = tf.sqrt(tf.where(curvatures > 0, curvatures, 1.0))
    return damped / scale[:, None] / scale[None, :], scale


class DenseSystem:
    """A system with a dense matrix.

    If the damping is less than the rounding of the matrix scaled to a unit diagonal, it is raised
    to that rounding. If the damped matrix is not finite, or its curvature along the solution is
    not positive, the solution is NaN.

    Args:
        matrix: The matrix.
        right: The right-hand side.
    """

    def __init__(self, matrix: Tensor, right: Tensor) -> None:
        self._matrix = matrix
        self._right = right

    @property
    def largest(self) -> Tensor:
        """The largest entry of the diagonal."""
        return tf.reduce_max(diagonal(self._matrix))

    def solve(self, damping: Tensor) -> Solution:
        """See `DampedSystem`."""
        scaled, scale = with_unit_diagonal(self._matrix, damping)
        ridge = tf.maximum(_rounding(self._matrix) - damping / scale**2, 0.0)
        scaled = tf.linalg.set_diag(scaled, diagonal(scaled) + ridge)
        scaled, is_finite = _replace_non_finite(scaled)
        right = self._right / scale
        # Not by Cholesky decomposition: XLA's is slower than this on a CPU, and TensorFlow's raises
        # an error when it fails.
        solution = tf.linalg.solve(scaled, right[:, None])[:, 0]
        is_positive = is_finite & (tf.reduce_sum(right * solution) > 0)
        vector = tf.where(is_positive, solution / scale, np.nan)
        return Solution(vector, tf.linalg.matvec(self._matrix, vector), tf.constant(0))


class SystemOfRows:
    r"""A matrix JᵀHJ, where J has fewer rows than columns, and a right-hand side Jᵀu.

    $$(J^\top H J + \lambda I)^{-1} J^\top u = J^\top (H J J^\top + \lambda I)^{-1} u$$

    Args:
        rows: J, groups × rows of a group × columns.
        blocks: H, which couples the rows of a group: groups × rows of a group × rows of a group.
        right: u, groups × rows of a group.
    """

    def __init__(self, rows: Tensor, blocks: Tensor, right: Tensor) -> None:
        self._rows = tf.reshape(rows, [-1, rows.shape[2]])
        self._blocks = blocks
        self._right = tf.reshape(right, [-1])
        products = tf.matmul(self._rows, self._rows, transpose_b=True)
        self._matrix = self._weighted(products)

    @property
    def largest(self) -> Tensor:
        """The largest entry of the diagonal."""
        return tf.reduce_max(tf.reduce_sum(self._rows * self._weighted(self._rows), axis=0))

    def solve(self, damping: Tensor) -> Solution:
        """See `DampedSystem`."""
        least = _rounding(self._matrix) * tf.reduce_max(diagonal(self._matrix))
        ridge = tf.maximum(damping, least)
        damped = tf.linalg.set_diag(self._matrix, diagonal(self._matrix) + ridge)
        damped, is_finite = _replace_non_finite(damped)
        coefficients = tf.linalg.solve(damped, self._right[:, None])
        coefficients = tf.where(is_finite, coefficients, np.nan)
        vector = tf.matmul(self._rows, coefficients, transpose_a=True)
        product = tf.matmul(
            self._rows, self._weighted(tf.matmul(self._rows, vector)), transpose_a=True
        )
        return Solution(vector[:, 0], product[:, 0], tf.constant(0))

    def _weighted(self, matrix: Tensor) -> Tensor:
        groups = tf.reshape(matrix, [-1, self._blocks.shape[2], tf.shape(matrix)[1]])
        return tf.reshape(tf.matmul(self._blocks, groups), tf.shape(matrix))


class SystemOfProducts:
    """A matrix known only by its products with vectors; solved by conjugate gradient.

    If rounding hides the curvature along the right-hand side, the solution is NaN.

    Args:
        product: The matrix times a vector.
        right: The right-hand side.
        scale: An approximate diagonal of the matrix, used as a preconditioner.
        tolerance: The residual to stop at, as a fraction of the right-hand side.
        most: The most iterations.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        right: Tensor,
        scale: Tensor,
        *,
        tolerance: float,
        most: int,
    ) -> None:
        self._product = product
        self._right = right
        self._scale = scale
        self._tolerance = tolerance
        self._most = most

    @property
    def largest(self) -> Tensor:
        """An estimate of the largest entry of the diagonal."""
        return tf.reduce_max(self._scale)

    def solve(self, damping: Tensor) -> Solution:
        """See `DampedSystem`."""
        solution, is_curved = conjugate_gradient(
            self._product,
            self._right,
            damping,
            scale=self._scale + damping,
            tolerance=self._tolerance,
            most=self._most,
        )
        return solution._replace(vector=tf.where(is_curved, solution.vector, np.nan))


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    damping: Tensor,
    *,
    scale: Tensor,
    tolerance: Any,
    most: int,
) -> tuple[Solution, Tensor]:
    """Solves until the residual is small or the curvature along a direction is not positive.

    Args:
        product: The matrix times a vector.
        right: The right-hand side.
        damping: The multiple of the identity that is added to the matrix.
        scale: The diagonal of the preconditioner: about that of the damped matrix, or 1.
        tolerance: The residual to stop at, as a fraction of the right-hand side.
        most: The most iterations.

    Returns:
        The solution, and whether the curvature along the first search direction, that of
        steepest descent, is positive. If it is not, the solution is this direction.
    """
    # The solution is proportional to the right-hand side, so solve with one of length 1.
    length = norm(right)
    right = tf.math.divide_no_nan(right, length)
    epsilon = machine_epsilon(right.dtype)
    root = tf.sqrt(scale)

    def body(
        count: Tensor, ended: Tensor, is_curved: Tensor, vector: Tensor, its_product: Tensor,
        residual: Tensor, search: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        of_search = product(search)
        damped = of_search + damping * search
        square, curvature = tf.reduce_sum(residual**2 / scale), tf.reduce_sum(search * damped)
        # The angle does not depend on units. NaN needs its own test: TensorFlow's graph optimizer
        # turns `~(angle > epsilon)` into `angle <= epsilon`, which is false for NaN.
        angle = cosine(search * root, damped / root)
        is_flat = (angle <= epsilon) | tf.math.is_nan(angle)
        at_first = tf.equal(count, 0)
        part = tf.where(is_flat, tf.cast(at_first, square.dtype), square / curvature)
        vector += part * search
        its_product += part * of_search
        residual -= part * damped
        ended = is_flat | (norm(residual) <= tolerance)
        new_square = tf.reduce_sum(residual**2 / scale)
        search = residual / scale + new_square / square * search
        is_curved &= ~(at_first & is_flat)
        return count + 1, ended, is_curved, vector, its_product, residual, search

    zeros = tf.zeros_like(right)
    count, _, is_curved, vector, its_product, *_ = tf.while_loop(
        lambda count, ended, *_: ~ended & (count < most),
        body,
        (tf.constant(0), length <= 0, tf.constant(True), zeros, zeros, right, right / scale),
    )
    return Solution(length * vector, length * its_product, count), is_curved


def _replace_non_finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix, or the identity if it is not finite; and whether it is finite."""
    is_finite = tf.reduce_all(tf.math.is_finite(matrix))
    size = tf.shape(matrix)[0]
    return tf.where(is_finite, matrix, tf.eye(size, dtype=matrix.dtype)), is_finite


def _rounding(matrix: Tensor) -> Tensor:
    """The rounding of a decomposition of a matrix with a unit diagonal."""
    epsilon = machine_epsilon(matrix.dtype)
    return 4 * tf.cast(tf.shape(matrix)[0], matrix.dtype) * epsilon
