"""Draws gradient descent at the edge of stability, for the page on TensorBoard."""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib.figure
import numpy as np
from plain_axes import as_svg, make_plain

import keras_gdopt as gdopt
from keras_gdopt.callbacks.curvature import Curvature, highest_stable_learning_rate

_RATE, _STEPS, _STEPS_BETWEEN = 0.12, 250, 5


class _HighestStableRate(keras.callbacks.Callback):
    """What `OptimizerTensorBoard` writes with `curvature_data`, and the loss of each step."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self._data = x, y
        self.losses: list[float] = []
        self.rates: dict[int, float] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        self._curvature = Curvature(self.model, self._data)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch % _STEPS_BETWEEN == 0:
            eigenvalue = self._curvature.largest_eigenvalue()
            rate = highest_stable_learning_rate(self.model.optimizer, eigenvalue)
            self.rates[epoch] = float("nan") if rate is None else rate

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))


def picture(name: str) -> bytes:
    """Trains with the whole data in each step, and draws the loss and the rates as an SVG."""
    del name
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = (np.sin(2 * x) @ rng.normal(size=(4, 1))).astype("float32")
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(16, "tanh"), keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(gdopt.GradientDescent(_RATE), "mse")
    watched = _HighestStableRate(x, y)
    model.fit(x, y, batch_size=64, epochs=_STEPS, verbose=0, callbacks=[watched])

    figure = matplotlib.figure.Figure(figsize=(5.6, 3.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    steps, rates = zip(*watched.rates.items(), strict=True)
    label = "highest stable learning rate"
    above.plot(steps, rates, color="tab:orange", linewidth=1.4, label=label)
    above.axhline(_RATE, color="tab:blue", linewidth=1.4, label="learning rate")
    above.set_ylim(0, 3 * _RATE)
    below.plot(np.arange(_STEPS), watched.losses, color="0.35", linewidth=1, label="loss")
    below.set_yscale("log")
    below.set_xlabel("step", fontsize=8, color="0.3")
    below.set_xlim(0, _STEPS)
    for axes in (above, below):
        make_plain(axes)
    return as_svg(figure)
