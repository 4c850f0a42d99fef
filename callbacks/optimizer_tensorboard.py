"""Streams an optimizer's step metrics to TensorBoard."""

import math
import os
import weakref
from typing import Any

import keras
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from keras_gdopt.optimizers.argument_checks import checked_count


class OptimizerTensorBoard(keras.callbacks.Callback):
    r"""Writes what the optimizer does, every few batches, as TensorBoard scalars.

    The optimizer records the metrics inside its compiled step, and only on the
    steps that are written; each write is one event, flushed at once, so that the
    event file holds all of it also when training dies. The step of every scalar is
    `optimizer.iterations`, the count of updates.

    | tag | meaning |
    | --- | --- |
    | `optimizer/learning_rate` | the rate of the step |
    | `optimizer/grad_norm` | norm of all gradients together, before clipping |
    | `optimizer/update_norm` | norm of the change that the rule made |
    | `optimizer/weight_norm` | norm of all weights after it |
    | `optimizer/update_ratio_log10` | log10 of update norm to weight norm; around -3 is healthy |

    and one for each metric of the algorithm's own, such as
    `optimizer/velocity_norm`. `update_ratio_log10` is left out where a norm is 0.

    Works with mixed precision (the optimizer inside Keras's `LossScaleOptimizer`),
    `jit_compile`, distribution strategies and `steps_per_execution`; with the last,
    only the last recording of an execution can be seen.

    Args:
        log_dir: The directory of the run, a path or a remote URL that TensorFlow
            can write to. Use one for each training run.
        update_freq: Write every so many batches. Defaults to 50.

    Raises:
        ValueError: If `update_freq` is no positive integer; before training starts,
            if the directory cannot be written or the model's optimizer records no
            step metrics, as Keras's own do not.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import numpy as np
    >>> import keras_gdopt as gdopt
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Adam(), "mse")
    >>> callback = gdopt.callbacks.OptimizerTensorBoard(tempfile.mkdtemp(), update_freq=2)
    >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0, callbacks=[callback])
    """

    def __init__(self, log_dir: str | os.PathLike[str], update_freq: int = 50) -> None:
        super().__init__()
        self.log_dir = os.fspath(log_dir)
        self.update_freq = checked_count("update_freq", update_freq, minimum=1)
        self._optimizer: Any = None
        self._writer: tf.summary.SummaryWriter | None = None
        self._batches = 0
        self._batches_before_epoch = 0
        self._last_look = 0
        self._last_written = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the event file and asks the model's optimizer to record."""
        self._optimizer = _recording_optimizer(self.model)
        self._writer = self._opened_writer()
        if self._optimizer.record_step_metrics(self.update_freq):
            self.model.make_train_function(force=True)
        updates = int(keras.ops.convert_to_numpy(self._optimizer.iterations))
        self._batches = updates * (self._optimizer.gradient_accumulation_steps or 1)
        self._last_look = self._batches
        self._last_written = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes how many batches came before the epoch."""
        self._batches_before_epoch = self._batches

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes, where a multiple of `update_freq` has been passed."""
        self._batches = self._batches_before_epoch + batch + 1
        if self._batches // self.update_freq > self._last_look // self.update_freq:
            self._last_look = self._batches
            self._write_new_metrics()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Writes what is left, ends the recording and closes the event file."""
        self._write_new_metrics()
        self._optimizer.record_step_metrics(0)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened_writer(self) -> tf.summary.SummaryWriter:
        try:
            tf.io.gfile.makedirs(self.log_dir)
            writer = tf.summary.create_file_writer(self.log_dir)
            writer.init()
            writer.flush()
        except (OSError, tf.errors.OpError) as error:
            raise ValueError(
                "Argument `log_dir` of OptimizerTensorBoard must be a directory that can "
                f"be created and written to. Received: log_dir={self.log_dir!r} ({error})"
            ) from error
        # `on_train_end` does not come when training ends by an exception.
        weakref.finalize(self, writer.close)
        return writer

    def _write_new_metrics(self) -> None:
        metrics = dict(self._optimizer.step_metrics)
        step = metrics.pop("iterations", 0)
        if step == self._last_written or self._writer is None:
            return
        self._last_written = step
        update, weight = metrics["update_norm"], metrics["weight_norm"]
        if update > 0 and weight > 0:
            metrics["update_ratio_log10"] = math.log10(update / weight)
        summary = Summary(
            value=[
                scalar_pb(f"optimizer/{name}", value).value[0] for name, value in metrics.items()
            ]
        )
        with self._writer.as_default():
            tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=step)
        self._writer.flush()


def _recording_optimizer(model: keras.Model) -> Any:
    """The model's optimizer, or the one inside its wrappers, that records."""
    compiled = getattr(model, "optimizer", None)
    optimizer = compiled
    while optimizer is not None and not hasattr(optimizer, "record_step_metrics"):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    if optimizer is None:
        raise ValueError(
            "OptimizerTensorBoard needs a model compiled with an optimizer of keras_gdopt, "
            "which records its step metrics, for example "
            "`model.compile(optimizer=keras_gdopt.Adam())`. Received: a model "
            + (
                f"compiled with {type(compiled).__module__}.{type(compiled).__name__}"
                if compiled is not None
                else "that is not compiled"
            )
        )
    return optimizer
