"""The loop that minimizes a batch's loss with a method until it has converged."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.line_search import rounding_of, select
from keras_gdopt.tensor import Tensor

Memory = dict[str, Tensor]
"""What an algorithm keeps from one iteration to the next, by name."""

STATUSES = (
    "the loss or its gradient is not finite at the weights",
    "neither the loss nor its gradient falls by more than its rounding",
)
"""How a step can end besides the method's own statuses."""

_LOSS_NOT_FINITE, _STALLED = range(2)

_RELATIVE_GRADIENT_TOLERANCE = 1e-9
_MOST_FAILURES = 2
_MOST_STALLED = 20
_LESS = 0.9  # a gradient smaller by this factor is smaller by more than rounding


class Point(NamedTuple):
    """Weights, and the loss and its gradient there."""

    weights: Tensor
    """All weights, as one vector."""
    loss: Tensor
    gradient: Tensor


class Progress(NamedTuple):
    """Counts and values that tell when rounding stops progress; floating-point scalars."""

    failures: Tensor
    """Successive iterations without a lower loss."""
    stalled: Tensor
    """Iterations since the loss or the gradient last fell to a new minimum."""
    lowest_loss: Tensor
    least_gradient: Tensor
    """The largest entry of the gradient, at its least."""
    loss: Tensor
    """The loss where the last iteration ended."""
    gradient: Tensor
    """The largest entry of the gradient there."""
    first_gradient: Tensor
    """The largest entry of the gradient where this series of iterations began."""


class Iteration(NamedTuple):
    """The result of one iteration of an algorithm."""

    point: Point
    """Where it ended; if it `failed`, where it began."""
    memory: Memory
    evaluations: Tensor
    """Evaluations of the loss and its gradient; int32."""
    step_length: Tensor
    status: Tensor
    """The index in the class's `statuses`; int32."""
    failed: Tensor
    """Whether it found no lower loss."""
    is_rounding: Tensor
    """Whether it failed because no nearby loss is lower by more than rounding."""


class Tolerances(NamedTuple):
    """When a step has converged; see the arguments of `ClosureOptimizer`."""

    gradient: float | None
    relative_gradient: float | None
    change: float

    def is_flat(self, progress: Progress) -> Tensor:
        """Whether the gradient is within its tolerance."""
        absolute, relative = self.gradient, self.relative_gradient
        if absolute is None and relative is None:
            relative = _RELATIVE_GRADIENT_TOLERANCE
        most = tf.maximum((relative or 0.0) * progress.first_gradient, absolute or 0.0)
        return progress.gradient <= most


class Run(NamedTuple):
    """The state of a training step."""

    iterations: Tensor
    evaluations: Tensor
    point: Point
    memory: Memory
    has_failed: Tensor
    """Whether the last iteration found no lower loss."""
    step_length: Tensor
    status: Tensor
    progress: Progress
    converged: Tensor


def minimize(
    iterate: Callable[[Point, Memory, Tensor, Tensor, BatchLoss], Iteration],
    point: Point,
    memory: Mapping[str, Tensor],
    saved: Progress,
    learning_rate: Tensor,
    loss: BatchLoss,
    *,
    iterations: int,
    tolerances: Tolerances,
    own_statuses: int,
) -> Run:
    """Iterates until it has converged, or up to `iterations` times; a pure function.

    Args:
        iterate: Makes one iteration of the method.
        point: Where to begin.
        memory: The method's memory after the previous step.
        saved: The progress after the previous step.
        learning_rate: A scalar.
        loss: The loss of the batch.
        iterations: The most iterations.
        tolerances: When it has converged.
        own_statuses: The number of the method's own statuses; the numbers of those in `STATUSES`
            follow.

    Returns:
        The state at the end. If rounding ended the previous step at the same point, the step has
        converged at once.
    """

    def iteration(run: Run) -> Run:
        before = run.point
        made = iterate(before, run.memory, run.has_failed, learning_rate, loss)
        after = made.point
        largest = _largest_entry(after, loss)
        progress = _update_progress(run.progress, after, largest, made.failed)
        stalled = progress.stalled >= _MOST_STALLED
        change = tf.abs(after.loss - before.loss)
        most_change = tolerances.change * tf.maximum(tf.abs(after.loss), tf.abs(before.loss))
        converged = tolerances.is_flat(progress) | (~made.failed & (change < most_change))
        # Where losses are not finite, a shorter step may still succeed, so that is not convergence.
        rounded = made.failed & made.is_rounding & (progress.failures >= _MOST_FAILURES)
        has_stalled = stalled & ~made.failed & ~converged
        return Run(
            iterations=run.iterations + 1,
            evaluations=run.evaluations + made.evaluations,
            point=after,
            memory=made.memory,
            has_failed=made.failed,
            step_length=made.step_length,
            status=tf.where(has_stalled, own_statuses + _STALLED, made.status),
            progress=progress,
            converged=converged | stalled | rounded,
        )

    finite = tf.math.is_finite(point.loss) & tf.reduce_all(tf.math.is_finite(point.gradient))
    progress, ended_by_rounding = _resume_progress(saved, point, loss)
    status = tf.where(ended_by_rounding, own_statuses + _STALLED, 0)
    run = Run(
        iterations=tf.constant(0),
        evaluations=tf.constant(1),
        point=point,
        memory=dict(memory),
        has_failed=saved.failures > 0,
        step_length=tf.zeros_like(point.loss),
        status=tf.where(finite, status, own_statuses + _LOSS_NOT_FINITE),
        progress=progress,
        converged=tolerances.is_flat(progress) | ended_by_rounding,
    )
    (run,) = tf.while_loop(
        lambda run: (
            (run.iterations < iterations)
            & ~run.converged
            & (run.progress.failures < _MOST_FAILURES)
            & finite
        ),
        lambda run: (iteration(run),),
        (run,),
    )
    return run


def gave_up(run: Run) -> Tensor:
    """Whether losses that are not finite ended a step, so that the next one tries again."""
    return (run.progress.failures >= _MOST_FAILURES) & ~run.converged


def _resume_progress(saved: Progress, point: Point, loss: BatchLoss) -> tuple[Progress, Tensor]:
    """The progress, kept if a step begins where the last ended; and whether rounding ended that."""
    largest = _largest_entry(point, loss)
    # A second evaluation need not give the same loss or gradient to the last bit.
    same_loss = tf.abs(point.loss - saved.loss) <= rounding_of(saved.loss)
    same_gradient = tf.abs(largest - saved.gradient) <= (1 - _LESS) * saved.gradient
    goes_on = same_loss & same_gradient & (saved.gradient > 0)
    zero = tf.zeros_like(largest)
    fresh = Progress(zero, zero, point.loss, largest, point.loss, largest, largest)
    ended = (saved.failures >= _MOST_FAILURES) | (saved.stalled >= _MOST_STALLED)
    return select(goes_on, saved, fresh), goes_on & ended


def _update_progress(before: Progress, after: Point, largest: Tensor, failed: Tensor) -> Progress:
    falls = after.loss < before.lowest_loss - rounding_of(before.lowest_loss)
    better = falls | (largest < _LESS * before.least_gradient)
    return Progress(
        failures=tf.where(failed, before.failures + 1, 0.0),
        stalled=tf.where(better, tf.zeros_like(largest), before.stalled + 1),
        lowest_loss=tf.where(better, after.loss, before.lowest_loss),
        least_gradient=tf.where(better, largest, before.least_gradient),
        loss=after.loss,
        gradient=largest,
        first_gradient=before.first_gradient,
    )


def _largest_entry(point: Point, loss: BatchLoss) -> Tensor:
    """The largest entry of the gradient, without those that push weights against bounds."""
    return tf.reduce_max(tf.abs(loss.free_gradient(point.weights, point.gradient)))
