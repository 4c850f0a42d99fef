"""Arithmetic that update rules share, and the dtypes they compute in."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gdopt.tensor import Tensor

_SMALLEST_PART, _MOST_PARTS = 2**15, 8

Number = Any
"""A hyper-parameter: a Python number, or a scalar tensor for a member of a population."""


def is_known(number: Number) -> bool:
    """Whether a hyper-parameter already has its value when a step is traced."""
    return isinstance(number, (int, float))


def in_dtype(number: Number, dtype: Any) -> Number:
    """Makes a hyper-parameter usable with tensors of a dtype."""
    return number if is_known(number) else ops.cast(number, dtype)


def one_minus_power(base: Number, exponent: Tensor) -> Tensor:
    """Computes `1 - base**exponent` without the cancellation when the power is near 1.

    Args:
        base: In [0, 1).
        exponent: Floating-point tensor, at least 1.

    Returns:
        A tensor of the exponent's shape and dtype.
    """
    if is_known(base):
        log = math.log(base) if base > 0.0 else -math.inf
    else:
        log = ops.log(in_dtype(base, exponent.dtype))
    return -ops.expm1(exponent * log)


def moving_average(average: Tensor, value: Tensor, decay: Number) -> Tensor:
    """`decay * average + (1 - decay) * value`, with one operation fewer where that is exact."""
    if not is_known(decay) or decay < 0.5:  # the difference would swallow a small value
        return decay * average + (1 - decay) * value
    return average + (1 - decay) * (value - average)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together; their dtypes may differ."""
    dtype = common_dtype(tensors)
    return ops.sqrt(sum(sum_of_squares(ops.cast(tensor, dtype)) for tensor in tensors))


def sum_of_squares(tensor: Tensor) -> Tensor:
    """The sum of a tensor's squared entries."""
    parts, rest = cut_into_parts(ops.square(tensor))
    total = ops.sum(sum(parts[1:], start=parts[0]))
    return total if rest is None else total + ops.sum(rest)


def cut_into_parts(tensor: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Cuts a tensor that is to be reduced to a scalar into parts to combine entry by entry first.

    On a CPU, XLA reduces in a single thread, and slowly over several axes, but combines tensors
    entry by entry in all threads.

    Args:
        tensor: Of any shape and dtype.

    Returns:
        Vectors of equal length, and the entries that are left, if any. A small tensor is returned
        whole.
    """
    size = math.prod(tensor.shape) if None not in tuple(tensor.shape) else 0
    count = min(size // _SMALLEST_PART, _MOST_PARTS)
    if count < 2:
        return [tensor], None
    entries, length = ops.reshape(tensor, (size,)), size // count
    parts = [entries[i * length : (i + 1) * length] for i in range(count)]
    return parts, entries[count * length :] if size % count else None


def common_dtype(arrays: Iterable[Any]) -> str:
    """The dtype for computing with several arrays: float64 if one of them is, else float32."""
    dtypes = {keras.backend.standardize_dtype(array.dtype) for array in arrays}
    return "float64" if "float64" in dtypes else "float32"


def computation_dtype(variable_dtype: Any) -> str:
    """The dtype in which a variable's update is computed and its slots are held."""
    dtype = keras.backend.standardize_dtype(variable_dtype)
    return "float32" if dtype == "bfloat16" else dtype


def machine_epsilon(dtype: Any) -> float:
    """The distance from 1 to the next larger number of a dtype."""
    return float(np.finfo(keras.backend.standardize_dtype(dtype)).eps)


def constrain(constraint: Callable[[Tensor], Tensor] | None, value: Tensor) -> Tensor:
    """Applies a constraint to a value, if there is one."""
    return value if constraint is None else constraint(value)
