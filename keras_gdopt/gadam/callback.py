"""The base class of callbacks that see the population."""

from collections.abc import Sequence
from typing import Any

import keras


class PopulationCallback(keras.callbacks.Callback):
    """A Keras callback that also sees the population.

    Its attribute `gadam` is the `Gadam` that trains. For Keras's own methods, a generation is an
    epoch.
    """

    gadam: Any

    def set_gadam(self, gadam: Any) -> None:
        """Called before training begins.

        Args:
            gadam: The `Gadam` that trains.
        """
        self.gadam = gadam

    def on_generation_begin(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        """Called before a generation is trained; generations are counted from 0."""

    def on_generation_end(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        """Called after the survivors of a generation are selected.

        Besides the logs of the epoch, `logs` has NumPy arrays of the whole population:

        - `parent_losses`, `child_losses`: the training losses in the last epoch,
        - `parent_fitness`, `child_fitness`: the fitness losses of the survival batch,
        - `selection_probabilities`: the probability of each member to be drawn as a parent,
        - `parents`: the places of each child's parents, of shape `(g, 2)`,
        - `mutation_probabilities`, `mutated_entries`: of each child,
        - `survivors`: for each place the place of the parent, or g plus the number of the child,
          that holds it now,
        - `identities`: the survivors' ids in the lineage,
        - `parent_hyperparameters`, `child_hyperparameters`: dictionaries of the hyper-parameters
          that evolve, by name.

        With a `RayEngine`, `logs` also has the numbers `bytes_moved` (to breed children),
        `bytes_rebalanced` (of members that moved to another worker) and `bytes_kept` (of the copy
        of the survivors), and `events`, a list of what happened to workers, in words.

        Args:
            generation: The number of the generation, counted from 0.
            logs: See above.
        """


class PopulationCallbackList(keras.callbacks.CallbackList):
    """Keras's list of callbacks, with a generation in place of an epoch.

    Args:
        callbacks: Keras's, and `PopulationCallback`s.
        gadam: The `Gadam` that trains; callbacks see its model.
        **params: What Keras tells callbacks: `epochs`, `steps` and `verbose`.

    Attributes:
        history: Keras's callback that keeps the logs.
    """

    def __init__(
        self, callbacks: Sequence[keras.callbacks.Callback] | None, gadam: Any, **params: Any
    ) -> None:
        super().__init__(callbacks, add_history=True, model=gadam.model, **params)
        self.history: keras.callbacks.History = gadam.model.history
        self._listeners = [c for c in self.callbacks if isinstance(c, PopulationCallback)]
        for listener in self._listeners:
            listener.set_gadam(gadam)

    def on_generation_begin(self, generation: int) -> None:
        """Begins an epoch and a generation."""
        self.on_epoch_begin(generation)
        for listener in self._listeners:
            listener.on_generation_begin(generation)

    def on_generation_end(
        self, generation: int, logs: dict[str, Any], details: dict[str, Any]
    ) -> None:
        """Ends a generation and its epoch.

        Args:
            generation: Counted from 0.
            logs: What all callbacks see.
            details: What a `PopulationCallback` sees besides.
        """
        for listener in self._listeners:
            listener.on_generation_end(generation, {**logs, **details})
        self.on_epoch_end(generation, logs)
