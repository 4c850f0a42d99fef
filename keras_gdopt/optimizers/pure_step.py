"""An optimizer's step on values instead of variables, for models that are trained in a stack."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import Tensor, computation_dtype
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.lookahead import Lookahead

State = Any
"""What an optimizer keeps, as a structure of tensors."""


class PureStep:
    """The step of a `GradientOptimizer` as a pure function of weights and state.

    Clipping, decay, rule, moving averages and constraints, as in `apply`; reads and
    changes no variable.

    Args:
        optimizer: A built optimizer.

    Raises:
        ValueError: If the optimizer does what only variables can.
    """

    def __init__(self, optimizer: GradientOptimizer) -> None:
        for name in ("lazy", "gradient_accumulation_steps", "loss_scale_factor"):
            if getattr(optimizer, name):
                raise ValueError(
                    f"`{name}` needs an optimizer with variables of its own. Received: "
                    f"{name}={getattr(optimizer, name)} with {type(optimizer).__name__}"
                )
        self._optimizer = optimizer
        self._step = optimizer._tensorflow_step

    def variables(self) -> State:
        """The optimizer's variables, in the structure of the state."""
        averages = getattr(self._optimizer, "_model_variables_moving_average", [])
        return {"slots": dict(self._optimizer._slots), "averages": list(averages)}

    def initial_state(self) -> State:
        """The state of an optimizer that never stepped."""
        initial = self._optimizer._slot_initial_values()
        return {
            "slots": {
                name: [tf.fill(slot.shape, tf.cast(initial[name], slot.dtype)) for slot in slots]
                for name, slots in self._optimizer._slots.items()
            },
            "averages": [tf.zeros(v.shape, v.dtype) for v in self.variables()["averages"]],
        }

    def __call__(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        state: State,
        learning_rate: Tensor,
        updates: Tensor,
    ) -> tuple[list[Tensor], State]:
        """One update.

        Args:
            grads: Dense, in the order of the optimizer's variables.
            weights: In the same order.
            state: The state before.
            learning_rate: A scalar.
            updates: How many updates were made before, in an integer dtype.

        Returns:
            The new weights, in their dtypes, and the new state.
        """
        optimizer, step = self._optimizer, updates + 1
        slots = {
            index: {name: values[index] for name, values in state["slots"].items()}
            for index in range(len(weights))
        }
        grads = [
            tf.cast(g, computation_dtype(w.dtype)) for g, w in zip(grads, weights, strict=True)
        ]
        _, values, slots = self._step.updated(
            grads, dict(enumerate(weights)), slots, learning_rate, step
        )
        averages = state["averages"]
        if optimizer.use_ema:
            pairs = {index: (averages[index], value) for index, value in values.items()}
            moved, overwriting = self._step.averaged(pairs, step)
            averages = [moved[index] for index in range(len(averages))]
            values.update(overwriting)
        for index, variable in enumerate(optimizer._trainable_variables):
            if variable.constraint is not None:
                values[index] = variable.constraint(values[index])
        weights = [tf.cast(values[index], weight.dtype) for index, weight in enumerate(weights)]
        lists = {name: [slots[i][name] for i in range(len(weights))] for name in state["slots"]}
        return weights, {"slots": lists, "averages": averages}

    def finalized(
        self, weights: Sequence[Tensor], state: State, updates: Tensor
    ) -> tuple[list[Tensor], State]:
        """What `finalize_variable_values` does at the end of training."""
        finals, slots = [], {name: list(values) for name, values in state["slots"].items()}
        for index, weight in enumerate(weights):
            own = {name: values[index] for name, values in slots.items()}
            final, own = self._optimizer._finalized(weight, own)
            if self._optimizer.use_ema:
                average = tf.cast(state["averages"][index], weight.dtype)
                final = tf.where(updates > 0, average, final)
            finals.append(final)
            for name, value in own.items():
                slots[name][index] = value
        return finals, {**state, "slots": slots}


class PureLookahead:
    """The step of a `Lookahead` as a pure function, see `PureStep`."""

    def __init__(self, optimizer: Lookahead) -> None:
        self._optimizer = optimizer
        self._inner = pure_step(optimizer.inner_optimizer)

    def variables(self) -> State:
        """The optimizer's variables, in the structure of the state."""
        return {
            "inner": self._inner.variables(),
            "slow": list(self._optimizer._slots["slow"]),
            "fast_updates": self._optimizer._fast_updates,
        }

    def initial_state(self) -> State:
        """The state of an optimizer that never stepped."""
        count = self._optimizer._fast_updates
        return {
            "inner": self._inner.initial_state(),
            "slow": [tf.zeros(slot.shape, slot.dtype) for slot in self._optimizer._slots["slow"]],
            "fast_updates": tf.zeros(count.shape, count.dtype),
        }

    def __call__(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        state: State,
        learning_rate: Tensor,
        updates: Tensor,
    ) -> tuple[list[Tensor], State]:
        """One update of the inner optimizer, and where it is due one of the slow weights."""
        count, alpha = state["fast_updates"], self._optimizer.slow_step_size
        slow = [
            tf.where(count == 0, tf.cast(weight, value.dtype), value)
            for weight, value in zip(weights, state["slow"], strict=True)
        ]
        weights, inner = self._inner(grads, weights, state["inner"], learning_rate, updates)
        count += 1
        due = count % self._optimizer.sync_period == 0
        slow = [
            tf.where(due, value + alpha * (tf.cast(weight, value.dtype) - value), value)
            for weight, value in zip(weights, slow, strict=True)
        ]
        weights = [
            tf.where(due, tf.cast(value, weight.dtype), weight)
            for weight, value in zip(weights, slow, strict=True)
        ]
        return weights, {"inner": inner, "slow": slow, "fast_updates": count}

    def finalized(
        self, weights: Sequence[Tensor], state: State, updates: Tensor
    ) -> tuple[list[Tensor], State]:
        """What `finalize_variable_values` does at the end of training."""
        weights, inner = self._inner.finalized(weights, state["inner"], updates)
        weights = [
            tf.where(state["fast_updates"] > 0, tf.cast(value, weight.dtype), weight)
            for weight, value in zip(weights, state["slow"], strict=True)
        ]
        return weights, {**state, "inner": inner, "fast_updates": state["fast_updates"] * 0}


def pure_step(optimizer: keras.optimizers.Optimizer) -> PureStep | PureLookahead:
    """The step of one of our optimizers as a pure function.

    Args:
        optimizer: A built optimizer of this package.

    Raises:
        ValueError: If it is none of ours, or does what only variables can.
    """
    if isinstance(optimizer, GradientOptimizer):
        return PureStep(optimizer)
    if isinstance(optimizer, Lookahead):
        return PureLookahead(optimizer)
    raise ValueError(
        f"Expected an optimizer of this package. Received: {type(optimizer).__name__} of "
        f"{type(optimizer).__module__}"
    )
