"""Callbacks that see a population."""

from collections.abc import Sequence
from typing import Any

import keras


class PopulationCallback(keras.callbacks.Callback):
    """A Keras callback that also sees the population.

    `gadam` is the `Gadam` that trains. To Keras's own methods a generation is an epoch.
    """

    gadam: Any

    def set_gadam(self, gadam: Any) -> None:
        """Called before training begins.

        Args:
            gadam: The `Gadam` that trains.
        """
        self.gadam = gadam

    def on_generation_begin(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        """Called before a generation, counted from 0, is trained."""

    def on_generation_end(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        """Called after the survivors of a generation are chosen.

        Args:
            generation: Counted from 0.
            logs: What the epoch's logs have, and of the whole population, as NumPy
                arrays: `parent_losses` and `child_losses` (the training losses of the
                generation's last epoch), `parent_fitness` and `child_fitness` (on the
                survival batch), `selection_probabilities` of the parents, `parents` of
                the children (places in the population, of shape `(g, 2)`),
                `mutation_probabilities`, `mutated_entries`, `survivors` (for each place
                the parent's, or g plus the child's, that it holds now) and `identities`
                (in the lineage), `parent_hyperparameters` and `child_hyperparameters` (those that
                evolve, by name). With a `RayEngine` also `bytes_moved` to breed, `bytes_rebalanced`
                where members moved to another worker, `bytes_kept` of the copy of the
                survivors, and `events`, what befell workers, in words.
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
