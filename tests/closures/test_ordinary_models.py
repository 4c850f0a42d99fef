"""Models that closures train as Keras's `fit` does, or refuse in words."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_gdopt as gdopt
from tests.closures.problems import model_of, point_of, step
from tests.optimizer_cases import closure_classes
from tests.parameters import slow

every_closure = pytest.mark.parametrize("cls", closure_classes(), ids=lambda cls: cls.__name__)
every_closure_alike = pytest.mark.parametrize(
    "cls",
    [cls if cls is gdopt.LBFGS else slow(cls) for cls in closure_classes()],
    ids=lambda cls: cls.__name__,
)

X = np.linspace(-1, 1, 40, dtype="float32")[:, None]


def _mlp(**arguments):
    return keras.Sequential(
        [keras.Input((1,)), layers.Dense(3, "tanh", name="body", **arguments), layers.Dense(1)]
    )


def _attached(model, optimizer, loss=None, **arguments):
    model.compile(optimizer, loss, **arguments)
    optimizer.attach(model)
    return model


def _step(model, x=X, y=X**2, **arguments):
    return model.train_on_batch(x, y, return_dict=True, **arguments)


# --- refused in words ---------------------------------------------------------------------


@every_closure
def test_constraints_are_refused_by_the_variables_name(cls):
    message = r"constraints.*'.*body/bias'.*UnitNorm"
    with pytest.raises(ValueError, match=message):
        _attached(_mlp(bias_constraint="unit_norm"), cls(), "mse")
    unbuilt = keras.Sequential([layers.Dense(1, bias_constraint="unit_norm", name="body")])
    _attached(unbuilt, cls(), "mse")
    with pytest.raises(ValueError, match=message):
        _step(unbuilt)
    if not cls.takes_bounds:
        with pytest.raises(ValueError, match=r"does not take constraints.*LBFGS.*NonNeg"):
            _attached(_mlp(bias_constraint="non_neg"), cls(), "mse")
    frozen = _mlp(bias_constraint="unit_norm")
    frozen.layers[0].trainable = False
    _attached(frozen, cls(), "mse")


@every_closure
def test_a_model_without_trainable_weights_is_refused(cls):
    model = _mlp()
    model.trainable = False
    with pytest.raises(ValueError, match="needs trainable weights"):
        _attached(model, cls(), "mse")


@every_closure
def test_an_optimizer_is_refused_for_other_weights(cls):
    optimizer = cls(jit_compile=False)
    model = _mlp()
    model.layers[0].trainable = False
    _attached(model, optimizer, "mse")
    optimizer.build(model.trainable_variables)
    message = r"compile with a new optimizer\. Received: the variable '.*kernel'"
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match=message):
        _attached(model, optimizer, "mse")
    with pytest.raises(ValueError, match=message):
        _attached(_mlp(), optimizer, "mse")
    shared = cls(jit_compile=False)  # by two models before it has any weights
    first, second = _attached(_mlp(), shared, "mse"), _attached(_mlp(), shared, "mse")
    shared.build(first.trainable_variables)
    with pytest.raises(ValueError, match=message):
        _step(second)


def test_a_train_step_is_named_before_a_missing_loss():
    class Own(keras.Sequential):
        def train_step(self, data):
            return {}

    model = Own([keras.Input((1,)), layers.Dense(1)])
    for optimizer in (gdopt.LBFGS(), gdopt.Adam()):
        model.compile(optimizer)
        with pytest.raises(ValueError, match="has a `train_step` of its own"):
            gdopt.Gadam(model) if type(optimizer) is gdopt.Adam else optimizer.attach(model)


# --- losses -------------------------------------------------------------------------------


class AddsLoss(layers.Layer):
    def call(self, pair):
        self.add_loss(keras.ops.mean((pair[0] - 2 * pair[1]) ** 2))
        return pair[0]


def _only_add_loss():
    inputs = keras.Input((1,))
    return keras.Model(inputs, AddsLoss()([layers.Dense(1)(inputs), inputs]))


@pytest.mark.slow
def test_a_loss_that_only_layers_add():
    model = _attached(_only_add_loss(), gdopt.LBFGS(iterations_per_step=20, jit_compile=False))
    assert model.train_on_batch(X) < 1e-6
    model = _only_add_loss()
    model.compile(gdopt.Adam(0.1))
    gadam = gdopt.Gadam(model, 2, seed=1)
    losses = gadam.fit(X, batch_size=10, generations=2, verbose=0).history["loss"]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("inputs", [1, 2])
def test_no_loss_at_all(inputs):
    inputs = {f"x{i}": keras.Input((1,)) for i in range(inputs)}
    model = keras.Model(inputs, layers.Dense(1)(sum(inputs.values())))
    for optimizer in (gdopt.LBFGS(), gdopt.Adam()):
        model.compile(optimizer)
        with pytest.raises(ValueError, match="must be compiled with a loss"):
            gdopt.Gadam(model) if type(optimizer) is gdopt.Adam else optimizer.attach(model)


def test_no_loss_of_a_model_that_cannot_be_asked():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    model = _attached(Subclassed(), gdopt.LBFGS(jit_compile=False))
    with pytest.raises(ValueError, match="No loss to compute") as raised:
        model.fit(X, verbose=0)
    assert len(str(raised.value).splitlines()) < 4


class Tracks(keras.Model):
    """A model whose `compute_loss` has a metric of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tracker = keras.metrics.Mean("tracked")

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.tracker.update_state(loss)
        return loss


@pytest.mark.parametrize(
    "arguments",
    [
        slow({}),
        slow({"loss_weights": {"a": 3.0, "b": 0.5}}),
        {"loss_weights": {"a": 3.0, "b": 0.5}, "run_eagerly": True},
    ],
    ids=["plain", "weighted", "eager"],
)
def test_history_has_the_losses_that_evaluate_has_afterwards(arguments):
    inputs = keras.Input((1,))
    hidden = layers.Dense(4, "tanh")(inputs)
    outputs = {"a": layers.Dense(1, name="a")(hidden), "b": layers.Dense(1, name="b")(hidden)}
    model = _attached(
        Tracks(inputs, outputs),
        gdopt.LBFGS(iterations_per_step=3, jit_compile=False),
        {"a": "mse", "b": "mae"},
        metrics={"a": "mae"},
        **arguments,
    )
    weights = {"a": np.linspace(0, 1, 40), "b": np.linspace(1, 0, 40)}
    data = {"x": X, "y": {"a": X, "b": X**2}, "sample_weight": weights, "verbose": 0}
    history = model.fit(batch_size=40, **data).history
    expected = model.evaluate(batch_size=40, return_dict=True, **data)
    assert {"loss", "a_loss", "b_loss", "tracked"} < set(history)
    assert history["a_loss"][0] > 0
    for name, value in expected.items():
        assert history[name][0] == pytest.approx(value, rel=1e-5), name


# --- dtypes -------------------------------------------------------------------------------


@every_closure_alike
def test_weights_of_two_dtypes(cls):
    class Model(keras.Model):
        def __init__(self):
            super().__init__(dtype="float64")
            self.a = self.add_weight(shape=(1,), dtype="float64", initializer="zeros")
            self.b = self.add_weight(shape=(1,), dtype="float32", initializer="zeros")
            self.built = True

        def call(self, x):
            return x * self.a + keras.ops.cast(self.b, "float64")

    model = _attached(Model(), cls(iterations_per_step=20, jit_compile=False), "mse")
    _step(model, y=2 * X + 1)
    assert model.a.numpy() == pytest.approx(2, abs=1e-3)
    assert model.b.numpy() == pytest.approx(1, abs=1e-3)
    norms = [metrics["weight_norm"] for metrics in model.optimizer.variable_metrics.values()]
    assert norms == pytest.approx([2, 1], abs=1e-3)


# --- frozen weights -----------------------------------------------------------------------


def _followed(optimizer, order, eager):
    """Which of both kernels each `fit` moves, for an order of actions."""
    model, moved = _mlp(), []
    for action in order:
        if action == "compile":
            model.compile(optimizer, "mse", run_eagerly=eager)
            getattr(optimizer, "attach", lambda model: None)(model)
        elif action == "build":
            optimizer.build(model.trainable_variables)
        elif action == "fit":
            before = model.get_weights()
            model.fit(X, X**2, batch_size=40, verbose=0)
            pairs = zip(model.get_weights(), before, strict=True)
            moved.append([bool(np.any(new != old)) for new, old in pairs][::2])
        else:
            model.layers[0].trainable = False
    return moved


@pytest.mark.parametrize(
    ("order", "eager"),
    [
        slow("compile freeze fit", False),
        slow("compile build freeze fit", False),
        ("compile fit freeze fit", True),
        slow("compile fit freeze fit", False),
        slow("compile fit freeze compile fit", False),
        slow("compile fit freeze compile fit", True),
    ],
)
@every_closure_alike
def test_frozen_weights_stay_where_keras_leaves_them(cls, order, eager):
    optimizer = cls(iterations_per_step=3, jit_compile=False)
    expected = _followed(keras.optimizers.Adam(0.1), order.split(), eager)
    assert _followed(optimizer, order.split(), eager) == expected


# --- units --------------------------------------------------------------------------------

EXACT, COMPILED = {"solver": "exact"}, {"solver": "exact", "jit_compile": True}
KINDS = [
    (gdopt.LBFGS, {}),
    (gdopt.ConjugateGradient, {}),
    (gdopt.Newton, EXACT),
    (gdopt.Newton, {"solver": "cg"}),
]


def _path(cls, arguments, function, start):
    optimizer = cls(**{"jit_compile": False, "gradient_tolerance": 0.0, **arguments})
    model = model_of(function, start, optimizer)
    return np.array([(step(model), point_of(model))[1] for _ in range(4)])


def _valley(x):
    return (x[0] - 1) ** 2 + 3 * (x[1] + x[0]) ** 2 + 0.5 * x[1] ** 4 + (x[2] - x[1]) ** 2


START = (-1.0, 2.0, 0.5)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [KINDS[0], *(slow(*kind) for kind in KINDS[1:4]), slow(gdopt.Newton, COMPILED)],
)
def test_the_unit_of_the_loss_does_not_matter(cls, arguments):
    """In float32. The first step of L-BFGS and CG is min(1, 1/|g|), so theirs only grows."""
    expected = _path(cls, arguments, _valley, START)
    units = [2.0**40] if cls is not gdopt.Newton else [2.0**40, 2.0**-40]
    for unit in units:
        received = _path(cls, arguments, lambda x, u=unit: u * _valley(x), START)
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [EXACT, COMPILED], ids=["plain", "compiled"])
def test_the_units_of_features_do_not_matter_to_newton(arguments):
    units = np.array([2.0**14, 1.0, 2.0**-6], "float32")
    expected = _path(gdopt.Newton, arguments, _valley, START)
    received = _path(gdopt.Newton, arguments, lambda x: _valley(x * units), START / units)
    np.testing.assert_allclose(received * units, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        KINDS[0],
        *(slow(*kind) for kind in KINDS[1:3]),
        KINDS[3],
        slow(gdopt.Newton, COMPILED),
        slow(gdopt.LBFGS, {"line_search": "armijo"}),
        slow(gdopt.LBFGS, {"line_search": "exact"}),
        slow(gdopt.Newton, {"line_search": "armijo"}),
        slow(gdopt.ConjugateGradient, {"line_search": "exact"}),
    ],
)
def test_dollars_beside_square_metres_until_rounding_ends_it(cls, arguments):
    """Least squares has 0.010145. Without a preconditioner, CG needs float64 for that.

    Where rounding ends L-BFGS depends on the order in which a processor adds: at times it is
    0.025 or, as with torch's, 0.094. Steepest descent is at 11.9.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)) * [20000.0, 30.0, 1.0]
    y = x @ [1e-3, 0.5, 2.0] + 3.0 + rng.normal(size=400) * 0.1
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, kernel_initializer="zeros")])
    optimizer = cls(**{"iterations_per_step": 200, "jit_compile": False, **arguments})
    _attached(model, optimizer, "mse")
    batch = tf.constant(x, "float32"), tf.constant(y, "float32")
    loss = model.train_on_batch(*batch)
    highest = {gdopt.Newton: 0.01018, gdopt.LBFGS: 0.1, gdopt.ConjugateGradient: 0.2}
    assert loss < highest[cls]
    assert optimizer.converged
    weights = model.get_weights()
    assert model.train_on_batch(*batch) == pytest.approx(loss, rel=1e-6)
    assert optimizer.converged and optimizer.step_metrics["evaluations"] <= 3
    assert "rounding" in optimizer.line_search_status
    for received, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(received, expected)
    # Another batch begins anew.
    model.train_on_batch(batch[0], batch[1] + 1.0)
    assert optimizer.step_metrics["steps_made"] > 0


@every_closure_alike
def test_state_of_version_0_1_0_loads(cls):
    """Which did not save how near rounding has ended the iterations."""
    optimizer = cls(jit_compile=False)
    model = _attached(_mlp(), optimizer, "mse")
    _step(model)
    state = {}
    optimizer.save_own_variables(state)
    del state["progress.0"]
    for build in (False, True):
        other = cls(jit_compile=False)
        if build:
            other.build(model.trainable_variables)
        other.load_own_variables(state)
        other.build(model.trainable_variables)
        for name, array in state.items():
            again = {}
            other.save_own_variables(again)
            np.testing.assert_array_equal(again[name], array)


# --- tolerances ---------------------------------------------------------------------------


@every_closure_alike
@pytest.mark.parametrize("unit", [1e12, slow(1.0), slow(1e-9)])
def test_it_converges_whatever_the_unit_of_the_targets(cls, unit, rng):
    """Not at once, and to the least squares."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    x = rng.normal(size=(30, 3))
    y = unit * (x @ rng.normal(size=(3, 1)) + 0.1 * rng.normal(size=(30, 1)))
    ones = np.concatenate([x, np.ones((30, 1))], axis=1)
    expected, *_ = np.linalg.lstsq(ones, y, rcond=None)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, kernel_initializer="zeros")])
    model.compile(cls(iterations_per_step=100, jit_compile=False), "mse")
    model.optimizer.attach(model)
    model.fit(x, y, batch_size=30, epochs=3, verbose=0)
    assert model.optimizer.converged and model.optimizer.status == "accepted"
    found = np.concatenate([w.ravel() for w in model.get_weights()])
    np.testing.assert_allclose(found / unit, expected[:, 0] / unit, rtol=1e-6, atol=1e-6)
    step_metrics = model.optimizer.step_metrics
    assert step_metrics["evaluations"] == 1 and step_metrics["steps_made"] == 0  # at the third step


@every_closure_alike
@pytest.mark.parametrize("bad", [1e30, slow(np.nan)])
def test_the_gradient_of_a_loss_that_is_not_finite_is_no_measure(cls, bad):
    """Where the square of a target overflows, the gradient need not do so."""
    optimizer = cls(jit_compile=False)
    model = _attached(_mlp(), optimizer, "mse")
    _step(model, y=np.full_like(X, bad))
    assert not optimizer.converged
    _step(model)
    assert not optimizer.converged and optimizer.step_metrics["steps_made"] == 1


@every_closure_alike
def test_other_data_have_a_gradient_of_their_own_to_begin_with(cls):
    optimizer = cls(jit_compile=False)
    model = _attached(_mlp(), optimizer, "mse")
    start = model.get_weights()
    _step(model, y=1e8 * X)
    model.set_weights(start)
    _step(model, y=X)
    assert not optimizer.converged and optimizer.step_metrics["steps_made"] == 1


@every_closure_alike
@pytest.mark.parametrize(
    ("arguments", "is_relative"),
    [
        slow({}, True),
        ({"relative_gradient_tolerance": 0.5}, True),
        ({"gradient_tolerance": 1e3}, False),
        slow({"gradient_tolerance": 0.0}, None),
        slow({"gradient_tolerance": 0.0, "relative_gradient_tolerance": 0.5}, True),
    ],
)
def test_what_is_converged(cls, arguments, is_relative):
    """By a part of the first gradient, by a number, or not at all."""
    optimizer = cls(jit_compile=False, **arguments)
    model = _attached(_mlp(), optimizer, "mse")
    _step(model)
    first = optimizer._progress.numpy()[-1]
    assert first > 0
    if is_relative is False:
        assert optimizer.converged
        assert optimizer.step_metrics["steps_made"] == 0
        return
    for _ in range(60):
        _step(model)
        largest = optimizer._progress.numpy()[-2]
        tolerance = arguments.get("relative_gradient_tolerance", 1e-9)
        if is_relative and largest <= tolerance * first:
            assert optimizer.converged and optimizer.status == "accepted"
            break
        if optimizer.converged:
            assert optimizer.status != "accepted"
            break
    assert optimizer._progress.numpy()[-1] == first
    again = cls.from_config(optimizer.get_config())
    assert again.gradient_tolerance == arguments.get("gradient_tolerance")
    assert again.relative_gradient_tolerance == arguments.get("relative_gradient_tolerance")


@every_closure_alike
def test_the_end_of_data_of_unknown_length_is_no_step(cls):
    model = _attached(_mlp(), cls(jit_compile=False), "mse")
    data = tf.data.Dataset.from_tensor_slices((X, X**2)).filter(lambda *_: True).batch(20)
    model.fit(data, epochs=3, verbose=0)
    assert int(model.optimizer.iterations) == 2 * 3
