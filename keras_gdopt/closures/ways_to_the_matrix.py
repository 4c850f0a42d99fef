"""How the Gauss–Newton matrix of a model can be had, found out with made-up data."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.gauss_newton import GaussNewton, Ways
from keras_gdopt.functional import Batch, ModelFunction, ResidualFunction

_SAMPLES, _OTHER_SAMPLES, _LENGTH = 3, 5, 4  # of made-up data, where shapes do not say


def ways_to_the_matrix(loss: BatchLoss) -> Ways:
    """Which arrays of outputs go which way.

    By samples go those of which a sample's part depends on that sample alone, in training too,
    if the loss adds up over the samples and the layers can be vectorized; of residuals by rows
    those that have as many rows whatever the batch, and no more than there are weights.

    Args:
        loss: Of a batch, which may be one of a function that is being traced.

    Raises:
        ValueError: If the loss has no curvature in the outputs, or residuals are not those of
            the loss.
    """
    # In a thread of its own there are values, and tapes that record, whatever is being traced.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_found_out, loss.function, loss.batch).result()


def _found_out(function: ModelFunction, batch: Batch) -> Ways:
    rng = np.random.default_rng(0)
    loss = BatchLoss(function, _made_up(batch, rng, _SAMPLES))
    weights = loss.joined([v.value for v in function.trainable_variables])
    # Where weights begin at 0, samples may seem to be apart that are not.
    weights += tf.constant(rng.normal(size=loss.size) * 0.1, weights.dtype)
    vector = tf.constant(rng.normal(size=loss.size), weights.dtype)
    if isinstance(function, ResidualFunction):
        return _ways_of_residuals(loss, weights, vector, rng)
    try:
        system = GaussNewton(loss)
        count = len(system.shapes_of_outputs(weights))
        expected = system.product(weights, vector).numpy()
    except Exception:  # of whatever such data are none for
        return Ways(by_products=(0,))
    everything = tuple(range(count))
    if not np.any(expected):
        if np.any(system.curvature_near_targets(weights, rng)):
            # Only flat far from its targets, as Huber's, so these data tell nothing.
            return Ways(by_products=everything)
        raise ValueError(
            "The loss has no curvature in the model's outputs, so there is no Gauss-Newton "
            "step. Use a smooth loss, such as 'mse' or 'huber', or another optimizer, such as "
            f"`LBFGS`. Received: the loss {function.model.loss!r}"
        )
    ways = Ways(by_samples=everything)
    if _gives(loss, ways, weights, vector, expected):
        return ways
    return Ways(by_products=everything)


def _ways_of_residuals(
    loss: BatchLoss, weights: Any, vector: Any, rng: np.random.Generator
) -> Ways:
    _check_residuals(loss, weights)
    system = GaussNewton(loss)
    shapes = system.shapes_of_outputs(weights)
    larger = BatchLoss(loss.function, _made_up(loss.batch, rng, _OTHER_SAMPLES))
    shapes_of_larger = GaussNewton(larger).shapes_of_outputs(weights)
    ways: dict[str, list[int]] = {name: [] for name in Ways._fields}
    for place, shape in enumerate(shapes):
        expected = system.product(weights, vector, only=(place,)).numpy()
        if shape != shapes_of_larger[place]:
            way = "by_samples"
        else:
            way = "by_rows" if math.prod(shape) <= loss.size else "by_products"
        if not _gives(loss, Ways(**{way: (place,)}), weights, vector, expected):
            way = "by_products"
        ways[way].append(place)
    return Ways(**{name: tuple(places) for name, places in ways.items()})


def _check_residuals(loss: BatchLoss, weights: Any) -> None:
    function, batch = loss.function, loss.batch
    arrays = loss.trained(weights)
    compiled = float(function.loss(arrays, loss.state, batch)[0])
    residuals = function.outputs(arrays, loss.state, batch)
    of_residuals = float(function.loss_of_outputs(arrays, loss.state, batch, residuals))
    if not np.isclose(of_residuals, compiled, rtol=1e-4, atol=0.0, equal_nan=True):
        raise ValueError(
            "The mean squares of the residuals must add up to the loss of the model "
            f"'{function.model.name}', regularizers included. Received: on made-up data, "
            f"residuals that add up to {of_residuals:.6g} and a loss of {compiled:.6g}"
        )


def _gives(loss: BatchLoss, ways: Ways, weights: Any, vector: Any, expected: np.ndarray) -> bool:
    try:
        matrix = GaussNewton(loss, ways).matrix(weights).numpy()
    except Exception:  # of whatever cannot be vectorized
        return False
    error = np.linalg.norm(matrix @ vector.numpy() - expected)
    return bool(error <= np.finfo(matrix.dtype).eps ** 0.5 * np.linalg.norm(expected))


def _made_up(batch: Batch, rng: np.random.Generator, samples: int) -> Batch:
    def array_like(array: Any) -> Any:
        shape = (samples, *(_LENGTH if length is None else length for length in array.shape[1:]))
        if array.dtype.is_floating:
            return tf.constant(rng.uniform(0.1, 0.9, shape), array.dtype)
        return tf.zeros(shape, array.dtype)

    parts = {name: part for name, part in batch._asdict().items() if part is not None}
    return Batch(**tf.nest.map_structure(array_like, parts))
