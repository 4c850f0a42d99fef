"""Gradients of embeddings: merges repeated rows, and steps single rows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import computation_dtype
from keras_gdopt.optimizers.dense_step import decayed_part
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


class RowStep(NamedTuple):
    """The result of a step on some rows of a variable."""

    change: Tensor
    """What the rule adds to the rows, without weight decay."""
    moved: Tensor
    """What the step adds to the rows, weight decay included."""
    slots: dict[str, Tensor]


def merge_rows(gradient: tf.IndexedSlices, variable_dtype: Any) -> tf.IndexedSlices:
    """Sums the repeated rows of a gradient.

    Args:
        gradient: Its rows may repeat.
        variable_dtype: The dtype of the variable.
    """
    values = tf.cast(gradient.values, computation_dtype(variable_dtype))
    rows, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(values, positions, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def sum_rows(gradient: tf.IndexedSlices, shape: Sequence[int], variable_dtype: Any) -> Tensor:
    """Makes a gradient dense and sums its repeated rows.

    Args:
        gradient: Its rows may repeat.
        shape: The shape of the variable.
        variable_dtype: The dtype of the variable.
    """
    values = tf.cast(gradient.values, computation_dtype(variable_dtype))
    dense = tf.math.unsorted_segment_sum(values, gradient.indices, shape[0])
    return tf.ensure_shape(dense, shape)


def scatter_rows(gradient: tf.IndexedSlices, shape: Sequence[int]) -> Tensor:
    """Makes a gradient without repeated rows dense.

    Args:
        gradient: Its rows do not repeat.
        shape: The shape of the variable.
    """
    rows = tf.cast(gradient.indices, tf.int64)[:, None]
    return tf.scatter_nd(rows, gradient.values, tf.constant(tuple(shape), tf.int64))


def step_rows(
    apply_rule: Callable[..., Update],
    gradient: tf.IndexedSlices,
    weight: Any,
    slots: Slots,
    learning_rate: Any,
    step: Any,
    weight_decay: Any,
) -> RowStep:
    """Applies the rule to the rows of a gradient.

    Args:
        apply_rule: A function of gradient, slots, learning rate and step.
        gradient: The clipped gradient; its rows do not repeat.
        weight: The whole variable.
        slots: Its whole slots, by name.
        learning_rate: A scalar.
        step: The 1-based count of updates.
        weight_decay: Weight decay for these rows only; `None` for none.
    """
    rows = gradient.indices
    change, new_slots = apply_rule(
        gradient.values,
        {name: tf.gather(slot, rows) for name, slot in slots.items()},
        learning_rate,
        step,
    )
    moved = change
    if weight_decay is not None:
        before = tf.cast(tf.gather(weight, rows), change.dtype)
        moved = change - before * decayed_part(learning_rate, weight_decay, change.dtype)
    return RowStep(change, moved, new_slots)
