"""The line searches: what they find is checked in NumPy float64, by formulas of its own.

A function is written once for NumPy and TensorFlow. Its derivative is TensorFlow's in the
search, and in the checks that of the complex step, Im φ(α + ih) / h, which has no rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_gdopt.closures.line_search import (
    ACCEPTED,
    DECREASED,
    NO_DECREASE,
    NOT_FINITE,
    Trial,
    armijo,
    exact,
    strong_wolfe,
)
from tests.parameters import slow


@pytest.fixture(autouse=True)
def _keras_settings_put_back():
    """There is no Keras here to put back, which takes longer than a search."""


SEARCHES = {"wolfe": strong_wolfe, "armijo": armijo, "exact": exact}
MOST = {"wolfe": 25, "armijo": 25, "exact": 60}
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Case:
    """A function of the step, and the constants with which it is searched."""

    name: str
    function: Callable
    """Of a module (`np` or `tf`) and the step."""
    sufficient_decrease: float = 1e-4
    curvature: float = 0.9
    slope: Callable | None = None
    """Of the step; where what the search is told is not the derivative."""

    def __str__(self):
        return self.name

    def value(self, step):
        return float(self.function(np, np.float64(step)))

    def derivative(self, step):
        tiny = 1e-40 * max(abs(step), 1e-200)
        return float(np.imag(self.function(np, np.complex128(step + 1j * tiny))) / tiny)

    def arguments(self, name):
        constants = {
            "sufficient_decrease": self.sufficient_decrease,
            "curvature": self.curvature,
        }
        return {"wolfe": constants, "exact": {},
                "armijo": {"sufficient_decrease": self.sufficient_decrease}}[name]  # fmt: skip


def _wavy(m, a, beta=0.01, waves=39):
    real = m.math.real(a) if m is tf else np.real(a)
    ends = m.where(real <= 1 - beta, 1 - a, a - 1)
    middle = (a - 1) ** 2 / (2 * beta) + beta / 2
    base = m.where(m.abs(real - 1) >= beta, ends, middle)
    return base + 2 * (1 - beta) / (waves * np.pi) * m.sin(waves * np.pi / 2 * a)


def _log(m, x):
    return m.math.log(x) if m is tf else np.log(x)


QUADRATIC = Case("quadratic", lambda m, a: 0.5 * (a - 1.0) ** 2)
# Moré and Thuente 1994, Eq. 5.1 to 5.3, with the constants of their tables 1 to 3.
MORE_THUENTE = [
    Case("more_thuente_1", lambda m, a: -a / (a**2 + 2.0), 1e-3, 0.1),
    Case("more_thuente_2", lambda m, a: (a + 0.004) ** 5 - 2.0 * (a + 0.004) ** 4, 0.1, 0.1),
    Case("more_thuente_3", _wavy, 0.1, 0.1),
]
SMOOTH = [
    QUADRATIC,
    *MORE_THUENTE,
    Case("far_away", lambda m, a: 1e-6 * (a - 1e3) ** 2 + 3.0),
    Case("quartic", lambda m, a: (a - 2.0) ** 4 + 0.1 * (a - 2.0) ** 2, 1e-4, 0.1),
    Case("exponential", lambda m, a: m.exp(a) - 3.0 * a, 1e-4, 0.1),
]
FIRST_STEPS = (1e-3, 0.1, 10.0, 1e3)


def _evaluation(case, units=(1.0, 1.0)):
    """φ in units of the loss and the step."""

    def evaluate(step):
        with tf.GradientTape() as tape:
            tape.watch(step)
            loss = units[0] * case.function(tf, step / units[1])
        slope = tape.gradient(loss, step, unconnected_gradients="zero")
        if case.slope is not None:
            slope = tf.cast(case.slope(step), step.dtype)
        return Trial(step, loss, slope, tf.stack([slope, 2.0 * step]))

    return evaluate


def _run(name, case, first_step, units=(1.0, 1.0), record=None):
    evaluate = _evaluation(case, units)

    def recorded(step):
        trial = evaluate(step)
        with tf.control_dependencies([tf.py_function(record, trial, [])] if record else []):
            return Trial(*(tf.identity(part) for part in trial))

    start = evaluate(tf.zeros_like(first_step))
    return start, SEARCHES[name](recorded, start, first_step, **case.arguments(name))


@cache
def _traced(name, case, dtype):
    """The search as one graph, and the list of the trials that it makes."""
    seen: list[Any] = []
    function = tf.function(
        lambda first_step, *units: _run(
            name, case, first_step, units, lambda *trial: seen.append(trial)
        ),
        input_signature=[tf.TensorSpec((), dtype)] * 3,
        autograph=False,
    )
    return function, seen


@dataclass(frozen=True)
class Result:
    """What a search has found, and the trials that it made."""

    start: Trial
    seen: list
    trial: Trial
    evaluations: int
    status: int

    @property
    def steps(self):
        return [float(trial.step) for trial in self.seen]


def _searched(name, case, first_step, dtype, units=(1.0, 1.0)):
    """Checks what every search must keep to."""
    search, seen = _traced(name, case, dtype)
    seen.clear()
    start, found = search(*(tf.constant(number, dtype) for number in (first_step, *units)))
    start, trial, *seen = (Trial(*(p.numpy() for p in t)) for t in (start, found.trial, *seen))
    result = Result(start, seen, trial, int(found.evaluations), int(found.status))

    assert result.evaluations == len(seen) <= MOST[name]
    taken = [other for other in [start, *seen] if other.step == trial.step]
    for part, expected in zip(trial, taken[0], strict=True):
        np.testing.assert_array_equal(part, expected)  # the gradient, too, is of this step
    assert trial.loss <= start.loss + _rounding(start.loss)
    usable = [t for t in seen if np.isfinite(t.loss) and np.isfinite(t.slope)]
    lowest = min([start.loss, *(t.loss for t in usable)])
    if result.status == ACCEPTED:
        assert trial.step > 0
    elif lowest < start.loss - 2 * _rounding(start.loss):
        assert result.status == DECREASED
        assert trial.loss <= lowest + _rounding(lowest)
    else:
        assert result.status == (NO_DECREASE if usable else NOT_FINITE)
        assert trial.step == 0
    return result


def _rounding(loss):
    return 4 * np.finfo(loss.dtype).eps * np.abs(loss)


def _check_enough_decrease(case, result, magnitude=1.0):
    """φ(α) ≤ φ(0) + c₁αφ'(0), or no rise where that is less than the loss's rounding."""
    step, slope = float(result.trial.step), case.derivative(0.0)
    rounding = float(_rounding(result.start.loss))
    # By how much the search's own numbers are off the exact ones.
    noise = abs(result.trial.loss - case.value(step)) + abs(result.start.loss - case.value(0.0))
    assert noise <= 8 * np.finfo(result.trial.loss.dtype).eps * max(
        magnitude, abs(case.value(0.0)), abs(case.value(step)), abs(slope * step)
    )
    wanted = -case.sufficient_decrease * step * slope
    decrease = case.value(0.0) - case.value(step)
    if wanted > rounding:
        assert decrease >= wanted - noise - np.finfo(float).eps * abs(wanted)
    else:
        assert decrease >= -rounding - noise


def _check_flat(case, result, magnitude=0.0):
    """|φ'(α)| ≤ c₂|φ'(0)|, and so Hager and Zhang's (2c₁ - 1)φ'(0) ≥ φ'(α) ≥ c₂φ'(0)."""
    step, epsilon = float(result.trial.step), np.finfo(result.trial.loss.dtype).eps
    slope, at_start = case.derivative(step), case.derivative(0.0)
    noise = abs(slope - float(result.trial.slope))
    change = abs(case.derivative(step * (1 + epsilon)) - slope)
    assert noise <= 8 * (change + epsilon * max(abs(at_start), magnitude))
    assert abs(slope) <= -case.curvature * at_start + noise


# --- the conditions ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_an_accepted_step_meets_the_strong_wolfe_conditions(case, dtype):
    for first_step in FIRST_STEPS:
        for constants in {(case.sufficient_decrease, case.curvature), (1e-4, 0.9)}:
            searched = replace(case, sufficient_decrease=constants[0], curvature=constants[1])
            result = _searched("wolfe", searched, first_step, dtype)
            if (case.name, dtype) == ("more_thuente_2", "float32"):
                # Around its minimum the slope changes by 20 times the flattest allowed one
                # from one number to the next: only a slope of 0 could do.
                assert result.status in (ACCEPTED, DECREASED)
                np.testing.assert_allclose(result.trial.step, 1.596, rtol=1e-3)
            else:
                assert result.status == ACCEPTED
                _check_enough_decrease(searched, result)
                _check_flat(searched, result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_armijo_backtracks_to_the_first_step_with_enough_decrease(case, dtype):
    for first_step in FIRST_STEPS:
        result = _searched("armijo", case, first_step, dtype)
        assert result.status == ACCEPTED
        _check_enough_decrease(case, result)
        np.testing.assert_allclose(result.steps[0], first_step, rtol=1e-6)
        ratios = np.divide(result.steps[1:], result.steps[:-1])
        assert np.all((ratios > 0.0999999) & (ratios < 0.5000001))


@pytest.mark.parametrize("dtype", ["float32", slow("float64")])
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_an_exact_step_has_no_slope(case, dtype):
    for first_step in FIRST_STEPS:
        result = _searched("exact", case, first_step, dtype)
        step, epsilon = float(result.trial.step), np.finfo(dtype).eps
        assert result.status == ACCEPTED
        # What the slope changes from one number to the next one, and its rounding.
        change = abs(case.derivative(step * (1 + epsilon)) - case.derivative(step))
        assert abs(case.derivative(step)) <= 8 * (change + epsilon * abs(case.derivative(0.0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_step_on_a_quadratic_takes_two_or_three_evaluations(dtype):
    for minimum in (1e-6, 0.3, 1.0, 7.0):
        case = Case("quadratic", lambda m, a, minimum=minimum: 4.0 + (a - minimum) ** 2)
        for first_step in (0.5 * minimum, minimum, 30.0 * minimum):
            result = _searched("exact", case, first_step, dtype)
            assert result.status == ACCEPTED
            assert result.evaluations <= 3
            np.testing.assert_allclose(result.trial.step, minimum, rtol=8 * np.finfo(dtype).eps)


# --- functions with few digits -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEARCHES)
def test_where_the_loss_tells_nothing_the_slope_decides(name, dtype):
    """1e8 + (α - 1)²: in float32 the numbers around 1e8 are 8 apart, the decrease is 1."""
    case = Case("offset", lambda m, a: 1e8 + (a - 1.0) ** 2, curvature=0.1)
    for first_step in FIRST_STEPS:
        result = _searched(name, case, first_step, dtype)
        assert result.status == ACCEPTED
        _check_enough_decrease(case, result)
        if name == "wolfe":
            assert abs(case.derivative(float(result.trial.step))) <= 0.2 * (1 + 1e-6)
        if name == "exact":
            np.testing.assert_allclose(result.trial.step, 1.0, rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_constant_loss_whose_slope_is_rounding_ends_at_the_first_step(name, dtype):
    case = Case("constant", _constant, slope=lambda a: tf.where(a == 0.0, -1e-12, 0.0))
    result = _searched(name, case, 1.0, dtype)
    assert (result.status, result.evaluations) == (ACCEPTED, 1)
    assert result.trial.loss == 3.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["wolfe", "exact"])
def test_a_constant_loss_that_keeps_its_slope_is_no_decrease(name, dtype):
    result = _searched(name, Case("constant", _constant, slope=lambda a: -1e-12), 1.0, dtype)
    assert result.status == NO_DECREASE


def _constant(m, a):
    return 3.0 + 0.0 * a


# --- functions that are not finite -------------------------------------------------------


def _beyond(limit, value):
    """A quadratic around 1 that is no number, or infinite, from a step on."""

    def function(m, a):
        real = m.math.real(a) if m is tf else np.real(a)
        return m.where(real < limit, (a - 1.0) ** 2, m.zeros_like(a) + value)

    return Case(f"{value}_beyond_{limit}", function, curvature=0.1)


NOT_FINITE_BEYOND = [
    _beyond(1.001, np.inf),
    _beyond(1.5, np.nan),
    _beyond(1.5, -np.inf),
    Case("pole", lambda m, a: (a - 1.0) ** 2 + 1e-6 / (1.001 - a) ** 2, curvature=0.1),
    Case("logarithm", lambda m, a: -0.01 * _log(m, 1.1 - a) - a, curvature=0.1),
]


@pytest.mark.parametrize("dtype", ["float32", slow("float64")])
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("case", NOT_FINITE_BEYOND, ids=str)
def test_a_step_that_is_not_finite_is_followed_by_shorter_ones(case, name, dtype):
    for first_step in (1e-3, 2.0, 1e3, 1e6):
        result = _searched(name, case, first_step, dtype)
        shortest = np.inf
        for trial in result.seen:
            assert trial.step < shortest
            if not (np.isfinite(trial.loss) and np.isfinite(trial.slope)):
                shortest = trial.step
        assert result.status == ACCEPTED
        assert np.isfinite(case.value(result.trial.step))
        assert case.value(result.trial.step) < case.value(0.0)
        if name != "exact":
            _check_enough_decrease(case, result)
        if name == "wolfe":
            _check_flat(case, result)


def _minus_one(a):
    return -1.0


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("what", ["loss", "slope"])
def test_nothing_finite_along_the_direction_leaves_the_start(what, name):
    if what == "loss":
        case = Case("", lambda m, a: m.where(a == 0.0, 1.0 + a, np.nan), slope=_minus_one)
    else:
        case = Case(
            "", lambda m, a: 1.0 - a, slope=lambda a: -1.0 / tf.cast(a == 0.0, a.dtype) + 0.0 * a
        )
    result = _searched(name, case, 1.0, "float64")
    assert result.status == NOT_FINITE
    assert np.all(np.diff(result.steps) < 0)


@pytest.mark.parametrize("name", ["wolfe", "exact"])
def test_a_loss_without_a_lower_bound_ends_at_the_lowest_seen(name):
    """Float32 ends at 3.4e38: the last steps would be beyond."""
    for first_step in (1.0, 1e30):
        result = _searched(name, Case("linear", lambda m, a: 5.0 - a), first_step, "float32")
        assert result.status == DECREASED
        assert result.trial.step == max(s for s in result.steps if np.isfinite(s))
        assert np.all(np.isfinite(result.steps))


# --- functions that do not go down -------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_loss_that_only_rises_leaves_the_start(name, dtype):
    """The slope at the start says otherwise."""
    ascending = Case(
        "ascending",
        lambda m, a: 2.0 + a + a**2,
        slope=lambda a: tf.where(a == 0.0, tf.constant(-1.0, a.dtype), 1.0 + 2.0 * a),
    )
    for first_step in (1e-3, 1.0, 1e3):
        result = _searched(name, ascending, first_step, dtype)
        assert result.status == NO_DECREASE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_valley_far_narrower_than_the_first_step_is_found(name, dtype):
    narrow = Case("", lambda m, a: 1e6 * a**2 - a, curvature=0.1)
    for first_step in (1.0, 1e3):
        result = _searched(name, narrow, first_step, dtype)
        assert result.status == ACCEPTED
        _check_enough_decrease(narrow, result)
        if name != "armijo":
            np.testing.assert_allclose(result.trial.step, 5e-7, rtol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kink_is_the_minimum_without_being_flat(dtype):
    """|α - 1| has no flat place: not accepted by Wolfe, found by the change of sign."""
    case = Case("kink", lambda m, a: m.where(a <= 1.0, 1.5 - a, a - 0.5))
    for first_step in (0.3, 0.7, 10.0):
        result = _searched("wolfe", case, first_step, dtype)
        assert result.status == DECREASED
        np.testing.assert_allclose(result.trial.step, 1.0, rtol=1e-2)
        result = _searched("exact", case, first_step, dtype)
        assert result.status == ACCEPTED
        np.testing.assert_allclose(result.trial.step, 1.0, rtol=16 * np.finfo(dtype).eps)


# --- scales ------------------------------------------------------------------------------

SCALES = [(100, 0), (-100, 0), (0, 100), (0, -100), (100, 100), (-100, -100)]
ONLY_FLOAT64 = [(100, -100), (-100, 100)]  # the slope is 2^±200


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_units_of_the_loss_and_the_step_make_no_difference(name, dtype):
    """2^100 is 1.3e30; by powers of two nothing is rounded, so all steps are the same."""
    for case in (MORE_THUENTE[0], MORE_THUENTE[2], SMOOTH[6]):
        expected = _searched(name, case, 10.0, dtype)
        assert expected.status == ACCEPTED
        for of_loss, of_step in [*SCALES, *(ONLY_FLOAT64 if dtype == "float64" else [])]:
            units = 2.0**of_loss, 2.0**of_step
            result = _searched(name, case, 10.0 * units[1], dtype, units)
            assert result.status == ACCEPTED
            np.testing.assert_array_equal(np.divide(result.steps, units[1]), expected.steps)


# --- compiled, and compared --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype) if (name, dtype) == ("wolfe", "float32") else slow(name, dtype)
        for name in SEARCHES
        for dtype in DTYPES
    ],
)
def test_eager_traced_and_compiled_searches_are_the_same(name, dtype):
    cases = [QUADRATIC, MORE_THUENTE[0], MORE_THUENTE[2], NOT_FINITE_BEYOND[1]]
    first_step = tf.constant(7.0, dtype)

    def all_found():
        return [_run(name, case, first_step)[1] for case in cases]

    eager = all_found()
    epsilon = np.finfo(dtype).eps
    for jit_compile in (False, True):
        results = tf.function(all_found, jit_compile=jit_compile, autograph=False)()
        for case, result, expected in zip(cases, results, eager, strict=True):
            assert int(result.status) == int(expected.status) == ACCEPTED
            if name != "exact":  # whose last evaluations are a matter of rounding
                assert int(result.evaluations) == int(expected.evaluations)
            # Graphs are rewritten, so the steps differ by rounding, which the curvature of the
            # function makes more of.
            step = float(expected.trial.step)
            error = abs(case.derivative(float(result.trial.step)) - case.derivative(step))
            change = abs(case.derivative(step * (1 + epsilon)) - case.derivative(step))
            assert error <= 64 * (epsilon * abs(case.derivative(0.0)) + change)


@pytest.mark.parametrize("name", SEARCHES)
def test_any_wavy_function_ends_by_the_conditions_in_single_precision(name, rng):
    """Sums of waves in a parabola, with offsets and first steps of all sizes."""

    def waves(m, a, numbers):
        return (
            numbers[0] * a**2
            - numbers[1] * a
            + numbers[2] * m.sin(numbers[3] * a)
            + numbers[4] * (m.cos(numbers[5] * a) - 1.0)
            + numbers[6]
        )

    @tf.function(input_signature=[tf.TensorSpec((), "float32"), tf.TensorSpec((7,), "float32")])
    def searched(first_step, numbers):
        case = Case("waves", lambda m, a: waves(m, a, numbers))
        return _run(name, case, first_step)

    accepted = 0
    for _ in range(200):
        numbers = 10.0 ** rng.uniform(-2, 1, size=7) * [1, 1, 1, 1, 1, 1, rng.choice([0, 1, 1e3])]
        numbers = numbers.astype("float32")
        case = Case("waves", lambda m, a, n=numbers: waves(m, a, [float(x) for x in n]))
        if case.derivative(0.0) > -1e-2:
            numbers[1] += 1.0 + case.derivative(0.0)
        start, found = searched(10.0 ** rng.uniform(-5, 5), numbers)
        start, trial = (Trial(*(p.numpy() for p in t)) for t in (start, found.trial))
        result = Result(start, [], trial, int(found.evaluations), int(found.status))
        assert trial.loss <= start.loss + _rounding(start.loss)
        if result.status == ACCEPTED:
            accepted += 1
            # Of the terms that the loss and the slope are sums of.
            magnitude = 100.0 * (1.0 + 10.0 * float(trial.step)) + numbers[6]
            _check_enough_decrease(case, result, magnitude)
            if name == "wolfe":
                _check_flat(case, result, magnitude)
    assert accepted >= 190
