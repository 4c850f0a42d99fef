"""The event files, read back, against norms computed from gradients and weights."""

import gc
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import keras_gdopt as gdopt
from tests.optimizer_cases import every_rule

TAGS = ["learning_rate", "grad_norm", "update_norm", "weight_norm", "update_ratio_log10"]


def read(log_dir):
    """{tag: {step: value}} of the scalars in all event files of a directory."""
    accumulator = EventAccumulator(str(log_dir), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in accumulator.Tensors(tag)}
        for tag in accumulator.Tags()["tensors"]
        if tag.startswith(("optimizer/", "epoch_"))
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
    expected = {tag: {} for tag in TAGS[1:]}
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


@pytest.mark.parametrize("jit_compile", [True, False])
@every_rule
def test_every_tag_at_every_expected_step(case, jit_compile, rng, tmp_path):
    x, y = _data(rng)
    model = _model(case(learning_rate=0.01), jit_compile=jit_compile)
    weights = _Weights()
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=3)
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[weights, callback])
    written = read(tmp_path)
    own = set(model.optimizer.step_metrics) - {"iterations", *TAGS}
    assert set(written) == {f"optimizer/{tag}" for tag in [*TAGS, *own]}
    steps = [3, 6, 9, 12, 15, 18]
    assert all(list(values) == steps for values in written.values())
    expected = _expected(weights.after, x, y, 4)
    for step in steps:
        assert written["optimizer/learning_rate"][step] == pytest.approx(0.01, rel=1e-6)
        for tag, values in expected.items():
            assert written[f"optimizer/{tag}"][step] == pytest.approx(values[step], rel=1e-3), tag


def test_a_second_fit_goes_on_and_traces_nothing_again(rng, tmp_path):
    x, y = _data(rng)
    model = _model(gdopt.Adam())
    for _ in range(2):
        callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=4)
        model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[callback])
        train_function = model.train_function
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [4, 8, 12, 16, 20]
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[callback])
    assert model.train_function is train_function
    clusters = model.optimizer._tensorflow_step._clusters.values()
    assert [c.experimental_get_tracing_count() for c in clusters] == [1, 1]


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


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_event_files_are_whole_and_closed_when_training_breaks(error, rng, tmp_path):
    model = _model(gdopt.Adam())
    callback = gdopt.callbacks.OptimizerTensorBoard(tmp_path, update_freq=2)
    with pytest.raises(type(error)):
        model.fit(*_data(rng), batch_size=4, verbose=0, callbacks=[callback, _Breaks(error)])
    assert list(read(tmp_path)["optimizer/grad_norm"]) == [2, 4, 6, 8]
    # Closed with the callback: a closed writer refuses.
    writer = callback._writer
    del callback
    error.__traceback__ = None
    gc.collect()
    with pytest.raises(RuntimeError, match="already closed"), writer.as_default():
        pass
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
    with pytest.raises(ValueError, match=r"optimizer of keras_gdopt.*Received: .*adam\.Adam"):
        model.fit(
            *_data(rng), verbose=0, callbacks=[gdopt.callbacks.OptimizerTensorBoard(tmp_path)]
        )
