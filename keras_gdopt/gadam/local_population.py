"""A population in the memory of this machine."""

from collections.abc import Sequence
from typing import Any

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


class LocalPopulation:
    """All members, and the phases of a generation in their order.

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
        self._everyone = range(size)
        self._diversity = tf.function(population.diversity)

    def use(
        self, data: GenerationData, arguments: DataArguments, directory: str | None = None
    ) -> None:
        """Trains and judges with this data from now on."""
        del arguments, directory  # they are for other machines
        self._training.data = data

    def train_parents(
        self, generation: int, progress: Progress, hyperparameters: Values
    ) -> np.ndarray:
        """Trains the members; returns their losses."""
        self._parents, losses = self._training.trained(
            self.members,
            self._everyone,
            generation,
            Phase.TRAIN_PARENTS,
            hyperparameters,
            stride=lambda: progress.stride,
            heard=progress.add,
        )
        return losses

    def parents_fitness(self, generation: int) -> np.ndarray:
        """The trained parents' losses of the batch that decides who begets."""
        return self._training.fitness(self._parents, generation, Phase.FITNESS)

    def train_children(
        self, plan: Plan, progress: Progress, hyperparameters: Values
    ) -> tuple[np.ndarray, np.ndarray]:
        """Breeds and trains; returns the children's losses and mutated entries."""
        parents = self._parents
        inheritance: list[Any] = [parents.state]
        if self._training.inherits_optimizer_state:
            inheritance.append((parents.optimizer, parents.batches))
        state, *inherited = tf.nest.map_structure(
            lambda value: tf.gather(value, plan.fitter), inheritance
        )
        children, mutated = self._training.children(
            plan, parents.weights, parents.weights, state, *inherited
        )
        self._children, losses = self._training.trained(
            children,
            self._everyone,
            plan.generation,
            Phase.TRAIN_CHILDREN,
            hyperparameters,
            stride=lambda: progress.stride,
            heard=progress.add,
        )
        return losses, mutated

    def survival_fitness(self, generation: int) -> tuple[np.ndarray, np.ndarray]:
        """Parents' and children's losses of the batch that decides who survives."""
        return (
            self._training.fitness(self._parents, generation, Phase.SURVIVAL),
            self._training.fitness(self._children, generation, Phase.SURVIVAL),
        )

    def select(self, places: np.ndarray) -> None:
        """Keeps the survivors, see `genetics.surviving`."""
        self.members = population.selected(places, self._parents, self._children)
        del self._parents, self._children

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
