"""The step as a pure function equals `apply`, for every optimizer and setting."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.optimizers.pure_step import pure_step
from tests.optimizer_cases import every_optimizer_alike, every_optimizer_with

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
    schedule = keras.optimizers.schedules.ExponentialDecay(0.2, 3, 0.7)
    optimizer = case(learning_rate=schedule, **SETTINGS[setting])
    variables = _variables(rng)
    optimizer.build(variables)
    step = pure_step(optimizer)
    weights = [tf.constant(v.numpy()) for v in variables]
    state = step.initial_state()
    compiled = tf.function(step, jit_compile=True)
    for t in range(7):
        grads = [tf.constant(rng.normal(size=v.shape)) for v in variables]
        weights, state = compiled(grads, weights, state, schedule(t), tf.constant(t, tf.int64))
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
            weights, state = step(
                gradients, weights, state, tf.constant(0.1), tf.constant(t, tf.int64)
            )
        return weights, state

    gradients = [[tf.constant(s * rng.normal(size=v.shape)) for v in variables] for s in (0.01, 9)]
    young, old = alone([0], gradients[0]), alone([0, 1, 2], gradients[1])
    stacked = tf.nest.map_structure(lambda *parts: tf.stack(parts), young, old)
    stacked_gradients = tf.nest.map_structure(lambda *parts: tf.stack(parts), *gradients)

    def one(member):
        (weights, state), grads, updates = member
        return step(grads, weights, state, tf.constant(0.1), updates)

    received = tf.vectorized_map(one, (stacked, stacked_gradients, tf.constant([1, 3], tf.int64)))
    expected = [alone([0, 1], gradients[0]), alone([0, 1, 2, 3], gradients[1])]
    for member in range(2):
        for a, b in zip(tf.nest.flatten(received), tf.nest.flatten(expected[member]), strict=True):
            np.testing.assert_allclose(a[member], b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: gdopt.Adam(lazy=True), "`lazy` needs an optimizer with variables of its own"),
        (lambda: gdopt.Adam(gradient_accumulation_steps=2), "`gradient_accumulation_steps` needs"),
        (lambda: keras.optimizers.Adam(), "Expected an optimizer of this package"),
        (lambda: gdopt.Lookahead("adam"), "Expected an optimizer of this package"),
    ],
)
def test_refuses_what_only_variables_can(optimizer, message):
    with pytest.raises(ValueError, match=message):
        pure_step(optimizer())
