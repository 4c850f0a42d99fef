"""Lookahead's formula for one weight, as pure functions."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_gdopt.optimizers.arithmetic import constrain
from keras_gdopt.tensor import Tensor


def start_slow_weight(weight: Tensor, slow: Tensor, where: Any) -> Tensor:
    """Sets the slow weight to the weight where a cycle begins.

    Args:
        weight: The fast weight.
        slow: The slow weight so far.
        where: Whether a cycle begins.
    """
    return ops.where(where, ops.cast(weight, slow.dtype), slow)


def synchronize_weight(
    weight: Tensor,
    slow: Tensor,
    slow_step_size: float,
    constraint: Callable[[Tensor], Tensor] | None,
    where: Any,
) -> tuple[Tensor, Tensor]:
    """Moves a slow weight towards the fast one, then sets the fast one to it.

    Args:
        weight: The fast weight.
        slow: The slow weight.
        slow_step_size: The step α.
        constraint: The weight's constraint.
        where: Whether to do so.

    Returns:
        The fast and the slow weight, each in its dtype.
    """
    fast = ops.cast(weight, slow.dtype)
    moved = constrain(constraint, slow + slow_step_size * (fast - slow))
    slow = ops.where(where, moved, slow)
    return ops.cast(ops.where(where, slow, fast), weight.dtype), slow


def final_weight(
    weight: Tensor, slow: Tensor, constraint: Callable[[Tensor], Tensor] | None, where: Any
) -> Tensor:
    """The weight that training ends with: the slow one.

    Args:
        weight: The fast weight.
        slow: The slow weight.
        constraint: The weight's constraint. A slow weight that never moved may violate it, as
            it is what training began with.
        where: Whether there is a slow weight.
    """
    weight = ops.convert_to_tensor(weight)
    return constrain(constraint, ops.where(where, ops.cast(slow, weight.dtype), weight))
