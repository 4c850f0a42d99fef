"""Trains, judges and breeds members on one machine."""

import contextlib
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Data
from keras_gdopt.gadam import keys
from keras_gdopt.gadam.breeding import Breeding, Plan
from keras_gdopt.gadam.data import GenerationData, Portion
from keras_gdopt.gadam.engine import Engine, SharedVariableError
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members
from keras_gdopt.gadam.samples import sample_count

Tensor = Any

_OF_TENSORFLOW = (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError)
_LONGEST = 300  # characters of another's message


class Training:
    """What trains a number of members: an engine, built once, and the keys of their draws.

    Args:
        model: Compiled and built.
        engine: `"stacked"` or `"mapped"`.
        count: How many members it trains together.
        breeding: Of the run.
        seed: Of the run.
    """

    data: GenerationData

    def __init__(
        self, model: keras.Model, engine: str, count: int, *, breeding: Breeding, seed: int
    ) -> None:
        self.engine = Engine(model, count, engine)
        self._is_stacked = engine == "stacked"
        self.count = count
        self._model = model
        self._breeding = breeding
        self._seed = seed

    def trained(
        self,
        members: Members,
        places: Sequence[int],
        generation: int,
        phase: Phase,
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
        for epoch in range(self.data.epochs):
            losses = []
            for portion in self.data.epoch(generation, phase, epoch, places):
                first = 0
                while first < portion.steps:
                    length = stride() if stride else portion.steps
                    last = min(first + length, portion.steps)
                    members, of_steps = self._train(members, portion, first, last)
                    losses.append(of_steps)
                    heard(last - first, of_steps[-1])
                    first = last
        members = self.engine.without_sequences(self.engine.finalized(members))
        return members, np.mean(np.concatenate(losses), axis=0)

    def fitness(self, members: Members, generation: int, phase: Phase) -> np.ndarray:
        """The members' losses of what they are judged by in a phase.

        Of several batches the mean over all samples, as of `evaluate`.
        """
        members = self.engine.with_sequences(members)
        batch = self.data.fitness_batch(generation, phase)
        if not isinstance(batch, list):
            with self._errors_in_words(batch):
                return self.engine.losses(members, batch).numpy()
        with self._errors_in_words(batch[0]):
            losses = self.engine.losses_apart(members, batch).numpy()
        counts = [sample_count(one) for one in batch]
        return np.average(losses, axis=0, weights=counts).astype(losses.dtype)

    def children(
        self,
        plan: Plan,
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        state: Sequence[Tensor],
        children: Sequence[int] | None = None,
    ) -> tuple[Members, np.ndarray]:
        """Children that were never trained, and how many entries of each mutated.

        Args:
            plan: Of the generation.
            first: See `Breeding.children`.
            second: Likewise.
            state: Of the children.
            children: Likewise.
        """
        weights, mutated = self._breeding.children(plan, first, second, children)
        fresh = self.engine.fresh_optimizer_state(self.count)
        batches = tf.zeros((self.count,), tf.int64)
        return Members(weights, list(state), fresh, batches), mutated

    def _train(
        self, members: Members, portion: Portion, first: int, last: int
    ) -> tuple[Members, np.ndarray]:
        data = portion.data
        if isinstance(data, list):
            with self._errors_in_words(data[0][0]):
                return self.engine.train_apart(members, data[first:last])
        with self._errors_in_words(data):
            return self.engine.train(members, data, portion.order, first, last)

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
