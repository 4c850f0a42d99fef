"""L-BFGS within bounds, against SciPy's L-BFGS-B."""

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import keras_gdopt as gdopt
from tests.closures.problems import gradient, model_of, point_of, step
from tests.parameters import slow

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-8


def _minimized(
    function, start, constraint, jit_compile=False, gradient_tolerance=TOLERANCE, **arguments
):
    optimizer = gdopt.LBFGS(
        iterations_per_step=1000,
        gradient_tolerance=gradient_tolerance,
        jit_compile=jit_compile,
        **arguments,
    )
    model = model_of(function, start, optimizer)
    model.trainable_variables[0].constraint = constraint
    return model, step(model)


def _by_scipy(function, start, constraint):
    lower, upper = (np.broadcast_to(limit, len(start)) for limit in constraint.limits())
    return scipy.optimize.minimize(
        lambda x: gradient(function, x),
        np.clip(start, lower, upper),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(lower, upper, strict=True)),
        options={"ftol": 1e-16, "gtol": TOLERANCE, "maxiter": 5000, "maxfun": 20000},
    )


def _flatness(function, found, constraint):
    """Of the gradient, the largest entry that no bound holds back."""
    lower, upper = constraint.limits()
    slopes = gradient(function, found.x)[1]
    held = ((found.x <= lower) & (slopes > 0)) | ((found.x >= upper) & (slopes < 0))
    return np.max(np.abs(slopes[~held]), initial=0.0)


def _check_optimum(function, model, constraint, found, as_flat=0.0):
    """SciPy's, the conditions of Karush, Kuhn and Tucker, and never out of bounds.

    `as_flat` is the gradient that was asked for; SciPy may end at one that is steeper than 1e-6.
    """
    x = point_of(model)
    lower, upper = constraint.limits()
    assert np.all(x >= lower) and np.all(x <= upper)
    value, slopes = gradient(function, x)
    assert value <= found.fun + 1e-8 * max(1.0, abs(found.fun))
    np.testing.assert_allclose(x, found.x, atol=1e-6)
    inside = (x > lower) & (x < upper)
    assert np.max(np.abs(slopes[inside]), initial=0.0) <= max(1e-6, as_flat)
    assert np.all(slopes[x == lower] >= 0) and np.all(slopes[x == upper] <= 0)


def _quadratic(rng):
    size, condition = rng.integers(5, 50), 10 ** rng.uniform(1, 3)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    curvatures = np.geomspace(1.0, condition, size)
    hessian, slope = basis * curvatures @ basis.T, rng.normal(size=size) * condition**0.25

    def function(x):
        return 0.5 * tf.reduce_sum(x * tf.linalg.matvec(hessian, x)) - tf.reduce_sum(slope * x)

    bounds = gdopt.constraints.Bounds(-rng.uniform(0, 1, size), rng.uniform(0, 1, size))
    return function, rng.normal(size=size), bounds


@pytest.mark.parametrize("seed", [0, *(slow(seed) for seed in range(1, 20))])
def test_bounded_quadratics(seed):
    function, start, bounds = _quadratic(np.random.default_rng(seed))
    found = _by_scipy(function, start, bounds)
    as_flat = max(TOLERANCE, _flatness(function, found, bounds))
    model, metrics = _minimized(function, start, bounds, gradient_tolerance=as_flat)
    _check_optimum(function, model, bounds, found, as_flat)
    at_bounds = np.isin(point_of(model), np.concatenate(bounds.limits()))
    assert 0 < np.sum(at_bounds) < len(start)
    assert metrics["evaluations"] <= 2 * found.nfev
    assert model.optimizer.converged
    free = gradient(function, point_of(model))[1][~at_bounds]
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(free), abs=1e-12)


@pytest.mark.parametrize(
    ("start", "lower", "upper"),
    [((-1.2, 1.0), (-1.5, -0.5), (0.5, 2.0)), slow((-1.0,) * 6, -1.5, 0.8)],
)
@pytest.mark.parametrize("jit_compile", [False, slow(True)])
def test_a_bounded_rosenbrock(start, lower, upper, jit_compile):
    def function(x):
        return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    bounds = gdopt.constraints.Bounds(lower, upper)
    found = _by_scipy(function, start, bounds)
    as_flat = max(TOLERANCE, _flatness(function, found, bounds))
    model, metrics = _minimized(function, start, bounds, jit_compile, as_flat)
    _check_optimum(function, model, bounds, found, as_flat)
    assert metrics["evaluations"] <= 2 * found.nfev


@pytest.mark.parametrize(
    "constraint", [keras.constraints.NonNeg(), slow(gdopt.constraints.Bounds(0))]
)
def test_non_negative_least_squares(constraint, rng):
    """A layer between x and y, beside a bias that is free; by SciPy's own method for it."""
    x = rng.normal(size=(60, 12))
    y = x @ np.maximum(rng.normal(size=(12, 1)), 0) - 1.0 + 0.1 * rng.normal(size=(60, 1))
    optimizer = gdopt.LBFGS(iterations_per_step=500, gradient_tolerance=1e-11, jit_compile=False)
    model = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(1, kernel_constraint=constraint)]
    )
    model.compile(optimizer, "mse")
    optimizer.attach(model)
    model.fit(x, y, batch_size=60, verbose=0)
    both = np.concatenate([x, np.ones((60, 1)), -np.ones((60, 1))], axis=1)
    expected, residual = scipy.optimize.nnls(both, y[:, 0])
    kernel, bias = model.get_weights()
    np.testing.assert_allclose(kernel[:, 0], expected[:12], atol=1e-8)
    np.testing.assert_allclose(bias[0], expected[12] - expected[13], atol=1e-8)
    assert model.evaluate(x, y, batch_size=60, verbose=0) == pytest.approx(residual**2 / 60)
    assert np.any(kernel == 0)


def test_weights_that_begin_out_of_bounds():
    """And one whose minimum lies within them."""
    bounds = gdopt.constraints.Bounds([-1.0, -1.0, 2.0], [1.0, 1.0, np.inf])

    def function(x):
        return tf.reduce_sum((x - [5.0, 0.25, 0.0]) ** 2)

    model, _ = _minimized(function, (-7.0, 9.0, 0.0), bounds)
    np.testing.assert_allclose(point_of(model), [1.0, 0.25, 2.0], atol=1e-8)
    assert model.optimizer.converged


@pytest.mark.slow
def test_frozen_weights_stay_where_they_are(rng):
    optimizer = gdopt.LBFGS(jit_compile=False)
    dense = keras.layers.Dense(1, kernel_constraint="non_neg")
    model = keras.Sequential([keras.Input((2,)), dense, keras.layers.Dense(1)])
    model.compile(optimizer, "mse", run_eagerly=True)
    optimizer.attach(model)
    x, y = rng.normal(size=(8, 2)), rng.normal(size=(8, 1))
    model.train_on_batch(x, y)
    dense.trainable = False
    dense.kernel.assign([[-1.0], [-1.0]])
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(dense.kernel, -1.0)


@pytest.mark.slow
@pytest.mark.parametrize("line_search", ["armijo", "exact"])
def test_the_other_line_searches(line_search):
    function, start, bounds = _quadratic(np.random.default_rng(3))
    model, _ = _minimized(function, start, bounds, line_search=line_search)
    found = _by_scipy(function, start, bounds)
    assert gradient(function, point_of(model))[0] <= found.fun + 1e-8 * abs(found.fun)


def test_bounds_of_other_shapes_do_not_fit():
    optimizer = gdopt.LBFGS(jit_compile=False)
    model = model_of(tf.reduce_sum, (1.0, 2.0), optimizer)
    model.trainable_variables[0].constraint = gdopt.constraints.Bounds([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"must broadcast to the shape of the weights.*\(3,\)"):
        step(model)
