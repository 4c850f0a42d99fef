"""Lookahead's two moments with TensorFlow: start of the slow weights, and synchronization."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import global_norm
from keras_gdopt.optimizers.step_metrics import StepMetrics
from keras_gdopt.optimizers.tensorflow_step import (
    after,
    compiled,
    constraint_compiles,
    is_distributed,
    on_every_device,
)
from keras_gdopt.optimizers.wrapping_optimizer import chain

if TYPE_CHECKING:
    from keras_gdopt.optimizers.lookahead import Lookahead


class TensorFlowSync:
    """Runs what `Lookahead` does around the inner optimizer's step.

    Each of both is one cluster, and a step in which neither is due costs two
    conditions. Holds no state that is saved.
    """

    def __init__(self, lookahead: "Lookahead") -> None:
        self._lookahead = lookahead
        self._clusters: dict[tuple[Callable[[], None], str], Callable[..., Any]] = {}
        self._recorded: tf.Variable | None = None

    @contextlib.contextmanager
    def around_step(self, grads: Iterable[Any]) -> Iterator[None]:
        """Starts the slow weights before a first step; after each counts and synchronizes.

        Args:
            grads: Those of the step.
        """
        with after(grads):
            self._wherever_the_weights_are(self._start)
            updates_before = self._lookahead.iterations + 0  # a value, which stays as it is
            yield
            updates = self._lookahead.iterations - updates_before
            self._wherever_the_weights_are(self._count, updates)

    def _wherever_the_weights_are(self, function: Callable[..., None], *args: Any) -> None:
        variables = [v for v in self._lookahead._trainable_variables if is_distributed(v)]
        if variables:
            on_every_device(variables[0], function, *args)
        else:
            function(*args)

    def _start(self, *, device: str = "", first: bool = True) -> None:
        del first
        is_new = tf.equal(tf.convert_to_tensor(self._lookahead._fast_updates), 0)
        tf.cond(is_new, self._cluster(self._lookahead._start, device), lambda: None)

    def _count(self, updates: tf.Tensor, *, device: str = "", first: bool = True) -> None:
        lookahead = self._lookahead
        count = tf.convert_to_tensor(lookahead._fast_updates) + updates
        lookahead.assign(lookahead._fast_updates, count)
        if first:
            self._record(updates, count)
        is_due = tf.logical_and(updates > 0, tf.equal(count % lookahead.sync_period, 0))
        tf.cond(is_due, self._cluster(lookahead._synchronize, device), lambda: None)

    def _record(self, updates: tf.Tensor, count: tf.Tensor) -> None:
        """Measures, where the inner optimizer has just recorded a step."""
        lookahead = self._lookahead
        metrics = _step_metrics(lookahead)
        if metrics is None or not metrics.asked_for:
            return
        with tf.init_scope():
            if self._recorded is None:
                self._recorded = tf.Variable(tf.zeros((2,)), trainable=False)
        recorded = self._recorded

        def measure() -> None:
            differences = [tf.cast(w, slow.dtype) - slow for w, slow in lookahead._pairs()]
            values = [global_norm(differences), count // lookahead.sync_period]
            recorded.assign(tf.stack([tf.cast(value, recorded.dtype) for value in values]))

        now = tf.logical_and(updates > 0, metrics.recorded_now())
        tf.cond(now, measure, lambda: None)

    def recorded(self) -> dict[str, float]:
        """What was measured in the last recorded step, or nothing."""
        if self._recorded is None:
            return {}
        names = ("slow_fast_distance", "syncs")
        return dict(zip(names, self._recorded.numpy().tolist(), strict=True))

    def _cluster(self, function: Callable[[], None], device: str) -> Callable[..., Any]:
        key = (function, device)
        if key not in self._clusters:
            variables = self._lookahead._trainable_variables
            constraints = (v.constraint for v in variables if v.constraint is not None)
            applies_none = function != self._lookahead._synchronize
            can_be_one = applies_none or all(map(constraint_compiles, constraints))
            self._clusters[key] = compiled(function, variables) if can_be_one else function
        return self._clusters[key]


def _step_metrics(optimizer: Any) -> StepMetrics | None:
    """Those of the innermost optimizer, if it is one of ours."""
    step = getattr(chain(optimizer)[-1], "_tensorflow_step", None)
    return None if step is None else step.metrics
