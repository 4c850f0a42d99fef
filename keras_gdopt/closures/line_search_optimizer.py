"""Base class of the optimizers with a line search."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import tensorflow as tf

from keras_gdopt.closures import line_search as searches
from keras_gdopt.closures.base import ClosureOptimizer
from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.line_search import LineSearch, Trial, select
from keras_gdopt.closures.minimize import Iteration, Memory, Point
from keras_gdopt.optimizers.argument_checks import checked_choice
from keras_gdopt.tensor import Tensor


class Proposal(NamedTuple):
    """The direction that an algorithm proposes."""

    direction: Tensor
    first_step: Tensor
    """The first step that the line search tries."""
    memory: Memory


class LineSearchOptimizer(ClosureOptimizer):
    r"""A closure optimizer that searches along one direction in each iteration.

    $$\theta_{k+1} = \theta_k + \alpha_k d_k$$

    A subclass defines the state it keeps (`memory_layout`) and three pure functions, `direction`,
    `remember` and `forget`; this class and `ClosureOptimizer` do the rest. It can also change or
    add to the line searches on offer (`line_searches`).

    Args:
        learning_rate: The first trial step, as a multiple of the algorithm's own: a number
            above 0 or a schedule (of training steps).
        line_search: `"wolfe"` (strong Wolfe conditions), `"armijo"` (enough decrease, by
            backtracking) or `"exact"` (the minimum along the direction, to machine
            precision).
        iterations_per_step: The most iterations in a training step. Defaults to 1.
        **kwargs: See `ClosureOptimizer`.

    Raises:
        ValueError: If an argument is out of range.
    """

    statuses = searches.STATUSES

    curvature: ClassVar[float] = 0.9
    """$c_2$ of the strong Wolfe conditions."""

    @property
    def line_searches(self) -> Mapping[str, LineSearch]:
        """The searches that the argument `line_search` names."""
        return {
            "wolfe": functools.partial(searches.strong_wolfe, curvature=self.curvature),
            "armijo": searches.armijo,
            "exact": searches.exact,
        }

    def __init__(
        self, learning_rate: Any, line_search: str, iterations_per_step: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(learning_rate, iterations_per_step=iterations_per_step, **kwargs)
        self.line_search = checked_choice("line_search", line_search, tuple(self.line_searches))

    @property
    def line_search_status(self) -> str:
        """How the last line search ended; the same as `status`."""
        return self.status

    # --- the algorithm -------------------------------------------------------

    def direction(
        self, point: Point, memory: Memory, learning_rate: Tensor, loss: BatchLoss
    ) -> Proposal:
        """Proposes a direction from a point; a pure function."""
        raise NotImplementedError

    def remember(self, memory: Memory, before: Point, after: Point, proposal: Proposal) -> Memory:
        """Updates the memory after an iteration; a pure function.

        Args:
            memory: The memory of the proposal.
            before: Where the iteration started.
            after: Where it ended: the same point if the line search found no lower loss.
            proposal: The direction that was searched.
        """
        raise NotImplementedError

    def forget(self, memory: Memory) -> Memory:
        """Resets the memory so that it no longer influences the next direction."""
        raise NotImplementedError

    # --- an iteration --------------------------------------------------------

    def iterate(
        self,
        point: Point,
        memory: Memory,
        has_failed: Tensor,
        learning_rate: Tensor,
        loss: BatchLoss,
    ) -> Iteration:
        """Searches along the algorithm's direction; after a failure, forgets its memory first.

        Args:
            point: Where it begins.
            memory: The memory after the previous iteration.
            has_failed: Whether the previous iteration found no lower loss.
            learning_rate: The first trial step, as a multiple of the algorithm's own.
            loss: The loss of the batch.
        """
        known = select(has_failed, self.forget(memory), memory)
        proposal = self.direction(point, known, learning_rate, loss)
        # The memory may be from before a layer was frozen.
        direction = loss.inward(point.weights, loss.without_frozen(proposal.direction))
        proposal, slope = self._ensure_descent(
            point._replace(gradient=loss.free_gradient(point.weights, point.gradient)),
            proposal._replace(direction=direction),
            learning_rate,
        )

        def evaluate(step: Tensor) -> Trial:
            weights = loss.projected(point.weights + step * proposal.direction)
            value, gradient = loss.value_and_gradient(weights)
            slope = _dot(gradient, loss.inward(weights, proposal.direction))
            return Trial(step, value, slope, gradient)

        start = Trial(tf.zeros_like(slope), point.loss, slope, point.gradient)
        search = self.line_searches[self.line_search]
        found = search(evaluate, start, proposal.first_step)
        trial = found.trial
        failed = tf.equal(trial.step, 0)
        weights = loss.projected(point.weights + trial.step * proposal.direction)
        after = Point(weights, trial.loss, trial.gradient)
        after = select(failed, point, after)
        remembered = self.remember(proposal.memory, point, after, proposal)
        # After one failure the next iteration begins with a forgotten memory. After two, keep the
        # memory from before, which may suit another batch.
        kept = select(has_failed, memory, proposal.memory)
        return Iteration(
            point=after,
            memory=select(failed, kept, remembered),
            evaluations=found.evaluations,
            step_length=trial.step,
            status=found.status,
            failed=failed,
            is_rounding=tf.equal(found.status, searches.NO_DECREASE),
        )

    def _ensure_descent(
        self, point: Point, proposal: Proposal, learning_rate: Tensor
    ) -> tuple[Proposal, Tensor]:
        """The proposal, or steepest descent if its slope is not negative; and the slope."""
        slope = _dot(point.gradient, proposal.direction)
        descends = tf.math.is_finite(slope) & (slope < 0)
        steepest = Proposal(
            -point.gradient,
            first_step_downhill(point.gradient, learning_rate),
            self.forget(proposal.memory),
        )
        proposal = select(descends, proposal, steepest)
        return proposal, tf.where(descends, slope, -_dot(point.gradient, point.gradient))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        return {**super().get_config(), "line_search": self.line_search}


def first_step_downhill(gradient: Tensor, learning_rate: Tensor) -> Tensor:
    """The first trial step along the negative gradient: all moves add up to 1 at most."""
    return learning_rate * tf.minimum(1.0 / tf.reduce_sum(tf.abs(gradient)), 1.0)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return tf.reduce_sum(one * other)
