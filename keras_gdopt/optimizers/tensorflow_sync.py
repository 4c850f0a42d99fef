"""Lookahead's start of the slow weights and their synchronization, with TensorFlow."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import global_norm
from keras_gdopt.optimizers.compilation import after, compiled, constraint_compiles
from keras_gdopt.optimizers.recording import Recorder
from keras_gdopt.optimizers.replicas import is_distributed, on_every_device, true_on_all_replicas
from keras_gdopt.tensor import Tensor


@dataclasses.dataclass(frozen=True)
class SlowWeights:
    """The slow weights of a `Lookahead`, and what it does with them."""

    sync_period: int
    fast_updates: Any
    """A variable, the count of updates since the slow weights began."""
    iterations: Callable[[], Any]
    """The count of updates."""
    pairs: Callable[[], Iterable[tuple[Any, Any]]]
    """Pairs of variables, weight and slow weight."""
    start: Callable[[], None]
    """Sets the slow weights to the weights."""
    synchronize: Callable[[], None]
    """Moves the slow weights towards the weights, then sets the weights to them."""
    assign: Callable[[Any, Tensor], None]
    """Sets a variable."""
    takes_step: Callable[[Iterable[Any]], Tensor | None]
    """Whether the inner optimizer takes a step; `None` if it always does."""
    inner_recorder: Callable[[], Recorder | None]
    """Records the steps of the inner optimizer."""


class TensorFlowSync:
    """Runs what `Lookahead` does before and after the inner optimizer's step.

    Start and synchronization are compiled; a step in which neither is due costs two conditions.

    Args:
        slow_weights: The optimizer's slow weights.

    Attributes:
        recorder: Records the distance between weights and slow weights, and the number of
            synchronizations.
    """

    def __init__(self, slow_weights: SlowWeights) -> None:
        self.recorder = Recorder()
        self._slow_weights = slow_weights
        self._compiled: dict[tuple[Callable[..., None], str], Callable[..., Any]] = {}

    @contextlib.contextmanager
    def around_step(self, grads: Iterable[Any]) -> Iterator[None]:
        """Starts the slow weights before a cycle's first step; counts and synchronizes after each.

        Args:
            grads: The step's gradients.
        """
        with after(grads):
            is_taken = self._slow_weights.takes_step(grads)
            if is_taken is not None:
                is_taken = true_on_all_replicas(is_taken)
            self._on_each_device(self._start, is_taken)
            updates_before = self._slow_weights.iterations() + 0  # copies the value
            yield
            updates = self._slow_weights.iterations() - updates_before
            self._on_each_device(self._count, updates)

    def _on_each_device(self, function: Callable[..., None], *args: Any) -> None:
        variables = [weight for weight, _ in self._slow_weights.pairs() if is_distributed(weight)]
        if variables:
            on_every_device(variables[0], function, *args)
        else:
            function(*args)

    def _start(self, is_taken: Tensor | None, *, device: str = "", first: bool = True) -> None:
        del first
        is_new = tf.equal(tf.convert_to_tensor(self._slow_weights.fast_updates), 0)
        if is_taken is not None:
            is_new &= is_taken
        tf.cond(is_new, self._function(self._slow_weights.start, device), lambda: None)

    def _count(self, updates: Tensor, *, device: str = "", first: bool = True) -> None:
        slow_weights = self._slow_weights
        count = tf.convert_to_tensor(slow_weights.fast_updates) + updates
        slow_weights.assign(slow_weights.fast_updates, count)
        if first:
            self._record(updates, count)
        is_due = tf.logical_and(updates > 0, tf.equal(count % slow_weights.sync_period, 0))
        tf.cond(is_due, self._function(slow_weights.synchronize, device), lambda: None)

    def _record(self, updates: Tensor, count: Tensor) -> None:
        """Records this step if the inner optimizer has just recorded it."""
        slow_weights, inner = self._slow_weights, self._slow_weights.inner_recorder()
        if inner is None or not inner.asked_for:
            return
        iterations = slow_weights.iterations()

        def record() -> None:
            differences = [
                tf.cast(weight, slow.dtype) - slow for weight, slow in slow_weights.pairs()
            ]
            numbers = {
                "slow_fast_distance": global_norm(differences),
                "syncs": count // slow_weights.sync_period,
            }
            self.recorder.store(self.recorder.pack(numbers), iterations)

        tf.cond(tf.logical_and(updates > 0, inner.recorded(iterations)), record, lambda: None)

    def _function(self, function: Callable[..., None], device: str) -> Callable[..., Any]:
        """A method of the optimizer, compiled if the constraints that it applies compile."""
        if (function, device) not in self._compiled:
            weights = [weight for weight, _ in self._slow_weights.pairs()]
            constraints = [w.constraint for w in weights if w.constraint is not None]
            applies_none = function != self._slow_weights.synchronize
            compiles = applies_none or all(map(constraint_compiles, constraints))
            made = compiled(function, weights) if compiles else function
            self._compiled[function, device] = made
        return self._compiled[function, device]
