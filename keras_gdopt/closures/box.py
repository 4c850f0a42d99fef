"""Bounds of all weights, as vectors."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.constraints import Bounds
from keras_gdopt.tensor import Tensor


class Box:
    """Lower and upper bounds of the weights.

    Args:
        lower: A vector, -∞ where there is no bound.
        upper: A vector, ∞ where there is no bound.
    """

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self._lower = lower
        self._upper = upper

    def projected(self, weights: Tensor) -> Tensor:
        """The nearest weights in the box."""
        return tf.minimum(tf.maximum(weights, self._lower), self._upper)

    def leads_out(self, weights: Tensor, direction: Tensor) -> Tensor:
        """For each weight, whether it is at a bound and the direction leads beyond it."""
        return ((weights <= self._lower) & (direction < 0)) | (
            (weights >= self._upper) & (direction > 0)
        )

    def inward(self, weights: Tensor, direction: Tensor) -> Tensor:
        """A direction with 0 where it leads out of the box at once."""
        return tf.where(self.leads_out(weights, direction), tf.zeros_like(direction), direction)


def is_box(constraint: Any) -> bool:
    """Whether a variable's constraint bounds it, as `Bounds` and `NonNeg` do."""
    return isinstance(constraint, Bounds) or type(constraint) is keras.constraints.NonNeg


def box_of(variables: Sequence[Any], is_frozen: Sequence[bool], dtype: Any) -> Box | None:
    """The bounds of variables that have no other constraints; `None` if none has bounds."""
    constraints = [
        None if frozen else variable.constraint
        for variable, frozen in zip(variables, is_frozen, strict=True)
    ]
    if all(constraint is None for constraint in constraints):
        return None
    limits: list[Sequence[np.ndarray]] = []
    for variable, bounds in zip(variables, constraints, strict=True):
        if bounds is None:
            bounds = Bounds(lower=-np.inf)
        elif not isinstance(bounds, Bounds):
            bounds = Bounds(lower=0.0)
        limits.append([np.ravel(limit) for limit in bounds.limits(tuple(variable.shape))])
    lower, upper = (
        tf.constant(np.concatenate(parts), dtype) for parts in zip(*limits, strict=True)
    )
    return Box(lower, upper)
