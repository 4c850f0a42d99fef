"""The algorithms against their equations, analytic optima and SciPy."""

import functools

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.closures.minimize import Point
from tests.closures.problems import PROBLEMS, gradient, hessian_times, model_of, point_of, step
from tests.parameters import slow
from tests.reference import bfgs

pytestmark = pytest.mark.usefixtures("float64")

# Plain operations: what is compiled is tested elsewhere.
EXACT = {"line_search": "exact", "gradient_tolerance": 0.0, "jit_compile": False}


def _quadratic(size, rng, condition=5.0):
    """A strictly convex quadratic, its Hessian and where its minimum is.

    With a condition of 50 and 20 weights, rounding keeps the textbook's linear conjugate
    gradient itself from 1e-10.
    """
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    hessian = basis @ np.diag(np.geomspace(1.0, condition, size)) @ basis.T
    hessian = 0.5 * (hessian + hessian.T)
    minimum = rng.normal(size=size)

    def function(x):
        moved = x - minimum
        return 0.5 * tf.reduce_sum(moved * tf.linalg.matvec(hessian, moved)) + 3.0

    return function, hessian, minimum


@pytest.mark.parametrize("size", [slow(1), slow(2), 8, slow(20)])
@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda n: gdopt.ConjugateGradient(beta="polak_ribiere", **EXACT), 0),
        (lambda n: gdopt.ConjugateGradient(beta="fletcher_reeves", **EXACT), 0),
        (lambda n: gdopt.LBFGS(memory=n, **EXACT), 1),
    ],
    ids=["polak_ribiere", "fletcher_reeves", "lbfgs"],
)
def test_a_quadratic_of_n_weights_takes_n_iterations(make, more, size, rng):
    function, _, minimum = _quadratic(size, rng)
    start = rng.normal(size=size)
    optimizer = make(size)
    optimizer.iterations_per_step = size + more
    model = model_of(function, start, optimizer)
    step(model)
    at_start, at_end = (np.linalg.norm(gradient(function, x)[1]) for x in (start, point_of(model)))
    assert at_end <= 1e-10 * at_start
    np.testing.assert_allclose(point_of(model), minimum, atol=1e-9)


@pytest.mark.slow
def test_both_betas_go_the_same_way_on_a_quadratic(rng):
    function, *_ = _quadratic(10, rng)
    start = rng.normal(size=10)
    ways = []
    for beta in ("polak_ribiere", "fletcher_reeves"):
        model = model_of(function, start, gdopt.ConjugateGradient(beta=beta, **EXACT))
        ways.append([(step(model), point_of(model))[1] for _ in range(6)])
    np.testing.assert_allclose(ways[0], ways[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("line_search", "jit_compile"),
    [
        slow("wolfe", True),
        ("armijo", False),
        slow("exact", False),
        slow("wolfe", False),
        slow("armijo", True),
        slow("exact", True),
    ],
)
def test_newton_takes_one_iteration_on_a_quadratic(line_search, jit_compile, rng):
    function, _, minimum = _quadratic(12, rng)
    start = rng.normal(size=12)
    optimizer = gdopt.Newton(solver="exact", line_search=line_search, jit_compile=jit_compile)
    model = model_of(function, start, optimizer)
    step(model)
    at_start, at_end = (np.linalg.norm(gradient(function, x)[1]) for x in (start, point_of(model)))
    assert at_end <= 1e-10 * at_start
    np.testing.assert_allclose(point_of(model), minimum, atol=1e-10)


# --- the equations ------------------------------------------------------------------------


def _followed(function, start, optimizer, count):
    """Points and gradients of each iteration, and the metrics."""
    model = model_of(function, start, optimizer)
    points, metrics = [np.array(start)], []
    for _ in range(count):
        metrics.append(step(model))
        points.append(point_of(model))
    return points, [gradient(function, x)[1] for x in points], metrics


@pytest.mark.parametrize("beta", ["polak_ribiere", "fletcher_reeves"])
def test_conjugate_gradient_follows_its_equations(beta):
    function = PROBLEMS[0].function
    points, gradients, metrics = _followed(
        function, [-1.2, 1.0], gdopt.ConjugateGradient(beta=beta, jit_compile=False), 8
    )
    direction = -gradients[0]
    for k in range(8):
        expected = points[k] + metrics[k]["step_length"] * direction
        np.testing.assert_allclose(points[k + 1], expected, rtol=1e-10)
        new, old = gradients[k + 1], gradients[k]
        change = new - old if beta == "polak_ribiere" else new
        expected = max(change @ new / (old @ old), 0.0)
        assert metrics[k]["beta"] == pytest.approx(expected, rel=1e-9)
        direction = -new + expected * direction
        if direction @ new >= 0:
            direction = -new


@pytest.mark.parametrize("problem", [PROBLEMS[0], slow(PROBLEMS[3])], ids=str)
@pytest.mark.parametrize("self_scaled", [True, False])
def test_bfgs_follows_its_equations(self_scaled, problem):
    points, gradients, metrics = _followed(
        problem.function, problem.start, gdopt.BFGS(self_scaled=self_scaled, jit_compile=False), 15
    )
    inverse, scalings = None, []
    for k, step_metrics in enumerate(metrics):
        s, alpha = points[k + 1] - points[k], step_metrics["step_length"]
        direction = -gradients[k] if inverse is None else -inverse @ gradients[k]
        np.testing.assert_allclose(s, alpha * direction, rtol=1e-6, atol=1e-12)
        y = gradients[k + 1] - gradients[k]
        inverse, scaling = bfgs.updated(inverse, s, y, alpha, gradients[k], self_scaled=self_scaled)
        assert step_metrics["scaling"] == pytest.approx(scaling, rel=1e-6)
        assert step_metrics["updates"] == k + 1
        scalings.append(scaling)
    assert scalings[0] == 1.0
    assert (min(scalings) < 0.9) == self_scaled


@pytest.mark.slow
def test_self_scaled_bfgs_goes_further_than_the_plain_one():
    """On y = sinc(10 x) with 61 weights, of which plain BFGS leaves a few 1e-4."""
    x = np.linspace(-1, 1, 2000)[:, None]

    def median_loss(self_scaled):
        losses = []
        for seed in range(3):
            keras.utils.set_random_seed(seed)
            hidden = keras.layers.Dense(20, activation="tanh")
            model = keras.Sequential([keras.Input((1,)), hidden, keras.layers.Dense(1)])
            optimizer = gdopt.BFGS(self_scaled=self_scaled, iterations_per_step=3000)
            model.compile(optimizer, "mse")
            optimizer.attach(model)
            losses.append(float(model.train_on_batch(x, np.sinc(10 * x))))
        return np.median(losses)

    self_scaled = median_loss(True)
    assert self_scaled <= 5e-6
    assert self_scaled <= median_loss(False) / 20


def test_bfgs_begins_anew_without_scaling():
    """After a search that failed: the matrix did not make the next step."""
    optimizer = gdopt.BFGS(jit_compile=False)
    memory = {
        "inverse_hessian": tf.constant(np.full((4, 4), 7.0)),
        "updates": tf.constant(5),
        "scaling": tf.constant(0.5, tf.float64),
    }
    forgotten = optimizer.forget(memory)
    point = tf.constant([3.0, -1.0, 0.5, 1.0], tf.float64)
    gradients = tf.constant([4.0, 1.0, -2.0, 0.5], tf.float64)
    before = Point(point, tf.constant(1.0, tf.float64), gradients)
    proposal = optimizer.direction(before, forgotten, tf.constant(1.0, tf.float64), None)
    np.testing.assert_array_equal(proposal.direction, -gradients)
    assert proposal.first_step < 1.0
    s, y = -0.1 * gradients.numpy(), np.array([-0.3, -0.2, 0.4, 0.1])
    after = Point(point + s, before.loss, gradients + y)
    kept = optimizer.remember(proposal.memory, before, after, proposal)
    expected, _ = bfgs.updated(None, s, y, 0.1, gradients.numpy(), self_scaled=True)
    np.testing.assert_allclose(kept["inverse_hessian"], expected, rtol=1e-12)
    assert (int(kept["updates"]), float(kept["scaling"])) == (1, 1.0)


def test_bfgs_leaves_out_a_pair_without_curvature():
    points, _, metrics = _followed(
        lambda x: tf.reduce_sum(2.0 * x), [1.0, 1.0], gdopt.BFGS(jit_compile=False), 3
    )
    assert [m["updates"] for m in metrics] == [0, 0, 0]
    assert np.all(np.diff([np.sum(point) for point in points]) < 0)


def test_bfgs_refuses_a_matrix_that_does_not_fit():
    model = keras.Sequential([keras.Input((90,)), keras.layers.Dense(91)])
    optimizer = gdopt.BFGS()
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match=r"at most 8,192 weights. Use `LBFGS`.* 8,281 weights"):
        optimizer.build(model.trainable_variables)


def test_lbfgs_with_a_long_memory_is_bfgs():
    """Against the inverse Hessian as a matrix, updated as Nocedal and Wright's Eq. 6.17."""
    function = PROBLEMS[3].function
    points, gradients, metrics = _followed(
        function, [3.0, -1.0, 0.0, 1.0], gdopt.LBFGS(memory=20, jit_compile=False), 12
    )
    pairs = []
    for k in range(12):
        inverse = np.eye(4)
        if pairs:
            s, y = pairs[-1]
            inverse *= s @ y / (y @ y)
        for s, y in pairs:
            rho = 1 / (s @ y)
            left = np.eye(4) - rho * np.outer(s, y)
            inverse = left @ inverse @ left.T + rho * np.outer(s, s)
        moved = points[k + 1] - points[k]
        expected = -metrics[k]["step_length"] * inverse @ gradients[k]
        np.testing.assert_allclose(moved, expected, rtol=1e-7, atol=1e-12)
        pairs.append((moved, gradients[k + 1] - gradients[k]))
        assert metrics[k]["memory_pairs"] == len(pairs)


@pytest.mark.slow
def test_lbfgs_forgets_the_oldest_pairs():
    function = PROBLEMS[4].function
    points, gradients, metrics = _followed(
        function, [1.0] * 10, gdopt.LBFGS(memory=3, jit_compile=False), 8
    )
    for k in (5, 6, 7):
        s = [points[i + 1] - points[i] for i in range(k - 3, k)]
        y = [gradients[i + 1] - gradients[i] for i in range(k - 3, k)]
        inverse = np.eye(10) * (s[-1] @ y[-1]) / (y[-1] @ y[-1])
        for a, b in zip(s, y, strict=True):
            left = np.eye(10) - np.outer(a, b) / (a @ b)
            inverse = left @ inverse @ left.T + np.outer(a, a) / (a @ b)
        expected = -metrics[k]["step_length"] * inverse @ gradients[k]
        np.testing.assert_allclose(points[k + 1] - points[k], expected, rtol=1e-6, atol=1e-12)
    assert [m["memory_pairs"] for m in metrics] == [1, 2, 3, 3, 3, 3, 3, 3]


def test_lbfgs_leaves_out_a_pair_without_curvature():
    """On a line the gradient never changes: no pair may be kept, and the loss must fall."""
    points, _, metrics = _followed(
        lambda x: tf.reduce_sum(2.0 * x), [1.0, 1.0], gdopt.LBFGS(jit_compile=False), 3
    )
    assert [m["memory_pairs"] for m in metrics] == [0, 0, 0]
    assert points[3].sum() < points[2].sum() < points[0].sum()


@pytest.mark.parametrize("jit_compile", [slow(True), False])
def test_newton_descends_where_the_hessian_is_not_positive(jit_compile):
    # A saddle at 0, minima at x = (+-1, 0).
    def function(x):
        return x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2

    for solver in ("exact", "cg"):
        optimizer = gdopt.Newton(
            solver=solver, iterations_per_step=30, gradient_tolerance=1e-10, jit_compile=jit_compile
        )
        model = model_of(function, [0.1, 0.5], optimizer)
        step(model)
        np.testing.assert_allclose(point_of(model), [1.0, 0.0], atol=1e-9)
        assert optimizer.converged


@pytest.mark.slow
def test_newton_takes_the_pseudo_inverse_of_a_singular_hessian():
    """f = (x + y - 3)^2 + z^2: the nearest of the minima to the start."""

    def function(x):
        return (x[0] + x[1] - 3.0) ** 2 + x[2] ** 2

    optimizer = gdopt.Newton(solver="exact", jit_compile=False)
    model = model_of(function, [1.0, 0.0, 5.0], optimizer)
    metrics = step(model)
    np.testing.assert_allclose(point_of(model), [2.0, 1.0, 0.0], atol=1e-12)
    assert metrics["damping"] == 0.0
    # Compiled it is damped instead, by as little as the decomposition needs.
    optimizer = gdopt.Newton(solver="exact", jit_compile=True, iterations_per_step=5)
    model = model_of(function, [1.0, 0.0, 5.0], optimizer)
    step(model)
    np.testing.assert_allclose(point_of(model), [2.0, 1.0, 0.0], atol=1e-7)


def test_damping_rises_where_the_model_is_wrong_and_falls_where_it_is_right(rng):
    function, hessian, _ = _quadratic(5, rng)
    start = rng.normal(size=5)
    points, gradients, metrics = _followed(
        function, start, gdopt.Newton(damping=2.0, solver="exact", jit_compile=False), 3
    )
    for k, damping in enumerate([2.0, 0.2, 0.02]):
        shifted = hessian + damping * np.eye(5)
        expected = -metrics[k]["step_length"] * np.linalg.solve(shifted, gradients[k])
        np.testing.assert_allclose(points[k + 1] - points[k], expected, rtol=1e-9, atol=1e-13)
        assert metrics[k]["damping"] == pytest.approx(damping / 10)
    # Where the loss falls by less than a quarter of what the quadratic model promises.
    points, gradients, metrics = _followed(
        lambda x: tf.reduce_sum((x**2) ** 0.775), [1.0],
        gdopt.Newton(solver="exact", line_search="armijo", jit_compile=False), 1,
    )  # fmt: skip
    hessian = 1.55 * 0.55
    moved, fell = (points[1] - points[0])[0], abs(points[1][0]) ** 1.55 - 1.0
    assert moved == pytest.approx(-1 / 0.55)
    assert fell / (1.55 * moved + hessian * moved**2 / 2) < 0.25
    assert metrics[0]["damping"] == pytest.approx(1e-3 * hessian)


def test_truncated_newton_solves_as_exactly_as_it_must(rng):
    """The residual of its direction is below the forcing term times the gradient."""
    function, hessian, _ = _quadratic(30, rng, condition=1e4)
    points, gradients, metrics = _followed(
        function, rng.normal(size=30), gdopt.Newton(solver="cg", jit_compile=False), 4
    )
    terms = [0.5]
    for k in range(4):
        direction = (points[k + 1] - points[k]) / metrics[k]["step_length"]
        residual = np.linalg.norm(hessian @ direction + gradients[k])
        assert residual <= terms[k] * np.linalg.norm(gradients[k]) * (1 + 1e-9)
        golden = (1 + 5**0.5) / 2
        term = 0.9 * (np.linalg.norm(gradients[k + 1]) / np.linalg.norm(gradients[k])) ** golden
        safeguard = 0.9 * terms[k] ** golden
        terms.append(min(max(term, safeguard) if safeguard > 0.1 else term, 0.5))
    assert all(m["inner_iterations"] >= 1 for m in metrics)


# --- beside SciPy -------------------------------------------------------------------------

_TOLERANCE = 1e-6


def _evaluations(problem, optimizer):
    """Of loss and gradient, up to the first iterate whose gradient is small."""
    model = model_of(problem.function, problem.start, optimizer)
    count = 1
    for _ in range(300):
        count += step(model)["evaluations"] - 1  # the first is the last one's of the step before
        if np.max(np.abs(gradient(problem.function, point_of(model))[1])) <= _TOLERANCE:
            return count
    raise AssertionError(f"{problem} is not solved: {optimizer.line_search_status}")


def _evaluations_of_scipy(problem, method, options):
    count, at_end = 0, None

    def value_and_gradient(x):
        nonlocal count
        count += 1
        return gradient(problem.function, x)

    def hessian_product(x, vector):
        return hessian_times(problem.function, x, vector)

    def look(x):
        nonlocal at_end
        if np.max(np.abs(gradient(problem.function, x)[1])) <= _TOLERANCE:
            at_end = count
            raise StopIteration

    more = {"hessp": hessian_product} if method == "Newton-CG" else {}
    scipy.optimize.minimize(
        value_and_gradient, np.array(problem.start), jac=True, method=method,
        callback=look, options={"maxiter": 1000, **options}, **more,
    )  # fmt: skip
    return at_end


_BFGS = "BFGS", {"gtol": _TOLERANCE}
_LBFGS = gdopt.LBFGS, "L-BFGS-B", {"ftol": 0.0, "gtol": 0.0}


@pytest.mark.parametrize(
    ("make", "method", "options", "problems"),
    [
        (*_LBFGS, PROBLEMS[:2]),
        slow(*_LBFGS, PROBLEMS),
        slow(functools.partial(gdopt.BFGS, self_scaled=False), *_BFGS, PROBLEMS),
        slow(gdopt.ConjugateGradient, "CG", {"gtol": _TOLERANCE}, PROBLEMS),
        *(
            slow(functools.partial(gdopt.Newton, solver=s), "Newton-CG", {"xtol": 1e-14}, PROBLEMS)
            for s in ("exact", "cg")
        ),
    ],
    ids=["a few", "lbfgs", "bfgs", "cg", "newton", "newton_cg"],
)
def test_as_few_evaluations_as_scipy(make, method, options, problems):
    ratios = {}
    for problem in problems:
        ours = _evaluations(problem, make(gradient_tolerance=0.0, jit_compile=False))
        ratios[str(problem)] = ours / _evaluations_of_scipy(problem, method, options)
    assert np.median(list(ratios.values())) <= 1.3, ratios
    assert max(ratios.values()) <= 2.0, ratios


def test_keras_holds_the_first_point_in_floatx():
    assert keras.config.floatx() == "float64"
    assert point_of(model_of(PROBLEMS[0].function, (1.5, 2.5), gdopt.LBFGS())).dtype == "float64"


@pytest.mark.parametrize("solver", ["exact", slow("cg")])
def test_newton_leaves_where_the_loss_is_almost_flat(solver):
    """There the curvature is 4e-44 and the gradient -1; the minimum of the loss is at 100."""
    optimizer = gdopt.Newton(solver=solver, iterations_per_step=200, jit_compile=False)
    model = model_of(lambda x: 100.0 - x[0] + tf.exp(x[0] - 100.0), (0.0,), optimizer)
    step(model)
    step(model)
    assert point_of(model)[0] == pytest.approx(100.0, abs=1e-6)
