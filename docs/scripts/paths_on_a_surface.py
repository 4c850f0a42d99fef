"""Draws the path of each optimizer on a test surface, beside gradient descent's.

The package's own optimizers run. The surface is a bent valley, steep across and flat along,

    f(x, y) = x² / 20 + (y - sin(x))²,

with its lowest point at (0, 0). It is a sum of two squares because Levenberg-Marquardt needs one.
"""

import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib.figure
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt
from keras_gdopt.closures import ClosureOptimizer

START = (-4.5, 1.6)


class Path(NamedTuple):
    """One curve of a picture."""

    label: str
    optimizer: Callable[[], keras.optimizers.Optimizer]
    steps: int = 60


DESCENT = Path("GradientDescent(0.3)", lambda: gdopt.GradientDescent(0.3))

PATHS: dict[str, Sequence[Path]] = {
    "gradient_descent": [
        Path("GradientDescent(0.05)", lambda: gdopt.GradientDescent(0.05)),
        Path("GradientDescent(0.65)", lambda: gdopt.GradientDescent(0.65)),
    ],
    "momentum": [
        Path("Momentum(0.3)", lambda: gdopt.Momentum(0.3)),
        Path("Momentum(0.1, classical=True)", lambda: gdopt.Momentum(0.1, classical=True)),
    ],
    "nag": [
        Path("NAG(0.3)", lambda: gdopt.NAG(0.3)),
        Path("NAG(0.1, classical=True)", lambda: gdopt.NAG(0.1, classical=True)),
    ],
    "adagrad": [Path("Adagrad(0.5)", lambda: gdopt.Adagrad(0.5))],
    "rmsprop": [
        Path("RMSprop(0.1)", lambda: gdopt.RMSprop(0.1)),
        Path("RMSprop(0.02, momentum=0.9)", lambda: gdopt.RMSprop(0.02, momentum=0.9)),
    ],
    "adadelta": [
        Path("Adadelta()", lambda: gdopt.Adadelta()),
        Path("Adadelta(epsilon_root=1e-3)", lambda: gdopt.Adadelta(epsilon_root=1e-3)),
    ],
    "adam": [
        Path("Adam(0.2)", lambda: gdopt.Adam(0.2)),
        Path("Adam(0.05)", lambda: gdopt.Adam(0.05)),
    ],
    "nadam": [
        Path("Nadam(0.2)", lambda: gdopt.Nadam(0.2)),
        Path("Adam(0.2)", lambda: gdopt.Adam(0.2)),
    ],
    "radam": [
        Path("RAdam(0.2)", lambda: gdopt.RAdam(0.2)),
        Path("Adam(0.2)", lambda: gdopt.Adam(0.2)),
    ],
    "lookahead": [
        Path("Lookahead(Adam(0.2))", lambda: gdopt.Lookahead(gdopt.Adam(0.2))),
        Path("Adam(0.2)", lambda: gdopt.Adam(0.2)),
    ],
    "conjugate_gradient": [
        Path("ConjugateGradient()", lambda: gdopt.ConjugateGradient(jit_compile=False), 15)
    ],
    "newton": [Path("Newton()", lambda: gdopt.Newton(jit_compile=False), 15)],
    "bfgs": [Path("BFGS()", lambda: gdopt.BFGS(jit_compile=False), 15)],
    "lbfgs": [Path("LBFGS()", lambda: gdopt.LBFGS(jit_compile=False), 15)],
    "levenberg_marquardt": [
        Path("LevenbergMarquardt()", lambda: gdopt.LevenbergMarquardt(jit_compile=False), 15),
        Path(
            "LevenbergMarquardt(damping=10)",
            lambda: gdopt.LevenbergMarquardt(damping=10, jit_compile=False),
            15,
        ),
    ],
}


def residuals(x: Any, y: Any) -> tuple[Any, Any]:
    """Returns the two terms whose squares add up to the surface."""
    return x / 20**0.5, y - keras.ops.sin(x)


def surface(x: Any, y: Any) -> Any:
    """Returns the function to minimize."""
    along, across = residuals(x, y)
    return along**2 + across**2


class Point(keras.Layer):
    """A layer whose weights are a point and whose outputs are the residuals there."""

    def build(self, input_shape: Any) -> None:
        """Puts the point where all paths start."""
        self.place = self.add_weight(shape=(2,), initializer=lambda *_, **__: tf.constant(START))

    def call(self, inputs: Any) -> Any:
        """Returns the residuals once for each input; they do not depend on the inputs."""
        return keras.ops.stack(residuals(self.place[0], self.place[1])) + 0 * inputs


def walked(path: Path) -> np.ndarray:
    """Returns the points of a path, with its start, of shape (steps + 1, 2)."""
    model = keras.Sequential([keras.Input((1,)), Point()])
    optimizer = path.optimizer()
    closure = isinstance(optimizer, ClosureOptimizer)
    model.compile(optimizer, loss=_sum_of_squares, run_eagerly=not closure)
    if closure:
        optimizer.attach(model)
    points, nothing = [np.array(START)], np.zeros((1, 1))
    for _ in range(path.steps):
        model.train_on_batch(nothing, nothing)
        points.append(model.get_weights()[0])
    return np.array(points)


def _sum_of_squares(target: Any, left: Any) -> Any:
    del target
    return keras.ops.sum(left**2, axis=-1)


@functools.cache
def _descent() -> np.ndarray:
    return walked(DESCENT)


def picture(name: str) -> bytes:
    """Draws the paths of that name on the surface, as an SVG.

    Args:
        name: A key of `PATHS`.
    """
    figure = matplotlib.figure.Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(-5, 2.5, 300), np.linspace(-2.2, 2.2, 200))
    height = np.array(surface(x, y))
    levels = np.array([0.01, 0.05, 0.15, 0.4, 0.8, 1.4, 2.2, 3.5, 5.5, 8, 12])
    axes.contour(x, y, height, levels=levels, colors="0.85", linewidths=0.8)
    axes.plot(0, 0, marker="*", color="0.4", markersize=11)
    curves = [(DESCENT, _descent(), "0.65")]
    colors = ("tab:blue", "tab:orange")
    curves += [
        (path, walked(path), color) for path, color in zip(PATHS[name], colors, strict=False)
    ]
    for path, points, color in curves:
        lowest = float(surface(*points[-1]))
        label = f"{path.label}: {path.steps} steps, f = {lowest:.2g}"
        axes.plot(*points.T, ".-", color=color, linewidth=1.2, markersize=4, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False, fontsize=9)
    axes.set(xlim=(-5, 2.5), ylim=(-2.2, 2.2), aspect="equal")
    axes.tick_params(labelsize=8, colors="0.4")
    for side in axes.spines.values():
        side.set_color("0.8")
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
