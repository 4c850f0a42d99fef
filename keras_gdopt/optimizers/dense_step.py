"""The order of a training step, as pure functions: clip, decay, rule, average, constraint.

`tensorflow_step.py` reads and writes variables around them; `pure_step.py` passes them the
weights of a population member.
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
    """What a step must know about each variable of a built optimizer."""
    # A rule is traced once for each shape, however many variables share it.
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
    """The result of a step, by variable index."""

    changes: dict[int, Tensor]
    """What the rule adds to the weights, without weight decay."""
    moved: dict[int, Tensor]
    """Weights after decay and the rule, in the dtype that the rule computes in."""
    slots: dict[int, dict[str, Tensor]]
    averages: dict[int, Tensor]
    weights: dict[int, Tensor]
    """Weights at the end of the step: overwritten by the averages if due, then constrained."""


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
    """Computes one step of an optimizer.

    Args:
        variables: All variables of the optimizer.
        gradients: Dense gradients by variable index, without the loss scale.
        weights: Weights by index, for each variable with a gradient, average or constraint.
        slots: Slots by index and name, for each variable with a gradient.
        averages: Moving averages of the weights, by index.
        learning_rate: A scalar.
        step: The 1-based count of updates, a scalar.
        settings: What the optimizer does around its rule.
        constrained: The indices of the variables whose constraints are applied.
        norm: The norm for `global_clipnorm`, if there are gradients besides `gradients`.
        hyperparameters: Scalars that replace the optimizer's own numbers, by name.
        due: Whether the gradients move weights and slots in this step; `None` if they always do.
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
    """Removes the loss scale from a gradient; a sparse gradient stays sparse."""
    factor = settings.loss_scale_factor
    return gradient if factor is None else scale(gradient, 1.0 / factor)


def accumulate(total: Any, gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Adds a gradient to a sum of gradients.

    Args:
        total: The sum so far.
        gradient: The gradient of this step.
        count: The number of steps per update.

    Returns:
        The new sum, and the mean gradient, which is valid if this step makes an update.
    """
    total = tf.cast(total, gradient.dtype) + gradient
    return total, total / count


def clip(
    gradients: Sequence[Any], settings: StepSettings, norm_dtype: Any, norm: Tensor | None = None
) -> list[Any]:
    """Clips gradients as Keras does; sparse gradients stay sparse.

    Args:
        gradients: Dense gradients, or `tf.IndexedSlices` without repeated rows.
        settings: `clipnorm`, `clipvalue` and `global_clipnorm` are read.
        norm_dtype: The dtype in which the norm of all gradients is computed.
        norm: The norm for `global_clipnorm`, if there are gradients besides `gradients`.
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
    """The fraction of a weight that weight decay subtracts in a step."""
    if is_known(weight_decay):  # a detour through float32 would cost float64 digits
        weight_decay = tf.constant(weight_decay, dtype)
    return tf.cast(learning_rate, dtype) * tf.cast(weight_decay, dtype)


def move_average(
    average: Any, weight: Any, variable_dtype: Any, step: Tensor, settings: StepSettings
) -> tuple[Tensor, Tensor | None]:
    """Updates the moving average of a weight.

    Args:
        average: The average so far.
        weight: The new weight.
        variable_dtype: The dtype of the variable.
        step: The 1-based count of updates, in an integer dtype.
        settings: `ema_momentum` and `ema_overwrite_frequency` are read.

    Returns:
        The new average, and the weight, replaced by the average in every n-th step; `None`
        instead of the weight if averages never overwrite it.
    """
    dtype = computation_dtype(variable_dtype)
    value = tf.cast(weight, dtype)
    if not value.dtype.is_floating:  # gradients never move it
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
    """Whether a gradient is given for some rows of its variable only."""
    return isinstance(gradient, tf.IndexedSlices)


def scale(gradient: Any, factor: Any) -> Any:
    """Multiplies a gradient by a scalar; a sparse gradient stays sparse."""
    if is_sparse(gradient):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def squares(tensors: Mapping[int, Any], dtype: Any) -> dict[int, Tensor]:
    """The squared Euclidean norms of tensors by index; sparse ones must not repeat rows."""
    return {
        # Not traced by shape: the number of rows differs from step to step.
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
