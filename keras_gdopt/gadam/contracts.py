"""What `Gadam` asks of a population, wherever its members are."""

from typing import Any, Protocol, TypeVar

import keras
import numpy as np

from keras_gdopt.gadam.breeding import Plan
from keras_gdopt.gadam.checkpoint import PopulationCheckpoint
from keras_gdopt.gadam.data import DataArguments, GenerationData
from keras_gdopt.gadam.hyperparameters import Values
from keras_gdopt.gadam.population import Members
from keras_gdopt.gadam.progress import Progress

Parents = TypeVar("Parents")
"""What a population knows of a generation whose parents are trained."""

Generation = TypeVar("Generation")
"""What it knows of a generation whose parents and children are trained."""


class Population(Protocol[Parents, Generation]):
    """All members, and the phases of a generation in their order."""

    @property
    def members(self) -> Members:
        """The survivors of the last generation, in this process."""

    def use(
        self, data: GenerationData, arguments: DataArguments, directory: str | None = None
    ) -> None:
        """Trains and judges with this data from now on.

        Args:
            data: For this process.
            arguments: From which other processes make the same data.
            directory: Of the checkpoints.
        """

    def train_parents(
        self, generation: int, progress: Progress, hyperparameters: Values
    ) -> tuple[Parents, np.ndarray]:
        """Trains the members.

        Args:
            generation: Its number.
            progress: Shows the steps.
            hyperparameters: Of each member.

        Returns:
            The generation with its parents, and their training losses.
        """

    def parents_fitness(self, generation: Parents) -> np.ndarray:
        """The parents' losses of the batch by which parents of children are selected."""

    def train_children(
        self, generation: Parents, plan: Plan, progress: Progress, hyperparameters: Values
    ) -> tuple[Generation, np.ndarray, np.ndarray]:
        """Breeds children and trains them.

        Args:
            generation: With its parents.
            plan: Which parents each child has.
            progress: Shows the steps.
            hyperparameters: Of each child.

        Returns:
            The generation with its children too, their training losses, and how many entries
            of each mutated.
        """

    def survival_fitness(self, generation: Generation) -> tuple[np.ndarray, np.ndarray]:
        """Parents' and children's losses of the batch by which survivors are selected."""

    def select(self, generation: Generation, places: np.ndarray) -> None:
        """Keeps the survivors of a generation, see `genetics.surviving`."""

    def diversity(self) -> float:
        """The mean distance of two members' weights; NaN where they are not here."""

    def load(self, place: int, model: keras.Model) -> None:
        """Puts a member into a model, its optimizer's state included."""

    def report(self) -> dict[str, Any]:
        """What else there is to tell of the last generation."""

    def save(self, checkpoint: PopulationCheckpoint, record: dict[str, Any]) -> None:
        """Writes the survivors, and what else is to be known of the run."""

    def restore(self, checkpoint: PopulationCheckpoint) -> dict[str, Any] | None:
        """Goes on with the survivors that were saved; returns what was saved with them."""
