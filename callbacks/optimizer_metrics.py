"""Puts an optimizer's step metrics into the logs that Keras hands to callbacks."""

import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_gdopt.callbacks.optimizer_parts import (
    OptimizerPart,
    optimizer_parts,
    start_recording,
    stop_recording,
)
from keras_gdopt.optimizers.argument_checks import check_tensorflow, checked_count

_NAMES = ("learning_rate", "grad_norm", "update_norm", "weight_norm")


class OptimizerMetrics(keras.callbacks.Callback):
    r"""Adds the optimizer's metrics to the logs, for `History` and any other logger.

    Put it before the callbacks that are to see them, such as `keras.callbacks.CSVLogger`, W&B's or
    MLflow's. `History` and the progress bar come last and show them too. The logs of a batch hold
    the last recorded step, those of an epoch the last one in it. They have the same keys from the
    first epoch on, since a `CSVLogger` fixes its columns then: a metric is NaN until a step has
    been recorded.

    With Keras's `MultiOptimizer`, the metrics of each optimizer have its name before theirs, such
    as `Adam/grad_norm`. Of an optimizer that records nothing, as Keras's own, the learning rate
    and the weight norm are known, and all else is NaN.

    Args:
        names: Which of the optimizer's `step_metrics`. Defaults to `None`: `learning_rate`,
            `grad_norm`, `update_norm` and `weight_norm`.
        update_freq: Batches between two recorded steps. Defaults to 100.

    Raises:
        ValueError: If `update_freq` is not a positive integer; before training starts, if the
            model is not compiled; after the first recorded step, if the optimizer has no metric of
            one of the names.
        RuntimeError: With a backend other than TensorFlow.

    Keras has no such callback.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Adam(), "mse")
    >>> metrics = gdopt.callbacks.OptimizerMetrics(["grad_norm"], update_freq=1)
    >>> x, y = np.ones((8, 3)), np.ones((8, 1))
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[metrics])
    >>> sorted(history.history)
    ['grad_norm', 'loss']
    """

    def __init__(self, names: Sequence[str] | None = None, update_freq: int = 100) -> None:
        check_tensorflow(type(self).__name__)
        super().__init__()
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            raise ValueError(
                "Argument `names` must be a list of names of metrics, such as ['grad_norm']. "
                f"Received: names={names!r}"
            )
        self.names = _NAMES if names is None else tuple(names)
        self.update_freq = checked_count("update_freq", update_freq, minimum=1)
        self._parts: list[OptimizerPart] = []
        self._known: dict[str, float] = {}
        self._batches = self._batches_before_epoch = 0

    # --- what Keras calls ----------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Asks the model's optimizer to record."""
        if getattr(self.model, "optimizer", None) is None:
            raise ValueError(
                "OptimizerMetrics needs a compiled model: call `model.compile(optimizer=..., "
                f"...)` first. Received: the model '{self.model.name}', which is not compiled"
            )
        self._batches, self._known, self._parts = 0, {}, []
        self._begin_recording()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes how many batches came before the epoch."""
        self._batches_before_epoch = self._batches

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the metrics of the last recorded step to the batch's logs."""
        if not self._parts:
            self._begin_recording()  # of optimizers that a function chooses
        before, self._batches = self._batches, self._batches_before_epoch + batch + 1
        if self._batches // self.update_freq > before // self.update_freq:
            self._look()
        if logs is not None:
            logs.update(self._known)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the metrics to the epoch's logs."""
        self._look()
        if logs is not None:
            logs.update(self._known)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Ends the recording."""
        stop_recording(self._parts, self)

    # --- the parts -----------------------------------------------------------

    def _begin_recording(self) -> None:
        self._parts = optimizer_parts(self.model.optimizer)
        start_recording(self.model, self._parts, self.update_freq, "scalars", self)
        for part in self._parts:
            for name in self.names:
                self._known[f"{part.prefix}{name}"] = math.nan

    def _look(self) -> None:
        """Reads what was recorded since the last look."""
        for part in self._parts:
            _, metrics = part.new_metrics(self.model.trainable_variables)
            if not metrics:
                continue
            unknown = [name for name in self.names if name not in metrics]
            if unknown and part.recording is not None:
                raise ValueError(
                    f"{type(part.optimizer).__name__} has no metric of the name(s) {unknown}. "
                    f"Expected some of {sorted(metrics)}. Received: names={list(self.names)}"
                )
            for name in self.names:
                self._known[f"{part.prefix}{name}"] = metrics.get(name, math.nan)
