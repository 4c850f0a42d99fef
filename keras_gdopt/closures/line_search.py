r"""How far to go along a direction: line searches as pure functions.

Each looks for a step $\alpha > 0$ at which $\varphi(\alpha) = f(\theta + \alpha d)$ is low
enough, given $\varphi(0)$ and $\varphi'(0) < 0$. They are made of TensorFlow operations
with static shapes and one loop each, in which the loss is evaluated at one place, so that
they compile. A trial whose loss or slope is not finite is a step that went too far.

Near a minimum the decrease that a condition asks for is less than the rounding of the loss.
There, and only there, a step is judged by its slope alone (the approximate Wolfe conditions of
Hager and Zhang 2005, Eq. 4.1), as long as the loss rises by no more than its rounding.

Losses, slopes and steps are compared and divided, but not multiplied with their own kind, so
that nothing over- or underflows before they do themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import machine_epsilon
from keras_gdopt.tensor import Tensor

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
    """The one that was accepted, or the best one seen: of the lowest loss, and the flattest of
    those whose loss is that one to rounding. Of step 0 where no step lowers the loss."""
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

    def judge(trial: Trial, low: _Bound) -> tuple[Tensor, Tensor]:
        enough = _is_enough(trial, start, sufficient_decrease)
        flat = tf.abs(trial.slope) <= -curvature * start.slope
        return flat & enough, ~enough | _rises(trial, low, start)

    return _closed_in(evaluate, start, first_step, judge, _WOLFE, _MOST_WOLFE)


def exact(evaluate: Evaluate, start: Trial, first_step: Tensor) -> Found:
    r"""The step at the minimum along the direction, to the machine's precision.

    $$\varphi'(\alpha) = 0$$

    The steps grow until the slope is positive; the zero of the slope in between is then
    closed in by secants, with bisection where they do not shrink the bracket. (By the
    slope, for around a minimum the loss tells steps apart to half of its digits only.) It
    ends where the slope is 0 to rounding, or where its sign changes from one step to the next.

    Args:
        evaluate: φ as a function of a scalar step.
        start: At step 0; its slope must be negative.
        first_step: The first one tried.
    """
    flat = 4 * machine_epsilon(start.loss.dtype) * tf.abs(start.slope)

    def judge(trial: Trial, low: _Bound) -> tuple[Tensor, Tensor]:
        rises = _rises(trial, low, start) | _rises(trial, start, start)
        return (tf.abs(trial.slope) <= flat) & ~rises, rises | (trial.slope > 0)

    return _closed_in(
        evaluate, start, first_step, judge, _exact_steps(start), _MOST_EXACT, to_the_last_digit=True
    )


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

    def body(search: _Search) -> _Search:
        trial = evaluate(search.step)
        accepted = _is_finite(trial) & _is_enough(trial, start, sufficient_decrease)
        promised = start.slope * trial.step
        parabola = -0.5 * promised / (trial.loss - start.loss - promised) * trial.step
        closer = _clipped(parabola, 0.1 * trial.step, 0.5 * trial.step)
        return _noted(search, trial, accepted)._replace(
            step=tf.where(_is_finite(trial), closer, _SHRINK * trial.step),
            ended=accepted,
        )

    return _found(_searched(body, start, first_step, _MOST_ARMIJO), start)


# --- what a trial is judged by -----------------------------------------------------------


def _is_enough(trial: Trial, start: Trial, sufficient_decrease: float) -> Tensor:
    """Whether the loss has decreased enough or, where it does not tell, the slope is right."""
    wanted = -sufficient_decrease * trial.step * start.slope
    rounding = rounding_of(start.loss)
    tells = (wanted > rounding) | (tf.abs(trial.loss - start.loss) > rounding)
    by_slope = trial.slope <= (2 * sufficient_decrease - 1) * start.slope
    return tf.where(tells, trial.loss <= start.loss - wanted, by_slope)


def _rises(trial: Trial, other: Any, start: Trial) -> Tensor:
    """Whether the loss of a trial is above another one by more than rounding.

    The loss may be a difference of numbers that are larger, so the rounding is not below that
    of the loss at the start.
    """
    rounding = tf.maximum(rounding_of(start.loss), rounding_of(other.loss))
    return trial.loss > other.loss + rounding


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
    lowest: Tensor
    """The lowest loss seen; the best trial's, to rounding."""
    accepted: Tensor
    any_finite: Tensor
    ended: Tensor
    evaluations: Tensor


def _searched(
    body: Callable[[_Search], _Search], start: Trial, first_step: Tensor, most: int
) -> _Search:
    infinity = tf.constant(float("inf"), start.loss.dtype)
    at_start = _Bound(start.step, start.loss, start.slope)
    no = tf.constant(False)
    search = _Search(
        step=tf.minimum(tf.cast(first_step, start.loss.dtype), start.loss.dtype.max),
        low=at_start,
        high=_Bound(infinity, infinity, infinity),
        width=infinity,
        last_width=infinity,
        best=start,
        lowest=start.loss,
        accepted=no,
        any_finite=no,
        ended=no,
        evaluations=tf.constant(0),
    )
    (search,) = tf.while_loop(
        lambda search: ~search.ended & (search.evaluations < most),
        lambda search: (body(search),),
        (search,),
    )
    return search


def _noted(search: _Search, trial: Trial, accepted: Tensor) -> _Search:
    """What is known after a trial, but for where to go next."""
    finite = _is_finite(trial)
    lowest = tf.where(finite, tf.minimum(trial.loss, search.lowest), search.lowest)
    most = lowest + rounding_of(lowest)
    flatter = (search.best.loss > most) | (tf.abs(trial.slope) < tf.abs(search.best.slope))
    better = finite & (trial.loss <= most) & flatter
    return search._replace(
        best=select(accepted | better, trial, search.best),
        lowest=lowest,
        accepted=accepted,
        any_finite=search.any_finite | finite,
        evaluations=search.evaluations + 1,
    )


def _found(search: _Search, start: Trial) -> Found:
    decreased = search.best.loss < start.loss - rounding_of(start.loss)
    status = tf.where(
        search.accepted,
        ACCEPTED,
        tf.where(decreased, DECREASED, tf.where(search.any_finite, NO_DECREASE, NOT_FINITE)),
    )
    trial = select(search.accepted | decreased, search.best, start)
    return Found(trial, search.evaluations, status)


def _closed_in(
    evaluate: Evaluate,
    start: Trial,
    first_step: Tensor,
    judge: Callable[[Trial, _Bound], tuple[Tensor, Tensor]],
    steps: "_Steps",
    most: int,
    *,
    to_the_last_digit: bool = False,
) -> Found:
    """Brackets a step and closes it in.

    Args:
        evaluate: φ.
        start: At step 0.
        first_step: The first one tried.
        judge: Whether a trial is accepted, and whether it went too far.
        steps: Where to go next.
        most: Evaluations.
        to_the_last_digit: Whether to accept the best step where the slope's sign changes from
            one step to the next.
    """

    def body(search: _Search) -> _Search:
        low, high = search.low, search.high
        trial = evaluate(search.step)
        finite = _is_finite(trial)
        accepted, too_far = judge(trial, low)
        accepted, too_far = accepted & finite, too_far | ~finite
        infinity = tf.constant(float("inf"), trial.loss.dtype)
        here = _Bound(
            trial.step,
            tf.where(finite, trial.loss, infinity),
            tf.where(finite, trial.slope, infinity),
        )
        # Downhill from here lies the other end of the interval, or the low one.
        turned = tf.sign(trial.slope) * tf.sign(high.step - low.step) >= 0
        new_high = select(too_far, here, select(turned, low, high))
        new_low = select(too_far, low, here)

        bracketed = tf.math.is_finite(new_high.step)
        distance = new_high.step - new_low.step
        width = tf.abs(distance)
        slow = tf.math.is_finite(search.width) & (width > 0.66 * search.width)
        part = tf.where(~slow, steps.inside(new_low, new_high), 0.5)
        # The size of a first step may be wrong by far, but not that of one between two others.
        shrunk = tf.cast(tf.where(new_low.step > 0, 0.5, _SHRINK), part.dtype)
        part = tf.where(tf.math.is_finite(new_high.loss), part, shrunk)
        few_digits = 4 * machine_epsilon(width.dtype)
        closed = bracketed & (width <= few_digits * tf.maximum(new_low.step, new_high.step))
        grown = trial.step + (trial.step - low.step) * steps.beyond(low, here)
        grown = tf.maximum(grown, trial.step * (1 + few_digits))
        grown = tf.minimum(grown, grown.dtype.max)
        noted = _noted(search, trial, accepted)
        if to_the_last_digit:
            is_zero = closed & (new_low.slope < 0) & (new_high.slope > 0)
            accepted |= is_zero & tf.math.is_finite(new_high.loss) & (noted.best.step > 0)
        return noted._replace(
            step=tf.where(bracketed, new_low.step + distance * part, grown),
            low=new_low,
            high=new_high,
            width=search.last_width,
            last_width=width,
            accepted=accepted,
            ended=accepted | closed,
        )

    return _found(_searched(body, start, first_step, most), start)


class _Steps(NamedTuple):
    """Where to go next, in parts of the distance that there is."""

    beyond: Callable[[_Bound, _Bound], Tensor]
    """Of the step before and one that did not go far enough; from the latter."""
    inside: Callable[[_Bound, _Bound], Tensor]
    """Of the low and the high end of an interval; from the low one."""


def _wolfe_beyond(before: _Bound, here: _Bound) -> Tensor:
    return _clipped(_zero_beyond(before, here), 1.1, 4.0)


def _wolfe_inside(low: _Bound, high: _Bound) -> Tensor:
    """At the minimum of the cubic through both ends."""
    rise = high.loss - low.loss
    one = low.slope + high.slope - 3 * rise / (high.step - low.step)
    scale = tf.maximum(tf.abs(one), tf.maximum(tf.abs(low.slope), tf.abs(high.slope)))
    root = (one / scale) ** 2 - (low.slope / scale) * (high.slope / scale)
    two = tf.sign(high.step - low.step) * scale * tf.sqrt(tf.maximum(root, 0.0))
    cubic = 1.0 - (high.slope + two - one) / (high.slope - low.slope + 2 * two)
    # Where the losses say nothing, by the slopes.
    rounding = tf.maximum(rounding_of(low.loss), rounding_of(high.loss))
    part = tf.where(tf.abs(rise) <= rounding, _zero_inside(low, high), cubic)
    return _clipped(part, 0.01, 0.99)


_WOLFE = _Steps(_wolfe_beyond, _wolfe_inside)


def _exact_steps(start: Trial) -> _Steps:
    # An end this flat is near the zero; another one may only seem so beside a steep one.
    flat = 0.01 * tf.abs(start.slope)

    def beyond(before: _Bound, here: _Bound) -> Tensor:
        part = _zero_beyond(before, here)
        # Near the zero a little beyond it, to have it in between.
        near = (part < 0.01) & (tf.abs(here.slope) < flat)
        return tf.where(near, 2.0 * part, _clipped(part, 1.1, 100.0))

    def inside(low: _Bound, high: _Bound) -> Tensor:
        part = _zero_inside(low, high)
        near_low = (part < 0.01) & (tf.abs(low.slope) < flat)
        near_high = (part > 0.99) & (tf.abs(high.slope) < flat)
        beyond_zero = tf.where(near_low, 2.0 * part, 2.0 * part - 1.0)
        part = tf.where(near_low | near_high, beyond_zero, _clipped(part, 0.01, 0.99))
        least = machine_epsilon(part.dtype) * tf.maximum(high.step / (high.step - low.step), 1.0)
        return _clipped(part, least, 1.0 - least)

    return _Steps(beyond, inside)


def _zero_beyond(before: _Bound, here: _Bound) -> Tensor:
    """Where the slope is zero if it is a line; infinity if it does not become flatter."""
    part = here.slope / (before.slope - here.slope)
    return tf.where(here.slope > before.slope, part, tf.constant(float("inf"), part.dtype))


def _zero_inside(low: _Bound, high: _Bound) -> Tensor:
    """Where the slope is zero if it is a line between two ends; their middle if it is not."""
    opposite = tf.sign(low.slope) * tf.sign(high.slope) < 0
    return tf.where(opposite, low.slope / (low.slope - high.slope), 0.5)


def _clipped(value: Tensor, least: Any, most: Any) -> Tensor:
    """The value within its bounds; their middle for one that is no number."""
    least, most = tf.cast(least, value.dtype), tf.cast(most, value.dtype)
    middle = least + 0.5 * (most - least)
    value = tf.where(tf.math.is_nan(value), middle, value)
    return tf.minimum(tf.maximum(value, least), most)


def select(condition: Tensor, one: Any, other: Any) -> Any:
    """One structure or another; what is the same tensor in both stays as it is."""
    return tf.nest.map_structure(
        lambda a, b: a if a is b else tf.where(condition, a, b), one, other
    )


def _is_finite(trial: Trial) -> Tensor:
    return tf.math.is_finite(trial.loss) & tf.math.is_finite(trial.slope)


def rounding_of(loss: Tensor) -> Tensor:
    """By how much two losses may differ that are the same but for rounding."""
    return 4 * machine_epsilon(loss.dtype) * tf.abs(loss)
