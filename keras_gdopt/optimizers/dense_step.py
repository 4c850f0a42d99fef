"""The order of a training step, as pure functions: clip, decay, rule, average, constraint.

`tensorflow_step.py` reads and writes variables around them, `pure_step.py` passes them the
weights of a population's member.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import (
    common_dtype,
    computation_dtype,
    is_known,
    sum_of_squares,
)
from keras_gdopt.optimizers.rule import (
    RuleOptimizer,
    Slots,
    StepSettings,
    TrainedVariable,
    Update,
)
from keras_gdopt.tensor import Tensor


def trained_variables(optimizer: RuleOptimizer) -> list[TrainedVariable]:
    """What a step must know of each variable of an optimizer that is built."""
    # Traced once for each shape, however many variables have it.
    rules: dict[str, Callable[..., Update]] = {}

    def trained(variable: Any) -> TrainedVariable:
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if dtype not in rules:
            rule = functools.partial(optimizer.apply_rule, variable_dtype=dtype)
            rules[dtype] = tf.function(rule, autograph=False)
        return TrainedVariable(
            dtype,
            rules[dtype],
            decays=optimizer.uses_weight_decay(variable),
            constraint=variable.constraint,
            is_overwritten=getattr(variable, "overwrite_with_gradient", False),
        )

    return [trained(variable) for variable in optimizer.step_variables.trainable]


class DenseStep(NamedTuple):
    """The result of a step, by the index of the variable."""

    changes: dict[int, Tensor]
    """What the rule adds to weights, without weight decay."""
    moved: dict[int, Tensor]
    """Weights after decay and the rule, in the dtype that the rule computes in."""
    slots: dict[int, dict[str, Tensor]]
    averages: dict[int, Tensor]
    weights: dict[int, Tensor]
    """Weights at the end of the step: overwritten by averages if due, and constrained."""


def take_step(
    variables: Sequence[TrainedVariable],
    gradients: Mapping[int, Tensor],
    weights: Mapping[int, Any],
    slots: Mapping[int, Slots],
    averages: Mapping[int, Any],
    learning_rate: Tensor,
    step: Tensor,
    settings: StepSettings,
    *,
    constrained: Iterable[int],
    norm: Tensor | None = None,
    hyperparameters: Mapping[str, Tensor] | None = None,
    due: Tensor | None = None,
) -> DenseStep:
    """One step of an optimizer.

    Args:
        variables: All of the optimizer's.
        gradients: Dense gradients by the index of the variable, not scaled by a loss scale.
        weights: Of each variable with a gradient, an average or a constraint, by index.
        slots: Of each variable with a gradient, by index and by name.
        averages: The moving averages of weights, by index.
        learning_rate: A scalar.
        step: The 1-based count of updates, a scalar.
        settings: What the optimizer does around its rule.
        constrained: The indices of the variables whose constraints are applied.
        norm: The norm for `global_clipnorm`, if `gradients` are not all there are.
        hyperparameters: Scalars in place of the optimizer's own numbers, by name.
        due: Whether the gradients move weights and slots in this step; `None`: they do.
    """
    own = dict(hyperparameters or {})
    weight_decay = own.pop("weight_decay", settings.weight_decay)
    of_rule = [own] if own else []
    changes, moved, new_slots = {}, {}, {}
    clipped = clip(list(gradients.values()), settings, common_dtype(variables), norm)
    for index, gradient in zip(gradients, clipped, strict=True):
        variable = variables[index]
        change, new_slots[index] = variable.apply_rule(
            gradient, slots[index], learning_rate, step, *of_rule
        )
        value = tf.cast(tf.convert_to_tensor(weights[index]), change.dtype)
        if weight_decay is not None and variable.decays:
            value -= value * decayed_part(learning_rate, weight_decay, value.dtype)
        changes[index], moved[index] = change, value + change
    if due is not None:
        for index, value in moved.items():
            moved[index] = tf.where(due, value, tf.cast(weights[index], value.dtype))
            new_slots[index] = {
                name: tf.where(due, slot, tf.cast(slots[index][name], slot.dtype))
                for name, slot in new_slots[index].items()
            }
    final, new_averages = dict(moved), {}
    for index, average in averages.items():
        weight = final.get(index, weights[index])
        new_averages[index], overwritten = move_average(
            average, weight, variables[index].dtype, step, settings
        )
        if overwritten is not None:
            final[index] = overwritten
    for index in constrained:
        constraint = variables[index].constraint
        if constraint is not None:
            final[index] = constraint(final.get(index, tf.convert_to_tensor(weights[index])))
    return DenseStep(changes, moved, new_slots, new_averages, final)


def unscale(gradient: Any, settings: StepSettings) -> Any:
    """A gradient of the scaled loss as one of the loss itself; a sparse one stays sparse."""
    factor = settings.loss_scale_factor
    return gradient if factor is None else scale(gradient, 1.0 / factor)


def accumulate(total: Any, gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Adds a gradient to a sum of gradients.

    Args:
        total: The sum so far.
        gradient: The gradient of this step.
        count: How many steps an update has.

    Returns:
        The new sum, and the mean gradient if this step makes an update.
    """
    total = tf.cast(total, gradient.dtype) + gradient
    return total, total / count


def clip(
    gradients: Sequence[Any], settings: StepSettings, norm_dtype: Any, norm: Tensor | None = None
) -> list[Any]:
    """Gradients clipped as Keras clips them; sparse ones stay sparse.

    Args:
        gradients: Dense gradients, or `tf.IndexedSlices` without repeated rows.
        settings: Of which `clipnorm`, `clipvalue` and `global_clipnorm` are read.
        norm_dtype: The dtype in which the norm of all gradients is computed.
        norm: The norm for `global_clipnorm`, if `gradients` are not all there are.
    """
    if settings.clipnorm:
        return [tf.clip_by_norm(gradient, settings.clipnorm) for gradient in gradients]
    if settings.clipvalue:
        limit = settings.clipvalue
        return [tf.clip_by_value(gradient, -limit, limit) for gradient in gradients]
    if settings.global_clipnorm:
        limit = settings.global_clipnorm
        if norm is None:
            norm = tf.sqrt(total_square(gradients, norm_dtype))
        # Keras's formula: an infinite norm makes the gradients NaN.
        factor = limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)
        return [scale(gradient, tf.cast(factor, gradient.dtype)) for gradient in gradients]
    return list(gradients)


def decayed_part(learning_rate: Any, weight_decay: Any, dtype: tf.DType) -> Tensor:
    """The part of a weight that weight decay subtracts in a step."""
    if is_known(weight_decay):  # in float32 it would lose digits on its way to float64
        weight_decay = tf.constant(weight_decay, dtype)
    return tf.cast(learning_rate, dtype) * tf.cast(weight_decay, dtype)


def move_average(
    average: Any, weight: Any, variable_dtype: Any, step: Tensor, settings: StepSettings
) -> tuple[Tensor, Tensor | None]:
    """Moves the moving average of a weight.

    Args:
        average: The average so far.
        weight: The new weight.
        variable_dtype: The dtype of the variable.
        step: The 1-based count of updates, in an integer dtype.
        settings: Of which `ema_momentum` and `ema_overwrite_frequency` are read.

    Returns:
        The new average, and the weight with the average in its place in every n-th step;
        `None` instead if averages never overwrite it.
    """
    dtype = computation_dtype(variable_dtype)
    value = tf.cast(weight, dtype)
    if not value.dtype.is_floating:  # no gradient ever moves it
        return value, None
    # The first average is the weight itself.
    momentum = tf.constant(settings.ema_momentum, dtype) * tf.cast(step > 1, dtype)
    moved = momentum * tf.cast(average, dtype) + (1 - momentum) * value
    if not settings.ema_overwrite_frequency:
        return moved, None
    overwrite = tf.equal(step % settings.ema_overwrite_frequency, 0)
    return moved, tf.where(overwrite, moved, value)


# --- norms and scales of gradients ----------------------------------------------------


def is_sparse(gradient: Any) -> bool:
    """Whether a gradient holds only some rows of its variable."""
    return isinstance(gradient, tf.IndexedSlices)


def scale(gradient: Any, factor: Any) -> Any:
    """A gradient times a scalar; a sparse one stays sparse."""
    if is_sparse(gradient):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def squares(tensors: Mapping[int, Any], dtype: Any) -> dict[int, Tensor]:
    """The squared Euclidean norms of tensors by index; sparse ones without repeated rows."""
    return {
        # The number of rows differs from step to step.
        index: tf.reduce_sum(tf.square(tf.cast(tensor.values, dtype)))
        if is_sparse(tensor)
        else _sum_of_squares(tf.cast(tensor, dtype))
        for index, tensor in tensors.items()
    }


def total_square(tensors: Sequence[Any], dtype: Any) -> Tensor:
    """The squared Euclidean norm of all tensors together."""
    parts = list(squares(dict(enumerate(tensors)), dtype).values())
    return tf.add_n(parts) if parts else tf.zeros((), dtype)


# Traced once for each shape.
_sum_of_squares = tf.function(sum_of_squares, autograph=False)
