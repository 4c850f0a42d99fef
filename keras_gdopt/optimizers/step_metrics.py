"""The metrics of recorded training steps, in variables that nobody saves."""

from typing import TYPE_CHECKING

import tensorflow as tf

if TYPE_CHECKING:
    from keras_gdopt.optimizers.base import GradientOptimizer

# float32 holds a norm to 1e-7, which is more than a plot shows.
_METRIC_DTYPE = tf.float32


class StepMetrics:
    """Which steps a `GradientOptimizer` records, and what it recorded last."""

    def __init__(self, optimizer: "GradientOptimizer") -> None:
        self._optimizer = optimizer
        self._every: tf.Variable | None = None
        self._latest: tf.Variable | None = None
        self._latest_iterations: tf.Variable | None = None
        self._names: tuple[str, ...] = ()
        self._last_trace_is_blind = False

    @property
    def asked_for(self) -> bool:
        """Whether anybody ever asked; a step traced since then can record."""
        return self._every is not None

    def note_trace(self) -> None:
        """Notes that a step is traced now, where it does not run eagerly."""
        if not tf.executing_eagerly():
            self._last_trace_is_blind = not self.asked_for

    def record_every(self, every: int) -> bool:
        """Records every n-th step from now on; 0 records none.

        Returns:
            Whether the step that was traced last cannot record.
        """
        with tf.init_scope():
            if self._every is not None:
                self._every.assign(every)
            elif every:
                self._every = tf.Variable(every, dtype=tf.int64, trainable=False)
            if every and self._latest_iterations is not None:
                self._latest_iterations.assign(0)
        return every > 0 and self._last_trace_is_blind

    def due(self) -> tf.Tensor:
        """Whether this call of `apply` passes a multiple of `every`."""
        optimizer = self._optimizer
        call = tf.convert_to_tensor(optimizer._iterations) + 1
        since_last_update = optimizer.gradient_accumulation_steps or 1
        every = tf.convert_to_tensor(self._every)
        divisor = tf.cast(tf.maximum(every, 1), call.dtype)
        passed = call // divisor > (call - since_last_update) // divisor
        return tf.logical_and(every > 0, passed)

    def stacked(
        self,
        learning_rate: tf.Tensor,
        step: tf.Tensor,
        grad_square: tf.Tensor,
        update_square: tf.Tensor,
        weight_square: tf.Tensor,
        slots: dict[str, list[tf.Tensor]],
    ) -> tf.Tensor:
        """All metrics of a step as one vector, for `store`; part of the cluster."""
        own = self._optimizer.rule_metrics(slots, learning_rate, tf.cast(step, tf.float64))
        metrics = {
            "learning_rate": learning_rate,
            "grad_norm": tf.sqrt(grad_square),
            "update_norm": tf.sqrt(update_square),
            "weight_norm": tf.sqrt(weight_square),
            **own,
        }
        self._names = tuple(metrics)
        return tf.stack([tf.cast(value, _METRIC_DTYPE) for value in metrics.values()])

    def store(self, metrics: tf.Tensor) -> None:
        """Keeps the vector of the step that is being made."""
        if self._latest is None or self._latest_iterations is None:
            with tf.init_scope():
                self._latest = tf.Variable(tf.zeros(metrics.shape), trainable=False)
                self._latest_iterations = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._latest.assign(metrics)
        self._latest_iterations.assign(tf.cast(self._optimizer.iterations + 1, tf.int64))

    def latest(self) -> dict[str, float]:
        """The metrics of the last recorded step, or nothing."""
        if self._latest is None or self._latest_iterations is None:
            return {}
        iterations = int(self._latest_iterations.numpy())
        if iterations == 0:
            return {}
        values = self._latest.numpy().tolist()
        return {"iterations": iterations, **dict(zip(self._names, values, strict=True))}
