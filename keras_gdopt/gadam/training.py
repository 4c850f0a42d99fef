"""Trains, judges and breeds members on one machine."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.gadam import keys, population
from keras_gdopt.gadam.breeding import Breeding, Plan
from keras_gdopt.gadam.data import GenerationData
from keras_gdopt.gadam.engines.stacked import StackedEngine
from keras_gdopt.gadam.engines.unrolled import UnrolledEngine
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members

Tensor = Any


class Training:
    """What trains a number of members: an engine, built once, and the keys of their draws.

    Args:
        model: Compiled and built.
        engine: `"stacked"` or `"unrolled"`.
        count: How many members it trains together.
        breeding: Of the run.
        seed: Of the run.
    """

    data: GenerationData

    def __init__(
        self, model: keras.Model, engine: str, count: int, *, breeding: Breeding, seed: int
    ) -> None:
        self.engine: StackedEngine | UnrolledEngine
        if engine == "stacked":
            self.engine = StackedEngine(model, count)
        else:
            clones = [
                population.compiled_as(model, population.clone(model, seed=member), metrics=False)
                for member in range(count)
            ]
            self.engine = UnrolledEngine(model, clones)
        self.count = count
        self._breeding = breeding
        self._seed = seed
        self._seed_generators = population.seed_generators(model)

    def trained(
        self,
        members: Members,
        places: Sequence[int],
        generation: int,
        phase: Phase,
        *,
        stride: int | None = None,
        heard: Callable[[int, np.ndarray], None] = lambda steps, losses: None,
    ) -> tuple[Members, np.ndarray]:
        """Members after a phase of training, and their mean losses in its last epoch.

        Args:
            members: Before.
            places: In the population, one for each member.
            generation: Its number.
            phase: Whether they are trained as parents or as children.
            stride: Steps from one call of `heard` to the next, at most.
            heard: Called with a number of steps and the losses in the last of them.
        """
        state = list(members.state)
        for index in self._seed_generators:
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
                length = stride or portion.steps
                for first in range(0, portion.steps, length):
                    last = min(first + length, portion.steps)
                    members, of_steps = self.engine.train(
                        members, portion.data, portion.order, first, last
                    )
                    losses.append(of_steps)
                    heard(last - first, of_steps[-1])
        return self.engine.finalized(members), np.mean(np.concatenate(losses), axis=0)

    def fitness(self, members: Members, generation: int, phase: Phase) -> np.ndarray:
        """The members' losses of the batch that they are judged by in a phase."""
        return self.engine.losses(members, self.data.fitness_batch(generation, phase)).numpy()

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
        updates = tf.zeros((self.count,), tf.int64)
        return Members(weights, list(state), fresh, updates), mutated
