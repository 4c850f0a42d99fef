"""Each alarm is raised by a training that has its disease, and by no healthy one."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.callbacks import TrainingAlarms
from keras_gdopt.callbacks.alarms import ALARMS, Epoch, Overfitting
from keras_gdopt.callbacks.training_alarms import NAMES
from tests.optimizer_cases import closure_classes, every_optimizer_alike
from tests.parameters import slow

PAGE = Path(__file__).parents[2] / "docs" / "training_fails.md"


def _data(samples=160):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 4)).astype("float32")
    y = (np.sin(x) @ rng.normal(size=(4, 1))).astype("float32")
    return x, y


def _mlp(optimizer, *, activation="tanh", depth=1, units=8, loss="mse", outputs=1):
    keras.utils.set_random_seed(1)
    hidden = [
        keras.layers.Dense(units, activation=activation, name=f"hidden_{place}")
        for place in range(depth)
    ]
    last = keras.layers.Dense(outputs, name="last")
    model = keras.Sequential([keras.Input((4,)), *hidden, last])
    model.compile(optimizer, loss)
    return model


def _alarms(model, x, y, *, epochs=2, update_freq=1, batch_size=8, others=(), **arguments):
    alarms = TrainingAlarms(update_freq=update_freq, **arguments)
    fit = {"batch_size": batch_size, "epochs": epochs, "shuffle": False, "verbose": 0}
    validation = others[0] if others else None
    model.fit(x, y, callbacks=[alarms], validation_data=validation, **fit)
    return alarms


# Each disease returns what was raised; the layer and the step where it is known.


def _nonfinite():
    x, y = _data()
    x[8 * 6 + 3, 2] = np.nan  # in the seventh batch
    return _alarms(_mlp(gdopt.Adam()), x, y, update_freq=2), "hidden_0/kernel", 7


def _exploding():
    x, y = _data()
    y[8 * 9 :] *= 1e5  # from the tenth batch on
    return _alarms(_mlp(gdopt.GradientDescent(1e-6)), x, y, update_freq=2), None, 10


def _vanishing():
    x, y = _data()
    model = _mlp(gdopt.Adam(1e-5), activation="sigmoid", depth=14)
    return _alarms(model, x, y), "hidden_0/", None


def _zero():
    x, y = _data()
    model = _mlp(gdopt.Adam(), activation="relu")
    kernel, _ = model.layers[0].get_weights()
    model.layers[0].set_weights([kernel, np.full(8, -100.0)])  # no unit is ever active
    return _alarms(model, x, y), "hidden_0/", None


def _large():
    # Without the constraint the weights would grow until the steps are small beside them.
    model = _mlp(gdopt.Adam(1.0))
    for layer in model.layers:
        layer.kernel.constraint = keras.constraints.MaxNorm(1.0)
    return _alarms(model, *_data(), epochs=3), None, None


def _clipping():
    return _alarms(_mlp(gdopt.Adam(global_clipnorm=1e-4)), *_data(), epochs=2), None, None


def _rate_gone():
    schedule = keras.optimizers.schedules.PolynomialDecay(0.01, 10, 0.0)
    return _alarms(_mlp(gdopt.Adam(schedule)), *_data()), None, 20


def _still():
    return _alarms(_mlp(gdopt.GradientDescent(1e-12)), *_data()), None, 10


def _entropy():
    rng = np.random.default_rng(0)
    x = np.zeros((160, 4), "float32")
    y = rng.integers(0, 3, size=160)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = _mlp(gdopt.Adam(1e-3), loss=loss, outputs=3)
    return _alarms(model, x, y, epochs=6, labels=y), None, None


def _overfitting():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 1))
    other = rng.normal(size=(64, 4)).astype("float32"), rng.normal(size=(64, 1))
    model = _mlp(gdopt.Adam(0.03), depth=2, units=64)
    return _alarms(model, x, y, epochs=40, others=[other]), None, None


def _children():
    alarms = TrainingAlarms()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 4)).astype("float32"), rng.integers(0, 3, size=64)
    model = _mlp(gdopt.Adam(0.01), loss=loss, outputs=3)
    # Every entry of a child is drawn anew, far from anything that was learned.
    gadam = gdopt.Gadam(
        model, 4, mutation_rate=1.0, mutation="normal", mutation_stddev=100.0, seed=0
    )
    gadam.fit(x, y, generations=5, epochs=2, verbose=0, callbacks=[alarms])
    return alarms, None, None


def _rounding(epochs=4):
    x, y = _data()
    model = _mlp(gdopt.LBFGS(iterations_per_step=400, relative_gradient_tolerance=0.0), depth=0)
    model.optimizer.attach(model)
    return _alarms(model, x, y, batch_size=len(x), epochs=epochs), None, None


DISEASES = {
    "nonfinite": _nonfinite,
    "exploding_gradients": _exploding,
    "vanishing_gradients": _vanishing,
    "zero_gradients": _zero,
    "large_updates": _large,
    "constant_clipping": _clipping,
    "learning_rate_gone": _rate_gone,
    "no_movement": _still,
    "loss_at_entropy": _entropy,
    "overfitting": _overfitting,
    "children_die": _children,
    "ended_by_rounding": _rounding,
}


# One of each kind: of a step, of its layers, of an epoch, of a population.
IN_THE_DEFAULT_RUN = ("nonfinite", "zero_gradients", "overfitting", "children_die")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if n in IN_THE_DEFAULT_RUN else slow(n) for n in NAMES])
def test_a_training_with_the_disease_raises_the_alarm(name):
    alarms, layer, step = DISEASES[name]()
    assert name in alarms.raised, sorted(alarms.raised)
    raised = alarms.raised[name]
    if layer is not None:
        assert layer in raised.layer
    if step is not None:
        assert step <= raised.step <= step + alarms.update_freq
    assert f"step {raised.step:,}" in raised.message
    assert len(raised.message) > 80


def test_every_alarm_has_a_name_and_a_definition():
    assert len(NAMES) == len(set(NAMES)) == len(ALARMS)
    for alarm in ALARMS:
        assert len(alarm.__doc__) > 40
        assert f"| `{alarm.name}` |" in TrainingAlarms.__doc__
        assert f"`{alarm.name}`" in PAGE.read_text()


@every_optimizer_alike
def test_a_healthy_training_raises_none(case, recwarn):
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(case.brisk(0.003), loss)
    alarms = TrainingAlarms(update_freq=5, labels=y[:1500])
    validation = x[1500:], y[1500:]
    model.fit(
        x[:1500], y[:1500], validation_data=validation, epochs=4, verbose=0, callbacks=[alarms]
    )
    assert alarms.raised == {}
    assert not [w for w in recwarn if "noticed at step" in str(w.message)]


@pytest.mark.filterwarnings("ignore")
def test_an_alarm_can_end_the_training_and_is_written(tmp_path):
    x, y = _data()
    x[8 * 6 + 3, 2] = np.nan
    model = _mlp(gdopt.Adam())
    with pytest.warns(
        UserWarning, match=r"^nonfinite, noticed at step 8, in '.*hidden_0/kernel': "
    ):
        alarms = _alarms(
            model, x, y, epochs=3, update_freq=4, stop_on=["nonfinite"], log_dir=tmp_path
        )
    assert int(model.optimizer.iterations) == 8
    assert alarms.raised["nonfinite"].step == 8
    (text,) = [
        value
        for event in tf.compat.v1.train.summary_iterator(str(next(tmp_path.glob("events*"))))
        for value in event.summary.value
    ]
    assert text.tag == "alarms/nonfinite"
    assert tf.make_ndarray(text.tensor).item().decode() == alarms.raised["nonfinite"].message


def test_small_steps_in_float64_move_the_weights():
    keras.config.set_floatx("float64")
    model = _mlp(gdopt.GradientDescent(1e-9))
    assert "no_movement" not in _alarms(model, *_data()).raised


@pytest.mark.filterwarnings("ignore")
def test_skipped_steps_are_named(tmp_path):
    x, y = _data()
    x[8 * 6 + 3, 2] = np.nan
    alarms = _alarms(_mlp(gdopt.Adam(skip_nonfinite=True)), x, y, epochs=1)
    assert "1 of the steps so far were skipped" in alarms.raised["nonfinite"].message


@pytest.mark.filterwarnings("ignore")
def test_the_dead_layer_is_named_and_not_those_around_it():
    model = _mlp(gdopt.Adam(), activation="relu", depth=4)
    for layer, bias in zip(model.layers[1:4], (-100.0, 0.1, 0.1), strict=True):
        layer.set_weights([layer.get_weights()[0], np.full(8, bias)])
    raised = _alarms(model, *_data(), epochs=1).raised["zero_gradients"]
    assert raised.layer.endswith("hidden_1/kernel")
    assert re.search("from '.*hidden_0' to '.*hidden_1' are 0", raised.message)


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_finite_and_what_can_be_done_about_it():
    x, y = _data()
    x[8 * 6 + 3, 2] = np.nan
    ours = _alarms(_mlp(gdopt.Adam()), x, y, epochs=1).raised
    assert set(ours) == {"nonfinite"}
    message = ours["nonfinite"].message
    assert "What is not finite: loss, gradients, updates, weights. No layer's" in message
    assert "skip_nonfinite=True" in message
    of_keras = _alarms(_mlp(keras.optimizers.Adam()), x, y, epochs=1).raised["nonfinite"].message
    assert "What is not finite: loss, weights. Look" in of_keras
    assert "skip_nonfinite" not in of_keras


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", [gdopt.Adam, slow(keras.optimizers.Adam)])
@pytest.mark.parametrize(("in_loss", "scale"), [(True, "1.6e+04"), (False, "0.031")])
def test_half_precision_that_skips_steps(optimizer, in_loss, scale):
    """The root of 0 is finite, and its derivative is not."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    x, y = _data()
    root = keras.layers.Lambda(lambda u: keras.ops.sqrt(keras.ops.abs(0.0 * u)))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), root])
    model.add(keras.layers.Dense(1))
    model.compile(optimizer(), "mse")
    if in_loss:
        x[:, 0] = np.nan
    before = model.get_weights()
    raised = _alarms(model, x, y, epochs=1).raised["nonfinite"]
    assert f"the loss scale, which is {scale} now" in raised.message
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_the_layer_is_the_one_behind_which_the_gradients_broke():
    """The root of 0 is finite, and its derivative is not."""
    layers = [keras.layers.Dense(4, name=f"hidden_{place}") for place in range(3)]
    root = keras.layers.Lambda(lambda u: keras.ops.sqrt(keras.ops.abs(0.0 * u)))
    model = keras.Sequential([keras.Input((4,)), *layers[:2], root, layers[2]])
    model.compile(gdopt.Adam(), "mse", run_eagerly=True)
    x, y = _data()
    (raised,) = _alarms(model, x[:8], y[:8], epochs=1).raised.values()
    assert raised.name == "nonfinite"
    assert raised.layer.split("/")[-2] == "hidden_1"


@pytest.mark.filterwarnings("ignore")
def test_with_an_optimizer_of_keras():
    x, y = _data()
    x[8 * 6 + 3, 2] = np.nan
    alarms = _alarms(_mlp(keras.optimizers.Adam()), x, y, update_freq=2)
    assert alarms.raised["nonfinite"].step in (7, 8, 9)


@pytest.mark.slow
@pytest.mark.parametrize("cls", closure_classes()[:1])
def test_with_an_optimizer_that_evaluates_the_loss(cls):
    x, y = _data()
    model = _mlp(cls())
    model.optimizer.attach(model)
    assert _alarms(model, x, y, batch_size=len(x)).raised == {}


@pytest.mark.parametrize("is_learning", [True, False])
def test_a_loss_that_rises_with_the_validation_loss_does_not_overfit(is_learning):
    alarm = Overfitting()
    validation = [2.0, 1.0, *(1.1 + 0.1 * epoch for epoch in range(10))]
    losses = [2.0, 1.0, *(0.9 if is_learning else 1.1 for _ in range(10))]
    found = [
        alarm.on_epoch(Epoch(number, number, {"loss": loss, "val_loss": of_others}, None))
        for number, (loss, of_others) in enumerate(zip(losses, validation, strict=True))
    ]
    raised = [number for number, finding in enumerate(found) if finding is not None]
    assert raised[:1] == ([6] if is_learning else [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_steps_of_a_line_search_are_not_judged_by_their_length():
    alarms, _, _ = _rounding(epochs=14)  # of which the last ten change nothing
    assert set(alarms.raised) == {"ended_by_rounding"}


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"names of alarms.*Received: stop_on=\['nan'\]"):
        TrainingAlarms(stop_on=["nan"])
    with pytest.raises(ValueError, match="Received: stop_on='nonfinite'"):
        TrainingAlarms(stop_on="nonfinite")
    with pytest.raises(ValueError, match="update_freq"):
        TrainingAlarms(update_freq=0)
