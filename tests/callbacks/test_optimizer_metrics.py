"""The optimizer's metrics in Keras's logs."""

import csv

import keras
import numpy as np
import pytest

import keras_gdopt as gdopt
from keras_gdopt.callbacks import OptimizerMetrics
from tests.optimizer_cases import closure_classes, every_optimizer_alike

DEFAULT = {"learning_rate", "grad_norm", "update_norm", "weight_norm"}


def _data(rng):
    x = rng.normal(size=(40, 3)).astype("float32")
    return x, (np.sin(x) @ rng.normal(size=(3, 2))).astype("float32")


def _model(optimizer, **compile_arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="only")])
    model.compile(optimizer, "mse", **compile_arguments)
    return model


class _Logs(keras.callbacks.Callback):
    """What a later callback sees after each batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(dict(logs))


@every_optimizer_alike
def test_later_callbacks_see_the_step(case, rng):
    """The norms of plain gradient descent, from the weights alone."""
    x, y = _data(rng)
    model, later = _model(case(learning_rate=0.01)), _Logs()
    history = model.fit(
        x, y, batch_size=8, epochs=2, verbose=0, callbacks=[OptimizerMetrics(update_freq=1), later]
    ).history
    assert set(history) == {"loss", *DEFAULT}
    assert all(np.all(np.isfinite(values)) for values in history.values())
    assert len(later.seen) == 10 and all(logs.keys() >= DEFAULT for logs in later.seen)
    for name in DEFAULT:
        assert [later.seen[4][name], later.seen[9][name]] == history[name]
    assert history["learning_rate"] == pytest.approx([0.01, 0.01])


def test_the_numbers_are_those_of_the_step(rng):
    x, y = _data(rng)
    model = _model(gdopt.GradientDescent(0.5))
    before = model.get_weights()
    later = _Logs()
    callbacks = [OptimizerMetrics(["grad_norm", "update_norm"], update_freq=1), later]
    model.fit(x, y, batch_size=40, verbose=0, callbacks=callbacks)
    change = np.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in zip(model.get_weights(), before, strict=True))
    )
    (logs,) = later.seen
    assert logs["update_norm"] == pytest.approx(change, rel=1e-4)
    assert logs["grad_norm"] == pytest.approx(change / 0.5, rel=1e-4)
    assert "weight_norm" not in logs


def test_a_second_fit_shows_a_step_as_soon_as_it_is_recorded(rng):
    """The optimizer counts on, so its tenth step is the fifth batch of the second `fit`."""
    x, y = _data(rng)
    model, later = _model(gdopt.Adam()), _Logs()
    model.fit(x, y, batch_size=8, verbose=0)  # 5 batches
    callbacks = [OptimizerMetrics(["grad_norm"], update_freq=10), later]
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    is_known = [bool(np.isfinite(logs["grad_norm"])) for logs in later.seen]
    assert is_known == [False] * 4 + [True] * 6


def test_a_csv_file_has_all_columns_from_the_first_epoch_on(rng, tmp_path):
    x, y = _data(rng)
    path = tmp_path / "log.csv"
    model = _model(gdopt.Adam())
    callbacks = [OptimizerMetrics(update_freq=8), keras.callbacks.CSVLogger(path)]
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks)  # 5 batches an epoch
    rows = list(csv.DictReader(path.open()))
    own = [{name for name in row if not name.startswith("val_")} for row in rows]
    assert own == 3 * [{"epoch", "loss", *DEFAULT}]  # Keras adds `val_` columns, which stay empty
    norms = [float(row["grad_norm"]) for row in rows]
    assert np.isnan(norms[0]) and norms[1] > 0  # recorded at batch 8
    assert norms[2] == norms[1]


@pytest.mark.slow
def test_mlflow_logs_them(rng, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow no longer develops
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'runs'}")
    with mlflow.start_run() as run:
        callbacks = [OptimizerMetrics(update_freq=1), mlflow.keras.MlflowCallback()]
        history = _model(gdopt.Adam()).fit(*_data(rng), epochs=2, verbose=0, callbacks=callbacks)
    logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "grad_norm")
    assert [metric.value for metric in logged] == pytest.approx(history.history["grad_norm"])


def test_executions_of_several_steps(rng):
    x, y = _data(rng)
    model = _model(gdopt.Adam(), steps_per_execution=2)
    later = _Logs()
    model.fit(
        x[:32], y[:32], batch_size=8, verbose=0, callbacks=[OptimizerMetrics(update_freq=3), later]
    )
    known = [not np.isnan(logs["grad_norm"]) for logs in later.seen]
    assert known == [False, True]


def test_keras_optimizers_and_several(rng):
    x, y = _data(rng)
    model = _model(keras.optimizers.SGD(0.25))
    history = model.fit(x, y, verbose=0, callbacks=[OptimizerMetrics(update_freq=1)]).history
    assert history["learning_rate"] == [0.25] and history["weight_norm"][0] > 0
    assert np.isnan(history["grad_norm"][0])
    if hasattr(keras.optimizers, "MultiOptimizer"):
        several = keras.optimizers.OptimizerMap(gdopt.Adam(0.5), {".*bias": gdopt.NAG(0.125)})
        model = _model(keras.optimizers.MultiOptimizer(several))
        callback = OptimizerMetrics(["learning_rate"], update_freq=1)
        history = model.fit(x, y, verbose=0, callbacks=[callback]).history
        assert history["Adam/learning_rate"] == [0.5]
        assert history["NAG/learning_rate"] == [0.125]


@pytest.mark.slow
@pytest.mark.parametrize("cls", closure_classes()[:1])
def test_optimizers_that_evaluate_the_loss(cls, rng):
    model = _model(cls())
    model.optimizer.attach(model)
    callback = OptimizerMetrics(["grad_norm", "evaluations"], update_freq=1)
    history = model.fit(*_data(rng), batch_size=40, epochs=2, verbose=0, callbacks=[callback])
    assert all(value >= 1 for value in history.history["evaluations"])


def test_recording_ends_with_the_training(rng):
    x, y = _data(rng)
    model = _model(gdopt.Adam())
    model.fit(x, y, verbose=0, callbacks=[OptimizerMetrics(update_freq=1)])
    model.fit(x, y, verbose=0)
    assert model.optimizer.step_metrics["iterations"] == 2  # of the first training


def test_wrong_arguments(rng):
    with pytest.raises(ValueError, match="Received: names='grad_norm'"):
        OptimizerMetrics("grad_norm")
    with pytest.raises(ValueError, match="update_freq"):
        OptimizerMetrics(update_freq=0)
    model = _model(gdopt.Adam())
    with pytest.raises(ValueError, match=r"no metric of the name\(s\) \['velocity'\]"):
        model.fit(*_data(rng), verbose=0, callbacks=[OptimizerMetrics(["velocity"], update_freq=1)])
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    callback = OptimizerMetrics()
    callback.set_model(plain)
    with pytest.raises(ValueError, match="which is not compiled"):
        callback.on_train_begin()
