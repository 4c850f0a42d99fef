"""Trains all members as one: their weights in a stack, all steps in one XLA function."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Batch, Data, ModelFunction
from keras_gdopt.gadam.population import Members
from keras_gdopt.optimizers.pure_step import pure_step

Tensor = Any


class StackedEngine:
    """The members' weights stacked along a first axis, one vectorized step for all.

    Forward, backward and update of all members, and the loop over the steps, are one XLA
    function, which is compiled once for each shape of a batch.

    Args:
        model: Compiled and built, one that `why_not_stacked` has nothing against.
        population_size: How many members.
    """

    def __init__(self, model: keras.Model, population_size: int) -> None:
        self._function = ModelFunction(model)
        self._optimizer = model.optimizer
        self._step = pure_step(model.optimizer)
        self._size = population_size
        self._train = tf.function(self._train_steps, jit_compile=True, autograph=False)
        self._losses = tf.function(self._fitness_losses, jit_compile=True, autograph=False)
        self._finalize = tf.function(self._finalized, autograph=False)
        # Of one member, for batches that differ in shape: XLA would compile each anew.
        self._train_one = tf.function(self._member_step, autograph=False, reduce_retracing=True)
        self._loss_of_one = tf.function(self._fitness_loss, autograph=False, reduce_retracing=True)

    # --- what the driver calls -----------------------------------------------

    def fresh_optimizer_state(self, count: int) -> Any:
        """The state of optimizers that never stepped, for `count` members."""
        return tf.nest.map_structure(
            lambda value: tf.repeat(value[None], count, axis=0), self._step.initial_state()
        )

    def train(
        self,
        members: Members,
        data: Data,
        order: Tensor | None,
        first: int,
        last: int,
    ) -> tuple[Members, np.ndarray]:
        """Makes the steps from `first` up to, not including, `last`.

        Args:
            members: Before.
            data: All samples; or without an `order`, batches of shape
                `(steps, members, batch, ...)`.
            order: The samples of each batch, of shape `(steps, members, batch)`.
            first: The first step.
            last: The step after the last one.

        Returns:
            The members afterwards, and their losses, of shape `(last - first, members)`.
        """
        members, losses = self._train(
            members, data, order, self._constant_rate(), tf.constant(first), tf.constant(last)
        )
        return members, losses.numpy()[first:last]

    def train_apart(
        self, members: Members, steps: Sequence[Sequence[Data]]
    ) -> tuple[Members, np.ndarray]:
        """Makes steps with batches that differ in shape, one member after the other.

        Args:
            members: Before.
            steps: For each step the batch of each member.

        Returns:
            The members afterwards, and their losses, of shape `(steps, members)`.
        """
        rate, trained = self._constant_rate(), []
        losses = np.zeros((len(steps), self._size), keras.config.floatx())
        for place in range(self._size):
            member = tf.nest.map_structure(lambda value, at=place: value[at], members)
            for step, batches in enumerate(steps):
                member, loss = self._train_one(member, batches[place], rate)
                losses[step, place] = loss
            trained.append(member)
        return tf.nest.map_structure(lambda *values: tf.stack(values), *trained), losses

    def finalized(self, members: Members) -> Members:
        """The members as their training ends, see `finalize_variable_values`."""
        return self._finalize(members)

    def losses(self, members: Members, batch: Data) -> Tensor:
        """Each member's loss of one batch, as in evaluation, of shape `(members,)`."""
        return self._losses(members.weights, members.state, batch)

    def losses_apart(self, members: Members, batches: Sequence[Data]) -> Tensor:
        """Each member's losses of batches that differ in shape: `(batches, members)`."""
        losses = []
        for place in range(self._size):
            weights, state = (
                [value[place] for value in part] for part in (members.weights, members.state)
            )
            of_member = []
            for batch in batches:
                loss, state = self._loss_of_one(weights, state, batch)
                of_member.append(loss)
            losses.append(tf.stack(of_member))
        return tf.stack(losses, axis=1)

    def forget_sequences(self) -> None:
        """Nothing: no layer that can be stacked remembers the batch before."""

    def _constant_rate(self) -> Tensor:
        """The learning rate, or 0 where there is a schedule."""
        rate = self._optimizer._learning_rate
        constant = 0.0
        if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            constant = self._optimizer.learning_rate
        return tf.cast(tf.convert_to_tensor(constant), keras.config.floatx())

    def load_optimizer(self, members: Members, member: int, optimizer: Any) -> None:
        """Gives a built optimizer of the model's class the state of a member's."""
        variables = tf.nest.flatten(pure_step(optimizer).variables())
        for variable, value in zip(variables, tf.nest.flatten(members.optimizer), strict=True):
            variable.assign(value[member])
        optimizer.iterations.assign(members.updates[member])

    # --- what is compiled ----------------------------------------------------

    def _train_steps(
        self,
        members: Members,
        data: Data,
        order: Tensor | None,
        learning_rate: Tensor,
        first: Tensor,
        last: Tensor,
    ) -> tuple[Members, Tensor]:
        example = order if order is not None else tf.nest.flatten(data)[0]
        losses = tf.zeros((example.shape[0], self._size), keras.config.floatx())

        def body(index: Tensor, members: Members, losses: Tensor) -> tuple:
            # By gather: a slice would be compiled anew for each index.
            rows = index if order is None else tf.gather(order, index)
            batch = tf.nest.map_structure(lambda part: tf.gather(part, rows), data)
            members, loss = tf.vectorized_map(
                lambda pair: self._member_step(pair[0], pair[1], learning_rate),
                (members, batch),
                warn=False,  # of random numbers, which are drawn in a loop
            )
            loss = tf.cast(loss, losses.dtype)
            return index + 1, members, tf.tensor_scatter_nd_update(losses, [[index]], [loss])

        _, members, losses = tf.while_loop(
            lambda index, *_: index < last, body, (first, members, losses)
        )
        return members, losses

    def _member_step(
        self, member: Members, batch: Data, learning_rate: Tensor
    ) -> tuple[Members, Tensor]:
        weights = member.weights
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss, state = self._function.loss(weights, member.state, Batch(**batch))
        # Zeros where the loss does not depend on a weight.
        grads = tape.gradient(loss, weights, unconnected_gradients="zero")
        grads = [tf.convert_to_tensor(gradient) for gradient in grads]
        rate = self._optimizer._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            learning_rate = rate(member.updates)
        weights, optimizer = self._step(
            grads, weights, member.optimizer, learning_rate, member.updates
        )
        return Members(weights, state, optimizer, member.updates + 1), loss

    def _finalized(self, members: Members) -> Members:
        def member(member: Members) -> Members:
            weights, optimizer = self._step.finalized(
                member.weights, member.optimizer, member.updates
            )
            return member._replace(weights=weights, optimizer=optimizer)

        return tf.vectorized_map(member, members)

    def _fitness_losses(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Data
    ) -> Tensor:
        return tf.vectorized_map(
            lambda member: self._fitness_loss(member[0], member[1], batch)[0], (weights, state)
        )

    def _fitness_loss(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Data
    ) -> tuple[Tensor, list[Tensor]]:
        return self._function.loss(weights, state, Batch(**batch), training=False)


def why_not_stacked(model: keras.Model) -> str | None:
    """Why a model cannot be trained in a stack, or `None`."""
    try:
        pure_step(model.optimizer)
    except ValueError as error:
        return f"its optimizer cannot be stacked ({error})"
    losses = keras.tree.flatten(model._compile_config.config.get("loss"))
    if any(map(_is_hinge, losses)):
        return "its hinge loss looks at the labels of a batch to know their kind"
    for layer in model._flatten_layers():
        if not layer.supports_jit:
            return f"XLA does not compile the layer '{layer.name}'"
        if getattr(layer, "stateful", False):
            return f"the layer '{layer.name}' remembers the batch before (`stateful=True`)"
        if isinstance(layer, keras.layers.RNN) and not layer.unroll:
            return (
                f"the recurrence of the layer '{layer.name}' is a loop, which cannot be "
                "vectorized (`unroll=True` can)"
            )
    return None


def _is_hinge(loss: Any) -> bool:
    """Whether a loss takes labels of 0 and 1 as -1 and 1, by a condition on each batch."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    return isinstance(loss, keras.losses.Hinge | keras.losses.SquaredHinge) or loss in (
        keras.losses.hinge,
        keras.losses.squared_hinge,
    )
