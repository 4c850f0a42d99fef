"""Levenberg-Marquardt against its equations, differences of the outputs and least squares."""

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.closures import gauss_newton
from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.damped_systems import DenseSystem, SystemOfProducts, SystemOfRows
from keras_gdopt.closures.gauss_newton import GaussNewton, Ways
from keras_gdopt.closures.ways_to_the_matrix import ways_to_the_matrix
from keras_gdopt.functional import Batch, ModelFunction, ResidualFunction
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
@pytest.mark.parametrize("jit_compile", [slow(True), False])
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


@pytest.mark.parametrize("loss", ["mse", slow("crossentropy")])
def test_with_fewer_samples_than_weights_the_steps_are_the_same(loss, rng, float64):
    """By a system of as many rows as there are outputs, where the equations have the weights."""
    x, units = rng.normal(size=(5, INPUTS)), 110
    y = np.eye(OUTPUTS)[rng.integers(OUTPUTS, size=5)]
    of_outputs, compiled = {
        "mse": (reference.squares, "mse"),
        "crossentropy": (
            reference.cross_entropy,
            keras.losses.CategoricalCrossentropy(from_logits=True),
        ),
    }[loss]
    optimizer = gdopt.LevenbergMarquardt(0.05, "exact", **PLAIN)
    model = _attached(_network(units=units), optimizer, compiled)
    assert model.count_params() > 512

    def function(theta):
        z, rows = reference.outputs_and_jacobian(theta, x, units, OUTPUTS)
        value, slope, blocks = of_outputs(z, y, np.ones(5))
        gradient = np.einsum("nk,nkd->d", slope, rows)
        return value, gradient, np.einsum("nkd,nkl,nle->de", rows, blocks, rows)

    for theta, _, damping, ratio in reference.path(_weights(model), function, 0.05, 4):
        model.train_on_batch(x, y)
        np.testing.assert_allclose(_weights(model), theta, rtol=1e-10, atol=1e-10)
        assert optimizer.step_metrics["damping"] == pytest.approx(damping, rel=1e-6)
        assert optimizer.step_metrics["gain_ratio"] == pytest.approx(ratio, rel=1e-5)


def test_systems_of_rows_and_of_products_are_the_dense_one(rng, float64):
    rows, right = tf.constant(rng.normal(size=(3, 2, 9))), tf.constant(rng.normal(size=(3, 2)))
    roots = rng.normal(size=(3, 2, 2))
    blocks = tf.constant(roots @ roots.transpose(0, 2, 1))
    flat = rows.numpy().reshape(6, 9)
    weighted = np.einsum("nkl,nld->nkd", blocks, rows).reshape(6, 9)
    matrix, gradient = tf.constant(flat.T @ weighted), tf.constant(flat.T @ np.ravel(right))
    damping = tf.constant(0.3, tf.float64)
    expected = np.linalg.solve(matrix.numpy() + 0.3 * np.eye(9), gradient)
    diagonal = np.diag(matrix)
    for system in (
        DenseSystem(matrix, gradient),
        SystemOfRows(rows, blocks, right),
        SystemOfProducts(
            lambda v: tf.linalg.matvec(matrix, v),
            gradient,
            tf.constant(diagonal),
            tolerance=1e-13,
            most=20,
        ),
    ):
        solution = system.solve(damping)
        np.testing.assert_allclose(solution.vector, expected, rtol=1e-9)
        np.testing.assert_allclose(solution.product, matrix.numpy() @ expected, rtol=1e-9)
        assert float(system.largest) == pytest.approx(np.max(diagonal))


@pytest.mark.slow
def test_conjugate_gradients_solve_to_a_thousandth_of_the_gradient(rng, float64):
    x, y = rng.normal(size=(17, INPUTS)), rng.normal(size=(17, OUTPUTS))
    optimizer = gdopt.LevenbergMarquardt(1.0, "cg", **PLAIN)
    model = _attached(_network(), optimizer)
    for _ in range(3):
        theta, before = _weights(model), optimizer.step_metrics.get("damping")
        model.train_on_batch(x, y)
        z, rows = reference.outputs_and_jacobian(theta, x, UNITS, OUTPUTS)
        _, slope, blocks = reference.squares(z, y, np.ones(17))
        gradient = np.einsum("nk,nkd->d", slope, rows)
        matrix = np.einsum("nkd,nkl,nle->de", rows, blocks, rows)
        step = _weights(model) - theta
        damping = np.max(np.diag(matrix)) if before is None else before
        left = matrix @ step + damping * step + gradient
        assert optimizer.step_metrics["evaluations"] == 2  # so the first damping was the one
        assert 0 < np.linalg.norm(left) <= 1e-3 * np.linalg.norm(gradient)
        assert 1 <= optimizer.step_metrics["inner_iterations"] <= 2 * len(theta)


@pytest.mark.slow
def test_conjugate_gradients_know_the_units_of_features(rng, float64):
    """From thousands to thousandths, in about as many iterations as there are weights."""
    units = 10.0 ** np.linspace(-3, 3, 20)
    x = rng.normal(size=(400, 20)) * units
    y = x @ (1 / units[:, None])
    optimizer = gdopt.LevenbergMarquardt(1e-12, "cg", gradient_tolerance=0.0, **PLAIN)
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(1)])
    _attached(model, optimizer).fit(x, y, batch_size=400, epochs=6, verbose=0)
    assert optimizer.step_metrics["inner_iterations"] <= 21
    assert model.evaluate(x, y, batch_size=400, verbose=0) < 1e-6


# --- residuals ---------------------------------------------------------------------------


class OwnLoss(keras.Model):
    """A loss of its own: at the samples of the batch, and at fixed points."""

    def __init__(self, points, shared=False, **arguments):
        super().__init__()
        self.network = _network(**arguments)
        self.points = tf.constant(points)
        self.shared = shared

    def call(self, x):
        return self.network(x)

    def residuals(self, x, y, y_pred, sample_weight):
        left = y_pred - y
        if self.shared:
            left -= tf.reduce_mean(left, axis=0)
        return {"samples": left, "points": self.network(self.points) - 1.0}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        parts = self.residuals(x, y, y_pred, sample_weight)
        return sum(tf.reduce_mean(part**2) for part in parts.values())


@pytest.mark.parametrize(
    ("points", "shared", "jit_compile", "ways"),
    [
        slow(4, False, True, Ways(by_samples=(1,), by_rows=(0,))),
        (4, False, False, Ways(by_samples=(1,), by_rows=(0,))),
        slow(40, False, False, Ways(by_samples=(1,), by_products=(0,))),
        slow(4, True, False, Ways(by_rows=(0,), by_products=(1,))),
        slow(40, True, False, Ways(by_products=(0, 1))),
    ],
)
def test_residuals_of_all_kinds(points, shared, jit_compile, ways, rng, float64):
    x, y = rng.normal(size=(9, INPUTS)), rng.normal(size=(9, OUTPUTS))
    points = rng.normal(size=(points, INPUTS))
    optimizer = gdopt.LevenbergMarquardt(0.02, jit_compile=jit_compile)
    model = OwnLoss(points, shared)
    model.compile(optimizer)
    optimizer.attach(model, residuals=model.residuals)
    model.build((None, INPUTS))
    batch = Batch(tf.constant(x), tf.constant(y))
    function = ResidualFunction(model, residuals=model.residuals)
    assert ways_to_the_matrix(BatchLoss(function, batch)) == ways

    def function(theta):
        value, gradient, matrix = 0.0, 0.0, 0.0
        for at, target in ((x, y), (points, 1.0)):
            z, rows = reference.outputs_and_jacobian(theta, at, UNITS, OUTPUTS)
            left = z - target
            if at is x and shared:
                left, rows = left - left.mean(axis=0), rows - rows.mean(axis=0)
            share = 2 / left.size
            value += np.mean(left**2)
            gradient += share * np.einsum("nk,nkd->d", left, rows)
            matrix += share * np.einsum("nkd,nke->de", rows, rows)
        return value, gradient, matrix

    for theta, value, damping, _ in reference.path(_weights(model), function, 0.02, 4):
        model.train_on_batch(x, y)
        np.testing.assert_allclose(_weights(model), theta, rtol=1e-10, atol=1e-10)
        assert optimizer.step_metrics["damping"] == pytest.approx(damping, rel=1e-6)
        assert float(model.compute_loss(x, y, model(x))) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    "of_model",
    [
        lambda model: lambda **parts: model.residuals(**parts)["samples"],
        slow(
            lambda model: lambda **parts: [2 * part for part in model.residuals(**parts).values()]
        ),
    ],
    ids=["a part", "another scale"],
)
def test_residuals_that_are_not_the_loss(of_model, rng):
    optimizer = gdopt.LevenbergMarquardt(**PLAIN)
    model = OwnLoss(rng.normal(size=(4, INPUTS)).astype("float32"))
    model.compile(optimizer)
    optimizer.attach(model, residuals=of_model(model))
    with pytest.raises(ValueError, match="must add up to the loss of the model"):
        model.train_on_batch(np.ones((3, INPUTS), "float32"), np.ones((3, OUTPUTS), "float32"))
    assert int(optimizer.iterations) == 0


class Differential(keras.Model):
    """u'' = -u, u(0) = 0 and u(1) = 1, of which the coordinate is cut out and put in again."""

    def __init__(self):
        super().__init__()
        self.network = _network(units=6, outputs=1)

    def call(self, points):
        return self.network(points)

    def residuals(self, x, **_):
        position, other = tf.split(x, 2, axis=1)
        with tf.GradientTape() as second:
            second.watch(position)
            with tf.GradientTape() as first:
                first.watch(position)
                u = self.network(tf.concat([position, other], axis=1))
            slope = first.gradient(u, position)
        ends = self.network(tf.constant([[0.0, 0.0], [1.0, 0.0]], x.dtype))
        return second.gradient(slope, position) + u, ends - [[0.0], [1.0]]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return sum(tf.reduce_mean(part**2) for part in self.residuals(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda **settings: gdopt.LevenbergMarquardt(solver="exact", **settings),
        lambda **settings: gdopt.LevenbergMarquardt(solver="cg", **settings),
        lambda **settings: gdopt.Newton(solver="exact", **settings),
        lambda **settings: gdopt.Newton(solver="cg", **settings),
    ],
    ids=["LevenbergMarquardt-exact", "LevenbergMarquardt-cg", "Newton-exact", "Newton-cg"],
)
def test_a_differential_equation_is_solved_compiled_or_not(optimizer, float64):
    """XLA's own form of cutting out has no second derivative."""
    x = np.linspace(0, 1, 30)[:, None] * [1.0, 0.0]
    for jit_compile in (True, False):
        keras.utils.clear_session()  # the seed that all layers share has no value yet
        keras.utils.set_random_seed(0)
        model = Differential()
        solver = optimizer(iterations_per_step=5, jit_compile=jit_compile)
        model.compile(solver)
        is_least_squares = isinstance(solver, gdopt.LevenbergMarquardt)
        solver.attach(model, **({"residuals": model.residuals} if is_least_squares else {}))
        losses = model.fit(x, batch_size=30, epochs=4, verbose=0).history["loss"]
        assert losses[-1] < 1e-3, losses


# --- the matrix --------------------------------------------------------------------------

BY_SAMPLES = ("dense", "regularized", "two_inputs", "activations", "attention")
BY_EVERY_CHANGE = ("regularized",)


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
    ways = ways_to_the_matrix(loss)
    assert ways.by_samples or name not in BY_SAMPLES
    for way in {ways, Ways(by_products=tuple(range(len(ends[0][0]))))}:
        matrix = tf.function(GaussNewton(loss, way).matrix, jit_compile=False)(weights)
        np.testing.assert_allclose(matrix, expected, rtol=1e-6, atol=1e-8)
    product = GaussNewton(loss).product(weights, tf.constant(vector))
    np.testing.assert_allclose(product, expected @ vector, rtol=1e-6, atol=1e-7)


class _Centered(keras.layers.Layer):
    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        slow(keras.layers.LayerNormalization, True),
        (_Centered, False),
        slow(lambda: keras.layers.Dropout(0.5), False),
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
    assert bool(ways_to_the_matrix(loss).by_samples) is expected
    before = model.evaluate(x, y, verbose=0)
    losses = model.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    if not isinstance(model.layers[1], keras.layers.Dropout):  # which has a mask for each step
        assert losses[-1] < before


@pytest.mark.slow
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


@pytest.mark.parametrize(("never", "entries"), [slow(1, 60), slow(1, 1)])
def test_a_jacobian_larger_than_memory_is_taken_in_parts(never, entries, rng, monkeypatch, float64):
    x, y = tf.constant(rng.normal(size=(11, 2))), tf.constant(rng.normal(size=(11, 2)))
    model = _network()
    model.compile("sgd", "mse")
    loss = BatchLoss(ModelFunction(model), Batch(x, y))
    weights = loss.joined([v.value for v in model.trainable_variables])
    system = GaussNewton(loss, Ways(by_samples=(0,)))
    whole = system.matrix(weights)
    monkeypatch.setattr(gauss_newton, "_NEVER_IN_PARTS", never)
    monkeypatch.setattr(gauss_newton, "_MOST_ENTRIES", entries)
    samples = []
    counted = GaussNewton.rows_by_samples
    monkeypatch.setattr(
        GaussNewton,
        "rows_by_samples",
        lambda self, *a: samples.append(self._loss.batch.x.shape[0]) or counted(self, *a),
    )
    np.testing.assert_allclose(system.matrix(weights), whole, rtol=1e-12, atol=1e-14)
    assert max(samples) == max(1, entries // (2 * loss.size)) and sum(samples) == 11
    np.testing.assert_allclose(system.diagonal(weights), np.diag(whole), rtol=1e-12, atol=1e-14)


# --- made-up data and threads ------------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [False, slow(True)])
@pytest.mark.parametrize(
    ("activation", "outputs", "loss"),
    [
        ("softmax", 3, keras.losses.SparseCategoricalCrossentropy),
        slow("sigmoid", 1, keras.losses.BinaryCrossentropy),
    ],
)
def test_probabilities_give_the_steps_of_their_logits(
    activation, outputs, loss, jit_compile, rng, float64
):
    x, y = rng.normal(size=(20, INPUTS)), rng.integers(outputs + 1 if outputs == 1 else 3, size=20)
    found = []
    for last, is_of_logits in ((activation, False), (None, True)):
        keras.utils.set_random_seed(0)
        model = _network(outputs=outputs)
        if last:
            model.add(keras.layers.Activation(last))
        optimizer = gdopt.LevenbergMarquardt(iterations_per_step=5, jit_compile=jit_compile)
        _attached(model, optimizer, loss(from_logits=is_of_logits))
        model.train_on_batch(x, y[:, None])
        found.append((_weights(model), optimizer.step_metrics["damping"]))
    np.testing.assert_allclose(*(weights for weights, _ in found), rtol=1e-8, atol=1e-8)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


@pytest.mark.slow
def test_squares_of_probabilities_are_least_squares(rng, float64):
    x, y = rng.normal(size=(12, INPUTS)), np.eye(3)[rng.integers(3, size=12)]
    model = _network(outputs=3)
    model.add(keras.layers.Softmax())
    model.compile("sgd", "mse")
    loss = BatchLoss(ModelFunction(model), Batch(tf.constant(x), tf.constant(y)))
    weights = loss.joined([v.value for v in model.trainable_variables])
    ways = ways_to_the_matrix(loss)
    assert ways.by_samples and not any(ways.activations)
    matrix = GaussNewton(loss, ways).matrix(weights).numpy()
    assert np.linalg.eigvalsh(matrix)[0] > -1e-12 < np.max(np.diag(matrix))


def test_conjugate_gradients_never_build_the_matrix(rng, monkeypatch):
    def built(*_):
        raise AssertionError

    monkeypatch.setattr(GaussNewton, "matrix", built)
    optimizer = gdopt.LevenbergMarquardt(solver="cg", **PLAIN)
    model = _attached(_network(), optimizer)
    model.train_on_batch(rng.normal(size=(9, 2)), rng.normal(size=(9, 2)))
    assert optimizer.status == "accepted"


class Sampled(keras.Model):
    """At points of its own, drawn without a seed of the model's; or as many as there are data."""

    def __init__(self, kind):
        super().__init__()
        self.network = _network(outputs=1)
        self.kind = kind

    def call(self, x):
        return self.network(x)

    def residuals(self, x, **_):
        u = self.network(x) - 1.0
        if self.kind == "random":
            return u, self.network(keras.random.uniform((6, INPUTS)))
        grid = tf.reshape(u, (5, 4))
        return u, grid[1:] - grid[:-1]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return sum(tf.reduce_mean(part**2) for part in self.residuals(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "grid"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_residuals_that_draw_or_know_how_many_samples_there_are(kind, jit_compile, rng):
    x = rng.normal(size=(20, INPUTS)).astype("float32")
    optimizer = gdopt.LevenbergMarquardt(iterations_per_step=3, jit_compile=jit_compile)
    model = Sampled(kind)
    model.compile(optimizer)
    optimizer.attach(model, residuals=model.residuals)
    before = float(model.compute_loss(x))
    losses = [float(model.train_on_batch(x)) for _ in range(4)]
    assert np.isfinite(losses).all() and losses[-1] < 0.5 * before


@pytest.mark.slow
@pytest.mark.parametrize("sample_weight", [np.ones(9, "int64"), np.ones(9, bool)])
def test_sample_weights_that_are_no_floats(sample_weight, rng):
    optimizer = gdopt.LevenbergMarquardt(**PLAIN)
    model = _attached(_network(), optimizer)
    x, y = rng.normal(size=(9, 2)), rng.normal(size=(9, 2))
    model.fit(x, y, sample_weight=sample_weight, batch_size=9, verbose=0)
    assert optimizer.status == "accepted"


class _MixedIds(keras.layers.Layer):
    def call(self, x):
        return x + keras.ops.mean(x, axis=0, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [True, False])
def test_ids_tell_whether_samples_stand_apart(mixed, rng):
    layers = [keras.layers.Embedding(5, 3), keras.layers.Flatten(), keras.layers.Dense(1)]
    mixing = [_MixedIds()] if mixed else []
    model = keras.Sequential([keras.Input((2,), dtype="int32"), *layers[:2], *mixing, layers[2]])
    model.compile("sgd", "mse")
    x, y = rng.integers(5, size=(9, 2)), rng.normal(size=(9, 1)).astype("float32")
    loss = BatchLoss(ModelFunction(model), Batch(tf.constant(x), tf.constant(y)))
    assert bool(ways_to_the_matrix(loss).by_samples) is not mixed


@pytest.mark.slow
def test_sequences_of_any_length(rng):
    """Their length is not known while the step is traced."""
    model = keras.Sequential([keras.Input((None, 1)), keras.layers.Dense(1)])
    optimizer = gdopt.LevenbergMarquardt(iterations_per_step=5, **PLAIN)
    _attached(model, optimizer)
    x = tf.constant(rng.normal(size=(6, 3, 1)), "float32")
    spec = tf.TensorSpec((None, None, 1), "float32")
    data = tf.data.Dataset.from_generator(lambda: iter([(x, 2 * x)]), output_signature=(spec, spec))
    for _ in range(3):
        model.fit(data, verbose=0)
    assert model.evaluate(data, verbose=0) < 1e-6


@pytest.fixture
def graph_optimizer():
    """TensorFlow optimizes graphs, as it does for users; see conftest.py."""
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
    yield
    tf.config.optimizer.set_experimental_options(before)


@pytest.mark.parametrize("solver", [slow("exact"), "cg"])
def test_a_loss_that_is_not_convex_raises_the_damping(solver, float64, graph_optimizer):
    """And does not pass for one that has converged."""
    optimizer = gdopt.LevenbergMarquardt(solver=solver, iterations_per_step=30, **PLAIN)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[2.0]])])
    _attached(model, optimizer, lambda y, z: -keras.ops.exp(-((z - y) ** 2)))
    model.fit(np.ones((3, 1)), np.zeros((3, 1)), batch_size=3, epochs=4, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], 0.0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_infinite_curvature_is_a_failed_step(jit_compile, float64):
    optimizer = gdopt.LevenbergMarquardt(jit_compile=jit_compile)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[1.0]])])
    _attached(model, optimizer, lambda y, z: keras.ops.abs(z - y) ** 1.5)
    model.train_on_batch(np.array([[1.0], [1.0]]), np.array([[1.0], [0.0]]))
    assert "no step" in optimizer.status
    np.testing.assert_array_equal(model.get_weights()[0], 1.0)


# --- where it ends -----------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e12, slow(1e-9)])
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
@pytest.mark.parametrize(("floatx", "bound"), [("float64", 1e-8), ("float32", 1e-5)])
def test_the_test_problem(floatx, bound):
    """np.sinc(10 x), 61 weights, 2,200 iterations from five starts."""
    keras.backend.set_floatx(floatx)
    x = np.linspace(-1, 1, 2000)[:, None]
    losses = []
    for seed in range(5):
        keras.utils.set_random_seed(seed)
        optimizer = gdopt.LevenbergMarquardt(iterations_per_step=100, jit_compile=True)
        model = _attached(_network(units=20, outputs=1, inputs=1), optimizer)
        history = model.fit(x, np.sinc(10 * x), batch_size=2000, epochs=22, verbose=0).history
        losses.append(history["loss"][-1])
    assert np.median(losses) <= bound, losses


@pytest.mark.slow
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


def test_it_has_no_learning_rate():
    with pytest.raises(ValueError, match="does not take `learning_rate`"):
        gdopt.LevenbergMarquardt(learning_rate=0.1)


def test_too_many_weights(rng):
    model = _attached(_network(units=2000), gdopt.LevenbergMarquardt(solver="exact"))
    with pytest.raises(
        ValueError, match=r'at most 8,192 weights. Use `solver="cg"`.* 10,002 weights'
    ):
        model.optimizer.build(model.trainable_variables)


@pytest.mark.parametrize("loss", ["mae", "hinge"])
def test_losses_without_curvature(loss, rng):
    model = _attached(_network(), gdopt.LevenbergMarquardt(**PLAIN), loss)
    with pytest.raises(ValueError, match=rf"linear in the model's outputs.*'{loss}'"):
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
