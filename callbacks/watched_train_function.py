"""A model's train function, watched: some of its steps are recorded, and listeners told."""

import weakref
from typing import Any, Protocol

import keras

from keras_gdopt.optimizers.step_metrics import TIERS
from keras_gdopt.optimizers.wrapping_optimizer import recording_optimizer


class Listener(Protocol):
    """Who is told of steps."""

    def on_step(self) -> None:
        """Called after a step that was asked for."""


class WatchedTrainFunction:
    """Stands for a model's train function, and tells listeners of each n-th batch.

    Where the optimizer records its steps, there are two train functions, each traced when
    it is first called, and one of them records. A step that looked for itself whether to
    record would cost more: a condition in the graph takes all that might be recorded as
    its inputs, in every step. Keras's own calls after each batch would cost more, too, for
    before them it waits for the batch's logs.

    Args:
        model: A compiled model; its train function is replaced.
    """

    def __init__(self, model: keras.Model) -> None:
        self.batches = 0
        """How many batches were trained; to be set where training begins or is restored."""
        self._model = model
        self._optimizer = recording_optimizer(model.optimizer)
        # Weakly: a training that dies does not say that it listens no more.
        self._listeners: weakref.WeakKeyDictionary[Listener, int] = weakref.WeakKeyDictionary()
        # One of several steps in a graph has to look for itself.
        self._chooses = hasattr(self._optimizer, "recording") and model.steps_per_execution == 1
        self._tier = TIERS[0]
        self._recording: Any = None  # made when somebody listens
        model.make_train_function()
        self._plain = model.train_function
        model.train_function = self

    @classmethod
    def of(cls, model: keras.Model) -> "WatchedTrainFunction":
        """The one that a model has, or a new one."""
        function = model.train_function
        return function if isinstance(function, cls) else cls(model)

    def tell(self, listener: Listener, every: int, tier: str) -> None:
        """Tells a listener of steps from now on.

        Args:
            listener: Whom to tell.
            every: Of every so many batches; 0 for none any more.
            tier: How much of them is to be recorded, one of `TIERS`.
        """
        self._listeners.pop(listener, None)
        if every:
            self._listeners[listener] = every
        if self._chooses:
            if self._recording is None or TIERS.index(tier) > TIERS.index(self._tier):
                self._tier, self._recording = tier, self._untraced()
        elif self._optimizer is not None and self._optimizer.record_step_metrics(
            every, tier=tier, listener=listener
        ):
            self._plain = self._untraced()

    def __call__(self, iterator: Any) -> Any:
        """Trains as Keras's train function does, and returns what it does."""
        batches_a_call = self._model.steps_per_execution
        self.batches += batches_a_call
        # With accumulated gradients, the next update is among so many batches.
        passed = max(batches_a_call, accumulated_batches(self._model.optimizer))
        due = [who for who, every in self._listeners.items() if self.batches % every < passed]
        if not due:
            return self._plain(iterator)
        before = updates(self._model.optimizer)
        if self._chooses:
            with self._optimizer.recording(self._tier):
                logs = self._recording(iterator)
        else:
            logs = self._plain(iterator)
        if updates(self._model.optimizer) > before:
            for listener in due:
                listener.on_step()
        return logs

    def _untraced(self) -> Any:
        """A train function of the model that is not traced yet."""
        self._model.make_train_function(force=True)
        made, self._model.train_function = self._model.train_function, self
        return made


def updates(optimizer: Any) -> int:
    """An optimizer's count of updates."""
    return int(keras.ops.convert_to_numpy(_innermost(optimizer).iterations))


def accumulated_batches(optimizer: Any) -> int:
    """How many batches an update takes."""
    return _innermost(optimizer).gradient_accumulation_steps or 1


def _innermost(optimizer: Any) -> Any:
    """The optimizer inside all wrappers: some of Keras's have a count that stays 0."""
    while getattr(optimizer, "inner_optimizer", None) is not None:
        optimizer = optimizer.inner_optimizer
    return optimizer
