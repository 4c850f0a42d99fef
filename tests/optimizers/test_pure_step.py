"""The step as a pure function equals `apply`, for every optimizer and setting."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.optimizers.pure_step import pure_step
from tests.optimizer_cases import (
    CASES,
    WrapperCase,
    every_optimizer_alike,
    every_optimizer_with,
)

SETTINGS = {
    "plain": {},
    "everything": {
        "weight_decay": 0.05,
        "global_clipnorm": 0.7,
        "use_ema": True,
        "ema_momentum": 0.6,
        "ema_overwrite_frequency": 3,
    },
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.2},
    "averages": {"use_ema": True, "ema_momentum": 0.5},
    "accumulation": {
        "gradient_accumulation_steps": 3,
        "loss_scale_factor": 8.0,
        "use_ema": True,
        "ema_momentum": 0.5,
    },
}


def _variables(rng):
    constraint = keras.constraints.MaxNorm(1.5)
    return [
        keras.Variable(rng.normal(size=(3, 2)), name="kernel"),
        keras.Variable(rng.normal(size=4), name="bias"),
        keras.Variable(rng.normal(size=(2, 2)), name="limited", constraint=constraint),
    ]


@every_optimizer_with("setting", SETTINGS, alike=True)
def test_equals_apply_and_finalize(case, setting, rng, float64):
    # In float32, as all of Keras's, and without a power, of which XLA has its own digits.
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 4], [0.2, 0.1, 0.07])
    optimizer = case(learning_rate=schedule, **SETTINGS[setting])
    variables = _variables(rng)
    optimizer.build(variables)
    step = pure_step(optimizer)
    weights = [tf.constant(v.numpy()) for v in variables]
    state = step.initial_state()
    compiled = tf.function(step, jit_compile=True)
    for t in range(7):
        grads = [tf.constant(rng.normal(size=v.shape)) for v in variables]
        batches = tf.constant(t, tf.int64)
        weights, state, batches = compiled(grads, weights, state, [schedule(t)], batches)
        assert int(batches) == t + 1
        optimizer.apply(grads, variables)
        for received, expected in zip(weights, variables, strict=True):
            np.testing.assert_allclose(received, expected.numpy(), rtol=1e-11, atol=1e-12)
    optimizer.finalize_variable_values(variables)
    weights, state = step.finalized(weights, state, tf.constant(7, tf.int64))
    for received, expected in zip(weights, variables, strict=True):
        np.testing.assert_allclose(received, expected.numpy(), rtol=1e-11, atol=1e-12)
    own = tf.nest.flatten(step.variables())
    for received, expected in zip(tf.nest.flatten(state), own, strict=True):
        np.testing.assert_allclose(received, expected.numpy(), rtol=1e-11, atol=1e-12)


@every_optimizer_alike
def test_members_of_a_stack_do_not_see_one_another(case, rng, float64):
    """Of different ages, and clipped each by its own norm."""
    optimizer = case(learning_rate=0.1, global_clipnorm=0.5)
    variables = _variables(rng)
    optimizer.build(variables)
    step = pure_step(optimizer)

    def alone(ages, gradients):
        weights, state = [tf.constant(v.numpy()) for v in variables], step.initial_state()
        for t in ages:
            weights, state, _ = step(
                gradients, weights, state, [tf.constant(0.1)], tf.constant(t, tf.int64)
            )
        return weights, state, tf.constant(t + 1, tf.int64)

    gradients = [[tf.constant(s * rng.normal(size=v.shape)) for v in variables] for s in (0.01, 9)]
    young, old = alone([0], gradients[0]), alone([0, 1, 2], gradients[1])
    stacked = tf.nest.map_structure(lambda *parts: tf.stack(parts), young, old)
    stacked_gradients = tf.nest.map_structure(lambda *parts: tf.stack(parts), *gradients)

    def one(member):
        (weights, state, batches), grads = member
        return step(grads, weights, state, [tf.constant(0.1)], batches)

    received = tf.vectorized_map(one, (stacked, stacked_gradients))
    expected = [alone([0, 1], gradients[0]), alone([0, 1, 2, 3], gradients[1])]
    for member in range(2):
        for a, b in zip(tf.nest.flatten(received), tf.nest.flatten(expected[member]), strict=True):
            np.testing.assert_allclose(a[member], b, rtol=1e-11, atol=1e-13)


def test_several_optimizers_equal_their_apply(rng, float64):
    """Each with a rate of its own, one of them a schedule; one has no variables at all."""
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this version of Keras has no MultiOptimizer")
    schedule = keras.optimizers.schedules.ExponentialDecay(0.2, 3, 0.7)
    others = {
        "bias": gdopt.Lookahead(gdopt.Momentum(schedule), sync_period=2),
        "nobody": gdopt.NAG(0.1),
    }
    optimizer = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(gdopt.Adam(0.1), others), loss_scale_factor=4.0
    )
    variables = _variables(rng)
    optimizer.build(variables)
    step = pure_step(optimizer)
    rates = step.learning_rates()
    assert sorted(rates, key=str) == [pytest.approx(0.1), None]
    weights, state = [tf.constant(v.numpy()) for v in variables], step.initial_state()
    for t in range(5):
        if t == 3:
            others["nobody"].learning_rate = 9.0
            step.set_learning_rates([rate and 0.05 for rate in rates])
        now = [rate or 0.0 for rate in step.learning_rates()]
        grads = [tf.constant(rng.normal(size=v.shape)) for v in variables]
        weights, state, _ = step(
            grads, weights, state, tf.constant(now, tf.float64), tf.constant(t, tf.int64)
        )
        optimizer.apply(grads, variables)
        for received, expected in zip(weights, variables, strict=True):
            np.testing.assert_allclose(received, expected.numpy(), rtol=1e-7)
    optimizer.finalize_variable_values(variables)
    weights, state = step.finalized(weights, state, tf.constant(5, tf.int64))
    other = keras.optimizers.MultiOptimizer.from_config(optimizer.get_config())
    copies = [keras.Variable(v, name=v.name) for v in variables]
    other.build(copies)
    pure_step(other).load(state, tf.constant(5, tf.int64))
    assert int(other.iterations) == 5
    for received, variable in zip(weights, variables, strict=True):
        np.testing.assert_allclose(received, variable.numpy(), rtol=1e-7)
    for received, expected in zip(other.variables, optimizer.variables, strict=True):
        if "learning_rate" not in expected.path and "nobody" not in expected.path:
            np.testing.assert_allclose(received, expected.numpy(), rtol=1e-6, atol=1e-12)


class Own(keras.optimizers.SGD):
    """A rule of a user's own."""


class OwnApply(gdopt.Adam):
    def apply(self, grads, trainable_variables=None):
        super().apply([-g for g in grads], trainable_variables)


def _one_for_two_keys():
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this version of Keras has no MultiOptimizer")
    shared = gdopt.Adam()
    optimizers = keras.optimizers.OptimizerMap(gdopt.NAG(), {"a": shared, "b": shared})
    return keras.optimizers.MultiOptimizer(optimizers)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: gdopt.Adam(lazy=True), r"leave `lazy` out.* Received: lazy=True with Adam"),
        (lambda: keras.optimizers.Adam(), r"keras_gdopt\.Adam has its rule.* Received: Adam of"),
        (lambda: keras.optimizers.SGD(), r"GradientDescent, Momentum or NAG has its rule"),
        (lambda: keras.optimizers.Lion(), r"own_rule.md\)\. Received: Lion of keras"),
        (lambda: Own(), r"own_rule.md\)\. Received: Own of tests"),
        (lambda: gdopt.Lookahead("adam"), r"keras_gdopt\.Adam has its rule"),
        (OwnApply, r"OwnApply defines `apply` itself"),
        (_one_for_two_keys, r"an optimizer of its own for each key"),
    ],
)
def test_refuses_what_only_variables_can(optimizer, message):
    with pytest.raises(ValueError, match=message):
        pure_step(optimizer())


def test_refuses_variables_that_a_gradient_overwrites():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.layers[-1].quantize("float8")
    optimizer = gdopt.Adam()
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"in float8 .*Received: the variable '.*_scale'"):
        pure_step(optimizer)


def _declared():
    """Each hyper-parameter that a rule declares, with two values of it."""
    values, declared = {"fraction": (0.35, 0.9), "positive": (1e-6, 3e-3)}, []
    seen = set()
    for case in CASES:
        for name, kind in pure_step(_built(case())).evolvable.items():
            is_wrapper = isinstance(case, WrapperCase)
            if is_wrapper and name == "weight_decay":
                continue  # it moves the weights that a synchronization sees: test_evolution.py
            marks = [pytest.mark.slow] if name in seen else []  # each by every change once
            seen.add(name)
            declared.append(
                pytest.param(case, name, values[kind], id=f"{case}-{name}", marks=marks)
            )
    return declared


def _built(optimizer):
    optimizer.build([keras.Variable(np.ones((3, 2)))])
    return optimizer


@pytest.mark.parametrize(("case", "name", "values"), _declared())
def test_members_have_hyperparameters_of_their_own(case, name, values, rng, float64):
    """Two members with two values take the steps of the transcription."""
    theta = rng.normal(size=(3, 2))
    gradients = rng.normal(size=(6, 3, 2))
    optimizer = case(learning_rate=0.1)
    optimizer.build([keras.Variable(theta)])
    step = pure_step(optimizer)

    def one(member):
        weights, state, own = member
        for t, gradient in enumerate(gradients):
            weights, state, _ = step(
                [tf.constant(gradient)], weights, state, rates, tf.constant(t, tf.int64), own
            )
        return weights

    start = tf.nest.map_structure(
        lambda value: tf.stack([value, value]), ([tf.constant(theta)], step.initial_state())
    )
    own, rates = {name: tf.constant(values, tf.float64)}, [tf.constant(0.1, tf.float64)]
    (received,) = tf.function(lambda: tf.vectorized_map(one, (*start, own)), jit_compile=True)()
    for member, value in enumerate(values):
        alike = case(**{"learning_rate": 0.1, name: value})
        rate = value if name == "learning_rate" else 0.1
        decay = value if name == "weight_decay" else 0.0
        hyperparameters = case.hyperparameters(alike)
        expected, slots = theta, case.initial_slots(theta.shape, alike)
        for t, gradient in enumerate(gradients, start=1):
            before = expected
            expected, slots = case.reference.update(
                before, gradient, slots, rate, t, **hyperparameters
            )
            expected = expected - rate * decay * before
        np.testing.assert_allclose(received[member], expected, rtol=1e-11, atol=1e-13)
