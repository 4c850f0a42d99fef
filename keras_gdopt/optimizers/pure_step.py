"""An optimizer's step on values instead of variables, for the members of a population."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import computation_dtype, constrain
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.dense_step import accumulate, take_step, trained_variables, unscale
from keras_gdopt.optimizers.lookahead import Lookahead
from keras_gdopt.optimizers.nag import NAG
from keras_gdopt.optimizers.nonfinite import all_finite, has_finite_norm
from keras_gdopt.optimizers.slow_weights import (
    final_weight,
    start_slow_weight,
    synchronize_weight,
)
from keras_gdopt.optimizers.wrapping_optimizer import chain, is_multi_optimizer
from keras_gdopt.tensor import Tensor

State = Any
"""The state of an optimizer, as a structure of tensors."""

Hyperparameters = Mapping[str, Tensor]
"""Scalars that replace an optimizer's own numbers, by name."""


class PureStep:
    """The step of a `GradientOptimizer` as a pure function of weights and state.

    It accumulates, clips, decays, and applies the rule, moving averages and constraints, as
    `apply` does, but neither reads nor changes a variable.

    Args:
        optimizer: A built optimizer.

    Raises:
        ValueError: If the optimizer does something that needs variables.

    Attributes:
        trainable: The optimizer's variables.
    """

    def __init__(self, optimizer: GradientOptimizer) -> None:
        if optimizer.lazy:
            raise ValueError(
                "`lazy=True` updates rows of a variable in place. Members of a population share "
                "none, and their embeddings get exact updates of all rows: leave `lazy` out. "
                f"Received: lazy=True with {type(optimizer).__name__}"
            )
        _check_step_is_inherited(optimizer, GradientOptimizer, NAG)
        variables = optimizer.step_variables.trainable
        for variable, known in zip(variables, trained_variables(optimizer), strict=True):
            if known.is_overwritten:
                raise ValueError(
                    "The step of a population updates weights by their gradients; one in float8 "
                    "is overwritten. Use `mixed_bfloat16` or float32. Received: the variable "
                    f"'{variable.path}'"
                )
        self.trainable = variables
        self._optimizer = optimizer
        self._batches_per_update = optimizer.gradient_accumulation_steps or 1

    # --- the state -----------------------------------------------------------

    def variables(self) -> State:
        """The optimizer's variables, in the structure of the state."""
        variables = self._optimizer.step_variables
        state = {"slots": dict(variables.slots), "averages": list(variables.averages)}
        if self._batches_per_update > 1:
            state["sums"] = list(variables.accumulators)
        return state

    def initial_state(self) -> State:
        """The state of an optimizer that never stepped."""
        initial = {**self._optimizer.slots, **self._optimizer.scalar_slots}
        variables = self.variables()
        slots = {
            name: [tf.fill(slot.shape, tf.cast(initial[name], slot.dtype)) for slot in slots]
            for name, slots in variables.pop("slots").items()
        }
        others = tf.nest.map_structure(lambda v: tf.zeros(v.shape, v.dtype), variables)
        return {**others, "slots": slots}

    def load(self, state: State, batches: Tensor) -> None:
        """Loads a state into the optimizer, and the number of batches it has seen."""
        _assign(self.variables(), state)
        self._optimizer.step_variables.iterations.assign(batches)

    def learning_rates(self) -> list[float | None]:
        """The learning rate; `None` if it follows a schedule."""
        if self._optimizer.step_settings.schedule is not None:
            return [None]
        return [float(keras.ops.convert_to_numpy(self._optimizer.learning_rate))]

    def set_learning_rates(self, rates: Sequence[float | None]) -> None:
        """Sets the learning rate that `learning_rates` returned."""
        (rate,) = rates
        if rate is not None and self._optimizer.step_settings.has_fixed_learning_rate:
            self._optimizer.learning_rate = rate

    @property
    def evolvable(self) -> dict[str, str]:
        """The hyper-parameters that a step accepts, see `GradientOptimizer.evolvable`."""
        is_fixed = self._optimizer.step_settings.has_fixed_learning_rate
        rate = {"learning_rate": "positive"} if is_fixed else {}
        classes = type(self._optimizer).__mro__
        rule, declaration = (
            next(place for place, cls in enumerate(classes) if name in vars(cls))
            for name in ("update_rule", "evolvable")
        )
        # A subclass with a rule of its own does not inherit what its parent's rule declares.
        declared = self._optimizer.evolvable if declaration <= rule else {}
        return {**rate, "weight_decay": "positive", **declared}

    def check_hyperparameters(self, values: Mapping[str, float]) -> None:
        """Raises the error of the optimizer's class if it does not accept the numbers."""
        config = {**self._optimizer.get_config(), "learning_rate": 0.001, **values}
        type(self._optimizer).from_config(config)

    def set_hyperparameters(self, values: Mapping[str, float]) -> None:
        """Replaces the optimizer's own numbers."""
        for name, value in values.items():
            setattr(self._optimizer, name, value)

    # --- a step --------------------------------------------------------------

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradients a step takes, see `loss_scale_factor`."""
        return self._optimizer.scale_loss(loss)

    def makes_update(self, batches: Tensor) -> Tensor:
        """Whether the step after this many batches moves the weights."""
        return tf.equal((batches + 1) % self._batches_per_update, 0)

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        state: State,
        learning_rates: Sequence[Tensor],
        batches: Tensor,
        hyperparameters: Hyperparameters | None = None,
    ) -> tuple[list[Tensor], State, Tensor]:
        """Makes one step.

        Args:
            grads: Dense gradients of the scaled loss, in the order of the optimizer's
                variables. `None` for weights that the loss does not depend on, which stay as
                they are.
            weights: The weights, in the same order.
            state: The state before the step.
            learning_rates: One scalar, which a schedule overrides.
            batches: The number of earlier steps that were taken, in an integer dtype.
            hyperparameters: Replace the optimizer's own numbers, and `learning_rates` too.

        Returns:
            The new weights, in their dtypes, the new state, and the new number of steps. With
            `skip_nonfinite`, all are as before if a gradient is not finite.
        """
        optimizer, count = self._optimizer, self._batches_per_update
        (learning_rate,), own = learning_rates, dict(hyperparameters or {})
        settings = optimizer.step_settings
        if settings.schedule is not None:
            learning_rate = settings.schedule(batches)
        learning_rate = own.pop("learning_rate", learning_rate)
        gradients = {
            index: unscale(tf.cast(gradient, computation_dtype(weights[index].dtype)), settings)
            for index, gradient in enumerate(grads)
            if gradient is not None
        }
        new, due = dict(state), None
        if "sums" in state:
            due, sums = self.makes_update(batches), list(state["sums"])
            for index, gradient in gradients.items():
                total, gradients[index] = accumulate(sums[index], gradient, count)
                sums[index] = tf.cast(total, sums[index].dtype)
            new["sums"] = [tf.where(due, tf.zeros_like(total), total) for total in sums]
        slots = {
            index: {name: values[index] for name, values in state["slots"].items()}
            for index in range(len(weights))
        }
        done = take_step(
            trained_variables(optimizer),
            gradients,
            dict(enumerate(weights)),
            slots,
            dict(enumerate(state["averages"])),
            learning_rate,
            batches // count + 1,
            settings,
            constrained=gradients,
            hyperparameters=own,
            due=due,
        )
        if done.averages:
            new["averages"] = list(done.averages.values())
        slots.update(done.slots)
        new["slots"] = {
            name: [slots[index][name] for index in range(len(weights))] for name in state["slots"]
        }
        moved = [
            tf.cast(done.weights.get(index, weight), weight.dtype)
            for index, weight in enumerate(weights)
        ]
        if not settings.skip_nonfinite:
            return moved, new, batches + 1
        given = [unscale(gradient, settings) for gradient in grads if gradient is not None]
        is_taken = has_finite_norm(given) if settings.clips_by_norm else all_finite(given)
        return tf.nest.map_structure(
            lambda after, before: tf.where(is_taken, after, before),
            (moved, new, batches + 1),
            (list(weights), dict(state), batches),
        )

    def finalized(
        self, weights: Sequence[Tensor], state: State, batches: Tensor
    ) -> tuple[list[Tensor], State]:
        """What `finalize_variable_values` does at the end of training."""
        finals, slots = [], {name: list(values) for name, values in state["slots"].items()}
        variables = self._optimizer.step_variables.trainable
        for index, (variable, weight) in enumerate(zip(variables, weights, strict=True)):
            own = {name: values[index] for name, values in slots.items()}
            final, own = self._optimizer.finalize_weight(weight, own)
            if state["averages"]:
                average = tf.cast(state["averages"][index], weight.dtype)
                final = tf.where(batches > 0, average, final)
            finals.append(constrain(variable.constraint, final))
            for name, value in own.items():
                slots[name][index] = value
        return finals, {**state, "slots": slots}


class PureLookahead:
    """The step of a `Lookahead` as a pure function, see `PureStep`."""

    def __init__(self, optimizer: Lookahead) -> None:
        _check_step_is_inherited(optimizer, Lookahead)
        self._optimizer = optimizer
        self._inner = pure_step(optimizer.inner_optimizer)
        self.trainable: Sequence[Any] = self._inner.trainable

    def variables(self) -> State:
        """The optimizer's variables, in the structure of the state."""
        return {
            "inner": self._inner.variables(),
            **self._optimizer.cycle_variables,
        }

    def initial_state(self) -> State:
        """The state of an optimizer that never stepped."""
        own = {name: value for name, value in self.variables().items() if name != "inner"}
        zeros = tf.nest.map_structure(lambda v: tf.zeros(v.shape, v.dtype), own)
        return {"inner": self._inner.initial_state(), **zeros}

    def load(self, state: State, batches: Tensor) -> None:
        """Loads a state into the optimizer, and the number of batches it has seen."""
        own = {name: value for name, value in self.variables().items() if name != "inner"}
        _assign(own, {name: state[name] for name in own})
        self._inner.load(state["inner"], batches)

    def learning_rates(self) -> list[float | None]:
        """The inner optimizer's rates, see `PureStep.learning_rates`."""
        return self._inner.learning_rates()

    def set_learning_rates(self, rates: Sequence[float | None]) -> None:
        """Sets the rates that `learning_rates` returned."""
        self._inner.set_learning_rates(rates)

    @property
    def evolvable(self) -> dict[str, str]:
        """The hyper-parameters of the inner optimizer's step."""
        return self._inner.evolvable

    def check_hyperparameters(self, values: Mapping[str, float]) -> None:
        """Raises the error of the inner optimizer's class if it does not accept the numbers."""
        self._inner.check_hyperparameters(values)

    def set_hyperparameters(self, values: Mapping[str, float]) -> None:
        """Replaces the inner optimizer's own numbers."""
        self._inner.set_hyperparameters(values)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as the inner optimizer scales it."""
        return self._inner.scaled(loss)

    def makes_update(self, batches: Tensor) -> Tensor:
        """Whether the step after this many batches moves the weights."""
        return self._inner.makes_update(batches)

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        state: State,
        learning_rates: Sequence[Tensor],
        batches: Tensor,
        hyperparameters: Hyperparameters | None = None,
    ) -> tuple[list[Tensor], State, Tensor]:
        """Makes a step of the inner optimizer and, if it is due, one of the slow weights."""
        count, alpha = state["fast_updates"], self._optimizer.slow_step_size
        before = weights
        weights, inner, batches_after = self._inner(
            grads, weights, state["inner"], learning_rates, batches, hyperparameters
        )
        is_taken = batches_after > batches
        slow = [
            start_slow_weight(weight, value, is_taken & (count == 0))
            for weight, value in zip(before, state["slow"], strict=True)
        ]
        updates = is_taken & self.makes_update(batches)
        count += tf.cast(updates, count.dtype)
        due = updates & (count % self._optimizer.sync_period == 0)
        pairs = [
            synchronize_weight(weight, value, alpha, variable.constraint, due)
            for variable, weight, value in zip(self.trainable, weights, slow, strict=True)
        ]
        weights, slow = map(list, zip(*pairs, strict=True))
        state = {"inner": inner, "slow": slow, "fast_updates": count}
        return weights, state, batches_after

    def finalized(
        self, weights: Sequence[Tensor], state: State, batches: Tensor
    ) -> tuple[list[Tensor], State]:
        """What `finalize_variable_values` does at the end of training."""
        weights, inner = self._inner.finalized(weights, state["inner"], batches)
        has_slow = state["fast_updates"] > 0
        weights = [
            final_weight(weight, value, variable.constraint, has_slow)
            for variable, weight, value in zip(self.trainable, weights, state["slow"], strict=True)
        ]
        return weights, {**state, "inner": inner, "fast_updates": state["fast_updates"] * 0}


class PureMultiOptimizer:
    """The step of a `keras.optimizers.MultiOptimizer` around optimizers of this package.

    See `PureStep`. The state is a list of the states of those optimizers that have variables.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        named: list[Any] = getattr(optimizer._optimizer_map, "values", list)()
        if len(named) != len({id(each) for each in named}):
            # A copy, as populations make many, would have one optimizer for each key.
            raise ValueError(
                "Expected an optimizer of its own for each key of a `MultiOptimizer`. Received: "
                "one for several keys; let one regular expression match their variables"
            )
        self.trainable: Sequence[Any] = optimizer._trainable_variables
        place = {id(variable): index for index, variable in enumerate(self.trainable)}
        used = [each for each in optimizer.optimizers if each.built]
        if any(getattr(chain(each)[-1], "skip_nonfinite", False) for each in used):
            raise ValueError(
                "`skip_nonfinite` in a `MultiOptimizer` would make its optimizers count different "
                "steps, but a member of a population counts one number of them. Leave it out. "
                "Received: skip_nonfinite=True"
            )
        self._steps = [pure_step(each) for each in used]
        self._places = [[place[id(v)] for v in step.trainable] for step in self._steps]

    def variables(self) -> State:
        """The optimizers' variables, in the structure of the state."""
        return [step.variables() for step in self._steps]

    def initial_state(self) -> State:
        """The state of optimizers that never stepped."""
        return [step.initial_state() for step in self._steps]

    def load(self, state: State, batches: Tensor) -> None:
        """Loads states into the optimizers, and the number of batches they have seen."""
        for step, own in zip(self._steps, state, strict=True):
            step.load(own, batches)
        self._optimizer.iterations.assign(batches)

    def learning_rates(self) -> list[float | None]:
        """The learning rates; `None` for each that follows a schedule."""
        return [rate for step in self._steps for rate in step.learning_rates()]

    def set_learning_rates(self, rates: Sequence[float | None]) -> None:
        """Sets the rates that `learning_rates` returned."""
        for step, rate in zip(self._steps, rates, strict=True):
            step.set_learning_rates([rate])

    @property
    def evolvable(self) -> dict[str, str]:
        """Empty: a name does not tell which of the optimizers it belongs to."""
        return {}

    def check_hyperparameters(self, values: Mapping[str, float]) -> None:
        """Does nothing: there are none to check."""
        del values

    def set_hyperparameters(self, values: Mapping[str, float]) -> None:
        """Does nothing: there are none to set."""
        del values

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradients a step takes, see `loss_scale_factor`."""
        return self._optimizer.scale_loss(loss)

    def makes_update(self, batches: Tensor) -> Tensor:
        """True: a `MultiOptimizer` counts each step as an update."""
        return tf.ones_like(batches, tf.bool)

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        state: State,
        learning_rates: Sequence[Tensor],
        batches: Tensor,
        hyperparameters: Hyperparameters | None = None,
    ) -> tuple[list[Tensor], State, Tensor]:
        """Makes a step of each optimizer."""
        del hyperparameters
        weights, new = list(weights), []
        for step, places, own, rate in zip(
            self._steps, self._places, state, learning_rates, strict=True
        ):
            moved, own, _ = step(
                [grads[i] for i in places], [weights[i] for i in places], own, [rate], batches
            )
            new.append(own)
            for place, weight in zip(places, moved, strict=True):
                weights[place] = weight
        return weights, new, batches + 1

    def finalized(
        self, weights: Sequence[Tensor], state: State, batches: Tensor
    ) -> tuple[list[Tensor], State]:
        """What `finalize_variable_values` does at the end of training."""
        weights, new = list(weights), []
        for step, places, own in zip(self._steps, self._places, state, strict=True):
            finals, own = step.finalized([weights[i] for i in places], own, batches)
            new.append(own)
            for place, weight in zip(places, finals, strict=True):
                weights[place] = weight
        return weights, new


AnyPureStep = PureStep | PureLookahead | PureMultiOptimizer


def pure_step(optimizer: keras.optimizers.Optimizer) -> AnyPureStep:
    """The step of an optimizer of this package as a pure function.

    Args:
        optimizer: A built optimizer of this package, or a `MultiOptimizer` around some.

    Raises:
        ValueError: If it is not one of these, or does something that needs variables.
    """
    if isinstance(optimizer, GradientOptimizer):
        return PureStep(optimizer)
    if isinstance(optimizer, Lookahead):
        return PureLookahead(optimizer)
    if is_multi_optimizer(optimizer):
        return PureMultiOptimizer(optimizer)
    name = type(optimizer).__name__
    instead = (
        f"keras_gdopt.{_SAME_RULE[name]} has its rule (docs/migrating.md compares the arguments)"
        if name in _SAME_RULE and type(optimizer).__module__.startswith("keras.")
        else "Write its rule as a subclass of keras_gdopt.GradientOptimizer (docs/own_rule.md)"
    )
    raise ValueError(
        f"Expected an optimizer of keras_gdopt, whose step can be made on the weights of many "
        f"models. {instead}. Received: {name} of {type(optimizer).__module__}"
    )


# For each Keras optimizer, the class of this package with the same rule.
_SAME_RULE = {
    "SGD": "GradientDescent, Momentum or NAG",
    "Adam": "Adam",
    "AdamW": "Adam with `weight_decay`",
    **{name: name for name in ("RMSprop", "Adagrad", "Adadelta", "Nadam")},
}


def _check_step_is_inherited(optimizer: Any, *bases: type) -> None:
    """Raises if a subclass replaces the step of the class that is known here."""
    for name in ("apply", "finalize_variable_values"):
        if all(getattr(type(optimizer), name) is not getattr(base, name) for base in bases):
            raise ValueError(
                f"{type(optimizer).__name__} defines `{name}` itself, which works on variables. "
                "Expected an optimizer whose rule is all in `update_rule`. Received: "
                f"{type(optimizer).__name__} of {type(optimizer).__module__}"
            )


def _assign(variables: State, values: State) -> None:
    pairs = zip(tf.nest.flatten(variables), tf.nest.flatten(values), strict=True)
    for variable, value in pairs:
        variable.assign(value)
