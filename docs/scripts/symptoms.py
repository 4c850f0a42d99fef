"""Draws trainings that fail, and where an alarm is raised, for the page on symptoms.

Each picture is of a small training that has the symptom; `TrainingAlarms` watches it.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from plain_axes import as_svg, make_plain

import keras_gdopt as gdopt
from keras_gdopt.callbacks import TrainingAlarms

Data = tuple[np.ndarray, np.ndarray]

_BATCH = 16
_HEALTHY = "a healthy training"
_CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Training(NamedTuple):
    """What a picture shows."""

    curves: dict[str, Sequence[float]]
    """By label; one value for each step or epoch."""
    unit: str
    """What the horizontal axis counts."""
    alarms: TrainingAlarms
    steps_per_unit: int = 1
    is_logarithmic: bool = False


class _Losses(keras.callbacks.Callback):
    """The loss of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))


def _regression(samples: int = 320) -> Data:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 4)).astype("float32")
    return x, (np.sin(2 * x) @ rng.normal(size=(4, 1))).astype("float32")


def _classes(samples: int = 320) -> Data:
    x, y = _regression(samples)
    return x, np.digitize(y[:, 0], np.quantile(y, [1 / 3, 2 / 3]))


def _mlp(
    optimizer: Any,
    *,
    activation: str = "relu",
    depth: int = 1,
    units: int = 16,
    outputs: int = 1,
    loss: Any = "mse",
) -> keras.Model:
    keras.utils.set_random_seed(1)
    hidden = [keras.layers.Dense(units, activation) for _ in range(depth)]
    model = keras.Sequential([keras.Input((4,)), *hidden, keras.layers.Dense(outputs)])
    model.compile(optimizer, loss)
    return model


def _train(model: keras.Model, data: Data, epochs: int, **arguments: Any) -> tuple[Any, Any]:
    losses, alarms = _Losses(), TrainingAlarms(update_freq=1)
    history = model.fit(
        *data, epochs=epochs, shuffle=False, verbose=0, callbacks=[losses, alarms], **arguments
    ).history
    return (history if epochs > 1 else {"loss": losses.losses}), alarms


def _by_steps(model: keras.Model, data: Data) -> Training:
    """One epoch, by the loss of each batch."""
    history, alarms = _train(model, data, 1, batch_size=_BATCH)
    return Training({"loss of a batch": history["loss"]}, "step", alarms)


def _by_epochs(optimizer: Any, healthy: Any, epochs: int = 15, **arguments: Any) -> Training:
    """Several epochs, beside a training with another optimizer."""
    data = _regression()
    others, _ = _train(_mlp(healthy, **arguments), data, epochs, batch_size=_BATCH)
    history, alarms = _train(_mlp(optimizer, **arguments), data, epochs, batch_size=_BATCH)
    curves = {"loss": history["loss"], _HEALTHY: others["loss"]}
    return Training(curves, "epoch", alarms, steps_per_unit=len(data[0]) // _BATCH)


def _nan() -> Training:
    x, y = _regression()
    x[_BATCH * 15, 2] = np.nan
    return _by_steps(_mlp(gdopt.Adam(0.01), activation="tanh"), (x, y))


def _jump() -> Training:
    x, y = _regression()
    y[_BATCH * 15 : _BATCH * 16] *= 3000.0
    model = _mlp(gdopt.GradientDescent(0.001), activation="tanh")
    return _by_steps(model, (x, y))._replace(is_logarithmic=True)


def _rate_too_high() -> Training:
    return _by_epochs(gdopt.Adam(1.0), gdopt.Adam(0.02))._replace(is_logarithmic=True)


def _flat() -> Training:
    x, y = _classes()
    histories = []
    for bias in (0.0, -100.0):  # with the latter, no unit is ever active
        model = _mlp(gdopt.Adam(0.02), loss=_CROSSENTROPY, outputs=3)
        model.layers[0].bias.assign(model.layers[0].bias + bias)
        alarms = TrainingAlarms(update_freq=1, labels=y)
        fit = {"batch_size": _BATCH, "epochs": 15, "verbose": 0}
        histories.append(model.fit(x, y, callbacks=[alarms], **fit).history["loss"])
    curves = {"loss": histories[1], _HEALTHY: histories[0]}
    return Training(curves, "epoch", alarms, steps_per_unit=len(x) // _BATCH)


def _ends_early() -> Training:
    schedule = keras.optimizers.schedules.PolynomialDecay(0.02, 60, 0.0)
    return _by_epochs(gdopt.Adam(schedule), gdopt.Adam(0.02))


def _slow() -> Training:
    return _by_epochs(gdopt.GradientDescent(0.1, global_clipnorm=1e-2), gdopt.GradientDescent(0.1))


def _validation() -> Training:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(124, 4)).astype("float32")
    y = x.sum(axis=1, keepdims=True) + rng.normal(size=(124, 1))
    history, alarms = _train(
        _mlp(gdopt.Adam(0.005), activation="tanh", units=64),
        (x[:24], y[:24]),
        80,
        batch_size=_BATCH,
        validation_data=(x[24:], y[24:]),
    )
    curves = {name: history[name] for name in ("loss", "val_loss")}
    return Training(curves, "epoch", alarms, steps_per_unit=2)


def _rounding() -> Training:
    curves = {}
    for dtype in ("float64", "float32"):
        keras.config.set_floatx(dtype)
        x, y = (array.astype(dtype) for array in _regression(64))
        optimizer = gdopt.LBFGS(iterations_per_step=5, relative_gradient_tolerance=0.0)
        model = _mlp(optimizer, activation="tanh", units=3)
        optimizer.attach(model)
        history, alarms = _train(model, (x, y), 50, batch_size=64)
        curves[dtype] = np.array(history["loss"])
    lowest = np.min(curves["float64"])
    above = {
        f"above the minimum, {dtype}": np.maximum(losses - lowest, 1e-8)
        for dtype, losses in reversed(curves.items())
    }
    return Training(above, "step", alarms, is_logarithmic=True)


def _children() -> Training:
    x, y = _classes(96)
    survived = []
    good = {"evolve": {"learning_rate": (1e-3, 1e-1)}}
    bad = {"mutation": "normal", "mutation_rate": 1.0, "mutation_stddev": 30.0}
    for arguments in (good, bad):
        model = _mlp(gdopt.Adam(0.01), loss=_CROSSENTROPY, outputs=3)
        gadam = gdopt.Gadam(model, 6, seed=0, **arguments)
        alarms = TrainingAlarms(update_freq=1)
        history = gadam.fit(x, y, generations=8, verbose=0, callbacks=[alarms]).history
        survived.append(history["children_survived"])
    curves = {"children that survive": survived[1], _HEALTHY: survived[0]}
    return Training(curves, "generation", alarms, steps_per_unit=len(x) // 32)


SYMPTOMS: dict[str, Callable[[], Training]] = {
    "symptom_nan": _nan,
    "symptom_jump": _jump,
    "symptom_rate_too_high": _rate_too_high,
    "symptom_flat": _flat,
    "symptom_ends_early": _ends_early,
    "symptom_slow": _slow,
    "symptom_validation": _validation,
    "symptom_rounding": _rounding,
    "symptom_children": _children,
}


def picture(name: str) -> bytes:
    """Trains, and draws the curves and the alarms as an SVG.

    Args:
        name: A key of `SYMPTOMS`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the alarms
        training = SYMPTOMS[name]()
    figure = matplotlib.figure.Figure(figsize=(4.6, 2.2), layout="constrained")
    axes = figure.subplots()
    for (label, values), color in zip(training.curves.items(), ("tab:blue", "0.6"), strict=False):
        places = np.arange(1, len(values) + 1)
        axes.plot(places, values, color=color, linewidth=1.4, label=label)
    alarms: dict[float, list[str]] = {}
    for raised in training.alarms.raised.values():
        place = min(raised.step / training.steps_per_unit, float(places[-1]))
        alarms.setdefault(place, []).append(raised.name)
    for place, names in sorted(alarms.items()):
        axes.axvline(
            place, color="tab:orange", linestyle="--", linewidth=1.4, label=", ".join(names)
        )
    if training.is_logarithmic:
        axes.set_yscale("log")
    axes.set_xlim(0, places[-1] * 1.02)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set_xlabel(training.unit, fontsize=8, color="0.3")
    make_plain(axes)
    return as_svg(figure)
