"""Trains, judges and breeds members on one machine."""

import contextlib
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Data
from keras_gdopt.gadam import keys
from keras_gdopt.gadam.breeding import Breeding, Plan
from keras_gdopt.gadam.data import GenerationData
from keras_gdopt.gadam.engine import Engine, SharedVariableError
from keras_gdopt.gadam.hyperparameters import Values
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members
from keras_gdopt.gadam.samples import sample_count
from keras_gdopt.gadam.training_data import Portion
from keras_gdopt.tensor import Tensor

_OF_TENSORFLOW = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError)
_LONGEST = 300  # characters that are quoted of another error's message


class Fitness(NamedTuple):
    """What members are judged by."""

    name: str
    """`"loss"`, or the name of a compiled metric."""
    direction: str
    """`"min"` if the fittest member has the lowest value, `"max"` if it has the highest."""

    @property
    def sign(self) -> int:
        """The factor that turns the value into a loss to minimize: 1 or -1."""
        return 1 if self.direction == "min" else -1


class Training:
    """Trains, judges and breeds members with an engine, which is built once.

    Args:
        model: The compiled and built model.
        engine: The name of the engine, `"stacked"` or `"mapped"`.
        count: The number of members that are trained together.
        breeding: Makes the weights of children.
        fitness: What members are judged by.
        seed: The seed of the run.
    """

    def __init__(
        self,
        model: keras.Model,
        engine: str,
        count: int,
        *,
        breeding: Breeding,
        fitness: Fitness,
        seed: int,
    ) -> None:
        self.engine = Engine(model, count, engine)
        self._is_stacked = engine == "stacked"
        self.count = count
        self._model = model
        self._breeding = breeding
        self.inherits_optimizer_state = breeding.inherits_optimizer_state
        self._fitness = fitness
        self._has_metrics = False
        self._seed = seed

    def trained(
        self,
        members: Members,
        places: Sequence[int],
        generation: int,
        phase: Phase,
        hyperparameters: Values,
        data: GenerationData,
        *,
        stride: Callable[[], int] | None = None,
        heard: Callable[[int, np.ndarray], None] = lambda steps, losses: None,
    ) -> tuple[Members, np.ndarray]:
        """Trains members for a phase; returns them and their mean losses in the last epoch.

        Batches and random draws depend on a member's place, not on the members trained with it.

        Args:
            members: The members before the phase.
            places: The place of each member in the population, or the number of each child.
            generation: The number of the generation.
            phase: `Phase.TRAIN_PARENTS` or `Phase.TRAIN_CHILDREN`.
            hyperparameters: The members' own hyper-parameters, if there are any.
            data: The training data.
            stride: Returns the largest number of steps to make before the next call of `heard`.
            heard: Called with the number of steps made and the losses in the last of them.
        """
        members = self.engine.with_sequences(members)
        state = list(members.state)
        for index in self.engine.seed_generators:
            drawn_keys = [
                keys.key(self._seed, generation, phase, place, index).view(np.uint32)
                for place in places
            ]
            state[index] = tf.cast(tf.constant(np.stack(drawn_keys)), state[index].dtype)
        members = members._replace(state=state)
        losses: list[np.ndarray] = []
        for epoch in range(data.epochs):
            losses = []
            for portion in data.epoch(generation, phase, epoch, places):
                first = 0
                while first < portion.steps:
                    length = stride() if stride else portion.steps
                    last = min(first + length, portion.steps)
                    members, of_steps = self._train(members, portion, first, last, hyperparameters)
                    losses.append(of_steps)
                    heard(last - first, of_steps[-1])
                    first = last
        members = self.engine.without_sequences(self.engine.finalized(members))
        return members, np.mean(np.concatenate(losses), axis=0)

    def fitness(
        self, members: Members, generation: int, phase: Phase, data: GenerationData
    ) -> np.ndarray:
        """Returns the members' fitness losses in a phase.

        For several batches this is the mean over all samples, as in `evaluate`; for a metric with
        direction `"max"` its negative.
        """
        members = self.engine.with_sequences(members)
        batch = data.fitness_batch(generation, phase)
        if self._fitness.name != "loss":
            return self._fitness.sign * self._metric(members, batch)
        if not isinstance(batch, list):
            with self._errors_in_words(batch):
                return self.engine.losses(members, batch).numpy()
        with self._errors_in_words(batch[0]):
            losses = self.engine.losses_apart(members, batch).numpy()
        counts = [sample_count(one) for one in batch]
        return np.average(losses, axis=0, weights=counts).astype(losses.dtype)

    def _metric(self, members: Members, batch: Data | list[Data]) -> np.ndarray:
        assert not isinstance(batch, list)  # the driver has checked this
        if not self._has_metrics:  # metrics have no variables before a first batch
            self._model.test_on_batch(**batch)
            self._model.reset_metrics()
            self._has_metrics = True
        with self._errors_in_words(batch):
            return self.engine.metric(self._fitness.name, members, batch).numpy()

    def children(
        self,
        plan: Plan,
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        state: Sequence[Tensor],
        inherited: tuple[Any, Tensor] | None = None,
        children: Sequence[int] | None = None,
    ) -> tuple[Members, np.ndarray]:
        """Makes children that are not trained yet, and counts the mutated entries of each.

        Args:
            plan: See `Breeding.children`.
            first: See `Breeding.children`.
            second: See `Breeding.children`.
            state: The children's non-trainable state.
            inherited: The state and the batch counts of the children's optimizers. Defaults to
                those of fresh optimizers.
            children: See `Breeding.children`.
        """
        weights, mutated = self._breeding.children(plan, first, second, children)
        if inherited is None:
            fresh = self.engine.fresh_optimizer_state(self.count)
            inherited = fresh, tf.zeros((self.count,), tf.int64)
        return Members(weights, list(state), *inherited), mutated

    def _train(
        self,
        members: Members,
        portion: Portion,
        first: int,
        last: int,
        hyperparameters: Values,
    ) -> tuple[Members, np.ndarray]:
        data = portion.data
        if isinstance(data, list):
            with self._errors_in_words(data[0][0]):
                return self.engine.train_apart(members, data[first:last], hyperparameters)
        with self._errors_in_words(data):
            return self.engine.train(members, data, portion.order, first, last, hyperparameters)

    @contextlib.contextmanager
    def _errors_in_words(self, data: Data) -> Iterator[None]:
        """Turns errors of the model into one that names the data and leaves out the graph."""
        try:
            yield
        except SharedVariableError:
            raise
        except (ValueError, TypeError, *_OF_TENSORFLOW) as error:
            name = self._model.name
            shapes = {
                part: tf.nest.map_structure(lambda p: tuple(p.shape), value)
                for part, value in data.items()
            }
            instead = ""
            if isinstance(error, _OF_TENSORFLOW) and self._is_stacked:
                instead = " If `model.fit` takes it, use `Gadam(engine='mapped')`."
            raise ValueError(
                f"The model '{name}' does not train on this data: {_core(error)}{instead} "
                f"Received: data of shapes {reprlib.repr(shapes)}"
            ) from error


def _core(error: Exception) -> str:
    """Extracts the message of an error, without the code that raised it."""
    text = str(error)
    bold = re.search(r"\x1b\[1m(.*?)\x1b\[0m", text, re.DOTALL)  # Keras prints its messages in bold
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if bold:
        core = bold.group(1)
    elif lines and lines[0] == "in user code:":  # the places in the code follow
        core = re.sub(r"^\w+(Error|Exception): ", "", lines[-1])
    else:
        core = lines[0] if lines else type(error).__name__
    core = " ".join(re.sub(r"\{\{.*?\}\}", "", core).split())
    return (core if len(core) <= _LONGEST else core[:_LONGEST] + "...").rstrip(".") + "."
