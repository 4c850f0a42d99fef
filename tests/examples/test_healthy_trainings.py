"""No alarm is raised by the trainings of the examples."""

import keras
import pytest

import keras_gdopt as gdopt
from keras_gdopt.callbacks import TrainingAlarms
from tests.examples.scripts import EXAMPLES, imported

POPULATIONS = (
    "--data", "digits", "--seeds", "1", "--members", "6", "--generations", "5", "--epochs", "2",
    "--contenders", "Gadam, as published", "Gadam, evolving",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "least", "expected"),
    [
        ("compare_optimizers", ("--epochs", "10"), 10, set()),  # each first-order optimizer
        ("embeddings", (), 9, set()),
        ("gradient_descent", (), 7, set()),
        ("population_study", POPULATIONS, 2, set()),
        # To the last digit is what it is for.
        ("regression_to_precision", ("--evaluations", "600"), 8, {"ended_by_rounding"}),
    ],
)
def test_they_raise_none(script, arguments, least, expected, tmp_path, monkeypatch, capsys):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    watched = []

    def watch(cls, optimizer_of):
        fit = cls.fit

        def fit_watched(trained, *data, callbacks=(), **settings):
            alarms = TrainingAlarms(update_freq=5)
            history = fit(trained, *data, callbacks=[*callbacks, alarms], **settings)
            watched.append((optimizer_of(trained), alarms.raised))
            return history

        monkeypatch.setattr(cls, "fit", fit_watched)

    watch(keras.Model, lambda model: type(model.optimizer).__name__)
    watch(gdopt.Gadam, lambda gadam: f"Gadam(evolve={gadam.evolve})")
    monkeypatch.chdir(tmp_path)
    with imported(EXAMPLES / f"{script}.py") as example:
        example.main([*arguments, "--logdir", str(tmp_path)])
    assert len(watched) >= least
    assert [one for one in watched if set(one[1]) - expected] == []
