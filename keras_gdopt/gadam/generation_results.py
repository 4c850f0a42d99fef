"""What a generation has produced: losses, choices, and the hyper-parameters behind them."""

from typing import Any, NamedTuple

import numpy as np

from keras_gdopt.gadam.breeding import Plan
from keras_gdopt.gadam.hyperparameters import Values


class GenerationResults(NamedTuple):
    """The results of a generation of g members; arrays, with one entry for each."""

    plan: Plan
    parent_losses: np.ndarray
    """The training losses of the last epoch."""
    child_losses: np.ndarray
    parent_fitness: np.ndarray
    """The fitness losses on the survival batch."""
    child_fitness: np.ndarray
    parent_hyperparameters: Values
    child_hyperparameters: Values
    mutated: np.ndarray
    """How many entries of each child mutated."""
    places: np.ndarray
    """For each survivor the place of the parent, or g plus that of the child."""

    @property
    def survival_fitness(self) -> np.ndarray:
        """The fitness losses of parents and children, of shape `(2 g,)`."""
        return np.concatenate([self.parent_fitness, self.child_fitness])

    @property
    def surviving_losses(self) -> np.ndarray:
        """The training losses of the survivors."""
        return np.concatenate([self.parent_losses, self.child_losses])[self.places]

    @property
    def surviving_hyperparameters(self) -> Values:
        """The hyper-parameters of the survivors."""
        return {
            name: np.concatenate([values, self.child_hyperparameters[name]])[self.places]
            for name, values in self.parent_hyperparameters.items()
        }

    @property
    def children_survived(self) -> int:
        """How many survivors are children."""
        return int(np.sum(self.places >= len(self.parent_fitness)))

    def details(self) -> dict[str, Any]:
        """The arrays that a `PopulationCallback` sees; see there."""
        return {
            "parent_losses": self.parent_losses,
            "child_losses": self.child_losses,
            "parent_fitness": self.parent_fitness,
            "child_fitness": self.child_fitness,
            "selection_probabilities": self.plan.probabilities,
            "parents": self.plan.parents,
            "mutation_probabilities": self.plan.mutation_probabilities,
            "mutated_entries": self.mutated,
            "survivors": self.places,
            "parent_hyperparameters": self.parent_hyperparameters,
            "child_hyperparameters": self.child_hyperparameters,
        }
