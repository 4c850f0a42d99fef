"""A population in the memory of this machine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.gadam import population
from keras_gdopt.gadam.breeding import Plan
from keras_gdopt.gadam.checkpoint import PopulationCheckpoint
from keras_gdopt.gadam.data import DataArguments, GenerationData
from keras_gdopt.gadam.hyperparameters import Values
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.gadam.population import Members
from keras_gdopt.gadam.progress import Progress
from keras_gdopt.gadam.training import Training


class LocalParents(NamedTuple):
    """A generation whose parents are trained."""

    number: int
    parents: Members


class LocalGeneration(NamedTuple):
    """A generation whose parents and children are trained."""

    number: int
    parents: Members
    children: Members


class LocalPopulation:
    """A `Population` whose members are arrays of this process.

    Args:
        training: Of as many members as the population has.
        starts: The weights and the state of each member.

    Attributes:
        members: As they survived the last generation.
    """

    def __init__(
        self,
        training: Training,
        starts: Sequence[tuple[list[np.ndarray], list[np.ndarray]]],
    ) -> None:
        self._training = training
        size = training.count
        weights, state = (
            [tf.constant(np.stack(arrays)) for arrays in zip(*part, strict=True)]
            for part in zip(*starts, strict=True)
        )
        self.members = Members(
            weights, state, training.engine.fresh_optimizer_state(size), tf.zeros((size,), tf.int64)
        )
        self._diversity = tf.function(population.diversity)

    def use(
        self, data: GenerationData, arguments: DataArguments, directory: str | None = None
    ) -> None:
        """Trains and judges with this data from now on."""
        del arguments, directory  # they are for other processes
        self._data = data

    def train_parents(
        self, generation: int, progress: Progress, hyperparameters: Values
    ) -> tuple[LocalParents, np.ndarray]:
        """See `Population.train_parents`."""
        parents, losses = self._train(
            self.members, generation, Phase.TRAIN_PARENTS, progress, hyperparameters
        )
        return LocalParents(generation, parents), losses

    def parents_fitness(self, generation: LocalParents) -> np.ndarray:
        """See `Population.parents_fitness`."""
        return self._training.fitness(
            generation.parents, generation.number, Phase.FITNESS, self._data
        )

    def train_children(
        self,
        generation: LocalParents,
        plan: Plan,
        progress: Progress,
        hyperparameters: Values,
    ) -> tuple[LocalGeneration, np.ndarray, np.ndarray]:
        """See `Population.train_children`."""
        parents = generation.parents
        inheritance: list[Any] = [parents.state]
        if self._training.inherits_optimizer_state:
            inheritance.append((parents.optimizer, parents.batches))
        state, *inherited = tf.nest.map_structure(
            lambda value: tf.gather(value, plan.fitter), inheritance
        )
        children, mutated = self._training.children(
            plan, parents.weights, parents.weights, state, *inherited
        )
        children, losses = self._train(
            children, generation.number, Phase.TRAIN_CHILDREN, progress, hyperparameters
        )
        return LocalGeneration(*generation, children), losses, mutated

    def survival_fitness(self, generation: LocalGeneration) -> tuple[np.ndarray, np.ndarray]:
        """See `Population.survival_fitness`."""
        parents, children = (
            self._training.fitness(members, generation.number, Phase.SURVIVAL, self._data)
            for members in (generation.parents, generation.children)
        )
        return parents, children

    def select(self, generation: LocalGeneration, places: np.ndarray) -> None:
        """See `Population.select`."""
        self.members = population.selected(places, generation.parents, generation.children)

    def _train(
        self,
        members: Members,
        generation: int,
        phase: Phase,
        progress: Progress,
        hyperparameters: Values,
    ) -> tuple[Members, np.ndarray]:
        return self._training.trained(
            members,
            range(self._training.count),
            generation,
            phase,
            hyperparameters,
            self._data,
            stride=lambda: progress.stride,
            heard=progress.add,
        )

    def diversity(self) -> float:
        """The mean distance of two members' weights."""
        return float(self._diversity(self.members.weights))

    def report(self) -> dict[str, Any]:
        """What else there is to tell of a generation."""
        return {}

    def load(self, place: int, model: keras.Model) -> None:
        """Puts a member into a model, its optimizer's state included."""
        members = self.members
        weights, state = ([value[place] for value in part] for part in members[:2])
        population.fill(model, weights, state)
        self._training.engine.load_optimizer(members, place, model.optimizer)

    # --- checkpoints -----------------------------------------------------------

    def save(self, checkpoint: PopulationCheckpoint, record: dict[str, Any]) -> None:
        """Writes the survivors, and what else is to be known of the run."""
        checkpoint.save(self.members, record)

    def restore(self, checkpoint: PopulationCheckpoint) -> dict[str, Any] | None:
        """Goes on with the survivors that were saved; returns what was with them."""
        saved = checkpoint.restore(self.members)
        if saved is None:
            return None
        self.members = saved.members
        return saved.record
