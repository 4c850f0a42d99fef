"""No alarm is raised by the trainings of the examples."""

import keras
import pytest

from keras_gdopt.callbacks import TrainingAlarms
from tests.examples.scripts import EXAMPLES, imported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "least"),
    [
        ("compare_optimizers", ("--epochs", "10"), 10),  # each first-order optimizer
        ("embeddings", (), 9),
        ("gradient_descent", (), 7),
    ],
)
def test_they_raise_none(script, arguments, least, tmp_path, monkeypatch, capsys):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    fit, watched = keras.Model.fit, []

    def fit_watched(model, *data, callbacks=(), **settings):
        alarms = TrainingAlarms(update_freq=5)
        history = fit(model, *data, callbacks=[*callbacks, alarms], **settings)
        watched.append((type(model.optimizer).__name__, alarms.raised))
        return history

    monkeypatch.setattr(keras.Model, "fit", fit_watched)
    with imported(EXAMPLES / f"{script}.py") as example:
        example.main([*arguments, "--logdir", str(tmp_path)])
    assert len(watched) >= least
    assert [one for one in watched if one[1]] == []
