"""Trains each member as a Keras model of its own, all of them in one function."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Batch, Data, loss_of
from keras_gdopt.gadam import population
from keras_gdopt.gadam.population import Members

Tensor = Any


class UnrolledEngine:
    """A clone and an optimizer for each member, whose steps stand in one function.

    For layers that are slow or impossible in a stack (convolutions, recurrence), and for
    optimizers of Keras. The clones hold the members only while they are trained.

    Args:
        model: Compiled and built.
        clones: A clone of it for each member, compiled as it is.
    """

    def __init__(self, model: keras.Model, clones: list[keras.Model]) -> None:
        self._optimizer = model.optimizer
        self._clones = clones
        for clone in clones:
            clone.optimizer.build(clone.trainable_variables)
        self._train = tf.function(self._train_steps)
        self._losses = tf.function(self._fitness_losses, jit_compile=bool(model.jit_compile))
        # Of one clone, for batches that differ in shape. All members take turns in the first, but
        # for layers that remember the batch before: what they remember stays in the clone.
        remembers = any(getattr(layer, "stateful", False) for layer in model._flatten_layers())
        self._ones = [_OneClone(clone) for clone in (clones if remembers else clones[:1])]

    # --- what the driver calls -----------------------------------------------

    def fresh_optimizer_state(self, count: int) -> Any:
        """The state of optimizers that never stepped, for `count` members."""
        fresh = type(self._optimizer).from_config(self._optimizer.get_config())
        fresh.build(self._clones[0].trainable_variables)
        return [tf.repeat(tf.convert_to_tensor(v)[None], count, axis=0) for v in fresh.variables]

    def train(
        self,
        members: Members,
        data: Data,
        order: Tensor | None,
        first: int,
        last: int,
    ) -> tuple[Members, np.ndarray]:
        """Makes the steps from `first` up to, not including, `last`.

        Arguments and results are those of `StackedEngine.train`.
        """
        self._load(members)
        self._set_learning_rate()
        losses = self._train(data, order, tf.constant(first), tf.constant(last))
        return self._read(), losses.numpy()

    def train_apart(
        self, members: Members, steps: Sequence[Sequence[Data]]
    ) -> tuple[Members, np.ndarray]:
        """Makes steps with batches that differ in shape, one member after the other.

        Arguments and results are those of `StackedEngine.train_apart`.
        """
        trained = []
        losses = np.zeros((len(steps), len(self._clones)), keras.config.floatx())
        for place in range(len(self._clones)):
            one = self._ones[place % len(self._ones)]
            one.load(members, place)
            self._set_learning_rate()
            for step, batches in enumerate(steps):
                losses[step, place] = one.train(batches[place])
            trained.append(one.read())
        return tf.nest.map_structure(lambda *values: tf.stack(values), *trained), losses

    def finalized(self, members: Members) -> Members:
        """The members as their training ends, see `finalize_variable_values`."""
        self._load(members)
        for clone in self._clones:
            clone.optimizer.finalize_variable_values(clone.trainable_variables)
        return self._read()

    def losses(self, members: Members, batch: Data) -> Tensor:
        """Each member's loss of one batch, as in evaluation, of shape `(members,)`."""
        self._load(members, with_optimizer=False)
        return self._losses(batch)

    def losses_apart(self, members: Members, batches: Sequence[Data]) -> Tensor:
        """Each member's losses of batches that differ in shape: `(batches, members)`."""
        losses = []
        for place in range(len(self._clones)):
            one = self._ones[place % len(self._ones)]
            one.load(members, place, with_optimizer=False)
            losses.append(tf.stack([one.loss(batch) for batch in batches]))
        return tf.stack(losses, axis=1)

    def forget_sequences(self) -> None:
        """Lets layers begin anew that remember the batch before (`stateful=True`)."""
        for clone in self._clones:
            population.forget_sequences(clone)

    def load_optimizer(self, members: Members, member: int, optimizer: Any) -> None:
        """Gives a built optimizer of the model's class the state of a member's."""
        for variable, value in zip(optimizer.variables, members.optimizer, strict=True):
            # Learning rates are the model's own.
            if not any(
                variable is each._learning_rate for each in _optimizers_with_a_rate(optimizer)
            ):
                variable.assign(value[member])

    def _set_learning_rate(self) -> None:
        """Gives the clones the learning rates of the model, which callbacks may change."""
        for clone in self._clones:
            for own, other in zip(
                _optimizers_with_a_rate(self._optimizer),
                _optimizers_with_a_rate(clone.optimizer),
                strict=True,
            ):
                is_schedule = isinstance(
                    own._learning_rate, keras.optimizers.schedules.LearningRateSchedule
                )
                if not is_schedule and isinstance(own.learning_rate, keras.Variable):
                    other.learning_rate = float(own.learning_rate)

    # --- members in and out of the clones ------------------------------------

    def _load(self, members: Members, *, with_optimizer: bool = True) -> None:
        values = [members.weights, members.state]
        if with_optimizer:
            values.append(members.optimizer)
        for group, tensors in zip(self._variables(), values, strict=False):
            for variables, tensor in zip(group, tensors, strict=True):
                for variable, value in zip(variables, tf.unstack(tensor), strict=True):
                    variable.assign(value)

    def _read(self) -> Members:
        groups = [
            [tf.stack([tf.convert_to_tensor(v) for v in variables]) for variables in group]
            for group in self._variables()
        ]
        weights, state, optimizer = groups
        updates = [tf.cast(c.optimizer.iterations, tf.int64) for c in self._clones]
        return Members(weights, state, optimizer, tf.stack(updates))

    def _variables(self) -> tuple[list[tuple[Any, ...]], ...]:
        """Weights, state and optimizers' variables, each as one tuple of all members'."""
        return (
            list(zip(*(c.trainable_variables for c in self._clones), strict=True)),
            list(zip(*(c.non_trainable_variables for c in self._clones), strict=True)),
            list(zip(*(c.optimizer.variables for c in self._clones), strict=True)),
        )

    # --- what is traced ------------------------------------------------------

    def _train_steps(self, data: Data, order: Tensor | None, first: Tensor, last: Tensor) -> Tensor:
        losses = tf.TensorArray(keras.config.floatx(), size=last - first)
        for index in tf.range(first, last):
            of_step = []
            for member, clone in enumerate(self._clones):
                place = tf.stack([index, member])
                rows = None if order is None else tf.gather_nd(order, place)
                of_step.append(_train_step(clone, _batch(data, rows, place)))
            losses = losses.write(index - first, tf.stack(of_step))
        return losses.stack()

    def _fitness_losses(self, batch: Data) -> Tensor:
        return tf.stack([loss_of(clone, Batch(**batch), training=False) for clone in self._clones])


class _OneClone:
    """A clone that members are loaded into, one after the other."""

    def __init__(self, clone: keras.Model) -> None:
        self._clone = clone
        self.train = tf.function(
            lambda batch: _train_step(clone, Batch(**batch)), reduce_retracing=True
        )
        self.loss = tf.function(self._fitness_loss, reduce_retracing=True)

    def load(self, members: Members, place: int, *, with_optimizer: bool = True) -> None:
        """Gives the clone what a member has."""
        values = [*members.weights, *members.state]
        variables = [*self._clone.trainable_variables, *self._clone.non_trainable_variables]
        if with_optimizer:
            values += members.optimizer
            variables += self._clone.optimizer.variables
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value[place])

    def _fitness_loss(self, batch: Data) -> Tensor:
        return loss_of(self._clone, Batch(**batch), training=False)

    def read(self) -> Members:
        """What the clone has, as a member."""
        clone = self._clone
        weights, state, optimizer = (
            [tf.convert_to_tensor(variable) for variable in variables]
            for variables in (
                clone.trainable_variables, clone.non_trainable_variables, clone.optimizer.variables,
            )
        )  # fmt: skip
        return Members(weights, state, optimizer, tf.cast(clone.optimizer.iterations, tf.int64))


def _optimizers_with_a_rate(optimizer: Any) -> list[Any]:
    """The optimizers that have a learning rate: those inside of a `MultiOptimizer`, or it."""
    return list(getattr(optimizer, "optimizers", [optimizer]))


def _batch(data: Data, rows: Tensor | None, place: Tensor) -> Batch:
    """One member's batch: some rows of the samples, or what stands in its place."""
    pick = (
        (lambda part: tf.gather_nd(part, place))
        if rows is None
        else (lambda part: tf.gather(part, rows))
    )
    return Batch(**tf.nest.map_structure(pick, data))


def _train_step(model: keras.Model, batch: Batch) -> Tensor:
    with tf.GradientTape() as tape:
        loss = loss_of(model, batch, training=True)
    variables = model.trainable_variables
    model.optimizer.apply(tape.gradient(loss, variables), variables)
    return tf.cast(loss, keras.config.floatx())
