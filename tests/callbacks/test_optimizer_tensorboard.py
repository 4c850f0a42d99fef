"""The event files, read back, against norms computed from gradients and weights."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

import keras_gdopt as gdopt
from keras_gdopt.callbacks.hyperparameters import hyperparameters
from keras_gdopt.optimizers.argument_checks import BASE_ARGUMENTS
from keras_gdopt.optimizers.recording import TIERS
from tests.optimizer_cases import (
    CASES,
    RULES,
    every_optimizer_alike,
    every_optimizer_with,
)
from tests.parameters import slow

OF_ANY = ["learning_rate", "learning_rate_log10", "weight_norm"]
NORMS = ["grad_norm", "update_norm", "weight_norm", "update_ratio_log10"]
TAGS = ["learning_rate", "learning_rate_log10", *NORMS]


def read(log_dir, *prefixes):
    """{tag: {step: value}} of the scalars in all event files of a directory."""
    prefixes = prefixes or ("optimizer/", "layer_")
    accumulator = EventAccumulator(str(log_dir), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in accumulator.Tensors(tag)}
        for tag in accumulator.Tags()["tensors"]
        if tag.startswith(prefixes)
    }


def _norm(arrays):
    return np.sqrt(sum(np.sum(np.square(a, dtype="float64")) for a in arrays))


def _data(rng, samples=40):
    x = rng.normal(size=(samples, 4)).astype("float32")
    return x, rng.normal(size=(samples, 1)).astype("float32")


def _model(optimizer, **compile_arguments):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    )
    model.compile(optimizer, "mse", **compile_arguments)
    return model


class _Weights(keras.callbacks.Callback):
    """The weights before the first batch and after every batch."""

    def on_train_begin(self, logs=None):
        self.after = [self.model.get_weights()]

    def on_train_batch_end(self, batch, logs=None):
        self.after.append(self.model.get_weights())


def _expected(after, x, y, batch_size):
    """Norms at every step from weights alone; gradients by a tape of our own."""
    twin = _model("sgd")
    expected = {tag: {} for tag in NORMS}
    batches = len(x) // batch_size
    for step in range(1, len(after)):
        twin.set_weights(after[step - 1])
        start = (step - 1) % batches * batch_size
        xb, yb = x[start : start + batch_size], y[start : start + batch_size]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(twin(xb) - yb))
        weights = [v.value for v in twin.trainable_variables]
        change = _norm(a - b for a, b in zip(after[step], after[step - 1], strict=True))
        expected["grad_norm"][step] = _norm(g.numpy() for g in tape.gradient(loss, weights))
        expected["update_norm"][step] = change
        expected["weight_norm"][step] = _norm(after[step])
        expected["update_ratio_log10"][step] = np.log10(change / _norm(after[step]))
    return expected


@every_optimizer_with("jit_compile", [False, True], alike=True)
def test_every_tag_at_every_expected_step(case, jit_compile, rng, tmp_path):
    x, y = _data(rng)
    model = _model(case(learning_rate=0.01), jit_compile=jit_compile)
    weights = _Weights()
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=3)
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[weights, callback])
    written = read(tmp_path)
    assert set(written) == {f"optimizer/{tag}" for tag in TAGS} | _own_tags(case)
    assert all(np.all(np.isfinite(list(values.values()))) for values in written.values())
    steps = [3, 6, 9, 12, 15, 18]
    assert all(list(values) == steps for values in written.values())
    expected = _expected(weights.after, x, y, 4)
    if case not in RULES:  # the numbers of the fast step, which a synchronization follows
        expected = {"grad_norm": expected["grad_norm"]}
    for step in steps:
        assert written["optimizer/learning_rate"][step] == pytest.approx(0.01, rel=1e-6)
        assert written["optimizer/learning_rate_log10"][step] == pytest.approx(-2.0)
        for tag, values in expected.items():
            assert written[f"optimizer/{tag}"][step] == pytest.approx(values[step], rel=1e-3), tag


def test_skipped_steps_are_counted_even_if_no_step_is_taken(rng, tmp_path, recwarn):
    x, y = _data(rng)
    model = _model(gdopt.Adam(skip_nonfinite=True))
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)
    broken = np.full_like(x, np.nan)
    model.fit(broken, y, batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    written = read(tmp_path)
    taken = list(written["optimizer/grad_norm"])
    assert list(written["optimizer/skipped_steps"]) == [0, *taken]
    assert set(written["optimizer/skipped_steps"].values()) == {2 * len(x) // 4}
    assert not [warning for warning in recwarn if "made no update" in str(warning.message)]


def test_a_second_fit_goes_on_and_traces_nothing_again(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Adam())

    def traces():
        clusters = model.optimizer._tensorflow_step.compiled_steps.values()
        return [cluster.experimental_get_tracing_count() for cluster in clusters]

    before = at_first = None
    for _ in range(2):
        callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=4)
        model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[callback])
        train_function = model.train_function
        before, at_first = before or train_function, at_first or traces()
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [4, 8, 12, 16, 20]
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    assert model.train_function is train_function
    assert train_function is before
    assert traces() == at_first


def test_a_model_that_trained_without_it_records_too(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Adam())
    model.fit(x, y, batch_size=4, verbose=0)
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=5)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [15, 20]
    # And does not go on to record when nobody listens.
    model.fit(x, y, batch_size=4, verbose=0)
    assert model.optimizer.step_metrics["iterations"] == 20


def test_after_a_roll_back_nothing_old_is_written(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Adam())
    model.fit(x[:8], y[:8], batch_size=4, verbose=0)
    model.save_weights(tmp_path / "early.weights.h5")
    for run in ("first", "second"):
        callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path / run, update_freq=10)
        model.load_weights(tmp_path / "early.weights.h5")
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
        assert list(read(tmp_path / run)["optimizer/grad_norm"]) == [10]
    model.load_weights(tmp_path / "early.weights.h5")
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path / "short", update_freq=10)
    model.fit(x[:8], y[:8], batch_size=4, verbose=0, callbacks=[callback])
    assert read(tmp_path / "short") == {}


def test_evaluate_and_predict_leave_everything_alone(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Adam())
    model.fit(x, y, verbose=0)
    train_function = model.train_function
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path / "run")
    model.evaluate(x, y, verbose=0, callbacks=[callback])
    model.predict(x, verbose=0, callbacks=[callback])
    assert model.train_function is train_function
    assert not (tmp_path / "run").exists()


def test_a_learning_rate_schedule(rng, tmp_path):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.0)
    model = _model(gdopt.GradientDescent(schedule))
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=1)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    rates = read(tmp_path)["optimizer/learning_rate"]
    # Step t is the t-th update, made at the rate of iteration t - 1.
    assert rates == pytest.approx({t: 0.1 * (1 - (t - 1) / 10) for t in range(1, 11)}, rel=1e-5)


def test_steps_per_execution_writes_the_last_recorded_step(rng, tmp_path):
    model = _model(gdopt.Adam(), steps_per_execution=5)
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)
    model.fit(*_data(rng), batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [4, 10, 14, 20]


@pytest.mark.parametrize("jit_compile", [True, False])
def test_inside_a_loss_scale_optimizer(jit_compile, rng, tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    model = _model(gdopt.Momentum(0.01), jit_compile=jit_compile)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    written = read(tmp_path)
    assert list(written["optimizer/grad_norm"]) == [2, 4, 6, 8, 10]
    # Unscaled: the loss scale starts at 2**15.
    assert all(value < 100 for value in written["optimizer/grad_norm"].values())


@pytest.mark.parametrize("update_freq", [1, 3])
def test_batches_that_a_loss_scale_skips(update_freq, rng, tmp_path):
    """The first gradients are infinite: batches and updates count differently."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(gdopt.Momentum(0.01), initial_scale=2.0**19)
    model = _model(optimizer)
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=update_freq)
    model.fit(*_data(rng), batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    updates = int(optimizer.inner_optimizer.iterations)
    assert 0 < updates < 20
    steps = list(range(update_freq, updates + 1, update_freq))
    assert list(read(tmp_path)["optimizer/grad_norm"]) == steps


def test_accumulation_counts_updates(rng, tmp_path):
    model = _model(gdopt.Adam(gradient_accumulation_steps=5))
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=5)
    model.fit(*_data(rng), batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [1, 2, 3, 4]


def test_two_devices(two_devices, rng, tmp_path):
    with two_devices.scope():
        model = _model(gdopt.Adam())
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [2, 4, 6, 8, 10]


def test_a_zero_update_has_no_ratio(rng, tmp_path):
    model = _model(gdopt.GradientDescent(0.0))
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=10)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    written = read(tmp_path)
    assert "optimizer/update_ratio_log10" not in written
    assert written["optimizer/update_norm"] == {10: 0.0}


class _Breaks(keras.callbacks.Callback):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def on_train_batch_end(self, batch, logs=None):
        if batch == 7:
            raise self._error


@pytest.mark.parametrize("error", [slow(RuntimeError("broken")), KeyboardInterrupt()], ids=repr)
def test_event_files_are_whole_when_training_breaks(error, rng, tmp_path):
    model = _model(gdopt.Adam())
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)
    with pytest.raises(type(error)):
        model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback, _Breaks(error)])
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [2, 4, 6, 8]
    # The next `fit` goes on, in a file of its own.
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    assert list(read(tmp_path)["optimizer/grad_norm"]) == list(range(2, 20, 2))


def test_a_killed_process_leaves_what_was_written(tmp_path):
    script = f"""
import os, signal
import keras, numpy as np, keras_gdopt as gdopt
class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 6:
            os.kill(os.getpid(), signal.SIGKILL)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(gdopt.Adam(), "mse")
callback = gdopt.callbacks.OptimizerTensorBoard({str(tmp_path)!r}, update_freq=2)
model.fit(np.ones((40, 4)), np.ones((40, 1)), batch_size=4, callbacks=[callback, Kill()])
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [2, 4, 6]


@pytest.mark.parametrize("update_freq", [0, -1, 2.5, "batch", True])
def test_update_freq_out_of_range(update_freq, tmp_path):
    with pytest.raises(
        ValueError, match=r"`update_freq` must be an integer of at least 1\. Received"
    ):
        gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq)


def test_a_directory_that_cannot_be_written(rng, tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = _model(gdopt.Adam())
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"`log_dir` .* must be a directory that can .*Received"):
        model.fit(
            *_data(rng),
            verbose=0,
            callbacks=[gdopt.callbacks.OptimizerTensorBoard(tmp_path / "file" / "run")],
        )
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


def test_an_optimizer_that_records_nothing(rng, tmp_path):
    model = _model("adam")
    weights = _Weights()
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=4)
    with pytest.warns(UserWarning, match=r"adam\.Adam records no step metrics.*keras_gdopt\.Adam"):
        model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[weights, callback])
    written = read(tmp_path)
    assert set(written) == {f"optimizer/{tag}" for tag in OF_ANY}
    assert written["optimizer/learning_rate"] == pytest.approx({4: 1e-3, 8: 1e-3, 10: 1e-3})
    expected = {step: _norm(weights.after[step]) for step in (4, 8, 10)}
    assert written["optimizer/weight_norm"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_is_not_compiled(tmp_path):
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path / "run")
    callback.set_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match=r"compiled model.*Received: .* is not compiled"):
        callback.on_train_begin()
    assert not (tmp_path / "run").exists()


def test_an_unknown_tier(tmp_path):
    with pytest.raises(ValueError, match=r"`tier` must be one of .*Received: tier='all'"):
        gdopt.callbacks.OptimizerTensorBoard(tmp_path, tier="all")


# --- what an algorithm has of its own ------------------------------------------------

_QUANTILES = {f"effective_learning_rate_p{q}" for q in (10, 50, 90)}
# Of those with more than the quantiles of their entries' learning rates, where those differ.
OWN = {
    "Momentum": {"velocity_norm"},
    "NAG": {"velocity_norm"},
    "RAdam": {"rho_t", "rectification", *_QUANTILES},
    "Lookahead": {"velocity_norm", "slow_fast_distance", "syncs"},  # around Momentum
}


# By every change those two whose metrics have the most of their own.
every_class = pytest.mark.parametrize(
    "case",
    [
        case if cls.__name__ in ("RAdam", "Lookahead") else slow(case)
        for cls, case in {case.cls: case for case in reversed(CASES)}.items()
    ],
    ids=str,
)


def _own_tags(case):
    name = case.cls.__name__
    own = OWN[name] if name in OWN else _QUANTILES if _has_rates_of_entries(case.cls) else set()
    return {f"optimizer/{tag}" for tag in own}


def _has_rates_of_entries(cls):
    return cls.effective_learning_rate is not gdopt.GradientOptimizer.effective_learning_rate


def _check_own_metrics(case, model, rng, log_dir):
    callback = gdopt.callbacks.OptimizerTensorBoard(log_dir, update_freq=5)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    written = read(log_dir)
    of_all = {f"optimizer/{tag}" for tag in [*TAGS, "loss_scale"]}
    assert set(written) - of_all == _own_tags(case)
    for tag in written:
        assert list(written[tag]) == [5, 10], tag
        assert np.all(np.isfinite(list(written[tag].values()))), tag


@every_class
def test_own_metrics_in_mixed_precision(case, rng, tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    _check_own_metrics(case, _model(case()), rng, tmp_path)
    assert read(tmp_path)["optimizer/loss_scale"] == {5: 2.0**15, 10: 2.0**15}


@pytest.mark.slow
@every_class
def test_own_metrics_on_two_devices(case, two_devices, rng, tmp_path):
    with two_devices.scope():
        model = _model(case())
    _check_own_metrics(case, model, rng, tmp_path)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_the_distance_of_lookaheads_weights(jit_compile, rng, tmp_path):
    optimizer = gdopt.Lookahead(gdopt.GradientDescent(0.1), sync_period=3)
    model = _model(optimizer, jit_compile=jit_compile)
    weights = _Weights()
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=1)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[weights, callback])
    written, after = read(tmp_path), weights.after
    for step in range(1, 11):
        slow = after[(step - 1) // 3 * 3]
        distance = _norm(a - b for a, b in zip(after[step], slow, strict=True))
        # A synchronization, which is seen here, has gone half of the way.
        distance *= 2 if step % 3 == 0 else 1
        assert written["optimizer/slow_fast_distance"][step] == pytest.approx(distance, rel=1e-4)
        assert written["optimizer/syncs"][step] == step // 3


def test_lookahead_around_keras(rng, tmp_path):
    model = _model(gdopt.Lookahead(keras.optimizers.SGD(0.01)))
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=10)
    with pytest.warns(UserWarning, match=r"Lookahead around keras.*SGD records no step"):
        model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    assert set(read(tmp_path)) == {f"optimizer/{tag}" for tag in OF_ANY}


# --- layers and histograms -----------------------------------------------------------


@pytest.mark.parametrize("jit_compile", [True, False])
def test_layers_have_norms_of_their_own(jit_compile, rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Momentum(0.01, momentum=0.5), jit_compile=jit_compile)
    weights = _Weights()
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=1, tier="layers")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[weights, callback])
    written = read(tmp_path)
    paths = [v.path for v in model.trainable_variables]
    names = ("grad_norm", "update_ratio_log10", "velocity_norm")
    expected = {f"layer_{name}/{path}" for name in names for path in paths}
    assert {tag for tag in written if tag.startswith("layer_")} == expected
    # The velocity is the mean of the gradients, and the change the rate times it.
    twin, velocity = _model("sgd"), [0.0] * 4
    for step in range(1, 11):
        before, after = weights.after[step - 1], weights.after[step]
        twin.set_weights(before)
        xb, yb = x[(step - 1) * 4 : step * 4], y[(step - 1) * 4 : step * 4]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(twin(xb) - yb))
        grads = tape.gradient(loss, [v.value for v in twin.trainable_variables])
        for i, (path, gradient) in enumerate(zip(paths, grads, strict=True)):
            velocity[i] = 0.5 * velocity[i] + 0.5 * gradient.numpy()
            change = np.log10(0.01 * _norm([velocity[i]]) / _norm([after[i]]))
            at = {name: written[f"layer_{name}/{path}"][step] for name in names}
            assert at["grad_norm"] == pytest.approx(_norm([gradient.numpy()]), rel=1e-4)
            assert at["velocity_norm"] == pytest.approx(_norm([velocity[i]]), rel=1e-4)
            assert at["update_ratio_log10"] == pytest.approx(change, abs=1e-4)


def _buckets(log_dir):
    """{tag: {step: buckets}} of all histograms."""
    accumulator = EventAccumulator(str(log_dir), size_guidance={"tensors": 0})
    accumulator.Reload()
    tags = accumulator.summary_metadata
    return {
        tag: {e.step: tf.make_ndarray(e.tensor_proto) for e in accumulator.Tensors(tag)}
        for tag in accumulator.Tags()["tensors"]
        if tags[tag].plugin_data.plugin_name == "histograms"
    }


def test_histograms_of_weights_slots_and_gradients(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.GradientDescent(0.01))
    momentum = _model(gdopt.Momentum(0.01))
    for name, one in (("plain", model), ("momentum", momentum)):
        weights = _Weights()
        callback = gdopt.callbacks.OptimizerTensorBoard(
            tmp_path / name, update_freq=10, tier="histograms"
        )
        one.fit(
            x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[weights, callback]
        )
        written = _buckets(tmp_path / name)
        kinds = {"weights", "gradients", *(["velocity"] if name == "momentum" else [])}
        paths = [v.path for v in one.trainable_variables]
        assert set(written) == {f"{kind}/{path}" for kind in kinds for path in paths}
        for i, path in enumerate(paths):
            histogram = written[f"weights/{path}"]
            assert list(histogram) == [10, 20]
            values = weights.after[20][i]
            if values.size == 1:
                assert histogram[20][-1].tolist() == [values[0], values[0], 1]
                continue
            counts, edges = np.histogram(values.astype("float64"), bins=30)
            np.testing.assert_array_equal(histogram[20][:, 2], counts)
            np.testing.assert_allclose(histogram[20][:, 0], edges[:-1], rtol=1e-6)
            np.testing.assert_allclose(histogram[20][:, 1], edges[1:], rtol=1e-6)
        if name == "plain":  # the last step's change is -0.01 times the gradient
            for i, path in enumerate(paths):
                gradient = (weights.after[19][i] - weights.after[20][i]) / 0.01
                of_gradient = written[f"gradients/{path}"][20]
                assert of_gradient[:, 2].sum() == gradient.size
                ends = of_gradient[0, 0], of_gradient[-1, 1]
                assert ends == pytest.approx((gradient.min(), gradient.max()), rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_gradients_that_were_not_recorded_anew_are_not_written_again(rng, tmp_path):
    model = _model(gdopt.Adam())
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=20, tier="histograms")
    model.fit(*_data(rng), batch_size=4, epochs=3, verbose=0, callbacks=[callback])
    steps = {tag.split("/")[0]: list(values) for tag, values in _buckets(tmp_path).items()}
    assert steps == {
        "weights": [10, 20, 30], "gradients": [20],
        "momentum": [10, 20, 30], "velocity": [10, 20, 30],
    }  # fmt: skip


@pytest.mark.slow
def test_a_higher_tier_is_recorded_in_a_second_fit(rng, tmp_path):
    model = _model(gdopt.Adam())
    for tier in TIERS:
        callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path / tier, update_freq=10, tier=tier)
        model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    assert not [tag for tag in read(tmp_path / "scalars") if tag.startswith("layer_")]
    assert [tag for tag in read(tmp_path / "layers") if tag.startswith("layer_")]
    assert list(_buckets(tmp_path / "histograms")["gradients/" + _path(model)]) == [30]


def _path(model):
    return model.trainable_variables[0].path


def test_a_gradient_of_an_embedding(rng, tmp_path):
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(6, 2), keras.layers.Flatten(),
         keras.layers.Dense(1)]
    )  # fmt: skip
    model.compile(gdopt.Adagrad(0.1, initial_accumulator_value=0.1), "mse")
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=1, tier="histograms")
    model.fit(rng.integers(0, 6, (4, 3)), rng.normal(size=(4, 1)), verbose=0, callbacks=[callback])
    gradient = model.optimizer.recorded_gradients[_path(model)]
    assert gradient.shape == (6, 2)
    norm = read(tmp_path)["layer_grad_norm/" + _path(model)]
    assert norm == pytest.approx({1: _norm([gradient])}, rel=1e-5)


# --- runs beside one another ---------------------------------------------------------


def test_two_in_one_fit_have_frequencies_of_their_own(rng, tmp_path):
    model = _model(gdopt.Adam())
    callbacks = [
        gdopt.callbacks.OptimizerTensorBoard(tmp_path / str(every), update_freq=every)
        for every in (3, 4)
    ]
    model.optimizer.record_step_metrics(5)
    model.fit(
        *_data(rng),
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=[*callbacks, keras.callbacks.TensorBoard(tmp_path / "keras")],
    )
    assert list(read(tmp_path / "3")["optimizer/grad_norm"]) == [3, 6, 9, 12, 15, 18, 20]
    assert list(read(tmp_path / "4")["optimizer/grad_norm"]) == [4, 8, 12, 16, 20]
    # And what was asked for without a callback goes on.
    model.fit(*_data(rng), batch_size=4, verbose=0)
    assert model.optimizer.step_metrics["iterations"] == 30


def test_a_resumed_fit_goes_on_where_its_checkpoint_was_made(rng, tmp_path):
    x, y = _data(rng)

    def fit(*more):
        model = _model(gdopt.Adam())
        board = gdopt.callbacks.OptimizerTensorBoard(tmp_path / "run", update_freq=2)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[board, backup, *more])

    class Dies(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 17:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Dies())
    assert list(read(tmp_path / "run")["optimizer/grad_norm"]) == [2, 4, 6, 8, 10, 12, 14, 16]
    fit()
    accumulator = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    accumulator.Reload()
    steps = [event.step for event in accumulator.Tensors("optimizer/grad_norm")]
    assert steps == list(range(2, 31, 2))
    assert [event.step for event in accumulator.Tensors("epoch_loss")] == [10, 20, 30]


def test_only_the_chief_writes(rng, tmp_path, monkeypatch):
    model = _model(gdopt.Adam())
    extended = type(model.distribute_strategy.extended)
    monkeypatch.setattr(extended, "should_save_summary", property(lambda self: False))
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path / "run", update_freq=2)
    model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback])
    assert not (tmp_path / "run").exists()
    assert model.optimizer.step_metrics["iterations"] == 10


def test_a_disk_that_fills_up_ends_the_writing_with_one_warning(rng, tmp_path, monkeypatch):
    model = _model(gdopt.Adam())
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)

    class Fills(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                full = tf.errors.ResourceExhaustedError(None, None, "No space left on device")
                writer = tf.io.TFRecordWriter
                monkeypatch.setattr(writer, "flush", lambda self: (_ for _ in ()).throw(full))

    with pytest.warns(UserWarning, match="No space left on device") as warned:
        history = model.fit(
            *_data(rng), batch_size=4, epochs=2, verbose=0, callbacks=[callback, Fills()]
        )
    assert sum("No space left" in str(w.message) for w in warned) == 1
    assert len(history.history["loss"]) == 2
    monkeypatch.undo()
    assert list(read(tmp_path)["optimizer/grad_norm"])[:2] == [2, 4]


# --- epochs and hyper-parameters -----------------------------------------------------


def test_the_logs_of_epochs(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Adam(), metrics=["mae"])
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path)
    history = model.fit(
        x, y, batch_size=4, epochs=2, validation_data=(x, y), verbose=0, callbacks=[callback]
    ).history
    written = read(tmp_path, "epoch_")
    assert set(written) == {"epoch_loss", "epoch_mae", "epoch_val_loss", "epoch_val_mae"}
    for name, values in history.items():
        expected = dict(zip([10, 20], values, strict=True))
        assert written[f"epoch_{name}"] == pytest.approx(expected, rel=1e-6)


def _hparams(log_dir):
    """The hyper-parameters of a run, its name and whether it ended."""
    accumulator = EventAccumulator(str(log_dir))
    accumulator.Reload()
    tags = accumulator.summary_metadata
    content = {tag: m.plugin_data.content for tag, m in tags.items() if "_hparams_" in tag}
    start = hparams_metadata.parse_session_start_info_plugin_data(
        content[hparams_metadata.SESSION_START_INFO_TAG]
    )
    values = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    }
    return values, start.group_name, hparams_metadata.SESSION_END_INFO_TAG in content


def test_hyperparameters_of_the_run(rng, tmp_path):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.5, 10, 0.25)
    keras.mixed_precision.set_global_policy("mixed_float16")
    optimizers = {
        "momentum": gdopt.Momentum(0.1, clipnorm=1.0),
        "scheduled": gdopt.GradientDescent(schedule),
        "lookahead": gdopt.Lookahead(gdopt.Adam(amsgrad=True), sync_period=3),
    }
    for name, optimizer in optimizers.items():
        callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path / name)
        _model(optimizer).fit(*_data(rng), verbose=0, callbacks=[callback])
    values, group, ended = _hparams(tmp_path / "momentum")
    assert values == {
        "optimizer": "Momentum", "learning_rate": 0.1, "momentum": 0.9, "classical": False,
        "clipnorm": 1.0,
    }  # fmt: skip
    assert group == f"{tmp_path.name}/momentum" and ended
    values, _, _ = _hparams(tmp_path / "scheduled")
    assert "learning_rate" not in values
    config = json.loads(values["learning_rate_schedule"])
    assert config["class_name"] == "PolynomialDecay"
    assert config["config"]["end_learning_rate"] == 0.25
    values, _, _ = _hparams(tmp_path / "lookahead")
    assert values == {
        "optimizer": "Lookahead", "inner_optimizer": "Adam", "sync_period": 3.0,
        "slow_step_size": 0.5, "learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999,
        "epsilon": 1e-8, "epsilon_root": 0.0, "amsgrad": True,
    }  # fmt: skip


def test_the_hyperparameters_of_a_run_that_breaks_are_there(rng, tmp_path):
    model = _model(gdopt.Adam())
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            *_data(rng), batch_size=4, verbose=0, callbacks=[callback, _Breaks(KeyboardInterrupt())]
        )
    values, _, ended = _hparams(tmp_path)
    assert values["optimizer"] == "Adam" and not ended


def _configs(cls):
    """The optimizers that a run may have, with arguments of every type that they take."""
    argument = [] if cls is not gdopt.Lookahead else [gdopt.Adam()]
    yield cls(*argument)
    if argument:
        return
    taken = {*inspect.signature(cls).parameters, *BASE_ARGUMENTS}
    if "learning_rate" in taken:
        yield cls(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5))
        yield cls(lambda: 0.1)
    of_any_type = {
        "weight_decay": (0, 0.1), "clipnorm": (1, 1.5), "loss_scale_factor": (2, 2.0),
        "momentum": (np.float32(0.5), 0), "beta_1": (tf.constant(0.5), 0.5), "nesterov": (1, True),
        "amsgrad": (True,), "jit_compile": (True, "auto"), "exclude_layers": (["a"],),
        "gradient_accumulation_steps": (2,), "ema_overwrite_frequency": (3,),
    }  # fmt: skip
    for name in taken & set(of_any_type):
        for value in of_any_type[name]:
            with contextlib.suppress(ValueError, TypeError):  # it does not take it
                yield cls(**{name: value})


@pytest.mark.slow
def test_a_hyperparameter_has_one_type_in_all_runs():
    """A key that is text in one run is text in all of them, for TensorBoard."""
    modules = (keras.optimizers, gdopt)
    public = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    of_keras = {c for c in public if issubclass(c, keras.optimizers.Optimizer)}
    named = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer", "GradientOptimizer")
    classes = {c for c in of_keras if c.__name__ not in named}
    assert len(classes) > 20
    types = {}
    for cls in classes:
        for optimizer in _configs(cls):
            for key, value in hyperparameters(optimizer).items():
                types.setdefault(key, {}).setdefault(type(value), optimizer)
    assert {key: kinds for key, kinds in types.items() if len(kinds) > 1} == {}
    assert (
        set(types["learning_rate"]) == set(types["momentum"]) == set(types["clipnorm"]) == {float}
    )
    assert set(types["nesterov"]) == {bool}


def test_an_optimizer_without_a_config(rng, tmp_path):
    class Own(keras.optimizers.SGD):
        def get_config(self):
            raise TypeError("a function that cannot be saved")

    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path)
    with pytest.warns(UserWarning, match="Own records no step metrics"):
        _model(Own()).fit(*_data(rng), verbose=0, callbacks=[callback])
    assert _hparams(tmp_path)[0] == {"optimizer": "Own"}


# --- models and logs of every kind ---------------------------------------------------


def test_logs_that_are_no_numbers(rng, tmp_path):
    class Adds(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs.update(note="a", none=None, list=[1, 2], ragged=[[1], [1, 2]], dict={"a": 1})
            logs.update(text=tf.constant("b"), tensor=tf.constant(2.0), flag=True, nan=np.nan)

    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path)
    _model(gdopt.Adam()).fit(*_data(rng), batch_size=4, verbose=0, callbacks=[Adds(), callback])
    written = read(tmp_path, "epoch_")
    assert set(written) == {f"epoch_{name}" for name in ("loss", "tensor", "flag", "nan")}
    assert written["epoch_tensor"] == {10: 2.0} and np.isnan(written["epoch_nan"][10])


class _Apart(keras.Sequential):
    """Trains by an optimizer that Keras does not know of, as adversarial models do."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - y))
        self.own.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"own": loss}


@pytest.mark.parametrize(
    ("why", "is_ours"),
    [("frozen", True), ("another", False), slow("frozen", False), slow("another", True)],
)
@pytest.mark.filterwarnings("ignore:.*records no step metrics", "ignore:.*not have any trainable")
def test_an_optimizer_that_makes_no_update(why, is_ours, rng, tmp_path):
    """Epochs are as many batches apart."""
    cls = keras.Sequential if why == "frozen" else _Apart
    model = cls([keras.Input((4,)), keras.layers.Dense(1)], name="model")
    model.trainable = why != "frozen"
    model.own = gdopt.Momentum() if why == "another" else None
    model.compile(gdopt.Adam() if is_ours else "rmsprop", "mse")
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, tier="histograms", update_freq=1)
    with pytest.warns(UserWarning, match=r"made no update in this epoch.* Received: ") as warned:
        model.fit(*_data(rng), batch_size=4, epochs=3, verbose=0, callbacks=[callback])
    assert sum("made no update" in str(warning.message) for warning in warned) == 1
    losses = read(tmp_path, "epoch_")["epoch_loss" if why == "frozen" else "epoch_own"]
    assert list(losses) == [10, 20, 30] and read(tmp_path) == {}


@every_optimizer_alike
def test_layers_that_were_frozen_in_between(case, rng, tmp_path):
    """Without `compile`, so that the optimizer has slots of weights that rest."""
    x, y = _data(rng, samples=8)
    model = _model(case())
    model.fit(x, y, batch_size=4, verbose=0)
    model.layers[0].trainable = False
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=1, tier="histograms")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    buckets = _buckets(tmp_path)
    assert f"weights/{model.layers[1].kernel.path}" in buckets
    kinds = model.optimizer.slot_variables
    assert {f"{kind}/{model.layers[1].kernel.path}" for kind in kinds} <= set(buckets)


def test_weights_that_overflow_have_no_ratio(rng, tmp_path):
    """The square of a weight is more than float32 holds; its change is finite."""
    model = _model(gdopt.GradientDescent(0.1))
    model.layers[0].set_weights([np.full((4, 5), 1e25), np.zeros(5)])
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=1, tier="layers")
    model.fit(*_data(rng), batch_size=40, verbose=0, callbacks=[callback])
    written = read(tmp_path)
    assert written["optimizer/weight_norm"] == {1: np.inf}
    assert "optimizer/update_ratio_log10" not in written
    assert f"layer_update_ratio_log10/{model.layers[1].kernel.path}" in written


# --- as TensorBoard serves it --------------------------------------------------------


def test_a_real_tensorboard_compares_the_runs(serving, rng, tmp_path):
    x, y = _data(rng)
    histories = {}
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 20)
    optimizers = {
        "adam": gdopt.Adam(),
        "momentum": gdopt.Momentum(0.02),
        "scheduled": gdopt.Momentum(schedule, clipnorm=1),
    }
    for name, optimizer in optimizers.items():
        log_dir = tmp_path / "runs" / name
        callback = gdopt.callbacks.OptimizerTensorBoard(log_dir, update_freq=5, tier="layers")
        histories[name] = (
            _model(optimizer)
            .fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[callback])
            .history
        )
    with serving(tmp_path / "runs", list(optimizers)) as server:
        assert set(server.json("/data/runs")) == set(optimizers)
        for name, history in histories.items():
            losses = server.scalars(name, "epoch_loss")
            expected = list(zip([10, 20], history["loss"], strict=True))
            np.testing.assert_allclose(losses, expected, rtol=1e-6)
            norms = read(tmp_path / "runs" / name)["optimizer/grad_norm"]
            np.testing.assert_allclose(
                server.scalars(name, "optimizer/grad_norm"), list(norms.items()), rtol=1e-6
            )
        # The layouts of both runs are the same, so that there is each chart once.
        (category,) = server.json("/data/plugin/custom_scalars/layout")["category"]
        assert category["title"] == "Optimizer"
        charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        assert len(charts) == len(category["chart"]) == 6
        for tags in charts.values():  # each chart has something to show
            for tag in tags:
                answer = server.json("/data/plugin/custom_scalars/scalars", run="adam", tag=tag)
                assert answer["regex_valid"] and answer["tag_to_events"], tag
        groups = _session_groups(server)
        columns = server.post("/data/plugin/hparams/experiment", {"experimentName": ""})
    # One run with a schedule must not make a text of the others' rates.
    types = {column["name"]: column["type"] for column in columns["hparamInfos"]}
    assert types["learning_rate"] == types["clipnorm"] == "DATA_TYPE_FLOAT64"
    assert types["learning_rate_schedule"] == types["optimizer"] == "DATA_TYPE_STRING"
    assert "CosineDecay" in groups.pop("runs/scheduled")[0]["learning_rate_schedule"]
    del histories["scheduled"]
    assert set(groups) == {"runs/adam", "runs/momentum"}
    for name, history in histories.items():
        hparams, metrics = groups[f"runs/{name}"]
        assert hparams["optimizer"] == ("Adam" if name == "adam" else "Momentum")
        assert hparams["learning_rate"] == (0.001 if name == "adam" else 0.02)
        assert metrics["epoch_loss"] == pytest.approx(history["loss"][-1], rel=1e-6)


def _session_groups(server):
    """{trial: (hyper-parameters, metrics)} as the HParams tab gets them."""
    experiment = server.post("/data/plugin/hparams/experiment", {"experimentName": ""})
    request = {
        "experimentName": "",
        "allowedStatuses": [
            "STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING",
        ],
        "colParams": [{"metric": info["name"]} for info in experiment["metricInfos"]],
        "startIndex": 0,
        "sliceSize": 100,
    }  # fmt: skip
    answer = server.post("/data/plugin/hparams/session_groups", request)
    return {
        group["name"]: (
            group["hparams"],
            {value["name"]["tag"]: value["value"] for value in group["metricValues"]},
        )
        for group in answer["sessionGroups"]
    }
