"""Save, load, go on: the next steps equal those of an uninterrupted run."""

import copy
import itertools
import os
import pickle
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_gdopt as gdopt
from tests.optimizer_cases import (
    A_FEW,
    CASES,
    every_optimizer,
    every_optimizer_alike,
    every_optimizer_with,
)
from tests.parameters import slow

SETTINGS = {
    "everything": {"weight_decay": 0.01, "global_clipnorm": 1.0, "use_ema": True},
    "plain": {},
    "schedule": {"learning_rate": keras.optimizers.schedules.CosineDecay(0.01, 30)},
    "accumulation": {"gradient_accumulation_steps": 3},
}


def _model(optimizer, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    )
    model.compile(optimizer, "mse")
    return model


def _fit(model, epochs=1):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 4)).astype("float32"), rng.normal(size=(40, 1)).astype("float32")
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return model


def _assert_same(model, expected):
    """Weights and optimizer state, bit for bit."""
    for received, wanted in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(received, wanted)
    state, wanted_state = model.optimizer.variables, expected.optimizer.variables
    for received, wanted in zip(state, wanted_state, strict=True):
        np.testing.assert_array_equal(received, wanted)


@pytest.mark.parametrize("setting", SETTINGS)
@every_optimizer
def test_config_round_trip(case, setting):
    optimizer = case(**SETTINGS[setting], lazy=setting == "plain", name="mine")
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    config = optimizer.get_config()
    again = type(optimizer).from_config(copy.deepcopy(config))
    assert again.get_config() == config
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is type(optimizer)
    assert again.get_config() == config


SETTINGS_AND_WAYS = [
    ("everything", "weights"),
    ("plain", "keras"),
    ("schedule", "checkpoint"),
    ("accumulation", "weights"),
]


@every_optimizer_with(
    "setting_and_way",
    SETTINGS_AND_WAYS,
    alike=True,
    slow_values=[
        pair
        for pair in itertools.product(SETTINGS, ["weights", "keras", "checkpoint"])
        if pair not in SETTINGS_AND_WAYS
    ],
)
def test_goes_on_bit_equal(case, setting_and_way, tmp_path):
    setting, way = setting_and_way
    model = _fit(_model(case(**SETTINGS[setting])))
    if way == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.optimizer) is case.cls
    elif way == "weights":
        model.save_weights(tmp_path / "model.weights.h5")
        # Compiled, but its optimizer is not built when the weights come.
        loaded = _model(case(**SETTINGS[setting]), seed=5)
        loaded.load_weights(tmp_path / "model.weights.h5")
        assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations)
    else:
        saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        path = saved.save(tmp_path / "checkpoint")
        loaded = _model(case(**SETTINGS[setting]), seed=5)
        loaded.optimizer.build(loaded.trainable_variables)
        tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer).restore(
            path
        ).assert_consumed()
    _assert_same(_fit(loaded), _fit(model))


@every_optimizer_alike
def test_checkpoint_restores_an_optimizer_that_is_not_built(case, tmp_path):
    model = _fit(_model(case()))
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
    loaded = _model(case(), seed=5)
    tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer).restore(path)
    _assert_same(_fit(loaded), _fit(model))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}


@every_optimizer_with("way", COPIES, alike=True)
def test_copies_keep_the_state(case, way):
    copied = COPIES[way]
    model = _fit(_model(case(weight_decay=0.1)))
    twin = _model(copied(model.optimizer))
    twin.set_weights(model.get_weights())
    assert int(twin.optimizer.iterations) == 10
    # A copy of a copy that was never built keeps it too.
    twin.compile(copied(twin.optimizer), "mse")
    _assert_same(_fit(twin), _fit(model))


def test_a_learning_rate_set_after_loading_stays(tmp_path):
    _fit(_model(gdopt.Adam(0.5))).save_weights(tmp_path / "a.weights.h5")
    model = _model(gdopt.Adam(0.1))
    model.load_weights(tmp_path / "a.weights.h5")
    assert float(model.optimizer.learning_rate) == 0.5
    model.optimizer.learning_rate = 0.25
    _fit(model)
    assert float(model.optimizer.learning_rate) == 0.25


def test_metrics_are_not_saved(tmp_path):
    model = _model(gdopt.Momentum())
    model.optimizer.record_step_metrics(1)
    _fit(model)
    names = {variable.name for variable in model.optimizer.variables}
    assert len(model.optimizer.variables) == 2 + 4, names
    model.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5") as file:
        assert sorted(file["optimizer/vars"]) == [
            "class=keras_gdopt>Momentum",
            "iteration",
            "learning_rate",
            *(f"velocity.{i}" for i in range(4)),
        ]


@pytest.mark.parametrize("names", [("block/dense/kernel", "dense/kernel"), ("w", "w")])
def test_exclusions_do_not_spread_to_other_variables(names):
    def variables():
        return [keras.Variable([1.0], name=name.replace("/", "_")) for name in names]

    optimizer, original = gdopt.GradientDescent(0.0, weight_decay=0.5), variables()
    optimizer.exclude_from_weight_decay(var_list=original[:1])
    optimizer.build(original)
    for again in (copy.deepcopy(optimizer), type(optimizer).from_config(optimizer.get_config())):
        own = variables()
        again.build(own)
        assert [again._use_weight_decay(v) for v in own] == [False, True]


def test_exclusions_of_an_optimizer_that_is_not_built_go_by_path():
    excluded = keras.Variable([1.0], name="outer_kernel")
    optimizer = gdopt.GradientDescent(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[excluded], var_names=["bias"])
    config = optimizer.get_config()
    again = gdopt.GradientDescent.from_config(config)
    names = ["other", "outer_kernel", "bias"]
    own = [keras.Variable([1.0], name=name) for name in names]
    again.build(own)
    assert [again._use_weight_decay(v) for v in own] == [True, False, False]
    again = gdopt.GradientDescent.from_config(config)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Expected one variable 'outer_kernel'.*'other'"):
            again.build(own[:1])


def test_exclusions_from_weight_decay_are_saved(tmp_path):
    def model_without_decay_on_biases():
        optimizer = gdopt.GradientDescent(0.1, weight_decay=0.5)
        model = _model(optimizer)
        kernel = model.layers[1].kernel
        optimizer.exclude_from_weight_decay(var_list=[kernel], var_names=["bias"])
        return model

    expected = _fit(_fit(model_without_decay_on_biases()))
    _fit(model_without_decay_on_biases()).save(tmp_path / "model.keras")
    _assert_same(_fit(keras.models.load_model(tmp_path / "model.keras")), expected)


# --- before the first step -----------------------------------------------------------


@every_optimizer_with(
    "way",
    ["keras", "weights into built", "pickle"],
    alike=True,
    slow_values=["weights", "deepcopy"],
)
def test_state_of_an_optimizer_that_never_stepped(case, way, tmp_path):
    """Saved before it is built: it starts afresh, whatever the receiving one has done."""
    model = _model(case())
    expected = _fit(_model(case()))
    if way == "keras":
        model.save(tmp_path / "a.keras")
        loaded = keras.models.load_model(tmp_path / "a.keras")
    elif way.startswith("weights"):
        model.save_weights(tmp_path / "a.weights.h5")
        loaded = _model(case(), seed=5)
        if way == "weights into built":
            _fit(loaded)
        loaded.load_weights(tmp_path / "a.weights.h5")
    else:
        loaded = _model(COPIES[way](model.optimizer))
    assert int(loaded.optimizer.iterations) == 0
    _assert_same(_fit(loaded), expected)


def test_copies_of_an_optimizer_with_a_callable_rate():
    optimizer = copy.deepcopy(gdopt.Momentum(lambda: 0.25))
    assert optimizer.learning_rate == 0.25


def test_clone_model_of_a_compiled_model():
    model = _fit(_model(gdopt.Adam(0.01, weight_decay=0.1)))
    twin = keras.models.clone_model(model)
    assert type(twin.optimizer) is gdopt.Adam
    assert twin.optimizer.get_config() == model.optimizer.get_config()
    _fit(twin)


# --- state that does not fit -------------------------------------------------------


def _saved(optimizer, path):
    _fit(_model(optimizer)).save_weights(path / "a.weights.h5")
    return path / "a.weights.h5"


STATES_THAT_DO_NOT_FIT = [
    (
        gdopt.Adam,
        gdopt.Momentum,
        r"keras_gdopt>Adam with the slots .*'velocity'.*is keras_gdopt>Momentum",
    ),
    (keras.optimizers.Adam, gdopt.Adam, r"without a class name, as Keras.*is keras_gdopt>Adam"),
    (gdopt.Adam, lambda: gdopt.Adam(use_ema=True), r"only in this optimizer: average"),
    (
        lambda: gdopt.Adam(gradient_accumulation_steps=2),
        gdopt.Adam,
        r"Only in the saved state: gradient_accumulator",
    ),
    (
        lambda: gdopt.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10)),
        gdopt.Adam,
        r"only in this optimizer: learning_rate",
    ),
]


@pytest.mark.parametrize(
    ("saved", "loading", "message", "built"),
    [
        (*STATES_THAT_DO_NOT_FIT[0], True),
        *((*state, False) for state in STATES_THAT_DO_NOT_FIT[1:3]),
        slow(*STATES_THAT_DO_NOT_FIT[0], False),
        *(slow(*state, False) for state in STATES_THAT_DO_NOT_FIT[3:]),
        *(slow(*state, True) for state in STATES_THAT_DO_NOT_FIT[1:]),
    ],
)
def test_state_that_does_not_fit_is_an_error(saved, loading, message, built, tmp_path):
    path = _saved(saved(), tmp_path)
    model = _model(loading(), seed=5)
    if built:
        _fit(model)
    with pytest.raises(ValueError, match=message):
        model.load_weights(path)
    # The way out loads the weights and starts the optimizer afresh.
    if built:
        _fit(model)
    with pytest.warns(UserWarning, match="could not be loaded"):
        model.load_weights(path, skip_mismatch=True)
    expected = _model(loading())
    expected.set_weights(model.get_weights())
    _assert_same(_fit(model), _fit(expected))


def test_state_of_another_model_is_an_error_in_build():
    optimizer = copy.deepcopy(_fit(_model(gdopt.Momentum())).optimizer)
    with pytest.raises(
        ValueError, match=r"4 variable\(s\) have another shape.*velocity\.0: saved \(4, 5\)"
    ):
        optimizer.build([keras.Variable(np.zeros((1, i + 1))) for i in range(4)])
    optimizer = copy.deepcopy(_fit(_model(gdopt.Momentum())).optimizer)
    with pytest.raises(ValueError, match=r"Only in the saved state: velocity\.1, velocity\.2"):
        optimizer.build([keras.Variable(np.zeros((4, 5)))])


def test_a_build_that_fails_fails_again():
    optimizer = copy.deepcopy(_fit(_model(gdopt.Momentum())).optimizer)
    other = keras.Variable(np.zeros(3))
    for _ in range(2):
        with pytest.raises(ValueError, match="Only in the saved state: velocity"):
            optimizer.apply([tf.ones(3)], [other])
    assert not optimizer.built


def _multi(optimizer):
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(default_optimizer=optimizer)
    )


@pytest.mark.filterwarnings("error:The file holds no state")
def test_inside_keras_multi_optimizer(tmp_path):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this version of Keras has no MultiOptimizer")
    model = _fit(_model(_multi(gdopt.Momentum())))
    expected = _fit(_fit(_model(_multi(gdopt.Momentum()))))
    model.save_weights(tmp_path / "a.weights.h5")
    loaded = _model(_multi(gdopt.Momentum()), seed=5)
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "a.weights.h5")
    _fit(loaded)
    for received, wanted in zip(loaded.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(received, wanted)
    # A mismatch is an error there, too, though Keras visits the optimizer twice.
    loaded = _model(_multi(gdopt.Momentum(use_ema=True)), seed=5)
    loaded.optimizer.build(loaded.trainable_variables)
    with pytest.raises(ValueError, match="only in this optimizer: average"):
        loaded.load_weights(tmp_path / "a.weights.h5")


def test_a_file_without_optimizer_state_warns(tmp_path):
    model = _model(gdopt.Adam())
    weights_only = keras.Sequential([keras.Input((4,)), *model.layers])
    weights_only.save_weights(tmp_path / "a.weights.h5")
    with pytest.warns(UserWarning, match="holds no state for the optimizer 'adam'"):
        model.load_weights(tmp_path / "a.weights.h5")


# --- in a new process ----------------------------------------------------------------

_LAYERS = {
    "normalized": lambda: [keras.layers.Dense(5), keras.layers.BatchNormalization()],
    "embedding": lambda: [keras.layers.Embedding(9, 3), keras.layers.Flatten()],
    "lstm": lambda: [keras.layers.Embedding(9, 3), keras.layers.LSTM(4)],
}


def _model_of_ids(optimizer, kind):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), *_LAYERS[kind](), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def fit_on_ids(model):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 9, size=(40, 6))
    model.fit(x, rng.normal(size=(40, 1)), batch_size=4, shuffle=False, verbose=0)
    return model


# `tests.fixtures` sets what a graph is optimized by, on which the last digits depend.
_SECOND_PROCESS = """
import keras
import tests.fixtures
from tests.optimizers.test_saved_state import fit_on_ids
for number in range(COUNT):
    model = keras.models.load_model(f"PATH/{number}.keras")
    fit_on_ids(model).save(f"PATH/{number}_resumed.keras")
"""


def _python(script):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize("cases", [A_FEW[:1], slow(CASES)], ids=["one", "all"])
def test_resumes_in_a_new_process(cases, tmp_path):
    """Each optimizer on an embedding and dense layers; the slow test, one on other layers, too."""
    runs = [(case, "embedding") for case in cases]
    if cases is CASES:
        runs += [(A_FEW[0], kind) for kind in ("normalized", "lstm")]
    expected = []
    for number, (case, kind) in enumerate(runs):
        model = fit_on_ids(_model_of_ids(case(), kind))
        model.save(tmp_path / f"{number}.keras")
        expected.append(fit_on_ids(model))
    script = _SECOND_PROCESS.replace("COUNT", str(len(runs))).replace("PATH", str(tmp_path))
    done = _python(script)
    assert done.returncode == 0, done.stderr
    for number, model in enumerate(expected):
        resumed = keras.models.load_model(tmp_path / f"{number}_resumed.keras")
        assert int(resumed.optimizer.iterations) == 20
        _assert_same(resumed, model)


@pytest.mark.slow
def test_loading_without_the_package_fails_loudly(tmp_path):
    names = sorted({case.cls.__name__ for case in CASES})
    for case in CASES:
        _model(case()).save(tmp_path / f"{case.cls.__name__}.keras")
    script = f"""
import keras
for name in {names}:
    try:
        keras.models.load_model(f"{tmp_path}/{{name}}.keras")
    except Exception as error:
        print(error)
"""
    printed = _python(script).stdout
    for name in names:
        assert f"Could not locate class '{name}'" in printed


@every_optimizer
def test_a_built_in_of_the_same_name_refuses_the_config(case):
    name = case.cls.__name__
    if not hasattr(keras.optimizers, name):
        pytest.skip(f"Keras has no {name}")
    with pytest.raises(ValueError, match="lazy"):
        keras.optimizers.get({"class_name": name, "config": case().get_config()})
