"""Closures behind `model.compile` and `fit`: state, callbacks, what is refused."""

import copy
import gc
import pickle
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import keras_gdopt as gdopt
from keras_gdopt.closures import ClosureOptimizer, LineSearchOptimizer
from tests.optimizer_cases import closure_classes
from tests.parameters import slow

every_closure = pytest.mark.parametrize("cls", closure_classes(), ids=lambda cls: cls.__name__)

SEARCHING = [cls for cls in closure_classes() if issubclass(cls, LineSearchOptimizer)]

# For what the base class does alike for all.
every_closure_alike = pytest.mark.parametrize(
    "cls",
    [cls if cls is gdopt.LBFGS else slow(cls) for cls in closure_classes()],
    ids=lambda cls: cls.__name__,
)


def _data(samples=24):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(samples, 4)).astype("float32")
    return x, np.sin(x.sum(axis=1, keepdims=True)).astype("float32")


def _model(optimizer, layers=(), seed=0, attach=True, **arguments):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            *layers,
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse", **arguments)
    if attach:
        optimizer.attach(model)
    return model


def _plain(cls, **arguments):
    return cls(jit_compile=False, **arguments)


def _fit(model, epochs=1, samples=24, batch_size=24):
    return model.fit(
        *_data(samples), batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0
    ).history


def test_they_are_these():
    assert {cls.__name__ for cls in closure_classes()} == {
        "BFGS",
        "ConjugateGradient",
        "LBFGS",
        "LevenbergMarquardt",
        "Newton",
    }


@pytest.mark.parametrize(
    ("cls", "jit_compile"),
    [
        *((cls, True) if cls is gdopt.LBFGS else slow(cls, True) for cls in closure_classes()),
        *(slow(cls, False) for cls in closure_classes()),
    ],
)
def test_fit_minimizes_and_shows_the_loss_at_the_accepted_weights(cls, jit_compile):
    optimizer = cls(iterations_per_step=4, jit_compile=jit_compile)
    model = _model(optimizer, metrics=["mae"], jit_compile=jit_compile)
    x, y = _data()
    before = model.evaluate(x, y, verbose=0)[0]
    stopping = keras.callbacks.EarlyStopping(monitor="loss", min_delta=10.0, patience=1)
    history = model.fit(
        x, y, batch_size=24, epochs=9, verbose=0, validation_data=(x, y), callbacks=[stopping]
    ).history
    assert len(history["loss"]) == 2  # stopped, for no loss falls by 10
    assert history["loss"][1] < history["loss"][0] < before
    for name in ("loss", "mae"):
        assert history[name] == pytest.approx(history[f"val_{name}"], rel=1e-4)
    metrics = optimizer.step_metrics
    assert metrics["iterations"] == 2 and metrics["steps_made"] == 4
    assert metrics["evaluations"] >= 5
    assert optimizer.status == "accepted"
    assert not optimizer.converged


def _gradient(model, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - y))
    return tape.gradient(loss, [v.value for v in model.trainable_variables])


@every_closure_alike
def test_metrics_are_those_of_weights_and_gradients(cls):
    optimizer = _plain(cls, iterations_per_step=2)
    optimizer.record_step_metrics(1, tier="histograms")
    model = _model(optimizer)
    before = model.get_weights()
    _fit(model)
    after, gradients = model.get_weights(), [g.numpy() for g in _gradient(model, *_data())]

    def norm(arrays):
        return np.sqrt(sum(np.sum(np.square(a, dtype="float64")) for a in arrays))

    changes = [a - b for a, b in zip(after, before, strict=True)]
    metrics = optimizer.step_metrics
    expected = {"grad_norm": gradients, "update_norm": changes, "weight_norm": after}
    for name, arrays in expected.items():
        assert metrics[name] == pytest.approx(norm(arrays), rel=1e-3)
        for index, of_variable in enumerate(optimizer.variable_metrics.values()):
            assert of_variable[name] == pytest.approx(norm(arrays[index : index + 1]), rel=1e-3)
    paths = [v.path for v in model.trainable_variables]
    assert list(optimizer.recorded_gradients) == list(optimizer.variable_metrics) == paths
    for recorded, wanted in zip(optimizer.recorded_gradients.values(), gradients, strict=True):
        np.testing.assert_allclose(recorded, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@every_closure_alike
def test_gradients_can_be_asked_for_after_a_training(cls):
    model = _model(_plain(cls))
    _fit(model)
    assert model.optimizer.recorded_gradients == {}
    assert model.optimizer.record_step_metrics(1, tier="histograms")
    assert model.optimizer.recorded_gradients == {}
    model.make_train_function(force=True)
    _fit(model)
    gradients = [g.numpy() for g in _gradient(model, *_data())]
    recorded = model.optimizer.recorded_gradients.values()
    for received, expected in zip(recorded, gradients, strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-5)


@every_closure_alike
def test_iterations_in_one_step_are_those_of_as_many_steps(cls):
    one = _model(_plain(cls, iterations_per_step=3))
    _fit(one)
    three = _model(_plain(cls))
    _fit(three, epochs=3)
    for received, expected in zip(one.get_weights(), three.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)


# --- state --------------------------------------------------------------------------------


def _assert_same(model, expected):
    for received, wanted in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(received, wanted)
    pairs = zip(model.optimizer.variables, expected.optimizer.variables, strict=True)
    for received, wanted in pairs:
        np.testing.assert_array_equal(received, wanted)


# How state comes back is up to the base class, what it is to each.
WAYS = [(gdopt.LBFGS, "keras")]
WAYS += [slow(gdopt.Newton, "weights"), slow(gdopt.ConjugateGradient, "pickle")]
WAYS += [slow(cls, "keras") for cls in (gdopt.Newton, gdopt.ConjugateGradient)]
WAYS += [slow(gdopt.LBFGS, way) for way in ("weights", "pickle", "deepcopy")]


@pytest.mark.parametrize(("cls", "way"), WAYS, ids=lambda value: getattr(value, "__name__", value))
def test_goes_on_bit_equal(cls, way, tmp_path):
    model = _model(_plain(cls, iterations_per_step=3))
    _fit(model, epochs=2)
    if way == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.optimizer) is cls
        assert loaded.optimizer.get_config() == model.optimizer.get_config()
        with pytest.raises(ValueError, match=r"model\.optimizer\.attach\(model\)"):
            _fit(loaded)
    elif way == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = _model(_plain(cls, iterations_per_step=3), seed=5)
        loaded.load_weights(tmp_path / "model.weights.h5")
    else:
        copied = copy.deepcopy if way == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        loaded = _model(copied(model.optimizer), seed=5, attach=False)
        loaded.set_weights(model.get_weights())
    loaded.optimizer.attach(loaded)
    _fit(loaded)
    _fit(model)
    _assert_same(loaded, model)


@pytest.mark.slow
@every_closure_alike
def test_state_of_another_size_is_refused(cls, tmp_path):
    model = _model(_plain(cls))
    _fit(model)
    state = {}
    model.optimizer.save_own_variables(state)
    other = _plain(cls)
    other.build([keras.Variable(np.zeros(3))])
    if other.memory_layout(3) != other.memory_layout(31):
        with pytest.raises(ValueError, match="another shape"):
            other.load_own_variables(state)
    state["more.0"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"Only in the saved state: more"):
        _model(_plain(cls), attach=False).optimizer.load_own_variables(state)


# --- the model stays what it was ------------------------------------------------------------


@every_closure_alike
def test_the_optimizer_does_not_keep_the_model_alive(cls):
    optimizer = _plain(cls)
    model = _model(optimizer)
    _fit(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_attach_changes_nothing_that_is_seen():
    optimizer = _plain(gdopt.LBFGS)
    model = _model(optimizer)
    optimizer.attach(model)  # twice is no harm
    assert type(model) is keras.Sequential
    twin = keras.models.clone_model(model)
    twin.compile("sgd", "mse")
    _fit(twin)  # as ever
    model.compile("sgd", "mse")  # undoes it
    steps = int(optimizer.iterations)
    before = model.get_weights()[0]
    _fit(model)
    assert int(optimizer.iterations) == steps
    assert not np.array_equal(model.get_weights()[0], before)


@pytest.mark.parametrize("run_eagerly", [slow(False), True])
@every_closure_alike
def test_nothing_is_traced_again(cls, run_eagerly):
    traces = []

    @keras.saving.register_keras_serializable("tests")
    class Counting(keras.layers.Layer):
        def call(self, inputs):
            if not tf.executing_eagerly():
                traces.append(1)
            return inputs

    optimizer = _plain(cls, iterations_per_step=2)
    model = _model(optimizer, [Counting()], run_eagerly=run_eagerly)
    _fit(model)
    at_first = len(traces)
    _fit(model, epochs=3)
    optimizer.learning_rate = 0.5
    _fit(model)
    assert len(traces) == at_first


def test_batch_normalization_moves_once_a_step_at_the_accepted_weights():
    model = _model(_plain(gdopt.LBFGS, iterations_per_step=5), [keras.layers.BatchNormalization()])
    x, y = _data()
    model.train_on_batch(x, y)
    hidden = model.layers[0](x).numpy()
    mean, variance = (v.numpy() for v in model.layers[1].non_trainable_variables)
    np.testing.assert_allclose(mean, 0.01 * hidden.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, 0.99 + 0.01 * hidden.var(axis=0), rtol=1e-4)


def test_a_loss_that_is_not_finite_leaves_the_weights():
    optimizer = _plain(gdopt.LBFGS)
    model = _model(optimizer)
    x, y = _data()
    before = model.get_weights()
    loss = model.train_on_batch(x, np.full_like(y, np.nan))
    assert np.isnan(loss)
    assert optimizer.status == "the loss or its gradient is not finite at the weights"
    for received, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(received, expected)
    model.train_on_batch(x, y)
    assert optimizer.status == "accepted"


@every_closure_alike
def test_converges_and_says_so(cls):
    x, y = _data()
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = _plain(cls, iterations_per_step=50, gradient_tolerance=1e-5)
    model.compile(optimizer, "mse")
    optimizer.attach(model)
    model.train_on_batch(x, y)
    assert optimizer.converged
    assert optimizer.step_metrics["steps_made"] < 50
    expected = np.linalg.lstsq(np.hstack([x, np.ones((24, 1))]), y, rcond=None)[0]
    received = np.concatenate([w.reshape(-1, 1) for w in model.get_weights()])
    np.testing.assert_allclose(received, expected, atol=1e-4)
    model.train_on_batch(x, y)
    assert optimizer.step_metrics["steps_made"] == 0  # nothing left to do
    optimizer.gradient_tolerance = 0.0


def test_change_tolerance_ends_a_step():
    model = _model(_plain(gdopt.LBFGS, iterations_per_step=200, change_tolerance=1e-2))
    _fit(model)
    assert model.optimizer.converged
    assert model.optimizer.step_metrics["steps_made"] < 100


def test_the_first_trial_is_the_learning_rate():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.25, 0.125])
    optimizer = _plain(gdopt.Newton, learning_rate=schedule, line_search="armijo")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    optimizer.attach(model)
    lengths = []
    for _ in range(3):
        model.train_on_batch(*_data())
        lengths.append(optimizer.step_metrics["step_length"])
    assert lengths == [0.25, 0.25, 0.125]


@pytest.mark.slow
def test_a_subclassed_model_that_is_built_by_its_first_batch():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    optimizer = _plain(gdopt.LBFGS, iterations_per_step=5)
    model = Subclassed()
    model.compile(optimizer, "mse")
    optimizer.attach(model)
    losses = _fit(model, epochs=3)["loss"]
    assert losses[2] < losses[0]


def test_mini_batches_and_a_smaller_last_one():
    model = _model(_plain(gdopt.LBFGS, iterations_per_step=2))
    x, y = _data(50)
    before = model.evaluate(x, y, verbose=0)
    assert _fit(model, epochs=4, samples=50, batch_size=20)["loss"][-1] < before
    assert int(model.optimizer.iterations) == 12


def test_chunks_give_the_step_of_the_whole_batch():
    whole, parts = (
        _model(_plain(gdopt.LBFGS, iterations_per_step=3, closure_chunks=chunks))
        for chunks in (1, 5)
    )
    _fit(whole)
    _fit(parts)
    for received, expected in zip(parts.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-5)


# --- TensorBoard ----------------------------------------------------------------------------

OWN = {
    "LevenbergMarquardt": {"damping", "gain_ratio", "inner_iterations"},
    "ConjugateGradient": {"beta"},
    "Newton": {"damping", "inner_iterations"},
    "LBFGS": {"memory_pairs"},
    "BFGS": {"updates", "scaling"},
}


@every_closure_alike
def test_tensorboard_shows_what_it_did(cls, tmp_path):
    optimizer = _plain(cls, iterations_per_step=2)
    model = _model(optimizer)
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=1, tier="histograms")
    model.fit(*_data(), batch_size=24, epochs=3, verbose=0, callbacks=[callback])
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    tags = events.Tags()["tensors"]
    expected = {"learning_rate", "learning_rate_log10", "grad_norm", "update_norm", "weight_norm"}
    expected |= {"update_ratio_log10", "step_length", "evaluations", "steps_made"}
    expected |= OWN[cls.__name__]
    assert {tag for tag in tags if tag.startswith("optimizer/")} == {
        f"optimizer/{name}" for name in expected
    }
    for name in expected:
        written = events.Tensors(f"optimizer/{name}")
        assert [event.step for event in written] == [1, 2, 3]
        assert np.isfinite([tf.make_ndarray(event.tensor_proto) for event in written]).all()
    last = tf.make_ndarray(events.Tensors("optimizer/evaluations")[-1].tensor_proto)
    assert last == optimizer.step_metrics["evaluations"]
    path = model.trainable_variables[0].path
    assert {f"layer_grad_norm/{path}", f"gradients/{path}", f"weights/{path}"} <= set(tags)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipnorm": 1.0}, r"does not take `clipnorm`: .*Received: clipnorm=1\.0"),
        ({"weight_decay": 0.1}, r"`weight_decay`: add a regularizer"),
        ({"gradient_accumulation_steps": 2}, r"use `closure_chunks`"),
        ({"use_ema": True}, r"does not take `use_ema`"),
        ({"lazy": True}, r"does not take the argument `lazy`"),
        ({"iterations_per_step": 0}, r"`iterations_per_step` must be an integer of at least 1"),
        ({"closure_chunks": 1.5}, r"`closure_chunks` must be an integer"),
        ({"gradient_tolerance": -1.0}, r"`gradient_tolerance` must be a finite number"),
        ({"jit_compile": "yes"}, r"`jit_compile` must be True or False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@every_closure
def test_arguments_out_of_range(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("cls", SEARCHING, ids=lambda cls: cls.__name__)
def test_arguments_of_line_searches_out_of_range(cls):
    with pytest.raises(ValueError, match=r"must be above 0\. Received: learning_rate=0\.0"):
        cls(learning_rate=0.0)
    with pytest.raises(ValueError, match=r"`learning_rate` must be a finite number"):
        cls(learning_rate=-1.0)
    with pytest.raises(ValueError, match=r"`line_search` must be one of .*'golden'"):
        cls(line_search="golden")


def test_arguments_of_their_own_out_of_range():
    with pytest.raises(ValueError, match=r"`beta` must be one of .*'hestenes'"):
        gdopt.ConjugateGradient(beta="hestenes")
    with pytest.raises(ValueError, match=r"`solver` must be one of .*'lu'"):
        gdopt.Newton(solver="lu")
    with pytest.raises(ValueError, match=r"`damping` must be a finite number"):
        gdopt.Newton(damping=-1.0)
    with pytest.raises(ValueError, match=r"`memory` must be an integer of at least 1"):
        gdopt.LBFGS(memory=0)


@every_closure
def test_config_round_trip(cls):
    searching = {"line_search": "armijo"} if cls in SEARCHING else {}
    optimizer = cls(0.5, iterations_per_step=7, closure_chunks=2, name="mine", **searching)
    config = optimizer.get_config()
    assert cls.from_config(config).get_config() == config
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is cls and again.get_config() == config
    assert issubclass(cls, ClosureOptimizer)


@every_closure
def test_a_step_without_a_closure(cls):
    model = _model(_plain(cls), attach=False)
    with pytest.raises(ValueError, match=r"call `model\.optimizer\.attach\(model\)`"):
        _fit(model)


def test_models_that_cannot_be_attached(two_devices):
    optimizer = gdopt.LBFGS()
    with pytest.raises(ValueError, match=r"Expected a `keras\.Model`"):
        optimizer.attach("model")
    with pytest.raises(ValueError, match="must be compiled with a loss"):
        optimizer.attach(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match=r"must be compiled with this optimizer.*Received"):
        optimizer.attach(_model(gdopt.LBFGS(), attach=False))
    if hasattr(keras.optimizers, "MultiOptimizer"):
        several = keras.optimizers.OptimizerMap(gdopt.Adam(), {".*": optimizer})
        model = _model(keras.optimizers.MultiOptimizer(several), attach=False)
        with pytest.raises(ValueError, match=r"in a `MultiOptimizer`\. Compile with it alone"):
            optimizer.attach(model)

    class Own(keras.Sequential):
        def train_step(self, data):
            return {}

    model = Own([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match=r"has a `train_step` of its own"):
        optimizer.attach(model)
    with two_devices.scope():
        model = _model(gdopt.LBFGS(), attach=False)
    with pytest.raises(ValueError, match=r"trains on one device.*MirroredStrategy with 2"):
        model.optimizer.attach(model)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision(policy):
    keras.mixed_precision.set_global_policy(policy)
    optimizer = gdopt.LBFGS()
    model = _model(optimizer, attach=False)
    with pytest.raises(ValueError, match=r"float16|half precision"):
        optimizer.attach(model)


def test_chunks_that_do_not_add_up():
    optimizer = gdopt.LBFGS(closure_chunks=2)
    with pytest.raises(ValueError, match=r"cannot be combined with batch normalization"):
        _model(optimizer, [keras.layers.BatchNormalization()])
    for layer in (keras.layers.Masking(), keras.layers.Embedding(4, 2, mask_zero=True)):
        masked = keras.Sequential([keras.Input((3, 1)), layer, keras.layers.Dense(1)])
        masked.compile(optimizer, "mse")
        with pytest.raises(ValueError, match=rf"combined with masks.*{layer.name}"):
            optimizer.attach(masked)
    model = _model(optimizer, attach=False)
    model.compile(optimizer, keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(ValueError, match=r"means over the samples.*reduction='sum'"):
        optimizer.attach(model)


def test_a_hessian_that_is_too_large():
    optimizer = gdopt.Newton(solver="exact")
    with pytest.raises(ValueError, match=r"at most 8,192 weights.*10,000 weights.* GiB"):
        optimizer.build([keras.Variable(np.zeros((100, 100)))])


def test_gadam_does_not_train_with_closures():
    for attach in (False, True):
        model = _model(gdopt.LBFGS(), attach=attach)
        with pytest.raises(ValueError, match=r"Gadam does not train with LBFGS"):
            gdopt.Gadam(model)
