"""Puts an optimizer's step metrics into the logs that Keras hands to callbacks."""

import math
from collections.abc import Sequence
from typing import Any

from keras_gdopt.callbacks.recording_callback import RecordingCallback

_NAMES = ("learning_rate", "grad_norm", "update_norm", "weight_norm")


class OptimizerMetrics(RecordingCallback):
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
        super().__init__(update_freq)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            raise ValueError(
                "Argument `names` must be a list of names of metrics, such as ['grad_norm']. "
                f"Received: names={names!r}"
            )
        self.names = _NAMES if names is None else tuple(names)
        self._known: dict[str, float] = {}

    # --- what Keras calls ----------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Asks the model's optimizer to record."""
        self._known = {}
        super().on_train_begin(logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the metrics of the last recorded step to the batch's logs."""
        super().on_train_batch_end(batch, logs)
        if logs is not None:
            logs.update(self._known)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the metrics to the epoch's logs."""
        self._look(logs)
        if logs is not None:
            logs.update(self._known)

    # --- the parts -----------------------------------------------------------

    def _begin_recording(self) -> None:
        super()._begin_recording()
        for part in self._parts:
            for name in self.names:
                self._known[f"{part.prefix}{name}"] = math.nan

    def _look(self, logs: dict[str, Any] | None) -> None:
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
