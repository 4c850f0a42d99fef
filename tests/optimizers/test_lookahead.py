"""Lookahead: synchronization, what is delegated, nesting, and saved state."""

import copy
import pickle

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from tests.parameters import slow
from tests.reference import adam, momentum, radam

PERIOD, ALPHA = 3, 0.25

# The inner optimizer, its transcription and the transcription's arguments.
INNER = {
    "Momentum": (
        lambda: gdopt.Momentum(0.125),
        momentum,
        {"momentum": 0.9, "classical": False},
    ),
    "Adam": (
        lambda: gdopt.Adam(0.125),
        adam,
        {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "epsilon_root": 0.0, "amsgrad": False},
    ),
    "RAdam": (
        lambda: gdopt.RAdam(0.125),
        radam,
        {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "epsilon_root": 0.0, "sma_threshold": 4},
    ),
    # 0.875 is a float32, in which Keras keeps it.
    "keras.SGD": (
        lambda: keras.optimizers.SGD(0.125, momentum=0.875),
        momentum,
        {"momentum": 0.875, "classical": True},
    ),
}
every_inner = pytest.mark.parametrize("inner", INNER)


def _lookahead(inner):
    return gdopt.Lookahead(INNER[inner][0](), sync_period=PERIOD, slow_step_size=ALPHA)


def _transcribed(inner, start, gradients):
    """Weights and slow weights after each step."""
    _, rule, hyperparameters = INNER[inner]
    theta = slow = start
    slots = {name: np.full(start.shape, v) for name, v in rule.slots(**hyperparameters).items()}
    weights, slow_weights = [], []
    for t, g in enumerate(gradients, start=1):
        theta, slots = rule.update(theta, g, slots, 0.125, t, **hyperparameters)
        if t % PERIOD == 0:
            theta = slow = slow + ALPHA * (theta - slow)
        weights.append(theta)
        slow_weights.append(slow)
    return weights, slow_weights


def _applied(optimizer, variable, gradients):
    trajectory = []
    for g in gradients:
        optimizer.apply([tf.constant(g)], [variable])
        trajectory.append(variable.numpy())
    return trajectory


@pytest.fixture
def start(rng):
    return rng.normal(size=(3, 2))


@pytest.fixture
def gradients(rng):
    return rng.normal(size=(11, 3, 2))


@every_inner
def test_equals_its_transcription_over_three_synchronizations(inner, start, gradients, float64):
    optimizer, variable = _lookahead(inner), keras.Variable(start)
    weights, slow_weights = _transcribed(inner, start, gradients)
    received = _applied(optimizer, variable, gradients)
    np.testing.assert_allclose(received, weights, rtol=0, atol=1e-12)
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(variable.numpy(), slow_weights[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("inner", "compiled"),
    [
        (inner, compiled) if compiled or inner == "Adam" else slow(inner, compiled)
        for inner in INNER
        for compiled in (True, False)
    ],
)
def test_equals_its_transcription_on_two_devices(
    inner, compiled, two_devices, start, gradients, float64
):
    with two_devices.scope():
        optimizer, variable = _lookahead(inner), keras.Variable(start)
        optimizer.build([variable])

    def step(gradient):
        # Each of the two devices holds half of the gradient.
        two_devices.run(lambda: optimizer.apply([gradient / 2], [variable]))

    step = tf.function(step) if compiled else step
    weights, slow_weights = _transcribed(inner, start, gradients)
    for gradient, expected in zip(gradients, weights, strict=True):
        step(tf.constant(gradient))
        for value in two_devices.experimental_local_results(variable.value):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
    optimizer.finalize_variable_values([variable])
    for value in two_devices.experimental_local_results(variable.value):
        np.testing.assert_allclose(value, slow_weights[-1], rtol=0, atol=1e-12)


def _itself(y, y_pred):
    return y_pred


class _Linear(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(3, 2), initializer="zeros")

    def call(self, x):
        return keras.ops.sum(x * self.kernel, axis=(1, 2))


def _model(optimizer, start):
    """A model whose gradient is its input."""
    model = keras.Sequential([keras.Input((3, 2)), _Linear()])
    model.layers[0].kernel.assign(start)
    model.compile(optimizer, loss=_itself)
    return model


def _train(model, gradients):
    for g in gradients:
        model.train_on_batch(g[None], np.zeros(1))


@pytest.mark.parametrize(
    ("inner", "way"),
    [
        (inner, way) if way == "weights" or inner == "Adam" else slow(inner, way)
        for inner in INNER
        for way in ("weights", "weights into built", "checkpoint")
    ],
)
def test_goes_on_between_two_synchronizations(inner, way, start, gradients, tmp_path, float64):
    weights, slow_weights = _transcribed(inner, start, gradients)
    model = _model(_lookahead(inner), start)
    _train(model, gradients[:7])
    loaded = _model(_lookahead(inner), 0 * start)
    if way == "checkpoint":
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
        loaded.optimizer.build(loaded.trainable_variables)
        again = tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer)
        again.restore(path).assert_consumed()
    else:
        model.save_weights(tmp_path / "a.weights.h5")
        if way == "weights into built" or inner.startswith("keras"):
            loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(tmp_path / "a.weights.h5")
    _train(loaded, gradients[7:])
    kernel = loaded.layers[0].kernel
    np.testing.assert_allclose(kernel.numpy(), weights[-1], rtol=0, atol=1e-12)
    loaded.optimizer.finalize_variable_values(loaded.trainable_variables)
    np.testing.assert_allclose(kernel.numpy(), slow_weights[-1], rtol=0, atol=1e-12)


# --- the slow weights ----------------------------------------------------------------


def test_slow_weights_start_from_the_weights_at_the_first_step():
    """Also when they were set after `build`, as a model's weights usually are."""
    variable = keras.Variable([0.0])
    optimizer = gdopt.Lookahead(gdopt.GradientDescent(1.0), sync_period=2)
    optimizer.build([variable])
    variable.assign([10.0])
    assert np.ravel(_applied(optimizer, variable, [[1.0]] * 2)).tolist() == [9.0, 9.0]


def test_finalizing_begins_a_new_cycle():
    variable = keras.Variable([8.0])
    optimizer = gdopt.Lookahead(gdopt.GradientDescent(1.0), sync_period=2)
    _applied(optimizer, variable, [[1.0]] * 3)
    assert variable.numpy() == [6.0]
    optimizer.finalize_variable_values([variable])
    assert variable.numpy() == [7.0]  # the step since the last synchronization is not in φ
    variable.assign([20.0])
    assert np.ravel(_applied(optimizer, variable, [[1.0]] * 2)).tolist() == [19.0, 19.0]


def test_a_synchronization_counts_updates_and_not_accumulated_batches():
    variable = keras.Variable([8.0])
    inner = gdopt.GradientDescent(1.0, gradient_accumulation_steps=3)
    received = _applied(gdopt.Lookahead(inner, sync_period=2), variable, [[1.0]] * 9)
    assert np.ravel(received).tolist() == [8.0, 8.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 6.0]


def test_fit_leaves_the_slow_weights_in_the_model(start, gradients, float64):
    _, slow_weights = _transcribed("Adam", start, gradients)
    model = _model(_lookahead("Adam"), start)
    model.fit(gradients, np.zeros(11), batch_size=1, shuffle=False, verbose=0)
    np.testing.assert_allclose(model.layers[0].kernel.numpy(), slow_weights[-1], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_slow_weights_of_bfloat16_variables_are_in_float32():
    variable = keras.Variable([256.0], dtype="bfloat16")
    optimizer = gdopt.Lookahead(gdopt.GradientDescent(1.0), sync_period=1, slow_step_size=1e-3)
    for _ in range(1000):
        optimizer.apply([tf.constant([2.0], "bfloat16")], [variable])
    # In bfloat16 steps of 0.002 would be lost.
    assert optimizer._slots["slow"][0].numpy()[0] < 255.0


# --- what is the inner optimizer's ---------------------------------------------------


def test_the_whole_inner_optimizer_runs(start, gradients, float64):
    """Clipping, decay, averages and constraints, as without the wrapper."""

    def inner():
        optimizer = gdopt.Momentum(
            0.125, weight_decay=0.5, clipnorm=0.5, use_ema=True, ema_overwrite_frequency=2
        )
        optimizer.exclude_from_weight_decay(var_names=["nothing"])
        return optimizer

    weights = []
    for optimizer in (inner(), gdopt.Lookahead(inner(), sync_period=100)):
        variable = keras.Variable(start)
        variable.constraint = keras.constraints.MaxNorm(1.0)
        weights.append(_applied(optimizer, variable, gradients))
    np.testing.assert_allclose(*weights, rtol=0, atol=1e-14)


def test_delegates_rate_count_variables_and_loss_scale():
    inner = gdopt.Adam(0.5, loss_scale_factor=8.0, weight_decay=0.1)
    optimizer = gdopt.Lookahead(inner)
    assert optimizer.learning_rate is inner.learning_rate
    optimizer.learning_rate = 0.25
    assert float(inner.learning_rate) == 0.25
    assert optimizer.loss_scale_factor == 8.0
    assert float(optimizer.scale_loss(tf.constant(2.0))) == 16.0
    variable = keras.Variable([1.0], name="w")
    optimizer.exclude_from_weight_decay(var_names=["w"])
    optimizer.apply([tf.constant([1.0])], [variable])
    assert not inner._use_weight_decay(variable)
    assert int(optimizer.iterations) == int(inner.iterations) == 1
    own = [v.path for v in optimizer.variables if not any(v is i for i in inner.variables)]
    assert own == ["lookahead/fast_updates", "lookahead/w_slow"]
    assert len(optimizer.variables) == 2 + len(inner.variables)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("adam", keras.optimizers.Adam),
        ({"class_name": "SGD", "config": {"learning_rate": 0.5}}, keras.optimizers.SGD),
        (keras.saving.serialize_keras_object(gdopt.Adam(0.5)), gdopt.Adam),
        (keras.saving.serialize_keras_object(gdopt.RAdam(0.5)), gdopt.RAdam),
        (keras.optimizers.Adam(0.5), keras.optimizers.Adam),
        (gdopt.Lookahead(gdopt.Adam(0.5)), gdopt.Lookahead),
    ],
)
def test_wraps_an_instance_a_config_or_a_name(given, expected):
    optimizer = gdopt.Lookahead(given)
    assert type(optimizer.inner_optimizer) is expected
    optimizer.apply([tf.constant([1.0])], [keras.Variable([1.0])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": 3}, r"`optimizer` must be an optimizer .*Received: optimizer=3"),
        ({"optimizer": gdopt.Adam}, r"`optimizer` must be an optimizer .*Received: "),
        ({"sync_period": 0}, r"`sync_period` must be an integer of at least 1\. Received: "),
        ({"sync_period": 2.5}, r"`sync_period` must be an integer"),
        ({"slow_step_size": 0.0}, r"`slow_step_size` must be .* above 0 and at most 1\. Received"),
        ({"slow_step_size": 1.5}, r"`slow_step_size` must be "),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        gdopt.Lookahead(**{"optimizer": gdopt.Adam(), **arguments})


# --- nesting -------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False])
def test_nests_with_loss_scaling(outside, start, gradients):
    """A step that overflows is no update, on either side."""
    inner = gdopt.Momentum(0.125)
    optimizer = gdopt.Lookahead(
        inner if outside else keras.optimizers.LossScaleOptimizer(inner),
        sync_period=PERIOD,
        slow_step_size=ALPHA,
    )
    if outside:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    variable = keras.Variable(start.astype("float32"))
    optimizer.build([variable])
    weights, slow_weights = _transcribed("Momentum", start, gradients)
    for t, gradient in enumerate(gradients):
        if t % 2:
            optimizer.apply([tf.fill((3, 2), np.inf)], [variable])
        scaled = optimizer.scale_loss(tf.constant(gradient, "float32"))
        optimizer.apply([scaled], [variable])
        np.testing.assert_allclose(variable.numpy(), weights[t], rtol=1e-5, atol=1e-6)
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(variable.numpy(), slow_weights[-1], rtol=1e-5, atol=1e-6)


def test_two_loss_scalings_are_refused():
    keras.mixed_precision.set_global_policy("mixed_float16")
    scaled = gdopt.Lookahead(keras.optimizers.LossScaleOptimizer(gdopt.Adam()))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"unscaled twice.*auto_scale_loss=False"):
        model.compile(scaled, "mse")
    model.compile(scaled, "mse", auto_scale_loss=False)
    model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)


@pytest.mark.parametrize("mixed", [False, True])
def test_swap_ema_weights_finds_the_averages(mixed):
    if mixed:
        keras.mixed_precision.set_global_policy("mixed_float16")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(gdopt.Lookahead(gdopt.Adam(0.1, use_ema=True, ema_momentum=0.5)), "mse")
    held = []
    callbacks = [
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: held.append(model.trainable_variables[0].numpy())
        ),
    ]
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, verbose=0, callbacks=callbacks)
    lookahead = getattr(model.optimizer, "inner_optimizer", None) if mixed else model.optimizer
    averages = lookahead.inner_optimizer._model_variables_moving_average
    np.testing.assert_array_equal(held[-1], averages[0].numpy())


@pytest.mark.parametrize("mixed", [False, True])
def test_tensorboard_finds_the_learning_rate(mixed, tmp_path):
    if mixed:
        keras.mixed_precision.set_global_policy("mixed_float16")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 8)
    model.compile(gdopt.Lookahead(gdopt.Adam(schedule)), "mse")
    board = keras.callbacks.TensorBoard(tmp_path)
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, verbose=0, callbacks=[board])
    rate = float(board._collect_learning_rate({})["learning_rate"])
    assert 0.0 < rate < 0.5
    assert rate == pytest.approx(float(schedule(model.optimizer.iterations)))


# --- saved state ---------------------------------------------------------------------


def test_the_inner_state_is_saved_once(start, gradients, tmp_path):
    model = _model(_lookahead("Adam"), start)
    _train(model, gradients[:4])
    model.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5") as file:
        assert sorted(file["optimizer/vars"]) == [
            "class=keras_gdopt>Lookahead",
            "fast_updates",
            "slow.0",
        ]
        assert sorted(file["optimizer/inner_optimizer/vars"]) == [
            "class=keras_gdopt>Adam",
            "iteration",
            "learning_rate",
            "momentum.0",
            "velocity.0",
        ]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_the_slow_weights_and_the_inner_state(copied, start, gradients, float64):
    weights, slow_weights = _transcribed("Adam", start, gradients)
    optimizer, variable = _lookahead("Adam"), keras.Variable(start)
    _applied(optimizer, variable, gradients[:7])
    twin = copied(copied(optimizer))
    np.testing.assert_allclose(_applied(twin, variable, gradients[7:])[-1], weights[-1], atol=1e-12)
    twin.finalize_variable_values([variable])
    np.testing.assert_allclose(variable.numpy(), slow_weights[-1], rtol=0, atol=1e-12)


def test_state_that_keras_would_drop_is_an_error(start, gradients, tmp_path):
    model = _model(_lookahead("keras.SGD"), start)
    _train(model, gradients[:4])
    model.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(ValueError, match=r"SGD of Keras loads its state only once it is built"):
        _model(_lookahead("keras.SGD"), start).load_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "a.keras")
    custom = {"_Linear": _Linear, "_itself": _itself}
    loaded = keras.models.load_model(tmp_path / "a.keras", custom_objects=custom)
    received, expected = (m.optimizer.inner_optimizer.variables[-1] for m in (loaded, model))
    np.testing.assert_array_equal(received, expected)


def test_state_of_another_model_is_an_error(start, gradients):
    optimizer, variable = _lookahead("Momentum"), keras.Variable(start)
    _applied(optimizer, variable, gradients[:4])
    with pytest.raises(ValueError, match=r"slow\.0: saved \(3, 2\), expected \(5,\)"):
        copy.deepcopy(optimizer).build([keras.Variable(np.zeros(5))])


def test_a_slow_step_size_set_later_holds_from_then_on():
    optimizer = gdopt.Lookahead(gdopt.GradientDescent(1.0), sync_period=1, slow_step_size=0.5)
    weight = keras.Variable([8.0])
    optimizer.apply([tf.constant([4.0])], [weight])
    assert weight.numpy() == [6.0]
    optimizer.slow_step_size = 0.25
    optimizer.apply([tf.constant([4.0])], [weight])
    assert weight.numpy() == [5.0]


def test_apply_without_variables_needs_a_built_optimizer():
    inner = gdopt.GradientDescent()
    inner.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="Lookahead is not built yet"):
        gdopt.Lookahead(inner).apply([tf.constant([1.0])])


@pytest.mark.parametrize("inner", [keras.optimizers.Adam, gdopt.Adam])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_where_the_original_is(inner, copied, rng):
    gradients = [tf.constant(rng.normal(size=3).astype("float32")) for _ in range(7)]
    one, other = keras.Variable(np.ones(3, "float32")), keras.Variable(np.ones(3, "float32"))
    original = gdopt.Lookahead(inner(0.1), sync_period=3)
    for gradient in gradients[:4]:
        original.apply([gradient], [one])
    copied_twice = copied(copied(original))
    other.assign(one)
    for gradient in gradients[4:]:
        original.apply([gradient], [one])
        copied_twice.apply([gradient], [other])
    np.testing.assert_array_equal(other.numpy(), one.numpy())
    assert int(copied_twice.iterations) == 7


def test_set_weights_sets_what_variables_lists():
    one, other = (gdopt.Lookahead(gdopt.Momentum(0.1)) for _ in range(2))
    weight = keras.Variable([1.0])
    one.apply([tf.constant([1.0])], [weight])
    other.build([weight])
    other.set_weights([variable.numpy() for variable in one.variables])
    for a, b in zip(other.variables, one.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_state_inside_a_loss_scale_optimizer_is_not_dropped_in_silence(tmp_path):
    def compiled():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        inside = keras.optimizers.LossScaleOptimizer(gdopt.Adam())
        model.compile(gdopt.Lookahead(inside), "mse")
        return model

    model = compiled()
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="LossScaleOptimizer of Keras loads its state only"):
        compiled().load_weights(tmp_path / "m.weights.h5")
