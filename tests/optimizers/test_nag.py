"""NAG: gradients are taken at the look-ahead point, and the weights themselves come back."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt

RHO = 0.75
FORMS = pytest.mark.parametrize("classical", [False, True], ids=["default", "classical"])


def _gradient(theta):
    """Of the sum of (theta**2 - 1)**2 / 4, which is not quadratic."""
    return theta * (theta**2 - 1)


def _published(theta, rates, classical, velocity=0.0):
    """Algorithm 5 as it stands: weights, look-ahead points and the last velocity."""
    weights, points, last_rate = [], [], 0.0
    for rate in rates:
        if classical:
            point = theta + (RHO * velocity)
            velocity = RHO * velocity - rate * _gradient(point)
            theta = theta + velocity
        else:
            point = theta - last_rate * RHO * velocity
            velocity = RHO * velocity + (1 - RHO) * _gradient(point)
            theta = theta - rate * velocity
        last_rate = rate
        weights.append(theta)
        points.append(point)
    return weights, points, velocity


def _step(optimizer, variable):
    optimizer.apply([tf.constant(_gradient(variable.numpy()))], [variable])


@FORMS
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
def test_weights_follow_the_published_algorithm(classical, scheduled, rng, float64):
    """After any number of steps, finalizing gives the algorithm's weights."""
    start, steps = rng.normal(size=(3, 2)), 12
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, 4, 0.25) if scheduled else 0.125
    rates = [float(rate(t)) if scheduled else rate for t in range(steps)]
    weights, points, _ = _published(start, rates, classical)
    for n in range(1, steps + 1):
        optimizer = gdopt.NAG(rate, momentum=RHO, classical=classical)
        variable = keras.Variable(start)
        for t in range(n):
            np.testing.assert_allclose(variable.numpy(), points[t], rtol=0, atol=1e-14)
            _step(optimizer, variable)
        optimizer.finalize_variable_values([variable])
        np.testing.assert_allclose(variable.numpy(), weights[n - 1], rtol=0, atol=1e-14)


@FORMS
def test_the_first_step_after_finalizing_looks_from_the_weights(classical, rng, float64):
    start = rng.normal(size=4)
    optimizer = gdopt.NAG(0.125, momentum=RHO, classical=classical)
    variable = keras.Variable(start)
    for _ in range(5):
        _step(optimizer, variable)
    optimizer.finalize_variable_values([variable])
    optimizer.finalize_variable_values([variable])  # twice is once
    weights, _, velocity = _published(start, [0.125] * 5, classical)
    np.testing.assert_allclose(variable.numpy(), weights[-1], rtol=0, atol=1e-14)
    # One step whose gradient is that of the weights, then on as before.
    for _ in range(3):
        _step(optimizer, variable)
    optimizer.finalize_variable_values([variable])
    theta = weights[-1]
    for step in range(3):
        if classical:
            point = theta + RHO * velocity if step else theta
            velocity = RHO * velocity - 0.125 * _gradient(point)
            theta = theta + velocity
        else:
            point = theta - 0.125 * RHO * velocity if step else theta
            velocity = RHO * velocity + (1 - RHO) * _gradient(point)
            theta = theta - 0.125 * velocity
    np.testing.assert_allclose(variable.numpy(), theta, rtol=0, atol=1e-14)


def test_classical_look_ahead_points_equal_keras_nesterov(rng, float64):
    start = rng.normal(size=(3, 2))
    ours, keras_s = keras.Variable(start), keras.Variable(start)
    nag = gdopt.NAG(0.125, momentum=RHO, classical=True)
    sgd = keras.optimizers.SGD(0.125, momentum=RHO, nesterov=True)
    for _ in range(30):
        _step(nag, ours)
        _step(sgd, keras_s)
        np.testing.assert_allclose(ours.numpy(), keras_s.numpy(), rtol=0, atol=1e-14)


# --- in `fit` ------------------------------------------------------------------------


class _Weights(keras.callbacks.Callback):
    """What the model holds after each batch."""

    def __init__(self, interrupted_after=None):
        super().__init__()
        self.seen = []
        self.interrupted_after = interrupted_after

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.model.layers[-1].kernel.numpy())
        if len(self.seen) == self.interrupted_after:
            raise KeyboardInterrupt


X = np.array([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0], [-1.0, 1.0]])
Y = np.array([[1.0], [0.0], [2.0], [-1.0]])


def _model(optimizer):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.5], [-0.5]])
    model.compile(optimizer, "mse")
    return model


def _fit(model, *callbacks, epochs=5):
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model.layers[-1].kernel.numpy()


def _trajectory(steps, rate=0.25):
    """The default form on the model above, from where the last `fit` left it."""
    theta, velocity = np.array([[0.5], [-0.5]]), 0.0
    weights, points = [], []
    for step in range(steps):
        point = theta - rate * RHO * velocity if step else theta
        velocity = RHO * velocity + (1 - RHO) * X.T @ (X @ point - Y) / 2
        theta = theta - rate * velocity
        weights.append(theta)
        points.append(theta - rate * RHO * velocity)
    return weights, points


def test_fit_shows_look_ahead_points_and_leaves_the_weights(float64):
    shown = _Weights()
    received = _fit(_model(gdopt.NAG(0.25, momentum=RHO)), shown)
    weights, points = _trajectory(5)
    np.testing.assert_allclose(shown.seen, points, rtol=0, atol=1e-12)
    np.testing.assert_allclose(received, weights[-1], rtol=0, atol=1e-12)


def test_early_stopping_restores_a_look_ahead_point(float64):
    """As documented: Keras finalizes before it restores."""
    shown = _Weights()
    stop = keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=2, restore_best_weights=True, start_from_epoch=1
    )
    model = _model(gdopt.NAG(0.25, momentum=RHO))
    received = _fit(model, stop, shown)
    np.testing.assert_array_equal(received, shown.seen[stop.best_epoch])
    # They are the weights now: the next step starts from them.
    assert all(float(ahead.numpy()) == 0.0 for ahead in model.optimizer._slots["look_ahead"])


def test_a_checkpoint_of_a_look_ahead_point_finalizes_to_the_weights(tmp_path, float64):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    _fit(_model(gdopt.NAG(0.25, momentum=RHO)), checkpoint)
    weights, points = _trajectory(5)
    loaded = keras.models.load_model(tmp_path / "3.keras")
    kernel = loaded.layers[-1].kernel
    np.testing.assert_allclose(kernel.numpy(), points[2], rtol=0, atol=1e-12)
    loaded.optimizer.finalize_variable_values(loaded.trainable_variables)
    np.testing.assert_allclose(kernel.numpy(), weights[2], rtol=0, atol=1e-12)


def test_training_goes_on_from_a_checkpoint_as_if_uninterrupted(tmp_path, float64):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    expected = _fit(_model(gdopt.NAG(0.25, momentum=RHO)), checkpoint)
    loaded = keras.models.load_model(tmp_path / "3.keras")
    np.testing.assert_array_equal(_fit(loaded, epochs=2), expected)


def test_an_interrupted_fit_is_finalized_by_hand_or_goes_on(float64):
    weights, points = _trajectory(5)
    model = _model(gdopt.NAG(0.25, momentum=RHO))
    with pytest.raises(KeyboardInterrupt):
        _fit(model, _Weights(interrupted_after=3))
    kernel = model.layers[-1].kernel
    np.testing.assert_allclose(kernel.numpy(), points[2], rtol=0, atol=1e-12)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    np.testing.assert_allclose(kernel.numpy(), weights[2], rtol=0, atol=1e-12)

    model = _model(gdopt.NAG(0.25, momentum=RHO))
    with pytest.raises(KeyboardInterrupt):
        _fit(model, _Weights(interrupted_after=3))
    np.testing.assert_allclose(_fit(model, epochs=2), weights[4], rtol=0, atol=1e-12)


def test_train_on_batch_does_not_finalize(float64):
    model = _model(gdopt.NAG(0.25, momentum=RHO))
    for _ in range(2):
        model.train_on_batch(X, Y)
    _, points = _trajectory(2)
    np.testing.assert_allclose(model.layers[-1].kernel.numpy(), points[1], rtol=0, atol=1e-12)


def test_finalizing_before_the_first_step_changes_nothing():
    variable = keras.Variable([1.0])
    optimizer = gdopt.NAG()
    optimizer.finalize_variable_values([variable])
    optimizer.build([variable])
    optimizer.finalize_variable_values([variable, keras.Variable([2.0])])
    assert variable.numpy() == [1.0]


# --- rows and variables that sit steps out -------------------------------------------


@FORMS
def test_each_row_and_variable_has_a_look_ahead_of_its_own(classical, rng, float64):
    """With a schedule, and over two finalized runs: what is absent stays where it is."""
    start = rng.normal(size=(3, 2))
    batches = [[0, 1], [0], [0, 1], None, [0], [2], [0, 1]]
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)
    optimizer = gdopt.NAG(schedule, momentum=RHO, classical=classical, lazy=True)
    table, other = keras.Variable(start), keras.Variable(start[0])
    optimizer.build([table, other])
    theta, velocity, ahead = start.copy(), np.zeros((3, 2)), np.zeros((3, 1))
    t = 0
    for rows in batches:
        if rows is None:
            optimizer.finalize_variable_values([table, other])
            np.testing.assert_allclose(table.numpy(), theta, rtol=0, atol=1e-13)
            ahead[:] = 0
            continue
        rate = float(schedule(t))
        t += 1
        point = theta + ahead * velocity if classical else theta - ahead * velocity
        np.testing.assert_allclose(table.numpy(), point, rtol=0, atol=1e-13)
        g = _gradient(point[rows])
        if classical:
            velocity[rows] = RHO * velocity[rows] - rate * g
            theta[rows] += velocity[rows]
        else:
            velocity[rows] = RHO * velocity[rows] + (1 - RHO) * g
            theta[rows] -= rate * velocity[rows]
        ahead[rows] = RHO if classical else RHO * rate
        optimizer.apply([tf.IndexedSlices(g, tf.constant(rows)), None], [table, other])
    optimizer.finalize_variable_values([table, other])
    np.testing.assert_allclose(table.numpy(), theta, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(other.numpy(), start[0])


@pytest.mark.parametrize("classical", [False, True])
def test_a_momentum_set_between_steps_undoes_what_was_looked_ahead(classical, rng, float64):
    """theta follows the rule, though each look-ahead is made with another momentum."""
    optimizer = gdopt.NAG(0.1, momentum=0.5, classical=classical)
    weight = keras.Variable(np.ones(3))
    theta, v = np.ones(3), np.zeros(3)
    for rho in (0.5, 0.9, 0.0, 0.7):
        optimizer.momentum = rho
        g = rng.normal(size=3)
        optimizer.apply([keras.ops.convert_to_tensor(g)], [weight])
        v = rho * v - 0.1 * g if classical else rho * v + (1 - rho) * g
        theta = theta + v if classical else theta - 0.1 * v
    optimizer.momentum = 0.2
    optimizer.finalize_variable_values([weight])
    np.testing.assert_allclose(weight.numpy(), theta, rtol=1e-12)
