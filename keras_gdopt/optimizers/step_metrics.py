"""The metrics of recorded training steps, in variables that nobody saves."""

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from keras_gdopt.optimizers.argument_checks import checked_choice
from keras_gdopt.optimizers.arithmetic import common_dtype, global_norm
from keras_gdopt.optimizers.saved_state import variable_path

if TYPE_CHECKING:
    from keras_gdopt.optimizers.base import GradientOptimizer

TIERS = ("scalars", "layers", "histograms")
"""How much a recorded step keeps: numbers of the whole model, besides them numbers of
each variable, and besides those the gradients."""

_MOST_LISTENERS = 8
_NEVER = 2**62  # steps from one recording to the next
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
_SAMPLED_ENTRIES = 4096
# float32 holds a norm to 1e-7, which is more than a plot shows.
_METRIC_DTYPE = tf.float32


class StepMetrics:
    """Which steps a `GradientOptimizer` records, and what it recorded last."""

    def __init__(self, optimizer: "GradientOptimizer") -> None:
        self._optimizer = optimizer
        # Weakly: a training that dies does not say that it listens no more.
        self._listeners: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._frequencies: tf.Variable | None = None
        self._latest_iterations: tf.Variable | None = None
        self._latest: dict[str, tf.Variable] = {}
        self._names: tuple[str, ...] = ()
        self._variable_names: tuple[str, ...] = ()
        self._tier = -1  # the highest that was ever asked for, by its place in TIERS
        self._last_traced_tier = len(TIERS)

    @property
    def asked_for(self) -> bool:
        """Whether anybody ever asked; a step traced since then can record."""
        return self._frequencies is not None

    @property
    def tier(self) -> int:
        """The place in `TIERS` of what a step that is traced now keeps; -1 for nothing."""
        return self._tier

    def note_trace(self) -> None:
        """Notes that a step is traced now, where it does not run eagerly."""
        if not tf.executing_eagerly():
            self._last_traced_tier = self._tier

    def record_every(self, every: int, tier: str, listener: Any) -> bool:
        """Records every n-th step from now on for a listener; 0 records none for it.

        Returns:
            Whether the step that was traced last cannot record.
        """
        checked_choice("tier", tier, TIERS)
        listener = self if listener is None else listener
        self._listeners.pop(listener, None)
        if every and len(self._listeners) == _MOST_LISTENERS:
            raise ValueError(
                f"At most {_MOST_LISTENERS} listeners may ask an optimizer for step metrics. "
                f"Received: {_MOST_LISTENERS + 1}"
            )
        if every:
            self._listeners[listener] = every
        frequencies = list(self._listeners.values())
        frequencies += [_NEVER] * (_MOST_LISTENERS - len(frequencies))
        with tf.init_scope():
            if self._frequencies is not None:
                self._frequencies.assign(frequencies)
            elif every:
                self._frequencies = tf.Variable(frequencies, dtype=tf.int64, trainable=False)
            if every and self._latest_iterations is not None:
                self._latest_iterations.assign(0)
        if every:
            self._tier = max(self._tier, TIERS.index(tier))
        return every > 0 and self._last_traced_tier < TIERS.index(tier)

    def due(self) -> tf.Tensor:
        """Whether this call of `apply` passes a multiple of what a listener asked for."""
        optimizer = self._optimizer
        call = tf.cast(optimizer._iterations, tf.int64) + 1
        since_last_update = optimizer.gradient_accumulation_steps or 1
        return tf.reduce_any(call % self._frequencies < since_last_update)

    def recorded_now(self) -> tf.Tensor:
        """Whether the step that was made last is the one that was recorded last."""
        if self._latest_iterations is None:
            return tf.constant(False)
        updates = tf.cast(self._optimizer.iterations, tf.int64)
        return tf.equal(tf.convert_to_tensor(self._latest_iterations), updates)

    # --- inside the step -----------------------------------------------------

    def of_step(
        self,
        tier: int,
        learning_rate: tf.Tensor,
        step: tf.Tensor,
        squares: Mapping[str, Mapping[int, tf.Tensor]],
        slots: Mapping[str, Mapping[int, tf.Tensor]],
        gradients: Mapping[int, tf.Tensor],
    ) -> dict[str, tf.Tensor]:
        """What a step records, for `store`; part of the cluster.

        Args:
            tier: The place in `TIERS` of what to keep.
            learning_rate: Of the step.
            step: The 1-based count of updates.
            squares: Squared norms by the names of their metrics and the variable's index.
            slots: The new slots of all variables, by name and the variable's index.
            gradients: By the variable's index.

        Returns:
            Numbers of the model as the vector "model"; in the second tier, numbers of the
            variables as the matrix "variables", one row for each; in the third one, the
            gradients by their indices, as strings.
        """
        optimizer, step = self._optimizer, tf.cast(step, tf.float64)
        lists = {name: list(values.values()) for name, values in slots.items()}
        metrics = {"learning_rate": learning_rate}
        for name, values in squares.items():
            metrics[name] = tf.sqrt(tf.add_n(list(values.values()))) if values else 0.0
        metrics.update(optimizer.rule_metrics(lists, learning_rate, step))
        metrics.update(self._quantiles(lists, learning_rate, step))
        self._names = tuple(metrics)
        recorded = {"model": _stacked(metrics.values())}
        if tier >= TIERS.index("layers"):
            norms = {name: _roots(of_variables) for name, of_variables in squares.items()}
            for name in optimizer.slots:
                norms[f"{name}_norm"] = {
                    index: global_norm([slot]) for index, slot in slots[name].items()
                }
            self._variable_names = tuple(norms)
            recorded["variables"] = tf.stack(
                [
                    _stacked(norms[name].get(index, 0.0) for name in norms)
                    for index in range(len(optimizer._trainable_variables))
                ]
            )
        if tier >= TIERS.index("histograms"):
            recorded.update((str(index), gradient) for index, gradient in gradients.items())
        return recorded

    def _quantiles(
        self, slots: Mapping[str, Sequence[tf.Tensor]], learning_rate: tf.Tensor, step: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Quantiles of the effective learning rates of a fixed sample of entries."""
        optimizer = self._optimizer
        sampled = {name: _sampled(slots[name]) for name in optimizer.slots}
        rates = optimizer.effective_learning_rate(sampled, learning_rate, step)
        if rates is None:
            return {}
        ascending = tf.sort(rates)
        last = rates.shape[0] - 1
        return {
            f"effective_learning_rate_{name}": ascending[round(quantile * last)]
            for name, quantile in _QUANTILES.items()
        }

    def store(self, recorded: Mapping[str, tf.Tensor]) -> None:
        """Keeps what the step that is being made has recorded, see `of_step`."""
        with tf.init_scope():
            if self._latest_iterations is None:
                self._latest_iterations = tf.Variable(0, dtype=tf.int64, trainable=False)
            for name, value in recorded.items():
                if name not in self._latest:
                    zeros = tf.zeros(value.shape, value.dtype)
                    self._latest[name] = tf.Variable(zeros, trainable=False)
        self._latest_iterations.assign(tf.cast(self._optimizer.iterations + 1, tf.int64))
        for name, value in recorded.items():
            self._latest[name].assign(value)

    # --- afterwards ----------------------------------------------------------

    def latest(self) -> dict[str, float]:
        """The metrics of the last recorded step, or nothing."""
        update = self._latest_update()
        if not update:
            return {}
        # Not by `Variable.numpy()`, which copies on the device first.
        values = self._latest["model"].value().numpy().tolist()
        return {"iterations": update, **dict(zip(self._names, values, strict=True))}

    def of_variables(self) -> dict[str, dict[str, float]]:
        """The metrics of each variable in the last recorded step, by its path."""
        if not self._latest_update() or "variables" not in self._latest:
            return {}
        rows = self._latest["variables"].numpy().tolist()
        return {
            path: dict(zip(self._variable_names, row, strict=True))
            for path, row in zip(self._paths(), rows, strict=True)
        }

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradients of the last recorded step, by the variables' paths."""
        if not self._latest_update():
            return {}
        kept = {i: self._latest.get(str(i)) for i in range(len(self._paths()))}
        paths = self._paths()
        return {paths[i]: gradient.numpy() for i, gradient in kept.items() if gradient is not None}

    def _latest_update(self) -> int:
        return 0 if self._latest_iterations is None else int(self._latest_iterations.value())

    def _paths(self) -> list[str]:
        return distinct_paths(self._optimizer._trainable_variables)


def distinct_paths(variables: Sequence[Any]) -> list[str]:
    """The variables' paths, with a number behind those that an earlier variable has too."""
    paths: list[str] = []
    for variable in variables:
        path = variable_path(variable)
        count = sum(other == path or other.startswith(f"{path}#") for other in paths)
        paths.append(f"{path}#{count + 1}" if count else path)
    return paths


def _stacked(values: Iterable[Any]) -> tf.Tensor:
    return tf.stack([tf.cast(value, _METRIC_DTYPE) for value in values])


def _roots(squares: Mapping[int, tf.Tensor]) -> dict[int, tf.Tensor]:
    return {index: tf.sqrt(square) for index, square in squares.items()}


def _sampled(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The same entries at each call, evenly spaced over all tensors; a vector."""
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    total = sum(sizes)
    places = np.linspace(0, total - 1, min(total, _SAMPLED_ENTRIES)).astype("int64")
    starts = np.cumsum([0, *sizes])
    dtype = common_dtype(tensors)
    parts = []
    for tensor, start, end in zip(tensors, starts[:-1], starts[1:], strict=True):
        own = places[(places >= start) & (places < end)] - start
        parts.append(tf.cast(tf.gather(tf.reshape(tensor, (-1,)), own), dtype))
    return tf.concat(parts, axis=0)
