"""Records optimizer steps: decides which steps and which numbers, and keeps them."""

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from keras_gdopt.optimizers.argument_checks import (
    check_tensorflow,
    checked_choice,
    checked_count,
)
from keras_gdopt.optimizers.arithmetic import common_dtype, global_norm
from keras_gdopt.optimizers.rule import RuleOptimizer
from keras_gdopt.optimizers.saved_state import SavedStateOptimizer, variable_path
from keras_gdopt.tensor import Tensor

TIERS = ("scalars", "layers", "histograms")
"""How much a recorded step keeps: numbers of the whole model; also numbers of each variable;
also the gradients."""

_MOST_LISTENERS = 8
_NEVER = 2**62  # steps from one recording to the next
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
_SAMPLED_ENTRIES = 512


class Record(NamedTuple):
    """What one step records, as tensors."""

    numbers: Tensor
    """Numbers of the whole model, as a vector."""
    of_variables: Tensor | None = None
    """Numbers of each variable, one row per variable; from the tier "layers" on."""
    gradients: Mapping[str, Tensor] | None = None
    """Gradients by variable index, as a string; in the tier "histograms"."""


class Recorder:
    """Decides which steps an optimizer records, and keeps the last record.

    The record is kept in variables that are not part of the optimizer's saved state.

    Args:
        records_all: Whether to record every step, in the tier "layers", without a listener.
        dtype: The dtype of the numbers. Defaults to float32, which holds a norm to 1e-7, more
            precisely than a plot shows.
    """

    def __init__(self, *, records_all: bool = False, dtype: Any = tf.float32) -> None:
        self.variables = ()
        self._records_all = records_all
        self._dtype = tf.as_dtype(dtype)
        # Weak references: a training run that dies does not unregister.
        self._listeners: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._frequencies: tf.Variable | None = None
        self._latest_iterations: tf.Variable | None = None
        self._latest: dict[str, tf.Variable] = {}
        self._skipped: tf.Variable | None = None
        self._names: tuple[str, ...] = ()
        self._variable_names: tuple[str, ...] = ()
        self._tier = TIERS.index("layers") if records_all else -1
        self._last_traced_tier = len(TIERS)

    @property
    def variables(self) -> Sequence[Any]:
        """The optimizer's variables, for their paths."""
        return self._variables

    @variables.setter
    def variables(self, variables: Sequence[Any]) -> None:
        self._variables = variables
        self._paths: list[str] = []

    @property
    def _distinct_paths(self) -> list[str]:
        if not self._paths:  # they are known once the variables are built
            self._paths = distinct_paths(self._variables)
        return self._paths

    # --- which steps ---------------------------------------------------------

    @property
    def asked_for(self) -> bool:
        """Whether anyone has ever asked for records; steps traced since then can record."""
        return self._records_all or self._frequencies is not None

    @property
    def tier(self) -> int:
        """The index in `TIERS` of what a step traced now keeps; -1 for nothing."""
        return self._tier

    def note_trace(self) -> None:
        """Notes that a step is being traced, unless it runs eagerly."""
        if not tf.executing_eagerly():
            self._last_traced_tier = self._tier

    def record_every(self, every: int, tier: str, listener: Any = None) -> bool:
        """Records every n-th step from now on for a listener; with 0, none.

        Args:
            every: A number of steps.
            tier: One of `TIERS`.
            listener: Any object that is hashable and can be weakly referenced.

        Returns:
            Whether the step that was traced last cannot record.
        """
        checked_choice("tier", tier, TIERS)
        if not self._records_all:
            self._listen(every, self if listener is None else listener)
        if every:
            self._tier = max(self._tier, TIERS.index(tier))
        return every > 0 and self._last_traced_tier < TIERS.index(tier)

    def _listen(self, every: int, listener: Any) -> None:
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

    def due(self, iterations: Any, steps_per_update: int) -> Tensor:
        """Whether a listener asked for this step.

        Args:
            iterations: The count of earlier calls of `apply`.
            steps_per_update: The number of calls per update of the weights; the first update
                at or after each n-th call is recorded.
        """
        call = tf.cast(iterations, tf.int64) + 1
        return tf.reduce_any(call % self._frequencies < steps_per_update)

    def recorded(self, update: Tensor) -> Tensor:
        """Whether the last record belongs to this update.

        Args:
            update: The count of updates, this one included.
        """
        if self._latest_iterations is None:
            return tf.constant(False)
        return tf.equal(tf.convert_to_tensor(self._latest_iterations), tf.cast(update, tf.int64))

    # --- inside the step -----------------------------------------------------

    def pack(
        self,
        numbers: Mapping[str, Any],
        of_variables: Mapping[str, Sequence[Any]] | None = None,
        gradients: Mapping[int, Tensor] | None = None,
    ) -> Record:
        """Makes a record of named numbers; may be called in a compiled function.

        Args:
            numbers: Scalars of the whole model, by name.
            of_variables: Lists of scalars, one for each variable, by name.
            gradients: Gradients by variable index.
        """
        self._names = tuple(numbers)
        rows = None
        if of_variables is not None:
            self._variable_names = tuple(of_variables)
            rows = tf.transpose(tf.stack([self._stack(one) for one in of_variables.values()]))
        by_name = None
        if gradients is not None:
            by_name = {str(index): gradient for index, gradient in gradients.items()}
        return Record(self._stack(numbers.values()), rows, by_name)

    def store(self, record: Record, update: Tensor) -> None:
        """Keeps the record of the present step.

        Args:
            record: What `pack` returned.
            update: The count of updates, this one included.
        """
        values = {"numbers": record.numbers}
        if record.of_variables is not None:
            values["of_variables"] = record.of_variables
        values.update(record.gradients or {})
        with tf.init_scope():
            if self._latest_iterations is None:
                self._latest_iterations = tf.Variable(0, dtype=tf.int64, trainable=False)
            for name, value in values.items():
                if name not in self._latest:
                    zeros = tf.zeros(value.shape, value.dtype)
                    self._latest[name] = tf.Variable(zeros, trainable=False)
        self._latest_iterations.assign(tf.cast(update, tf.int64))
        for name, value in values.items():
            self._latest[name].assign(value)

    def expect_skipped(self) -> None:
        """Begins to count skipped steps, unless it has begun before."""
        with tf.init_scope():
            if self._skipped is None:
                self._skipped = tf.Variable(0, dtype=tf.int64, trainable=False)

    def add_skipped(self) -> None:
        """Counts the present step as skipped, of which no record is kept."""
        assert self._skipped is not None
        self._skipped.assign_add(1)

    def _stack(self, values: Iterable[Any]) -> Tensor:
        return tf.stack([tf.cast(value, self._dtype) for value in values])

    # --- afterwards ----------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The numbers of the last record and its `iterations`, if there is one.

        With them, or alone, the count of `skipped_steps`, once a step could be skipped.
        """
        skipped: dict[str, float] = {}
        if self._skipped is not None:
            skipped["skipped_steps"] = int(self._skipped.value())
        update = self._latest_update()
        if not update:
            return skipped
        # `Variable.numpy()` would first copy on the device.
        values = self._latest["numbers"].value().numpy().tolist()
        return {"iterations": update, **dict(zip(self._names, values, strict=True)), **skipped}

    def metrics_of_variables(self) -> dict[str, dict[str, float]]:
        """The numbers of each variable in the last record, by its path."""
        if not self._latest_update() or "of_variables" not in self._latest:
            return {}
        rows = self._latest["of_variables"].value().numpy().tolist()
        return {
            path: dict(zip(self._variable_names, row, strict=True))
            for path, row in zip(self._distinct_paths, rows, strict=True)
        }

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradients of the last record, by the paths of their variables."""
        if not self._latest_update():
            return {}
        paths = self._distinct_paths
        kept = {path: self._latest.get(str(index)) for index, path in enumerate(paths)}
        return {path: gradient.numpy() for path, gradient in kept.items() if gradient is not None}

    def _latest_update(self) -> int:
        return 0 if self._latest_iterations is None else int(self._latest_iterations.value())


class RecordingOptimizer(SavedStateOptimizer):
    """An optimizer that can record its steps; callbacks ask for this class."""

    evaluates_loss: ClassVar[bool] = False
    """Whether it evaluates the loss itself, so that it cannot make a step from gradients."""

    @property
    def recorder(self) -> Recorder | None:
        """The recorder, which decides what is recorded and keeps it; `None` if there is none."""
        raise NotImplementedError

    @property
    def stability_bound(self) -> float | None:
        """The product of learning rate and curvature above which steps on a quadratic diverge.

        `None` if there is no such number, because the steps depend on more than the gradients'
        average.
        """
        return None

    def takes_step(self, grads: Iterable[Tensor | None]) -> Tensor | None:
        """Whether a step with these gradients, of one replica, is taken.

        Args:
            grads: Gradients as for `apply`.

        Returns:
            A boolean scalar, in which a strategy's replicas may differ; `None` if each step is
            taken, as without `skip_nonfinite`.
        """
        del grads
        return None

    def record_step_metrics(
        self, every: int = 1, *, tier: str = "scalars", listener: Any = None
    ) -> bool:
        """Requests the metrics of every n-th training step; needs TensorFlow.

        A step that was traced before the first request does not record; a step traced later
        does, and `every` may change at any time without a new trace. A request discards the
        earlier record. Training steps are counted as calls of `apply`; under gradient
        accumulation, the first update at or after each n-th call is recorded. (Optimizers that
        evaluate the loss themselves record every step; only their gradients need a request.)

        Args:
            every: Record every n-th step; 0 stops the recording. Defaults to 1.
            tier: What to keep: `"scalars"` for `step_metrics`, `"layers"` for `variable_metrics`
                too, `"histograms"` for `recorded_gradients` too, which takes the memory of the
                gradients once more. Defaults to `"scalars"`.
            listener: Who requests: any object that is hashable and can be weakly referenced. Each
                listener has its own `every`, and the steps of all are recorded. Defaults to
                `None`: all requests without a listener share one.

        Returns:
            Whether the step that was traced last cannot record and must be traced again with
            `model.make_train_function(force=True)`.

        Raises:
            ValueError: If `every` is negative or not an integer, `tier` is unknown, there are
                already eight listeners, or the optimizer inside this one records nothing.
            RuntimeError: If the backend is not TensorFlow.
        """
        every = checked_count("every", every, minimum=0)
        check_tensorflow("`record_step_metrics`")
        recorder = self.recorder
        if recorder is None:
            inner = getattr(self, "inner_optimizer", None)
            raise ValueError(
                "Step metrics need an optimizer of keras_gdopt, which records them. Received: "
                f"{type(self).__name__} around {type(inner).__name__} of {type(inner).__module__}"
            )
        return recorder.record_every(every, tier, listener)

    @property
    def step_metrics(self) -> dict[str, float]:
        """The metrics of the last recorded step; empty before there is one."""
        recorder = self.recorder
        return {} if recorder is None else recorder.metrics()

    @property
    def variable_metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of each variable in the last recorded step, by its path.

        They are `grad_norm`, `update_norm`, `weight_norm` and the norm of each slot, such as
        `velocity_norm`; norms that need a gradient are 0 if there was none. Empty until a step
        is recorded with the tier `"layers"`.
        """
        recorder = self.recorder
        return {} if recorder is None else recorder.metrics_of_variables()

    @property
    def recorded_gradients(self) -> dict[str, np.ndarray]:
        """The gradients of the last recorded step, before clipping, by the variable's path.

        Empty until a step is recorded with the tier `"histograms"`.
        """
        recorder = self.recorder
        return {} if recorder is None else recorder.gradients()


def summarize_step(
    recorder: Recorder,
    rule: RuleOptimizer,
    learning_rate: Tensor,
    step: Tensor,
    squares: Mapping[str, Mapping[int, Tensor]],
    slots: Mapping[str, Mapping[int, Tensor]],
    gradients: Mapping[int, Tensor],
    tier: int,
) -> Record:
    """Makes the record of a first-order step; part of the compiled step.

    Args:
        recorder: The recorder that packs it.
        rule: The optimizer.
        learning_rate: The step's learning rate.
        step: The 1-based count of updates.
        squares: Squared norms by metric name and variable index.
        slots: The new slots of all variables, by name and variable index.
        gradients: Gradients by variable index.
        tier: The index in `TIERS` of what to keep.
    """
    step = tf.cast(step, tf.float64)
    lists = {name: list(values.values()) for name, values in slots.items()}
    numbers = {"learning_rate": learning_rate}
    for name, values in squares.items():
        numbers[name] = tf.sqrt(tf.add_n(list(values.values()))) if values else 0.0
    numbers.update(rule.rule_metrics(lists, learning_rate, step))
    numbers.update(_quantiles(rule, lists, learning_rate, step))
    of_variables = None
    if tier >= TIERS.index("layers"):
        norms = {
            name: {index: tf.sqrt(square) for index, square in values.items()}
            for name, values in squares.items()
        }
        for name in rule.slots:
            norms[f"{name}_norm"] = {
                index: global_norm([slot]) for index, slot in slots[name].items()
            }
        count = len(recorder.variables)
        of_variables = {
            name: [values.get(index, 0.0) for index in range(count)]
            for name, values in norms.items()
        }
    keeps_gradients = tier >= TIERS.index("histograms")
    return recorder.pack(numbers, of_variables, gradients if keeps_gradients else None)


def distinct_paths(variables: Sequence[Any]) -> list[str]:
    """The variables' paths; a number is appended to a path that an earlier variable has."""
    paths: list[str] = []
    for variable in variables:
        path = variable_path(variable)
        count = sum(other == path or other.startswith(f"{path}#") for other in paths)
        paths.append(f"{path}#{count + 1}" if count else path)
    return paths


def _quantiles(
    rule: RuleOptimizer,
    slots: Mapping[str, Sequence[Tensor]],
    learning_rate: Tensor,
    step: Tensor,
) -> dict[str, Tensor]:
    """Quantiles of the effective learning rates of a fixed sample of entries."""
    sampled = {name: _sample(slots[name]) for name in rule.slots}
    rates = rule.effective_learning_rate(sampled, learning_rate, step)
    if rates is None:
        return {}
    ascending = tf.sort(rates)
    last = rates.shape[0] - 1
    return {
        f"effective_learning_rate_{name}": ascending[round(quantile * last)]
        for name, quantile in _QUANTILES.items()
    }


def _sample(tensors: Sequence[Tensor]) -> Tensor:
    """A vector of entries evenly spaced over all tensors, the same ones in each call."""
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
