"""Functions to minimize, as Keras models whose weights are their arguments, and in NumPy."""

from dataclasses import dataclass
from typing import Callable

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt


@dataclass(frozen=True)
class Problem:
    """A function of a few numbers, written once for NumPy and TensorFlow."""

    name: str
    function: Callable
    """Of a module's `sum`, and a vector."""
    start: tuple[float, ...]
    minimum: float = 0.0

    def __str__(self):
        return self.name


def _rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def _himmelblau(x):
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def _beale(x):
    return (
        (1.5 - x[0] + x[0] * x[1]) ** 2
        + (2.25 - x[0] + x[0] * x[1] ** 2) ** 2
        + (2.625 - x[0] + x[0] * x[1] ** 3) ** 2
    )


def _powell(x):
    return (
        (x[0] + 10 * x[1]) ** 2
        + 5 * (x[2] - x[3]) ** 2
        + (x[1] - 2 * x[2]) ** 4
        + 10 * (x[0] - x[3]) ** 4
    )


def _zakharov(x):
    weighted = sum(0.5 * (i + 1) * x[i] for i in range(10))
    return sum(x[i] ** 2 for i in range(10)) + weighted**2 + weighted**4


PROBLEMS = [
    Problem("rosenbrock", _rosenbrock, (-1.2, 1.0)),
    Problem("himmelblau", _himmelblau, (0.0, 0.0)),
    Problem("beale", _beale, (1.0, 1.0)),
    Problem("powell_singular", _powell, (3.0, -1.0, 0.0, 1.0)),
    Problem("zakharov", _zakharov, (1.0,) * 10),
]


class Weights(keras.layers.Layer):
    """A layer whose loss is a function of its weights alone."""

    def __init__(self, function, start):
        super().__init__()
        self.function = function
        self.point = self.add_weight(
            shape=(len(start),),
            initializer=lambda shape, dtype=None: tf.constant(start, dtype),
        )

    def call(self, inputs):
        return inputs[:, :1] * 0.0 + self.function(tf.convert_to_tensor(self.point))


def model_of(function, start, optimizer, **kwargs):
    """A model whose loss is the function, for any batch."""
    layer = Weights(function, start)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(optimizer, loss=lambda y_true, y_pred: y_pred[:, 0], **kwargs)
    optimizer.attach(model)
    return model


def point_of(model):
    return model.trainable_variables[0].numpy()


ONE_BATCH = np.zeros((2, 1)), np.zeros((2, 1))


def step(model):
    """One training step; returns the optimizer's metrics."""
    model.train_on_batch(*ONE_BATCH)
    return model.optimizer.step_metrics


def gradient(function, point):
    """By TensorFlow, outside of any model."""
    point = tf.constant(point, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = function(point)
    return float(value), tape.gradient(value, point).numpy()


OPTIMIZERS = {
    "cg": (gdopt.ConjugateGradient, "CG"),
    "newton": (gdopt.Newton, "Newton-CG"),
    "lbfgs": (gdopt.LBFGS, "L-BFGS-B"),
}
