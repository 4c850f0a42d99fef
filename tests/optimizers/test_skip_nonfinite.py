"""A step whose gradients are not all finite changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.optimizers.pure_step import pure_step
from tests.optimizer_cases import (
    every_optimizer_alike,
    every_optimizer_with,
    every_rule_alike,
)
from tests.parameters import slow

BAD_STEPS = {0: np.nan, 3: np.inf, 4: -np.inf, 7: np.nan}  # the first, two in a row, the last
STEPS = 8

SETTINGS = {
    "plain": {},
    "everything": {
        "weight_decay": 0.05,
        "global_clipnorm": 0.7,
        "use_ema": True,
        "ema_momentum": 0.6,
        "ema_overwrite_frequency": 3,
    },
    "clipvalue": {"clipvalue": 0.2},  # which would make a finite gradient of an infinite one
    "accumulation": {"gradient_accumulation_steps": 2, "loss_scale_factor": 8.0},
}


def _schedule():
    return keras.optimizers.schedules.PiecewiseConstantDecay([0, 1, 2], [0.2, 0.1, 0.05, 0.01])


def _variables(rng, units=4):
    limited = keras.constraints.MaxNorm(0.5)
    return [
        keras.Variable(rng.normal(size=(5, units)).astype("float32"), name="embeddings"),
        keras.Variable(
            rng.normal(size=units).astype("float32"), name="limited", constraint=limited
        ),
    ]


def _steps(rng, variables, *, sparse=False):
    """The gradients of each step; in a bad one, a single entry is not finite."""
    steps = []
    for step in range(STEPS):
        arrays = [rng.normal(size=v.shape).astype("float32") for v in variables]
        place = step % 2
        arrays[place][1] = BAD_STEPS.get(step, arrays[place][1])
        gradients = [tf.constant(array) for array in arrays]
        if sparse:
            rows = tf.constant([1, 3, 1])
            gradients[0] = tf.IndexedSlices(
                tf.gather(arrays[0], rows), rows, tf.constant(arrays[0].shape)
            )
        steps.append(gradients)
    return steps


def _numbers(optimizer, variables):
    """The weights and the whole state."""
    return [v.numpy() for v in (*variables, *optimizer.variables)]


def _assert_same(received, expected):
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def _assert_bad_steps_are_as_if_not_there(make, variables_of, steps, wrap=None):
    """Of two copies, one sees all steps, and the other the good ones.

    The other one has no guard, but where TensorFlow optimizes the graph of a step: it may round
    the steps of two graphs differently.
    """
    guarded, plain = make(skip_nonfinite=True), make(**{"skip_nonfinite": True} if wrap else {})
    wrap = wrap or (lambda function: function)
    own, others = variables_of(), variables_of()
    for optimizer, variables in ((guarded, own), (plain, others)):
        optimizer.build(variables)
    apply = wrap(lambda gradients: guarded.apply(gradients, own))
    apply_plain = wrap(lambda gradients: plain.apply(gradients, others))
    skipped = 0
    for step, gradients in enumerate(steps):
        before = _numbers(guarded, own)
        apply(gradients)
        if step in BAD_STEPS:
            skipped += 1
            _assert_same(_numbers(guarded, own), before)
        else:
            apply_plain(gradients)
            _assert_same(_numbers(guarded, own), _numbers(plain, others))
        assert guarded.step_metrics["skipped_steps"] == skipped
    for optimizer, variables in ((guarded, own), (plain, others)):
        optimizer.finalize_variable_values(variables)
    _assert_same(_numbers(guarded, own), _numbers(plain, others))
    assert not plain.step_metrics.get("skipped_steps")
    assert all(np.all(np.isfinite(value)) for value in _numbers(guarded, own))


def _copies(rng, **arguments):
    state = rng.bit_generator.state

    def make():
        rng.bit_generator.state = state
        return _variables(rng, **arguments)

    return make


@every_optimizer_with("setting", SETTINGS, alike=True)
def test_skipped_steps_change_nothing(case, setting, rng):
    variables_of = _copies(rng)
    _assert_bad_steps_are_as_if_not_there(
        lambda **guard: case(learning_rate=_schedule(), **SETTINGS[setting], **guard),
        variables_of,
        _steps(rng, variables_of()),
    )


@every_optimizer_alike
@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_a_train_function(case, jit_compile, rng):
    variables_of = _copies(rng)
    _assert_bad_steps_are_as_if_not_there(
        lambda **guard: case(learning_rate=_schedule(), **SETTINGS["everything"], **guard),
        variables_of,
        _steps(rng, variables_of()),
        lambda function: tf.function(function, jit_compile=jit_compile),
    )


def test_in_a_compiled_step(rng, monkeypatch):
    monkeypatch.setattr("keras_gdopt.optimizers.compilation.SMALLEST_COMPILED", 1)
    variables_of = _copies(rng)
    _assert_bad_steps_are_as_if_not_there(
        lambda **guard: gdopt.Adam(0.1, **guard), variables_of, _steps(rng, variables_of())
    )


@every_rule_alike
@pytest.mark.parametrize("lazy", [False, True])
def test_with_sparse_gradients(case, lazy, rng):
    variables_of = _copies(rng)
    _assert_bad_steps_are_as_if_not_there(
        lambda **guard: case(learning_rate=0.1, weight_decay=0.1, lazy=lazy, **guard),
        variables_of,
        _steps(rng, variables_of(), sparse=True),
        tf.function,
    )


def _model_and_data(rng):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    x = rng.normal(size=(24, 3)).astype("float32")
    y = rng.normal(size=(24, 2)).astype("float32")
    return model, x, y


@every_optimizer_alike
def test_under_a_strategy(case, two_devices, rng):
    """One replica's share of a batch is enough to skip it on both."""
    weights = []
    _, x, y = _model_and_data(rng)
    broken = x.copy()
    broken[4, 0] = np.nan  # in the second batch of four, which the first replica sees
    for data, labels in ((broken, y), (np.delete(x, range(4, 8), 0), np.delete(y, range(4, 8), 0))):
        with two_devices.scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            model.compile(case(learning_rate=0.1, skip_nonfinite=True), "mse")
        model.fit(data, labels, batch_size=4, shuffle=False, verbose=0)
        weights.append(_numbers(model.optimizer, model.trainable_variables))
        assert model.optimizer.step_metrics["skipped_steps"] == (len(data) == 24)
    for received, expected in zip(*weights, strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-6)


@every_optimizer_alike
def test_a_member_of_a_population_skips_by_itself(case, rng):
    optimizer = case(learning_rate=0.1, skip_nonfinite=True, use_ema=True)
    variables = _variables(rng)
    optimizer.build(variables)
    step = pure_step(optimizer)
    state, batches = step.initial_state(), tf.constant(0, tf.int64)
    weights = [tf.constant(v.numpy()) for v in variables]
    two = tf.nest.map_structure(lambda v: tf.stack([v, v]), (weights, state, batches))
    for gradients in _steps(rng, variables):
        finite = [tf.where(tf.math.is_finite(g), g, 1.0) for g in gradients]
        both = [tf.stack(pair) for pair in zip(gradients, finite, strict=True)]

        def member(parts, step=step):
            (weights, state, batches), gradients = parts
            return step(gradients, weights, state, [tf.constant(0.1)], batches)

        two = tf.vectorized_map(member, (two, both))
        bad = not all(np.all(np.isfinite(gradient)) for gradient in gradients)
        if not bad:
            optimizer.apply(gradients, variables)
    weights, state, batches = tf.nest.map_structure(lambda v: v[0], two)
    assert two[2].numpy().tolist() == [STEPS - len(BAD_STEPS), STEPS]
    assert int(batches) == int(optimizer.iterations)
    own = [v.numpy() for v in (*variables, *tf.nest.flatten(step.variables()))]
    for received, expected in zip(tf.nest.flatten((weights, state)), own, strict=True):
        np.testing.assert_allclose(received, expected, rtol=2e-5, atol=1e-6)


@every_optimizer_alike
def test_the_record_is_that_of_the_last_step_taken(case, rng):
    optimizer = case(learning_rate=0.1, skip_nonfinite=True)
    variables = _variables(rng)
    optimizer.build(variables)
    optimizer.record_step_metrics(1)
    good, bad = _steps(rng, variables)[1], _steps(rng, variables)[3]
    optimizer.apply(bad, variables)
    assert optimizer.step_metrics == {"skipped_steps": 1}
    optimizer.apply(good, variables)
    recorded = optimizer.step_metrics
    assert recorded["iterations"] == 1 and np.isfinite(recorded["grad_norm"])
    optimizer.apply(bad, variables)
    assert optimizer.step_metrics == {**recorded, "skipped_steps": 2}


def test_finite_gradients_whose_squares_overflow_are_taken():
    weight = keras.Variable([1.0, 2.0])
    optimizer = gdopt.GradientDescent(1e-30, skip_nonfinite=True)
    optimizer.apply([tf.constant([1e30, -1e30])], [weight])
    np.testing.assert_allclose(weight.numpy(), [0.0, 3.0], rtol=1e-6, atol=1e-6)
    assert optimizer.step_metrics["skipped_steps"] == 0


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("units", [4, slow(20_000)], ids=["small", "compiled"])
@every_optimizer_alike
def test_a_norm_that_overflows_is_not_clipped_by(case, units, clip, rng):
    """Keras's clipping makes NaN of such gradients, though all of them are finite."""
    optimizer = case(learning_rate=0.1, skip_nonfinite=True, **{clip: 1.0})
    variables = _variables(rng, units)
    optimizer.apply(_steps(rng, variables)[1], variables)
    before = _numbers(optimizer, variables)
    large = [tf.fill(v.shape, tf.constant(1e20)) for v in variables]
    rows = tf.IndexedSlices(large[0][:2], tf.constant([1, 3]), tf.constant(variables[0].shape))
    optimizer.apply(large, variables)
    optimizer.apply([rows, large[1] * 0.0], variables)
    _assert_same(_numbers(optimizer, variables), before)
    step = pure_step(optimizer)
    member = [tf.constant(v.numpy()) for v in variables], step.initial_state(), tf.constant(0)
    after = step(large, *member[:2], [tf.constant(0.1)], member[2])
    _assert_same(tf.nest.flatten(after), tf.nest.flatten(member))


def test_scaled_losses_that_overflow_are_skipped(rng):
    _, x, y = _model_and_data(rng)
    x[:4] = 1e30
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = gdopt.Adam(0.1, skip_nonfinite=True, loss_scale_factor=1e20)
    model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    assert optimizer.step_metrics["skipped_steps"] == 1
    assert int(optimizer.iterations) == 5
    assert all(np.all(np.isfinite(value)) for value in model.get_weights())


@every_optimizer_alike
def test_is_saved_with_the_optimizer(case, rng):
    del rng
    optimizer = case(skip_nonfinite=True)
    again = type(optimizer).from_config(optimizer.get_config())
    assert case.rule(again).skip_nonfinite is True
    assert case.rule(case()).skip_nonfinite is False
    # What a file of version 0.1.0 has.
    config = case().get_config()
    inner = config.get("optimizer", {}).get("config", config)
    assert inner.pop("skip_nonfinite") is False
    assert case.rule(type(optimizer).from_config(config)).skip_nonfinite is False


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="skip_nonfinite"):
        gdopt.Adam(skip_nonfinite="yes")


@pytest.mark.parametrize("wrap", [lambda inner: inner, gdopt.Lookahead])
def test_a_population_refuses_it_inside_a_multi_optimizer(wrap, rng):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this version of Keras has no MultiOptimizer")
    chosen = keras.optimizers.OptimizerMap(
        wrap(gdopt.Adam(skip_nonfinite=True)), {"x": gdopt.NAG()}
    )
    optimizer = keras.optimizers.MultiOptimizer(chosen)
    optimizer.build(_variables(rng))
    with pytest.raises(ValueError, match=r"count different steps.*Received: skip_nonfinite=True"):
        pure_step(optimizer)
