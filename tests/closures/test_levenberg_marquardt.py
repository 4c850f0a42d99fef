"""Levenberg-Marquardt against its equations, differences of the outputs and least squares."""

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.gauss_newton import GaussNewton, can_be_by_samples
from keras_gdopt.functional import Batch, ModelFunction
from tests.closures.test_batch_loss import MODELS
from tests.parameters import slow
from tests.reference import levenberg_marquardt as reference

INPUTS, UNITS, OUTPUTS = 2, 3, 2
PLAIN = {"jit_compile": False}


def _network(l2=0.0, units=UNITS, outputs=OUTPUTS, inputs=INPUTS):
    regularizer = keras.regularizers.L2(l2) if l2 else None
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(units, activation="tanh", kernel_regularizer=regularizer),
            keras.layers.Dense(outputs),
        ]
    )


def _attached(model, optimizer, loss="mse", **arguments):
    model.compile(optimizer, loss, **arguments)
    optimizer.attach(model)
    return model


def _weights(model):
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


# --- the equations -----------------------------------------------------------------------


# Keras rounds a regularizer's factor to float32, so these are powers of 2.
@pytest.mark.parametrize("jit_compile", [True, slow(False)])
@pytest.mark.parametrize(
    ("loss", "weighted", "l2"),
    [slow("mse", False, 0.0), slow("mse", True, 0.25), ("crossentropy", True, 1 / 64)],
)
def test_steps_are_those_of_the_equations(loss, weighted, l2, jit_compile, rng, float64):
    x = rng.normal(size=(17, INPUTS))
    sample_weight = rng.uniform(0.2, 2.0, 17) if weighted else np.ones(17)
    if loss == "mse":
        y = np.sin(3 * x)
        of_outputs, compiled = reference.squares, "mse"
    else:
        y = np.eye(OUTPUTS)[rng.integers(OUTPUTS, size=17)]
        of_outputs, compiled = (
            reference.cross_entropy,
            keras.losses.CategoricalCrossentropy(from_logits=True),
        )
    keras.utils.set_random_seed(3)
    optimizer = gdopt.LevenbergMarquardt(0.02, jit_compile=jit_compile)
    model = _attached(_network(l2), optimizer, compiled)
    is_regularized = np.arange(model.count_params()) < INPUTS * UNITS

    def function(theta):
        z, rows = reference.outputs_and_jacobian(theta, x, UNITS, OUTPUTS)
        value, slope, blocks = of_outputs(z, y, sample_weight)
        decayed = 2 * l2 * is_regularized
        return (
            value + l2 * np.sum(theta[is_regularized] ** 2),
            np.einsum("nk,nkd->d", slope, rows) + decayed * theta,
            np.einsum("nkd,nkl,nle->de", rows, blocks, rows) + np.diag(decayed),
        )

    expected = reference.path(_weights(model), function, 0.02, 12)
    for theta, value, damping, ratio in expected:
        model.train_on_batch(x, y, sample_weight if weighted else None)
        assert optimizer.status == "accepted"
        np.testing.assert_allclose(_weights(model), theta, rtol=1e-10, atol=1e-10)
        assert optimizer.step_metrics["damping"] == pytest.approx(damping, rel=1e-6)
        assert optimizer.step_metrics["gain_ratio"] == pytest.approx(ratio, rel=1e-6)
        assert model.evaluate(x, y, sample_weight=sample_weight, verbose=0) == pytest.approx(
            value, rel=1e-10
        )


# --- the matrix --------------------------------------------------------------------------

BY_SAMPLES = ("dense", "regularized", "two_inputs", "activations", "attention")
BY_EVERY_CHANGE = ("regularized", "two_inputs")


@pytest.mark.parametrize(
    "name",
    [
        name if name in BY_EVERY_CHANGE else slow(name)
        for name in MODELS
        if name != "batch_normalization"  # is refused
    ],
)
def test_the_matrix_is_that_of_differences_of_the_outputs(name, rng, float64):
    """For the mean squared error, 2/n JᵀWJ and the second derivatives of the regularizers."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    x = [tf.constant(rng.normal(size=(5, *shape))) for shape in shapes]
    x = x[0] if len(x) == 1 else {t.name: part for t, part in zip(model.inputs, x, strict=True)}
    y = tf.nest.map_structure(lambda z: tf.constant(rng.normal(size=z.shape)), model(x))
    model.compile("sgd", tf.nest.map_structure(lambda _: "mse", y))
    sample_weight = tf.constant(rng.uniform(0.5, 2.0, 5))
    model.evaluate(x, y, verbose=0)  # builds the loss
    loss = BatchLoss(ModelFunction(model), Batch(x, y, sample_weight))
    weights = loss.joined([v.value for v in model.trainable_variables])

    def outputs(theta):
        for variable, value in zip(model.trainable_variables, loss.parted(theta), strict=True):
            variable.assign(value)
        return [np.array(z).reshape(5, -1) for z in tf.nest.flatten(model(x, training=True))]

    expected = np.zeros((loss.size, loss.size))
    ends = [
        (outputs(weights + 1e-5 * unit), outputs(weights - 1e-5 * unit))
        for unit in np.eye(loss.size)
    ]
    outputs(weights)
    for place in range(len(ends[0][0])):  # of each output
        columns = [(up[place] - down[place]) / 2e-5 for up, down in ends]
        jacobian = np.stack(columns, axis=-1)
        shares = 2 * sample_weight.numpy() / (5 * jacobian.shape[1])
        expected += np.einsum("n,nkd,nke->de", shares, jacobian, jacobian)
    start = 0
    for variable in model.trainable_variables:
        size = int(np.prod(variable.shape))
        if variable.regularizer is not None:
            places = np.arange(start, start + size)
            expected[places, places] += 2 * float(variable.regularizer.l2)
        start += size
    vector = rng.normal(size=loss.size)
    by_samples = can_be_by_samples(loss)
    assert by_samples or name not in BY_SAMPLES
    for way in {by_samples, False}:
        matrix = tf.function(GaussNewton(loss, by_samples=way).matrix, jit_compile=False)(weights)
        np.testing.assert_allclose(matrix, expected, rtol=1e-6, atol=1e-8)
    product = GaussNewton(loss, by_samples=False).product(weights, tf.constant(vector))
    np.testing.assert_allclose(product, expected @ vector, rtol=1e-6, atol=1e-7)


class _Centered(keras.layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (keras.layers.LayerNormalization, True),
        (_Centered, False),
        (lambda: keras.layers.Dropout(0.5), False),
    ],
    ids=["apart", "mixed", "random"],
)
def test_it_finds_out_whether_samples_stand_apart(layer, expected, rng):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), layer(), keras.layers.Dense(1)]
    )
    optimizer = gdopt.LevenbergMarquardt(iterations_per_step=5, **PLAIN)
    _attached(model, optimizer)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    loss = BatchLoss(ModelFunction(model), Batch(tf.constant(x), tf.constant(y)))
    assert can_be_by_samples(loss) is expected
    before = model.evaluate(x, y, verbose=0)
    losses = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    if not isinstance(model.layers[1], keras.layers.Dropout):  # which has a mask for each step
        assert losses[-1] < before


def test_parts_of_a_batch_are_the_batch(rng, float64):
    x, y = rng.normal(size=(11, 2)), rng.normal(size=(11, 2))
    found = []
    for chunks in (1, 3):
        keras.utils.set_random_seed(0)
        optimizer = gdopt.LevenbergMarquardt(
            iterations_per_step=6, closure_chunks=chunks, jit_compile=False
        )
        model = _attached(_network(), optimizer)
        model.fit(x, y, batch_size=11, verbose=0)
        found.append(_weights(model))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-11)


# --- where it ends -----------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e12, 1e-9])
def test_a_linear_model_is_solved_as_least_squares(unit, rng, float64):
    """Whatever the unit of the targets, with a feature that is there twice."""
    x = rng.normal(size=(40, 3))
    x = np.concatenate([x, x[:, :1]], axis=1)
    y = unit * rng.normal(size=(40, 1))
    ones = np.concatenate([x, np.ones((40, 1))], axis=1)
    expected = ones @ np.linalg.lstsq(ones, y, rcond=None)[0]
    optimizer = gdopt.LevenbergMarquardt(iterations_per_step=100, gradient_tolerance=0.0, **PLAIN)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    _attached(model, optimizer).fit(x, y, batch_size=40, epochs=2, verbose=0)
    # No nearer than weights of size 1 can tell: which of the two features counts is left open.
    np.testing.assert_allclose(model(x), expected, rtol=1e-7, atol=max(1e-8 * unit, 2e-15))
    assert optimizer.converged and "rounding" in optimizer.status


@pytest.mark.parametrize("seed", [0, slow(2)])
def test_about_as_few_iterations_as_minpack(seed, float64):
    """On a curve of seven weights, to SciPy's optimum."""
    x = np.linspace(-2, 2, 30)[:, None]
    y = 1.5 * np.tanh(2 * x - 0.5) + 0.3 * np.cos(5 * x)

    def residuals(theta):
        kernel, bias, last, last_bias = reference.parted(theta, 1, 2, 1)
        return (np.tanh(x @ kernel + bias) @ last + last_bias - y)[:, 0]

    keras.utils.set_random_seed(seed)
    optimizer = gdopt.LevenbergMarquardt(iterations_per_step=400, **PLAIN)
    model = _attached(_network(units=2, outputs=1, inputs=1), optimizer)
    found = scipy.optimize.least_squares(residuals, _weights(model), method="lm")
    history = model.fit(x, y, batch_size=30, verbose=0).history
    assert history["loss"][0] <= 1.0001 * np.mean(found.fun**2)
    assert optimizer.converged
    assert optimizer.step_metrics["steps_made"] <= 2 * found.nfev


@pytest.mark.slow
def test_the_test_problem(float64):
    """np.sinc(10 x), 61 weights, 2,200 iterations from five starts."""
    x = np.linspace(-1, 1, 2000)[:, None]
    losses = []
    for seed in range(5):
        keras.utils.set_random_seed(seed)
        optimizer = gdopt.LevenbergMarquardt(iterations_per_step=100, jit_compile=True)
        model = _attached(_network(units=20, outputs=1, inputs=1), optimizer)
        history = model.fit(x, np.sinc(10 * x), batch_size=2000, epochs=22, verbose=0).history
        losses.append(history["loss"][-1])
    assert np.median(losses) <= 1e-8, losses


def test_more_weights_than_samples_a_dead_unit_and_one_sample(rng):
    x, y = rng.normal(size=(3, 2)).astype("float32"), rng.normal(size=(3, 2)).astype("float32")
    for count in (3, 1):
        model = _network(units=8)
        kernel, bias, last, last_bias = model.get_weights()
        last[0] = kernel[:, 0] = 0.0  # which nothing that comes after depends on
        model.set_weights([kernel, bias, last, last_bias])
        optimizer = gdopt.LevenbergMarquardt(iterations_per_step=50, **PLAIN)
        _attached(model, optimizer)
        history = model.fit(x[:count], y[:count], batch_size=count, epochs=4, verbose=0).history
        assert history["loss"][-1] < 1e-8


def test_a_loss_that_is_not_finite_moves_nothing(rng):
    optimizer = gdopt.LevenbergMarquardt(iterations_per_step=3, **PLAIN)
    model = _attached(_network(), optimizer)
    before = _weights(model)
    x, y = rng.normal(size=(4, 2)).astype("float32"), rng.normal(size=(4, 2)).astype("float32")
    y[0] = np.nan
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(_weights(model), before)
    assert "not finite" in optimizer.status
    model.train_on_batch(x, np.nan_to_num(y))
    assert optimizer.status == "accepted"


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, -1.0, np.nan])
def test_damping_must_be_above_zero(damping):
    with pytest.raises(ValueError, match="`damping`"):
        gdopt.LevenbergMarquardt(damping)


def test_too_many_weights(rng):
    model = _attached(_network(units=2000), gdopt.LevenbergMarquardt())
    with pytest.raises(ValueError, match=r"at most 8,192 weights. Use `LBFGS`.* 10,002 weights"):
        model.optimizer.build(model.trainable_variables)


@pytest.mark.parametrize("loss", ["mae", "hinge"])
def test_losses_without_curvature(loss, rng):
    model = _attached(_network(), gdopt.LevenbergMarquardt(**PLAIN), loss)
    with pytest.raises(ValueError, match=rf"no curvature in the model's outputs.*'{loss}'"):
        model.train_on_batch(rng.normal(size=(4, 2)), rng.normal(size=(4, 2)))


def test_a_loss_that_is_flat_only_far_from_its_targets(rng):
    model = _network(outputs=1)
    model.layers[-1].bias.assign([50.0])
    optimizer = gdopt.LevenbergMarquardt(iterations_per_step=20, **PLAIN)
    _attached(model, optimizer, keras.losses.Huber(delta=1.0))
    x = rng.normal(size=(8, 2)).astype("float32")
    assert np.isfinite(model.train_on_batch(x, x[:, :1]))
    model.layers[-1].bias.assign([0.0])
    before = model.evaluate(x, x[:, :1], verbose=0)
    model.train_on_batch(x, x[:, :1])
    assert model.evaluate(x, x[:, :1], verbose=0) < 0.1 * before


def test_models_whose_loss_is_not_of_their_outputs(rng):
    class Own(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(y_pred**2)

    with pytest.raises(ValueError, match=r"'own.*' with a `compute_loss` of its own"):
        _attached(Own([keras.Input((2,)), keras.layers.Dense(1)]), gdopt.LevenbergMarquardt())
    normalized = [keras.Input((2,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    with pytest.raises(ValueError, match=r"batch normalization mixes.*'batch_normalization"):
        _attached(keras.Sequential(normalized), gdopt.LevenbergMarquardt())
    active = keras.layers.Dense(2, activity_regularizer="l2")
    model = keras.Sequential([keras.Input((2,)), active])
    _attached(model, gdopt.LevenbergMarquardt(**PLAIN))
    with pytest.raises(ValueError, match=r"1 loss\(es\) that layers add by `add_loss`"):
        model.train_on_batch(rng.normal(size=(4, 2)), rng.normal(size=(4, 2)))
