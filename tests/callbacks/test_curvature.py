"""The largest eigenvalue against NumPy's of the whole Hessian, and where training diverges."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.callbacks.curvature import (
    Curvature,
    highest_stable_learning_rate,
    largest_eigenvalue,
)
from tests.callbacks.test_optimizer_tensorboard import read
from tests.optimizer_cases import rule_classes


def _model(optimizer="sgd", *layers, inputs=4):
    layers = layers or (keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2))
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((inputs,)), *layers])
    model.compile(optimizer, "mse")
    return model


def _data(rng, samples=20):
    return rng.normal(size=(samples, 4)), rng.normal(size=(samples, 2))


def _hessian(model, x, y, weights=None):
    """The Hessian by central differences of gradients, in float64, of a model in float64."""
    variables = model.trainable_variables
    start = np.concatenate([v.numpy().ravel() for v in variables])

    def gradient(vector):
        parts = np.split(vector, np.cumsum([v.numpy().size for v in variables])[:-1])
        for variable, part in zip(variables, parts, strict=True):
            variable.assign(part.reshape(variable.shape))
        with tf.GradientTape() as tape:
            squares = tf.reduce_mean((model(x, training=True) - y) ** 2, axis=-1)
            loss = tf.reduce_mean(squares * (1.0 if weights is None else weights))
            loss += sum(model.losses)
        gradients = tape.gradient(loss, [v.value for v in variables])
        return np.concatenate([g.numpy().ravel() for g in gradients])

    step = 1e-5
    columns = [
        (gradient(start + step * e) - gradient(start - step * e)) / (2 * step)
        for e in np.eye(len(start))
    ]
    gradient(start)  # puts the weights back
    return np.array(columns)


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("kind", ["plain", "normalized", "regularized"])
def test_the_eigenvalue_is_that_of_the_hessian(kind, has_weights, float64, rng):
    layers = [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2)]
    if kind == "normalized":
        layers.insert(1, keras.layers.BatchNormalization())
    if kind == "regularized":
        layers[0] = keras.layers.Dense(3, activation="tanh", kernel_regularizer="l2")
    model = _model("sgd", *layers)
    x, y = _data(rng)
    weights = rng.uniform(0, 2, size=len(x)) if has_weights else None
    expected = np.linalg.eigvalsh(_hessian(model, x, y, weights))[-1]
    before = [v.numpy() for v in model.variables]
    data = (x, y, weights) if has_weights else (x, y)
    assert Curvature(model, data).largest_eigenvalue() == pytest.approx(expected, rel=1e-4)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_the_eigenvalue_follows_the_weights_and_the_layers_state(float64, rng):
    layers = keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2, trainable=False)
    model = _model("sgd", *layers)  # weights that are not trained are part of the state
    x, y = _data(rng)
    curvature = Curvature(model, (x, y))
    first = curvature.largest_eigenvalue()
    for layer in layers:
        layer.kernel.assign(1.5 * layer.kernel)
        expected = np.linalg.eigvalsh(_hessian(model, x, y))[-1]
        assert curvature.largest_eigenvalue() == pytest.approx(expected, rel=1e-4)
        assert abs(expected - first) > 0.1 * first
        first = expected


@pytest.mark.parametrize("size", [1, 2, 30, 300])
def test_lanczos_finds_the_largest_and_not_the_largest_in_magnitude(size, rng):
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    values = -np.geomspace(1e-6, 5.0, size)
    values[0] = 2.0
    matrix = basis * values @ basis.T
    found = largest_eigenvalue(lambda vector: matrix @ vector, size)
    assert found == pytest.approx(2.0, rel=1e-3)


def test_lanczos_of_a_flat_and_of_a_broken_loss():
    assert largest_eigenvalue(lambda vector: 0 * vector, 5) == 0.0
    assert np.isnan(largest_eigenvalue(lambda vector: np.nan * vector, 5))


def _distance_after(optimizer, steps=2000):
    """How far from the minimum a weight is that began at 1, where the curvature is 3."""
    weight = keras.Variable(1.0)
    optimizer.build([weight])

    @tf.function
    def train():
        for _ in tf.range(steps):
            optimizer.apply([3.0 * weight.value])

    train()
    optimizer.finalize_variable_values([weight])
    return abs(float(weight.numpy()))


_BOUNDED = [c for c in rule_classes() if c().stability_bound is not None]


@pytest.mark.parametrize("settings", [{}, {"classical": True}, {"momentum": 0.5}], ids=str)
@pytest.mark.parametrize("case", [*_BOUNDED, keras.optimizers.SGD], ids=lambda c: c.__name__)
def test_steps_diverge_above_the_highest_stable_rate(case, settings):
    if case is gdopt.GradientDescent and settings:
        pytest.skip("it has no momentum")
    if case is keras.optimizers.SGD:
        settings = {"momentum": 0.9, "nesterov": "classical" in settings} if settings else {}
    rate = highest_stable_learning_rate(case(**settings), 3.0)
    assert _distance_after(case(0.98 * rate, **settings)) < 1e-3
    assert not _distance_after(case(1.02 * rate, **settings)) < 1e3


def test_only_gradient_descent_and_momentum_have_a_highest_stable_rate():
    assert {case.__name__ for case in _BOUNDED} == {"GradientDescent", "Momentum", "NAG"}
    for optimizer in (
        gdopt.Lookahead(gdopt.Momentum()),
        gdopt.Lookahead("sgd"),
        keras.optimizers.Adam(),
        gdopt.LBFGS(),
    ):
        assert highest_stable_learning_rate(optimizer, 3.0) is None
    scaled = keras.optimizers.LossScaleOptimizer(gdopt.GradientDescent())
    assert highest_stable_learning_rate(scaled, 4.0) == 0.5
    assert highest_stable_learning_rate(gdopt.GradientDescent(), -4.0) is None


@pytest.mark.slow
def test_digits_becomes_unstable_where_the_callback_says(tmp_path):
    """Full-batch gradient descent from one point, below and above the rate that is written."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = x[:500] / 16, np.eye(10)[y[:500]]
    model = _model("sgd", keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(10),
                   inputs=64)  # fmt: skip
    fit = {"batch_size": len(x), "verbose": 0, "shuffle": False}
    model.compile(gdopt.GradientDescent(0.3), "mse")
    callback = gdopt.callbacks.OptimizerTensorBoard(
        tmp_path, curvature_data=(x, y), curvature_freq=300
    )
    model.fit(x, y, epochs=300, callbacks=[callback], **fit)
    (*_, stable) = read(tmp_path, "curvature/")["curvature/highest_stable_learning_rate"].values()
    start = model.get_weights()
    losses = {}
    for factor in (0.9, 1.2):
        model.set_weights(start)
        model.compile(gdopt.GradientDescent(factor * stable), "mse")
        losses[factor] = model.fit(x, y, epochs=60, **fit).history["loss"]
    assert np.all(np.diff(losses[0.9]) < 0)
    assert np.any(np.diff(losses[1.2]) > 0)


def test_what_is_written_and_when(rng, tmp_path):
    x, y = _data(rng, 24)
    model = _model(gdopt.Momentum(0.01, momentum=0.5, classical=True))
    runs = {"epoch": [0, 6, 12], 4: [0, 4, 8, 12]}
    for freq, steps in runs.items():
        model.compile(gdopt.Momentum(0.01, momentum=0.5, classical=True), "mse")
        callback = gdopt.callbacks.OptimizerTensorBoard(
            tmp_path / str(freq), curvature_data=(x, y), curvature_freq=freq
        )
        model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[callback])
        written = read(tmp_path / str(freq), "curvature/")
        assert set(written) == {
            f"curvature/{name}"
            for name in ("largest_eigenvalue", "learning_rate", "highest_stable_learning_rate")
        }
        assert all(list(values) == steps for values in written.values())
        for step in steps:
            now = {name.removeprefix("curvature/"): v[step] for name, v in written.items()}
            assert now["learning_rate"] == pytest.approx(0.01)
            stable = 3.0 / now["largest_eigenvalue"]
            assert now["highest_stable_learning_rate"] == pytest.approx(stable, rel=1e-6)
    expected = Curvature(model, (x, y)).largest_eigenvalue()
    assert now["largest_eigenvalue"] == pytest.approx(expected, rel=1e-5)


def test_training_is_the_same_with_and_without(rng, tmp_path):
    x, y = _data(rng, 24)
    ends = []
    for data in (None, (x, y)):
        keras.utils.set_random_seed(0)
        layers = keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)
        model = _model("sgd", *layers, keras.layers.Dense(2))
        model.compile(gdopt.Adam(), "mse")
        callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, curvature_data=data)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[callback])
        ends.append([v.numpy() for v in model.variables])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "convolution", "embedding", "attention"])
def test_ordinary_layers(kind, rng, tmp_path):
    x = rng.integers(0, 9, (12, 6)) if kind == "embedding" else rng.normal(size=(12, 6, 4))
    layers = {
        "lstm": [keras.layers.LSTM(3)],
        "convolution": [keras.layers.Conv1D(3, 3, activation="relu"), keras.layers.MaxPooling1D(),
                        keras.layers.Flatten()],
        "embedding": [keras.layers.Embedding(9, 3), keras.layers.GRU(3)],
        "attention": [keras.layers.Flatten()],
    }[kind]  # fmt: skip
    inputs = keras.Input(x.shape[1:])
    hidden = inputs
    if kind == "attention":
        hidden = keras.layers.MultiHeadAttention(2, 3)(hidden, hidden)
    for layer in layers:
        hidden = layer(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(gdopt.Adam(), "mse")
    y = rng.normal(size=(12, 1))
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, curvature_data=(x, y))
    model.fit(x, y, verbose=0, callbacks=[callback])
    written = read(tmp_path, "curvature/")["curvature/largest_eigenvalue"]
    assert np.all(np.isfinite(list(written.values())))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curvature_data": np.ones(3)}, "must be .x, y. or .x, y, sample_weight.*ndarray"),
        ({"curvature_data": (np.ones(3),)}, r"must be .*\(\(3,\),\)"),
        ({"curvature_freq": 3}, "needs `curvature_data`"),
        ({"curvature_data": (np.ones(3), np.ones(3)), "curvature_freq": 0}, "curvature_freq"),
        ({"curvature_data": (np.ones(3), np.ones(3)), "curvature_freq": "batch"}, "curvature_freq"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gdopt.callbacks.OptimizerTensorBoard(tmp_path, **arguments)


def test_data_and_models_that_do_not_fit(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Adam())

    def fit(model, *data):
        callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, curvature_data=data)
        model.fit(x, y, verbose=0, callbacks=[callback])

    before = model.get_weights()
    with pytest.raises(ValueError, match=r"cannot compute its loss.*\(20, 3\), \(20, 2\)"):
        fit(model, x[:, :3], y)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])

    class OwnStep(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    own = OwnStep([keras.layers.Dense(2)])
    own.compile(gdopt.Adam(), "mse")
    with pytest.raises(ValueError, match="`train_step` of its own"):
        fit(own, x, y)
    half = _model(gdopt.Adam(), keras.layers.Dense(2, dtype="mixed_bfloat16"))
    with pytest.raises(ValueError, match="half precision"):
        fit(half, x, y)
