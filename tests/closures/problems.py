"""Functions to minimize, as Keras models whose weights are their arguments."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Problem:
    """A function of a few numbers, and its standard start."""

    name: str
    function: Callable
    start: tuple[float, ...]

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
    """Value and gradient, by TensorFlow, outside of any model."""
    value, of_value = _traced_gradient(function)(tf.constant(point, tf.float64))
    return float(value), of_value.numpy()


def hessian_times(function, point, vector):
    """The Hessian's product with a vector, likewise."""
    arrays = tf.constant(point, tf.float64), tf.constant(vector, tf.float64)
    return _traced_product(function)(*arrays).numpy()


@functools.cache
def _traced_gradient(function):
    def value_and_gradient(point):
        with tf.GradientTape() as tape:
            tape.watch(point)
            value = function(point)
        return value, tape.gradient(value, point)

    return tf.function(value_and_gradient, autograph=False)


@functools.cache
def _traced_product(function):
    def product(point, vector):
        with tf.autodiff.ForwardAccumulator(point, vector) as accumulator:
            _, of_value = _traced_gradient(function)(point)
        return accumulator.jvp(of_value)

    return tf.function(product, autograph=False)
