r"""How far to go along a direction: line searches as pure functions.

Each looks for a step $\alpha > 0$ at which $\varphi(\alpha) = f(\theta + \alpha d)$ is low
enough, given $\varphi(0)$ and $\varphi'(0) < 0$. They are made of TensorFlow operations
with static shapes and one loop each, in which the loss is evaluated at one place, so that
they compile. A trial whose loss or slope is not finite is a step that went too far.

Near a minimum the decrease that a condition asks for is less than the rounding of the loss.
There a step is judged by its slope alone (the approximate Wolfe conditions of Hager and
Zhang 2005, Eq. 4.1), as long as the loss rises by no more than its rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

Tensor = Any

ACCEPTED, DECREASED, NO_DECREASE, NOT_FINITE = range(4)
STATUSES = (
    "accepted",
    "no step met the conditions within the evaluations allowed: the best one seen was taken",
    "no step along the direction lowers the loss by more than its rounding",
    "no step along the direction has a finite loss",
)
"""What a `Found.status` says."""

_SHRINK = 0.2  # a step whose loss is not finite
_MOST_WOLFE, _MOST_ARMIJO, _MOST_EXACT = 25, 25, 60


class Trial(NamedTuple):
    """A step, and the loss there."""

    step: Tensor
    loss: Tensor
    slope: Tensor
    """The derivative of the loss by the step."""
    gradient: Tensor
    """The gradient of the loss by the weights."""


class Found(NamedTuple):
    """What a line search has found."""

    trial: Trial
    """Of step 0 where no step lowers the loss."""
    evaluations: Tensor
    """Of loss and gradient, without the one at step 0; int32."""
    status: Tensor
    """The place in `STATUSES`; int32."""


Evaluate = Callable[[Tensor], Trial]


class _Bound(NamedTuple):
    """An end of the interval that is searched."""

    step: Tensor
    loss: Tensor
    slope: Tensor


def strong_wolfe(
    evaluate: Evaluate,
    start: Trial,
    first_step: Tensor,
    *,
    sufficient_decrease: float = 1e-4,
    curvature: float = 0.9,
) -> Found:
    r"""A step with enough decrease and a slope that is flat enough.

    $$\varphi(\alpha) \le \varphi(0) + c_1 \alpha \varphi'(0), \qquad
    |\varphi'(\alpha)| \le c_2 |\varphi'(0)|$$

    The steps grow until they bracket such a one, which is then closed in by cubic
    interpolation, with bisection where that does not shrink the bracket.

    Args:
        evaluate: φ as a function of a scalar step.
        start: At step 0; its slope must be negative.
        first_step: The first one tried.
        sufficient_decrease: $c_1$, in (0, 1).
        curvature: $c_2$, in ($c_1$, 1): the smaller, the more exact the search.

    Source: Nocedal and Wright 2006, *Numerical Optimization*, Algorithms 3.5 and 3.6,
    Eq. 3.59.
    """
    rounding = _rounding(start.loss)

    def judge(trial: Trial, low: _Bound, best: Trial) -> _Verdict:
        sufficient = trial.loss <= start.loss + sufficient_decrease * trial.step * start.slope
        no_rise = trial.loss <= start.loss + rounding
        flat = tf.abs(trial.slope) <= -curvature * start.slope
        nearly = no_rise & (trial.slope <= (2 * sufficient_decrease - 1) * start.slope)
        too_far = ~(sufficient | nearly) | (trial.loss > low.loss + rounding)
        return _Verdict(
            accepted=flat & (sufficient | nearly),
            too_far=too_far,
            better=trial.loss < best.loss,
            closed=tf.constant(False),
        )

    return _found(_closed_in(evaluate, start, first_step, judge, _interpolated, 4.0, _MOST_WOLFE))


def exact(evaluate: Evaluate, start: Trial, first_step: Tensor) -> Found:
    r"""The step at the minimum along the direction, to the machine's precision.

    $$\varphi'(\alpha) = 0$$

    The steps grow until the slope is positive; the zero of the slope in between is then
    closed in by secants, with bisection where they do not shrink the bracket. (By the
    slope, for around a minimum the loss tells steps apart to half of its digits only.)

    Args:
        evaluate: φ as a function of a scalar step.
        start: At step 0; its slope must be negative.
        first_step: The first one tried.
    """
    rounding = _rounding(start.loss)
    flat = 4 * _epsilon(start.loss) * tf.abs(start.slope)

    def judge(trial: Trial, low: _Bound, best: Trial) -> _Verdict:
        rises = trial.loss > low.loss + rounding
        slope = tf.abs(trial.slope)
        # Two steps nearly the same, and the slope no longer falls: it is rounding.
        near = tf.abs(trial.step - best.step) <= _epsilon(slope) ** 0.5 * trial.step
        return _Verdict(
            accepted=(slope <= flat) & ~rises,
            too_far=rises | (trial.slope > 0),
            better=(slope < tf.abs(best.slope)) & ~rises,
            closed=near & (slope > 0.5 * tf.abs(best.slope)),
        )

    search = _closed_in(evaluate, start, first_step, judge, _secant, 100.0, _MOST_EXACT)
    # A bracket as narrow as steps can be told apart is a minimum too.
    is_minimum = search.closed & (search.best.step > 0)
    return _found(search._replace(accepted=search.accepted | is_minimum))


def armijo(
    evaluate: Evaluate,
    start: Trial,
    first_step: Tensor,
    *,
    sufficient_decrease: float = 1e-4,
) -> Found:
    r"""A step with enough decrease, by backtracking.

    $$\varphi(\alpha) \le \varphi(0) + c_1 \alpha \varphi'(0)$$

    Each step tried is the minimum of the parabola through the last one, but between a
    tenth and a half of it.

    Args:
        evaluate: φ as a function of a scalar step.
        start: At step 0; its slope must be negative.
        first_step: The first one tried.
        sufficient_decrease: $c_1$, in (0, 1).

    Source: Armijo 1966; Nocedal and Wright 2006, Algorithm 3.1 and Eq. 3.58.
    """
    rounding = _rounding(start.loss)

    def body(search: _Search) -> _Search:
        trial = evaluate(search.step)
        finite = _is_finite(trial)
        sufficient = trial.loss <= start.loss + sufficient_decrease * trial.step * start.slope
        nearly = (trial.loss <= start.loss + rounding) & (
            tf.abs(trial.slope) <= (1 - 2 * sufficient_decrease) * tf.abs(start.slope)
        )
        accepted = finite & (sufficient | nearly)
        rise = trial.loss - start.loss - start.slope * trial.step
        parabola = -start.slope * trial.step**2 / (2 * rise)
        closer = _clipped(parabola, 0.1 * trial.step, 0.5 * trial.step)
        return search._replace(
            step=tf.where(finite, closer, _SHRINK * trial.step),
            best=_select(accepted, trial, search.best),
            accepted=accepted,
            any_finite=search.any_finite | finite,
            closed=trial.step * tf.abs(start.slope) <= rounding,
            evaluations=search.evaluations + 1,
        )

    return _found(_searched(body, start, first_step, _MOST_ARMIJO))


# --- the loop ----------------------------------------------------------------------------


class _Search(NamedTuple):
    """What a search knows so far."""

    step: Tensor
    """To try next."""
    low: _Bound
    """The best end of the interval."""
    high: _Bound
    """The other end; at infinity until there is one."""
    width: Tensor
    """Of the interval two trials ago."""
    last_width: Tensor
    best: Trial
    accepted: Tensor
    any_finite: Tensor
    closed: Tensor
    """Whether all steps that are left are the same, but for rounding."""
    evaluations: Tensor


class _Verdict(NamedTuple):
    """What a search thinks of a finite trial."""

    accepted: Tensor
    too_far: Tensor
    better: Tensor
    """Than the best one so far."""
    closed: Tensor
    """Whether there is nothing more to find."""


def _searched(
    body: Callable[[_Search], _Search], start: Trial, first_step: Tensor, most: int
) -> _Search:
    infinity = tf.constant(float("inf"), start.loss.dtype)
    at_start = _Bound(start.step, start.loss, start.slope)
    no = tf.constant(False)
    search = _Search(
        step=tf.cast(first_step, start.loss.dtype),
        low=at_start,
        high=_Bound(infinity, infinity, infinity),
        width=infinity,
        last_width=infinity,
        best=start,
        accepted=no,
        any_finite=no,
        closed=no,
        evaluations=tf.constant(0),
    )
    (search,) = tf.while_loop(
        lambda search: ~(search.accepted | search.closed) & (search.evaluations < most),
        lambda search: (body(search),),
        (search,),
    )
    return search


def _found(search: _Search) -> Found:
    status = tf.where(
        search.accepted,
        ACCEPTED,
        tf.where(
            search.best.step > 0,
            DECREASED,
            tf.where(search.any_finite, NO_DECREASE, NOT_FINITE),
        ),
    )
    return Found(search.best, search.evaluations, status)


def _closed_in(
    evaluate: Evaluate,
    start: Trial,
    first_step: Tensor,
    judge: Callable[[Trial, _Bound, Trial], _Verdict],
    between: Callable[[_Bound, _Bound, Tensor], Tensor],
    growth: float,
    most: int,
) -> _Search:
    """Brackets a step and closes it in.

    Args:
        evaluate: φ.
        start: At step 0.
        first_step: The first one tried.
        judge: A verdict on a trial, from the low end of the interval and the best trial.
        between: The next step from both ends of an interval and the loss's rounding.
        growth: By how much a step may grow, in distances from the one before.
        most: Evaluations.
    """
    rounding = _rounding(start.loss)

    def body(search: _Search) -> _Search:
        low, high = search.low, search.high
        trial = evaluate(search.step)
        finite = _is_finite(trial)
        verdict = judge(trial, low, search.best)
        accepted, too_far = verdict.accepted & finite, verdict.too_far | ~finite
        infinity = tf.constant(float("inf"), trial.loss.dtype)
        here = _Bound(
            trial.step,
            tf.where(finite, trial.loss, infinity),
            tf.where(finite, trial.slope, infinity),
        )
        # Downhill from here lies the other end of the interval, or the low one.
        turned = trial.slope * (high.step - low.step) >= 0
        new_high = _select(too_far, here, _select(turned, low, high))
        new_low = _select(too_far, low, here)

        bracketed = tf.math.is_finite(new_high.step)
        grown = _extrapolated(low, here, growth)
        width = tf.abs(new_high.step - new_low.step)
        inside = between(new_low, new_high, rounding)
        ends = (tf.minimum(new_low.step, new_high.step), tf.maximum(new_low.step, new_high.step))
        inside = _clipped(inside, ends[0] + 0.01 * width, ends[1] - 0.01 * width)
        halfway = new_low.step + 0.5 * (new_high.step - new_low.step)
        slow = tf.math.is_finite(search.width) & (width > 0.66 * search.width)
        inside = tf.where(slow, halfway, inside)
        inside = tf.where(
            tf.math.is_finite(new_high.loss),
            inside,
            new_low.step + _SHRINK * (new_high.step - new_low.step),
        )
        closed = verdict.closed | (bracketed & (width <= 4 * _epsilon(width) * ends[1]))
        return _Search(
            step=tf.where(bracketed, inside, grown),
            low=new_low,
            high=new_high,
            width=search.last_width,
            last_width=width,
            best=_select(accepted | (finite & verdict.better), trial, search.best),
            accepted=accepted,
            any_finite=search.any_finite | finite,
            closed=closed,
            evaluations=search.evaluations + 1,
        )

    return _searched(body, start, first_step, most)


def _extrapolated(before: _Bound, here: _Bound, growth: float) -> Tensor:
    """A step beyond `here`, where the slope is still negative."""
    distance = here.step - before.step
    flatter = here.slope > before.slope
    to_zero = here.step + distance * here.slope / (before.slope - here.slope)
    step = tf.where(flatter, to_zero, here.step + growth * distance)
    return _clipped(step, here.step + 1.1 * distance, here.step + growth * distance)


def _interpolated(low: _Bound, high: _Bound, rounding: Tensor) -> Tensor:
    """The minimum of the cubic through two ends."""
    distance = high.step - low.step
    rise = high.loss - low.loss
    one = low.slope + high.slope - 3 * rise / distance
    root = one**2 - low.slope * high.slope
    two = tf.sign(distance) * tf.sqrt(tf.maximum(root, 0.0))
    cubic = high.step - distance * (high.slope + two - one) / (high.slope - low.slope + 2 * two)
    # Where the losses say nothing, by the slopes.
    return tf.where(tf.abs(rise) <= rounding, _secant(low, high, rounding), cubic)


def _secant(low: _Bound, high: _Bound, rounding: Tensor) -> Tensor:
    """Where the slope is zero, if it is a line between two ends; their middle if it is none."""
    del rounding
    distance = high.step - low.step
    opposite = low.slope * high.slope < 0
    line = low.step - distance * low.slope / (high.slope - low.slope)
    return tf.where(opposite, line, low.step + 0.5 * distance)


def _clipped(value: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """The value within its bounds; their middle for one that is no number."""
    middle = least + 0.5 * (most - least)
    value = tf.where(tf.math.is_nan(value), middle, value)
    return tf.minimum(tf.maximum(value, least), most)


def _select(condition: Tensor, one: Any, other: Any) -> Any:
    return tf.nest.map_structure(lambda a, b: tf.where(condition, a, b), one, other)


def _is_finite(trial: Trial) -> Tensor:
    return tf.math.is_finite(trial.loss) & tf.math.is_finite(trial.slope)


def _epsilon(like: Tensor) -> float:
    return float(np.finfo(like.dtype.as_numpy_dtype).eps)


def _rounding(loss: Tensor) -> Tensor:
    return 4 * _epsilon(loss) * tf.abs(loss)
