"""Every optimizer with Keras's callbacks and wrappers, and on gradients of any size."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.optimizer_cases import every_optimizer, every_optimizer_alike, every_rule
from tests.parameters import slow

callbacks = keras.callbacks


@pytest.fixture
def data(rng):
    x = rng.normal(size=(32, 4)).astype("float32")
    return x, x @ np.array([[1.0], [-2.0], [0.5], [0.0]], "float32")


def _model(optimizer):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


class _Epochs(callbacks.Callback):
    """The weights and the learning rate at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.weights, self.rates = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())
        self.rates.append(float(self.model.optimizer.learning_rate))


# --- data --------------------------------------------------------------------------------


@every_optimizer_alike
def test_the_end_of_data_of_unknown_length_is_no_step(case, data):
    """There the iterator fails, beside operations that need no data of it."""
    known = tf.data.Dataset.from_tensor_slices(data).batch(12)
    received = []
    for stream in (known, known.filter(lambda *_: True)):
        model = _model(case.brisk(0.05, gradient_accumulation_steps=2))
        keras.utils.set_random_seed(0)
        model.set_weights([np.ones((4, 1)), np.zeros(1)])
        model.fit(stream, epochs=4, verbose=0)
        received.append([int(model.optimizer.iterations), *model.get_weights()])
    assert received[0][0] == received[1][0] == 3 * 4 // 2
    for one, other in zip(*received, strict=True):
        np.testing.assert_array_equal(one, other)


# --- callbacks -----------------------------------------------------------------------


@every_optimizer_alike
def test_early_stopping_restores_the_best_epoch_and_training_goes_on(case, data):
    model, epochs = _model(case.brisk(0.05)), _Epochs()
    # The worst epoch counts as the best: it is not the last one.
    stop = callbacks.EarlyStopping("loss", mode="max", patience=2, restore_best_weights=True)
    model.fit(*data, batch_size=8, epochs=6, verbose=0, callbacks=[epochs, stop])
    assert stop.best_epoch < len(epochs.weights) - 1
    for received, expected in zip(
        model.get_weights(), epochs.weights[stop.best_epoch], strict=True
    ):
        np.testing.assert_array_equal(received, expected)
    before = model.evaluate(*data, verbose=0)
    model.fit(*data, batch_size=8, epochs=6, verbose=0)
    assert model.evaluate(*data, verbose=0) < before


@every_optimizer_alike
def test_callbacks_set_the_learning_rate(case, data):
    model, epochs = _model(case(learning_rate=0.5)), _Epochs()
    reduce = callbacks.ReduceLROnPlateau("loss", mode="max", factor=0.5, patience=1, min_delta=9e9)
    model.fit(*data, batch_size=8, epochs=3, verbose=0, callbacks=[reduce, epochs])
    first = epochs.rates[0]
    np.testing.assert_allclose(epochs.rates, [first, first / 2, first / 4], rtol=1e-6)


@every_optimizer_alike
def test_a_rate_that_a_callback_sets_holds_for_the_next_epoch(case, data):
    weights = []
    for later in (0.25, 0.125):
        keras.utils.set_random_seed(0)
        scheduler = callbacks.LearningRateScheduler(
            lambda epoch, rate, later=later: later if epoch else rate
        )
        model, epochs = _model(case(learning_rate=0.25)), _Epochs()
        model.fit(*data, batch_size=8, epochs=2, verbose=0, callbacks=[scheduler, epochs])
        assert epochs.rates == [0.25, later]
        weights.append([epoch[0] for epoch in epochs.weights])
    np.testing.assert_array_equal(weights[0][0], weights[1][0])
    assert np.all(weights[0][1] != weights[1][1])


@every_optimizer_alike
def test_swap_ema_weights_evaluates_the_average(case, data):
    model = _model(case(learning_rate=0.05, use_ema=True, ema_momentum=0.5))
    model.fit(*data, batch_size=8, verbose=0)
    averages = case.rule(model.optimizer)._model_variables_moving_average
    for average, shift in zip(averages, (1.0, 2.0), strict=True):
        average.assign(average + shift)
    weights, shifted = model.get_weights(), [average.numpy() for average in averages]
    received = model.evaluate(*data, verbose=0, callbacks=[callbacks.SwapEMAWeights()])
    for unchanged, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(unchanged, expected, rtol=1e-6, atol=1e-6)
    model.set_weights(shifted)
    assert received == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-4)


# --- wrappers ------------------------------------------------------------------------


@every_optimizer_alike
def test_multi_optimizer_gives_each_layer_its_own(case, rng, float64):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this version of Keras has no MultiOptimizer")
    start, gradients = rng.normal(size=(2, 3)), rng.normal(size=(6, 2, 3))
    variables = [keras.Variable(start[i], name=name) for i, name in enumerate(("ours", "sgd"))]
    optimizer = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            default_optimizer=case(learning_rate=0.125),
            optimizer_map={"sgd": keras.optimizers.SGD(0.125)},
        )
    )
    for gradient in gradients:
        optimizer.apply([tf.constant(g) for g in gradient], variables)
    expected = case.transcribed(start[0], gradients[:, 0], [0.125] * 6)[-1]
    np.testing.assert_allclose(variables[0].numpy(), expected, rtol=0, atol=1e-12)
    expected = start[1] - 0.125 * gradients[:, 1].sum(axis=0)
    np.testing.assert_allclose(variables[1].numpy(), expected, rtol=0, atol=1e-12)


# --- gradients and variables of any size ---------------------------------------------


@every_optimizer
def test_a_variable_without_axes(case, rng, float64):
    start, gradients = rng.normal(size=()), rng.normal(size=8)
    optimizer, variable = case(learning_rate=0.1, clipnorm=1e9), keras.Variable(start)
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    expected = case.transcribed(start, gradients, [0.1] * 8)[-1]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-12, slow(1e-6), slow(1e6), 1e15])
@every_rule
def test_very_small_and_very_large_gradients(case, size, rng):
    """In float32, where the square of the largest is near the end of the range."""
    gradients = (size * rng.normal(size=(6, 50))).astype("float32")
    optimizer, variable = case(learning_rate=0.125), keras.Variable(np.zeros(50, "float32"))
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    expected = case.transcribed(np.zeros(50), gradients, [0.125] * 6)[-1]
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-5, atol=1e-5 * largest)


@every_optimizer
def test_zero_gradients_from_the_start_change_nothing(case):
    variable = keras.Variable([1.0, -2.0])
    optimizer = case(learning_rate=0.1)
    for _ in range(7):
        optimizer.apply([tf.zeros(2)], [variable])
    np.testing.assert_array_equal(variable.numpy(), [1.0, -2.0])
    optimizer.finalize_variable_values([variable])
    np.testing.assert_array_equal(variable.numpy(), [1.0, -2.0])


@every_optimizer
def test_zero_gradients_later_follow_the_rule(case, rng, float64):
    gradients = np.concatenate([rng.normal(size=(3, 4)), np.zeros((5, 4))])
    optimizer, variable = case(learning_rate=0.1), keras.Variable(np.zeros(4))
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    expected = case.transcribed(np.zeros(4), gradients, [0.1] * 8)[-1]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=0, atol=1e-12)
