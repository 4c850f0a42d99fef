"""Trains the members of a population: the step of one member, mapped over all members."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Batch, Data, ModelFunction
from keras_gdopt.gadam.hyperparameters import Values
from keras_gdopt.gadam.population import Members, forget_sequences
from keras_gdopt.optimizers.pure_step import pure_step
from keras_gdopt.tensor import Tensor

ENGINES = ("auto", "stacked", "mapped")

# Beginnings of the names of TensorFlow operations that change a variable.
_ASSIGNING = (
    "Assign", "ResourceScatter", "ResourceApply", "ResourceStridedSliceAssign", "RngReadAndSkip",
    "RngSkip", "StatefulStandardNormal", "StatefulUniform", "StatefulTruncatedNormal",
)  # fmt: skip


class SharedVariableError(ValueError):
    """Raised if a layer changes a variable that the members of a population would share."""


class Engine:
    """Runs the steps of all members, by mapping the pure step of one member over them.

    Forward pass, backward pass, update and the loop over the steps are one function of the
    members, whose weights are stacked. It is traced once for each shape of a batch. With
    `"stacked"`, each operation works on all members at once (`tf.vectorized_map`), and XLA
    compiles the function. With `"mapped"`, the members run side by side (`tf.map_fn`), for layers
    that cannot be stacked or are slower in a stack.

    Args:
        model: The compiled and built model.
        population_size: The number of members.
        name: `"mapped"`, or `"stacked"` if `why_not_stacked` returns `None` for the model.

    Raises:
        ValueError: If the optimizer has no pure step.
    """

    def __init__(self, model: keras.Model, population_size: int, name: str) -> None:
        self._function = ModelFunction(model)
        self._step = pure_step(model.optimizer)
        self._size = population_size
        self._kept_state = len(model.non_trainable_variables)
        self._begun = _values_at_the_beginning(self._function, self._kept_state)
        self.seed_generators = [
            place
            for place, variable in enumerate(self._function.state_variables)
            if variable.name == "seed_generator_state"
        ]
        """The places in the members' state of the seed generators, on which random draws depend."""
        self._model_name = model.name
        self._shares = ""  # the error message, if tracing finds a variable that members would share
        stacks = name == "stacked"
        self._map: Callable[[Any, Any, Any], Any]
        self._map = self._stacked if stacks else self._side_by_side
        train = self._train_stack if stacks else self._train_side_by_side
        self._train = tf.function(train, jit_compile=stacks, autograph=False)
        self._losses = tf.function(self._fitness_losses, jit_compile=stacks, autograph=False)
        self._judge = tf.function(self._metrics, autograph=False)
        self._finalize = tf.function(self._finalized, autograph=False)
        # Functions of one member, for batches that differ in shape.
        self._train_one = tf.function(self._member_step, autograph=False, reduce_retracing=True)
        self._loss_of_one = tf.function(self._fitness_loss, autograph=False, reduce_retracing=True)

    # --- state and learning rates --------------------------------------------

    def fresh_optimizer_state(self, count: int) -> Any:
        """Returns the state of `count` optimizers that have not made a step, stacked."""
        return tf.nest.map_structure(
            lambda value: tf.repeat(value[None], count, axis=0), self._step.initial_state()
        )

    def load_optimizer(self, members: Members, member: int, optimizer: Any) -> None:
        """Copies the state of a member's optimizer to a built optimizer of the model's class."""
        state = tf.nest.map_structure(lambda value: value[member], members.optimizer)
        pure_step(optimizer).load(state, members.batches[member])

    def learning_rates(self) -> list[float | None]:
        """The learning rates of the model's optimizers; `None` for one with a schedule."""
        return self._step.learning_rates()

    def set_learning_rates(self, rates: Sequence[float | None]) -> None:
        """Sets the learning rates of the model's optimizers to what `learning_rates` returned."""
        self._step.set_learning_rates(rates)

    def with_sequences(self, members: Members) -> Members:
        """Prepares the members' state for training or judging.

        Layers with `stateful=True` remember the previous batch in variables of the state, which
        get their initial values. State that is not kept between phases is added.
        """
        places = range(len(self._function.state_variables))
        begun = {
            place: tf.repeat(value[None], self._size, axis=0)
            for place, value in self._begun.items()
        }
        state = [begun[p] if p in begun else members.state[p] for p in places]
        return members._replace(state=state)

    def without_sequences(self, members: Members) -> Members:
        """Returns the members without the state that is not kept between phases."""
        return members._replace(state=members.state[: self._kept_state])

    # --- training and judging ------------------------------------------------

    def train(
        self,
        members: Members,
        data: Data,
        order: Tensor | None,
        first: int,
        last: int,
        hyperparameters: Values,
    ) -> tuple[Members, np.ndarray]:
        """Makes the steps from `first` up to, but not including, `last`.

        Args:
            members: The members before the steps.
            data: All samples or, if `order` is `None`, batches of shape
                `(steps, members, batch, ...)`.
            order: The indices of the samples of each batch, of shape `(steps, members, batch)`.
            first: The first step.
            last: The step after the last one.
            hyperparameters: The members' own hyper-parameters, if there are any.

        Returns:
            The members after the steps, and their losses, of shape `(last - first, members)`.

        Raises:
            SharedVariableError: If a layer changes a variable that is not one of the model's.
        """
        steps = tf.constant(first), tf.constant(last)
        with self._sharing_in_words():
            members, losses = self._train(
                members, data, order, self._rates(), _tensors(hyperparameters), *steps
            )
        return members, losses.numpy()[-(last - first) :]

    def train_apart(
        self, members: Members, steps: Sequence[Sequence[Data]], hyperparameters: Values
    ) -> tuple[Members, np.ndarray]:
        """Makes steps with batches that differ in shape, for one member after the other.

        Args:
            members: The members before the steps.
            steps: For each step, the batch of each member.
            hyperparameters: See `train`.

        Returns:
            The members after the steps, and their losses, of shape `(steps, members)`.

        Raises:
            SharedVariableError: See `train`.
        """
        rates, trained, of_all = self._rates(), [], _tensors(hyperparameters)
        losses = np.zeros((len(steps), self._size), keras.config.floatx())
        for place in range(self._size):
            member, own = tf.nest.map_structure(
                lambda value, at=place: value[at], (members, of_all)
            )
            for step, batches in enumerate(steps):
                with self._sharing_in_words():
                    member, loss = self._train_one(member, batches[place], rates, own)
                losses[step, place] = loss
            trained.append(member)
        return tf.nest.map_structure(lambda *values: tf.stack(values), *trained), losses

    def finalized(self, members: Members) -> Members:
        """Finalizes the members at the end of training, see `finalize_variable_values`."""
        return self._finalize(members)

    def metric(self, name: str, members: Members, batch: Data) -> Tensor:
        """Returns a compiled metric of one batch for each member, of shape `(members,)`.

        It is NaN where the member's loss is not finite. Members are judged one after the other,
        because a metric may contain any operation.
        """
        return self._judge(name, members.weights, members.state, batch)

    def losses(self, members: Members, batch: Data) -> Tensor:
        """Returns each member's loss of one batch, as in `evaluate`, of shape `(members,)`."""
        return self._losses(members.weights, members.state, batch)

    def losses_apart(self, members: Members, batches: Sequence[Data]) -> Tensor:
        """Returns each member's losses of batches that differ in shape: `(batches, members)`."""
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

    def _rates(self) -> list[Tensor]:
        rates = self._step.learning_rates()
        return [tf.constant(rate or 0.0, keras.config.floatx()) for rate in rates]

    # --- traced functions ----------------------------------------------------

    def _stacked(self, function: Any, elements: Any, like: Any) -> Any:
        del like
        # Random draws are made in a loop, about which it would warn.
        return tf.vectorized_map(function, elements, warn=False)

    def _side_by_side(self, function: Any, elements: Any, like: Any) -> Any:
        return tf.map_fn(
            function, elements, fn_output_signature=like, parallel_iterations=self._size
        )

    def _train_stack(
        self,
        members: Members,
        data: Data,
        order: Tensor | None,
        rates: Sequence[Tensor],
        hyperparameters: dict[str, Tensor],
        first: Tensor,
        last: Tensor,
    ) -> tuple[Members, Tensor]:
        """Makes the steps in one loop, each of them mapped over the members.

        XLA needs static shapes, but the number of steps differs from call to call. So there is a
        row of losses for each step of the portion; the last `last - first` rows are filled.
        """
        steps = tf.nest.flatten(data)[0].shape[0] if order is None else order.shape[0]
        losses = tf.zeros((steps, self._size), keras.config.floatx())

        def body(index: Tensor, members: Members, losses: Tensor) -> tuple:
            # A slice would be compiled anew for each index.
            rows = index if order is None else tf.gather(order, index)
            batch = tf.nest.map_structure(lambda part: tf.gather(part, rows), data)
            members, loss = self._map(
                lambda parts: self._member_step(parts[0], parts[1], rates, parts[2]),
                (members, batch, hyperparameters),
                None,
            )
            place = [[index + steps - last]]
            return index + 1, members, tf.tensor_scatter_nd_update(losses, place, [loss])

        _, members, losses = tf.while_loop(
            lambda index, *_: index < last, body, (first, members, losses)
        )
        return members, losses

    def _train_side_by_side(
        self,
        members: Members,
        data: Data,
        order: Tensor | None,
        rates: Sequence[Tensor],
        hyperparameters: dict[str, Tensor],
        first: Tensor,
        last: Tensor,
    ) -> tuple[Members, Tensor]:
        """Maps the whole loop over the members, so that each makes all its steps by itself."""

        def batch_of(index: Tensor, member: Tensor) -> Data:
            place = tf.stack([index, member])
            if order is None:
                return tf.nest.map_structure(lambda part: tf.gather_nd(part, place), data)
            rows = tf.gather_nd(order, place)
            return tf.nest.map_structure(lambda part: tf.gather(part, rows), data)

        def trained(parts: tuple[Tensor, Members, dict]) -> tuple[Members, Tensor]:
            place, member, own = parts

            def body(index: Tensor, member: Members, losses: tf.TensorArray) -> tuple:
                member, loss = self._member_step(member, batch_of(index, place), rates, own)
                return index + 1, member, losses.write(index - first, loss)

            losses = tf.TensorArray(keras.config.floatx(), size=last - first, element_shape=())
            _, member, losses = tf.while_loop(
                lambda index, *_: index < last, body, (first, member, losses)
            )
            return member, losses.stack()

        like = _one_of(members), tf.TensorSpec((None,), keras.config.floatx())
        everyone = tf.range(self._size), members, hyperparameters
        members, losses = self._map(trained, everyone, like)
        return members, tf.transpose(losses)

    def _member_step(
        self,
        member: Members,
        batch: Data,
        rates: Sequence[Tensor],
        hyperparameters: dict[str, Tensor],
    ) -> tuple[Members, Tensor]:
        """Makes one step of one member; returns the member and the loss before the update."""
        weights = member.weights
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss, state = self._function.loss(weights, member.state, Batch(**batch))
            scaled = self._step.scaled(loss)
        self._check_nothing_is_shared()
        grads = [
            None if g is None else tf.convert_to_tensor(g) for g in tape.gradient(scaled, weights)
        ]
        if all(gradient is None for gradient in grads):
            raise ValueError("Its loss depends on none of its trainable weights.")
        weights, optimizer, batches = self._step(
            grads, weights, member.optimizer, rates, member.batches, hyperparameters
        )
        member = Members(weights, state, optimizer, batches)
        return member, tf.cast(loss, keras.config.floatx())

    def _check_nothing_is_shared(self) -> None:
        """Raises a `ValueError` if the traced step changes a variable that members would share.

        The model's own variables are replaced by each member's values. That leaves Keras
        variables that no layer tracks, and raw `tf.Variable`s.
        """
        if self._function.loses_updates:
            self._shares = (
                f"A layer of the model '{self._model_name}' changes a Keras variable that is not "
                "among the model's. Make it a variable of the layer, by `self.add_weight(..., "
                "trainable=False)`, or for random numbers a `keras.random.SeedGenerator` that is "
                "an attribute of the layer. Received: a variable that no layer tracks"
            )
            raise ValueError(self._shares)
        name = _assigning_operation(tf.compat.v1.get_default_graph())
        if name:
            self._shares = (
                f"A layer of the model '{self._model_name}' assigns a raw `tf.Variable` in its "
                "`call`, which all members would share. Make it a variable of the layer, by "
                "`self.add_weight(..., trainable=False)`, of which each member has its own (a "
                "`tf.random.Generator` becomes a `keras.random.SeedGenerator`). "
                f"Received: the operation '{name}'"
            )
            raise ValueError(self._shares)

    @contextlib.contextmanager
    def _sharing_in_words(self) -> Iterator[None]:
        """Restores the error of `_check_nothing_is_shared`, which tracing turns into another."""
        try:
            yield
        except Exception:
            if self._shares:
                raise SharedVariableError(self._shares) from None
            raise

    def _finalized(self, members: Members) -> Members:
        def member(member: Members) -> Members:
            weights, optimizer = self._step.finalized(
                member.weights, member.optimizer, member.batches
            )
            return member._replace(weights=weights, optimizer=optimizer)

        return self._map(member, members, _one_of(members))

    def _fitness_losses(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Data
    ) -> Tensor:
        return self._map(
            lambda member: self._fitness_loss(member[0], member[1], batch)[0],
            (weights, state),
            tf.TensorSpec((), keras.config.floatx()),
        )

    def _metrics(
        self, name: str, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Data
    ) -> Tensor:
        def judged(member: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Tensor:
            loss, metrics = self._function.judged(*member, Batch(**batch))
            value = tf.cast(metrics[name], keras.config.floatx())
            return tf.where(tf.math.is_finite(loss), value, np.nan)

        return tf.map_fn(
            judged,
            (list(weights), list(state)),
            fn_output_signature=tf.TensorSpec((), keras.config.floatx()),
            parallel_iterations=1,
        )

    def _fitness_loss(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Data
    ) -> tuple[Tensor, list[Tensor]]:
        loss, state = self._function.loss(weights, state, Batch(**batch), training=False)
        return tf.cast(loss, keras.config.floatx()), state


def chosen_engine(model: keras.Model, asked_for: str) -> tuple[str, str]:
    """Chooses the engine for a model; returns its name and the reason.

    Args:
        model: The compiled model, whose optimizer is built.
        asked_for: One of `ENGINES`.

    Raises:
        ValueError: If `asked_for` is `"stacked"` and the model cannot be stacked.
    """
    reason = why_not_stacked(model)
    if asked_for == "stacked" and reason:
        raise ValueError(
            f"The engine 'stacked' cannot train the model '{model.name}': {reason}. Use "
            "engine='mapped' or 'auto'."
        )
    if asked_for != "auto":
        return asked_for, "as asked for"
    reason = reason or _why_slow_in_a_stack(model)
    return ("mapped", reason) if reason else ("stacked", "all layers can be stacked")


def why_not_stacked(model: keras.Model) -> str | None:
    """Why the engine `"stacked"` cannot train a model, or `None` if it can."""
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
                f"the recurrence of the layer '{layer.name}' is a loop, which can be stacked only "
                "with `unroll=True`"
            )
    return None


def _why_slow_in_a_stack(model: keras.Model) -> str | None:
    slow = ("Conv", "LSTM", "GRU", "RNN", "Bidirectional", "TimeDistributed")
    for layer in model._flatten_layers():
        if any(word in type(layer).__name__ for word in slow):
            return f"a stack of layers such as '{layer.name}' is slower than one by one"
    return None


def _is_hinge(loss: Any) -> bool:
    """Whether a loss maps labels of 0 and 1 to -1 and 1, after a look at those of the batch."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    return isinstance(loss, keras.losses.Hinge | keras.losses.SquaredHinge) or loss in (
        keras.losses.hinge,
        keras.losses.squared_hinge,
    )


def _values_at_the_beginning(function: ModelFunction, kept: int) -> dict[int, Tensor]:
    """The initial values of state that each phase begins anew, by its place in the state.

    Args:
        function: The model as a function of its weights and state.
        kept: How many variables of the state, from its beginning, are kept between phases.
    """
    with keras.StatelessScope() as scope:
        forget_sequences(function.model)
    values = {}
    for place, variable in enumerate(function.state_variables):
        value = scope.get_current_value(variable)
        if value is None and place >= kept:
            value = tf.convert_to_tensor(variable)
        if value is not None:
            values[place] = value
    return values


def _assigning_operation(graph: Any) -> str | None:
    """The name of an operation that changes a variable, itself or in a function that it calls."""
    functions = {f.signature.name: f.node_def for f in graph.as_graph_def().library.function}

    found: dict[str, bool] = {"": False}

    def function_assigns(name: str) -> bool:
        if name not in found:
            found[name] = False  # so that recursive functions end
            found[name] = any(map(assigns, functions.get(name, ())))
        return found[name]

    def assigns(node: Any) -> bool:
        if node.op.startswith(_ASSIGNING):
            return True
        called = [f for a in node.attr.values() for f in (a.func, *a.list.func)]
        return any(function_assigns(function.name) for function in called)

    return next((op.name for op in graph.get_operations() if assigns(op.node_def)), None)


def _tensors(hyperparameters: Values) -> dict[str, Tensor]:
    return {
        name: tf.constant(values, keras.config.floatx()) for name, values in hyperparameters.items()
    }


def _one_of(members: Members) -> Any:
    """Returns the shapes and types of one member."""
    return tf.nest.map_structure(lambda v: tf.TensorSpec(v.shape[1:], v.dtype), members)
