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
_LONGEST = 300  # characters of another's message


class Fitness(NamedTuple):
    """What members are judged by."""

    name: str
    """`"loss"`, or a compiled metric."""
    direction: str
    """Whether the fittest member has the least of it, `"min"`, or the most, `"max"`."""

    @property
    def sign(self) -> int:
        """What makes a loss of it, of which less is better."""
        return 1 if self.direction == "min" else -1


class Training:
    """What trains a number of members: an engine, built once, and the keys of their draws.

    Args:
        model: Compiled and built.
        engine: `"stacked"` or `"mapped"`.
        count: How many members it trains together.
        breeding: Of the run.
        fitness: What members are judged by.
        seed: Of the run.
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
        """Members after a phase of training, and their mean losses in its last epoch.

        Args:
            members: Before.
            places: In the population, one for each member.
            generation: Its number.
            phase: Whether they are trained as parents or as children.
            hyperparameters: Theirs, where they have some of their own.
            data: To train on.
            stride: Tells how many steps to make until the next call of `heard`, at most.
            heard: Called with a number of steps and the losses in the last of them.
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
        """The members' losses of what they are judged by in a phase.

        Of several batches the mean over all samples, as of `evaluate`. Of a metric of which more
        is better the negative.
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
        assert not isinstance(batch, list)  # the driver has looked
        if not self._has_metrics:  # they have variables only after a first batch
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
        """Children before their training, and how many entries of each mutated.

        Args:
            plan: Of the generation.
            first: See `Breeding.children`.
            second: Likewise.
            state: Of the children.
            inherited: The state and the batches of their optimizers; fresh ones by default.
            children: Likewise.
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
        """Says of which data a model does not take, without TensorFlow's graph."""
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
    """What an error says, without the code that it came from."""
    text = str(error)
    bold = re.search(r"\x1b\[1m(.*?)\x1b\[0m", text, re.DOTALL)  # as Keras marks it
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if bold:
        core = bold.group(1)
    elif lines and lines[0] == "in user code:":  # and then come the places
        core = re.sub(r"^\w+(Error|Exception): ", "", lines[-1])
    else:
        core = lines[0] if lines else type(error).__name__
    core = " ".join(re.sub(r"\{\{.*?\}\}", "", core).split())
    return (core if len(core) <= _LONGEST else core[:_LONGEST] + "...").rstrip(".") + "."
