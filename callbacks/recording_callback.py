"""What the callbacks that read an optimizer's recorded steps have in common."""

from typing import Any

import keras

from keras_gdopt.callbacks.optimizer_parts import (
    OptimizerPart,
    count,
    optimizer_parts,
    start_recording,
    stop_recording,
)
from keras_gdopt.optimizers.argument_checks import check_tensorflow, checked_count
from keras_gdopt.optimizers.wrapping_optimizer import chain


class RecordingCallback(keras.callbacks.Callback):
    """Asks the model's optimizer to record its steps, and looks every `update_freq` batches.

    A subclass overrides `_look`, which reads what the optimizers in `_parts` recorded, and
    `_open_files` if it writes any.

    Args:
        update_freq: Batches between two recorded steps.
        tier: What is recorded of a step: one of `keras_gdopt.optimizers.recording.TIERS`.

    Raises:
        ValueError: If `update_freq` is not a positive integer; before training starts, if the
            model is not compiled.
        RuntimeError: With a backend other than TensorFlow.
    """

    def __init__(self, update_freq: int, tier: str = "scalars") -> None:
        check_tensorflow(type(self).__name__)
        super().__init__()
        self.update_freq = checked_count("update_freq", update_freq, minimum=1)
        self.tier = tier
        self._parts: list[OptimizerPart] = []
        self._has_parts = self._has_begun = False
        self._batches = self._batches_before_epoch = 0

    # --- what Keras calls ----------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Asks the model's optimizer to record."""
        if getattr(self.model, "optimizer", None) is None:
            raise ValueError(
                f"{type(self).__name__} needs a compiled model: call "
                "`model.compile(optimizer=keras_gdopt.Adam(), ...)` first. Received: the model "
                f"'{self.model.name}', which is not compiled"
            )
        self._has_begun = False
        self._batches = 0
        self._open_files()
        self._begin_recording()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Records how many batches came before the epoch."""
        if not self._has_begun:  # by now `BackupAndRestore` has restored the model
            self._has_begun = True
            accumulated = self._innermost.gradient_accumulation_steps or 1
            self._batches = self._updates * accumulated
        self._batches_before_epoch = self._batches

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks if a multiple of `update_freq` has been passed."""
        if not self._has_parts:
            self._begin_recording()
        before, self._batches = self._batches, self._batches_before_epoch + batch + 1
        if self._batches // self.update_freq > before // self.update_freq:
            self._look(logs)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Ends the recording."""
        stop_recording(self._parts, self)

    # --- for subclasses ------------------------------------------------------

    def _look(self, logs: dict[str, Any] | None) -> None:
        """Reads what was recorded since the last look; `logs` are those of the batch."""
        raise NotImplementedError

    def _open_files(self) -> None:
        """Opens what is written to; called before the optimizers are asked to record."""

    def _begin_recording(self) -> None:
        """Asks the optimizers to record.

        Does nothing before a `MultiOptimizer` knows its optimizers: if a function chooses
        them, that is after the first batch.
        """
        self._parts = optimizer_parts(self.model.optimizer)
        self._has_parts = bool(self._parts) or self._innermost.built
        start_recording(self.model, self._parts, self.update_freq, self.tier, self)

    @property
    def _is_chief(self) -> bool:
        """Whether this process writes files, of those that train the model together."""
        return bool(self.model.distribute_strategy.extended.should_save_summary)

    @property
    def _innermost(self) -> Any:
        """The optimizer inside all wrappers: the count of some Keras wrappers stays 0."""
        return chain(self.model.optimizer)[-1]

    @property
    def _updates(self) -> int:
        return count(self._innermost)
