r"""Line searches as pure functions: how far to go along a direction.

Each searches for a step $\alpha > 0$ at which $\varphi(\alpha) = f(\theta + \alpha d)$ is low
enough, given $\varphi(0)$ and $\varphi'(0) < 0$. To compile well, each uses TensorFlow operations
with static shapes and a single loop that evaluates the loss at one place. A trial whose loss or
slope is not finite counts as a step that went too far.

Near a minimum the decrease that a condition requires is less than the rounding of the loss.
There, and only there, a step is judged by its slope alone (the approximate Wolfe conditions of
Hager and Zhang 2005, Eq. 4.1), as long as the loss rises by no more than its rounding.

The code compares and divides losses, slopes and steps but never multiplies two losses, two slopes
or two steps, so that no result over- or underflows unless its operands do.
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
"""What each `Found.status` means."""

_SHRINK = 0.2  # factor on a step whose loss is not finite
_MOST_WOLFE, _MOST_ARMIJO, _MOST_EXACT = 25, 25, 60


class Trial(NamedTuple):
    """A step and the loss there."""

    step: Tensor
    loss: Tensor
    slope: Tensor
    """The derivative of the loss by the step."""
    gradient: Tensor
    """The gradient of the loss by the weights."""


class Found(NamedTuple):
    """The result of a line search."""

    trial: Trial
    """The accepted trial, or the best one seen: the one with the flattest slope among those whose
    loss is the lowest to rounding. If no step lowers the loss, the trial at step 0."""
    evaluations: Tensor
    """Evaluations of the loss and its gradient, without the one at step 0; int32."""
    status: Tensor
    """The index in `STATUSES`; int32."""


Evaluate = Callable[[Tensor], Trial]
"""The loss and its slope as a function of a scalar step."""

LineSearch = Callable[[Evaluate, Trial, Tensor], Found]
"""Finds a step, given the trial at step 0 and the first step to try."""


class _Bound(NamedTuple):
    """An end of the search interval."""

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
    r"""Finds a step with enough decrease and a slope that is flat enough.

    $$\varphi(\alpha) \le \varphi(0) + c_1 \alpha \varphi'(0), \qquad
    |\varphi'(\alpha)| \le c_2 |\varphi'(0)|$$

    The steps grow until they bracket such a step. Cubic interpolation then shrinks the bracket,
    with bisection where interpolation is too slow.

    Args:
        evaluate: φ as a function of a scalar step.
        start: The trial at step 0; its slope must be negative.
        first_step: The first step to try.
        sufficient_decrease: $c_1$, in (0, 1).
        curvature: $c_2$, in ($c_1$, 1): the smaller, the more exact the search.

    Source: Nocedal and Wright 2006, *Numerical Optimization*, Algorithms 3.5 and 3.6,
    Eq. 3.59.
    """

    def judge(trial: Trial, low: _Bound) -> tuple[Tensor, Tensor]:
        enough = _is_enough(trial, start, sufficient_decrease)
        flat = tf.abs(trial.slope) <= -curvature * start.slope
        return flat & enough, ~enough | _rises(trial, low, start)

    return _bracket_and_shrink(evaluate, start, first_step, judge, _WOLFE, _MOST_WOLFE)


def exact(evaluate: Evaluate, start: Trial, first_step: Tensor) -> Found:
    r"""Finds the minimum along the direction, to machine precision.

    $$\varphi'(\alpha) = 0$$

    The steps grow until the slope is positive and so bracket a zero of the slope. Secants then
    shrink the bracket, with bisection where they are too slow. (Around a minimum the loss locates
    the step to only half of its digits, so the search uses the slope.) It ends where the slope is
    0 to rounding, or where its sign changes between two steps that are equal to rounding.

    Args:
        evaluate: φ as a function of a scalar step.
        start: The trial at step 0; its slope must be negative.
        first_step: The first step to try.
    """
    flat = 4 * machine_epsilon(start.loss.dtype) * tf.abs(start.slope)

    def judge(trial: Trial, low: _Bound) -> tuple[Tensor, Tensor]:
        rises = _rises(trial, low, start) | _rises(trial, start, start)
        return (tf.abs(trial.slope) <= flat) & ~rises, rises | (trial.slope > 0)

    return _bracket_and_shrink(
        evaluate, start, first_step, judge, _exact_steps(start), _MOST_EXACT, to_the_last_digit=True
    )


def armijo(
    evaluate: Evaluate,
    start: Trial,
    first_step: Tensor,
    *,
    sufficient_decrease: float = 1e-4,
) -> Found:
    r"""Finds a step with enough decrease, by backtracking.

    $$\varphi(\alpha) \le \varphi(0) + c_1 \alpha \varphi'(0)$$

    Each new step is the minimum of the parabola through the last trial, clipped to between a tenth
    and a half of the last step.

    Args:
        evaluate: φ as a function of a scalar step.
        start: The trial at step 0; its slope must be negative.
        first_step: The first step to try.
        sufficient_decrease: $c_1$, in (0, 1).

    Source: Armijo 1966; Nocedal and Wright 2006, Algorithm 3.1 and Eq. 3.58.
    """

    def body(search: _Search) -> _Search:
        """Tries a step and shortens the next one."""
        trial = evaluate(search.step)
        accepted = _is_finite(trial) & _is_enough(trial, start, sufficient_decrease)
        promised = start.slope * trial.step
        parabola = -0.5 * promised / (trial.loss - start.loss - promised) * trial.step
        closer = _clip(parabola, 0.1 * trial.step, 0.5 * trial.step)
        return _record_trial(search, trial, accepted)._replace(
            step=tf.where(_is_finite(trial), closer, _SHRINK * trial.step),
            ended=accepted,
        )

    return _summarize(_run_search(body, start, first_step, _MOST_ARMIJO), start)


# --- conditions on a trial ---------------------------------------------------------------


def _is_enough(trial: Trial, start: Trial, sufficient_decrease: float) -> Tensor:
    """Whether the loss fell enough or, where rounding hides that, the slope is right."""
    wanted = -sufficient_decrease * trial.step * start.slope
    rounding = rounding_of(start.loss)
    tells = (wanted > rounding) | (tf.abs(trial.loss - start.loss) > rounding)
    by_slope = trial.slope <= (2 * sufficient_decrease - 1) * start.slope
    return tf.where(tells, trial.loss <= start.loss - wanted, by_slope)


def _rises(trial: Trial, other: Any, start: Trial) -> Tensor:
    """Whether the loss of a trial is above that of another by more than rounding.

    A loss may be the difference of larger numbers, so its rounding is taken to be at least that of
    the loss at the start.
    """
    rounding = tf.maximum(rounding_of(start.loss), rounding_of(other.loss))
    return trial.loss > other.loss + rounding


# --- the loop ----------------------------------------------------------------------------


class _Search(NamedTuple):
    """The state of a search."""

    step: Tensor
    """The next step to try."""
    low: _Bound
    """The better end of the interval."""
    high: _Bound
    """The other end; infinite until the steps bracket a minimum."""
    width: Tensor
    """The width of the interval two trials ago."""
    last_width: Tensor
    """The width of the interval after the last trial."""
    best: Trial
    lowest: Tensor
    """The lowest loss seen; that of the best trial equals it to rounding."""
    accepted: Tensor
    any_finite: Tensor
    ended: Tensor
    evaluations: Tensor


def _run_search(
    body: Callable[[_Search], _Search], start: Trial, first_step: Tensor, most: int
) -> _Search:
    """Repeats `body` until the search has ended or has made `most` evaluations."""
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


def _record_trial(search: _Search, trial: Trial, accepted: Tensor) -> _Search:
    """Updates everything but the next step and the interval after a trial."""
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


def _summarize(search: _Search, start: Trial) -> Found:
    decreased = search.best.loss < start.loss - rounding_of(start.loss)
    status = tf.where(
        search.accepted,
        ACCEPTED,
        tf.where(decreased, DECREASED, tf.where(search.any_finite, NO_DECREASE, NOT_FINITE)),
    )
    trial = select(search.accepted | decreased, search.best, start)
    return Found(trial, search.evaluations, status)


def _bracket_and_shrink(
    evaluate: Evaluate,
    start: Trial,
    first_step: Tensor,
    judge: Callable[[Trial, _Bound], tuple[Tensor, Tensor]],
    steps: "_Steps",
    most: int,
    *,
    to_the_last_digit: bool = False,
) -> Found:
    """Brackets a step and shrinks the bracket until a trial is accepted.

    Args:
        evaluate: φ.
        start: The trial at step 0.
        first_step: The first step to try.
        judge: Tells whether a trial is accepted, and whether it went too far.
        steps: Chooses the next step.
        most: The most evaluations.
        to_the_last_digit: Whether to accept the best step where the slope's sign changes between
            two steps that are equal to rounding.
    """

    def body(search: _Search) -> _Search:
        """Tries a step, updates the interval [low, high] and chooses the next step.

        A trial that went too far becomes `high`. Any other becomes `low`; the old `low` becomes
        `high` if the slope at the trial points back to it. While `high` is infinite, the step
        grows (`steps.beyond`). After that the next step lies inside the interval: at
        `steps.inside`; at the middle if the interval shrank by less than a third in two trials; or,
        if the loss at `high` is not finite, at the middle or (from step 0) a fifth. The search
        also ends once the ends of the interval are equal to rounding.
        """
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
        # The minimum lies downhill of the trial: towards `high`, or back towards `low`.
        turned = tf.sign(trial.slope) * tf.sign(high.step - low.step) >= 0
        new_high = select(too_far, here, select(turned, low, high))
        new_low = select(too_far, low, here)

        bracketed = tf.math.is_finite(new_high.step)
        distance = new_high.step - new_low.step
        width = tf.abs(distance)
        slow = tf.math.is_finite(search.width) & (width > 0.66 * search.width)
        part = tf.where(~slow, steps.inside(new_low, new_high), 0.5)
        # A first step may be far too long, so shrink it more than one between two finite trials.
        shrunk = tf.cast(tf.where(new_low.step > 0, 0.5, _SHRINK), part.dtype)
        part = tf.where(tf.math.is_finite(new_high.loss), part, shrunk)
        few_digits = 4 * machine_epsilon(width.dtype)
        closed = bracketed & (width <= few_digits * tf.maximum(new_low.step, new_high.step))
        grown = trial.step + (trial.step - low.step) * steps.beyond(low, here)
        grown = tf.maximum(grown, trial.step * (1 + few_digits))
        grown = tf.minimum(grown, grown.dtype.max)
        recorded = _record_trial(search, trial, accepted)
        if to_the_last_digit:
            is_zero = closed & (new_low.slope < 0) & (new_high.slope > 0)
            accepted |= is_zero & tf.math.is_finite(new_high.loss) & (recorded.best.step > 0)
        return recorded._replace(
            step=tf.where(bracketed, new_low.step + distance * part, grown),
            low=new_low,
            high=new_high,
            width=search.last_width,
            last_width=width,
            accepted=accepted,
            ended=accepted | closed,
        )

    return _summarize(_run_search(body, start, first_step, most), start)


class _Steps(NamedTuple):
    """How to choose the next step, as a fraction of the distance between two steps."""

    beyond: Callable[[_Bound, _Bound], Tensor]
    """From the previous step and one that did not go far enough: how far beyond the latter."""
    inside: Callable[[_Bound, _Bound], Tensor]
    """From the low and the high end of an interval: how far from the low one."""


def _wolfe_beyond(before: _Bound, here: _Bound) -> Tensor:
    return _clip(_zero_beyond(before, here), 1.1, 4.0)


def _wolfe_inside(low: _Bound, high: _Bound) -> Tensor:
    """The minimum of the cubic through both ends."""
    rise = high.loss - low.loss
    one = low.slope + high.slope - 3 * rise / (high.step - low.step)
    scale = tf.maximum(tf.abs(one), tf.maximum(tf.abs(low.slope), tf.abs(high.slope)))
    root = (one / scale) ** 2 - (low.slope / scale) * (high.slope / scale)
    two = tf.sign(high.step - low.step) * scale * tf.sqrt(tf.maximum(root, 0.0))
    cubic = 1.0 - (high.slope + two - one) / (high.slope - low.slope + 2 * two)
    # Where the losses differ by no more than rounding, use the slopes.
    rounding = tf.maximum(rounding_of(low.loss), rounding_of(high.loss))
    part = tf.where(tf.abs(rise) <= rounding, _zero_inside(low, high), cubic)
    return _clip(part, 0.01, 0.99)


_WOLFE = _Steps(_wolfe_beyond, _wolfe_inside)


def _exact_steps(start: Trial) -> _Steps:
    # An end this flat is near the zero. A steeper one may only seem so beside a much steeper end.
    flat = 0.01 * tf.abs(start.slope)

    def beyond(before: _Bound, here: _Bound) -> Tensor:
        part = _zero_beyond(before, here)
        # Near the zero, step a little beyond it to bracket it.
        near = (part < 0.01) & (tf.abs(here.slope) < flat)
        return tf.where(near, 2.0 * part, _clip(part, 1.1, 100.0))

    def inside(low: _Bound, high: _Bound) -> Tensor:
        part = _zero_inside(low, high)
        near_low = (part < 0.01) & (tf.abs(low.slope) < flat)
        near_high = (part > 0.99) & (tf.abs(high.slope) < flat)
        beyond_zero = tf.where(near_low, 2.0 * part, 2.0 * part - 1.0)
        part = tf.where(near_low | near_high, beyond_zero, _clip(part, 0.01, 0.99))
        least = machine_epsilon(part.dtype) * tf.maximum(high.step / (high.step - low.step), 1.0)
        return _clip(part, least, 1.0 - least)

    return _Steps(beyond, inside)


def _zero_beyond(before: _Bound, here: _Bound) -> Tensor:
    """The zero of the slope if it is linear; infinity if the slope does not become flatter."""
    part = here.slope / (before.slope - here.slope)
    return tf.where(here.slope > before.slope, part, tf.constant(float("inf"), part.dtype))


def _zero_inside(low: _Bound, high: _Bound) -> Tensor:
    """The zero of the slope if it is linear between two ends; the middle if it has none."""
    opposite = tf.sign(low.slope) * tf.sign(high.slope) < 0
    return tf.where(opposite, low.slope / (low.slope - high.slope), 0.5)


def _clip(value: Tensor, least: Any, most: Any) -> Tensor:
    """The value clipped to its bounds; the middle of the bounds for NaN."""
    least, most = tf.cast(least, value.dtype), tf.cast(most, value.dtype)
    middle = least + 0.5 * (most - least)
    value = tf.where(tf.math.is_nan(value), middle, value)
    return tf.minimum(tf.maximum(value, least), most)


def select(condition: Tensor, one: Any, other: Any) -> Any:
    """Chooses one of two structures; a tensor that both share is not touched."""
    return tf.nest.map_structure(
        lambda a, b: a if a is b else tf.where(condition, a, b), one, other
    )


def _is_finite(trial: Trial) -> Tensor:
    return tf.math.is_finite(trial.loss) & tf.math.is_finite(trial.slope)


def rounding_of(loss: Tensor) -> Tensor:
    """How much two equal losses may differ by rounding."""
    return 4 * machine_epsilon(loss.dtype) * tf.abs(loss)
