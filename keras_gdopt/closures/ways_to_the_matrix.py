"""Finds how to compute the Gauss–Newton matrix of a model, by tests with random data."""

import math
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.gauss_newton import GaussNewton, Ways
from keras_gdopt.functional import Batch, ModelFunction, ResidualFunction, in_another_thread
from keras_gdopt.optimizers.arithmetic import machine_epsilon

_SAMPLES, _OTHER_SAMPLES, _LENGTH = 3, 5, 4  # sizes of random data, where shapes are unknown
_MOST_ENTRIES_BY_ROWS = 2**25
_UNKNOWN = Ways(by_products=(0,))  # for all arrays, as no array uses another method


def ways_to_the_matrix(loss: BatchLoss) -> Ways:
    """Chooses a method for each array of outputs.

    An array is computed by samples if the outputs of a sample depend on that sample alone, even
    in training, the loss is a sum over the samples and the layers can be vectorized. An array of
    residuals is computed by rows if its number of rows does not depend on the batch and is at most
    the number of weights. All others are computed by products.

    Args:
        loss: The loss of a batch; its tensors may belong to a function that is being traced.

    Raises:
        ValueError: If the loss has no curvature in the outputs, or the residuals do not match
            the loss.
    """
    ways = in_another_thread(lambda: _find_ways(loss.function, loss.batch))
    if ways.by_samples:
        zeros = tf.zeros((loss.size,), loss.dtype)
        shapes = GaussNewton(loss, ways).shapes_of_outputs(zeros)
        if any(None in shapes[place][1:] for place in ways.by_samples):
            return _UNKNOWN  # sequences of different lengths
    return ways


def _find_ways(function: ModelFunction, batch: Batch) -> Ways:
    rng = np.random.default_rng(0)
    try:
        loss = BatchLoss(function, _make_up_batch(batch, rng, _SAMPLES))
        weights = loss.joined([v.value for v in function.trainable_variables])
        # With weights that begin at 0, dependent samples may seem to be independent.
        weights += tf.constant(rng.normal(size=loss.size) * 0.1, weights.dtype)
        vector = tf.constant(rng.normal(size=loss.size), weights.dtype)
        expected = GaussNewton(loss).product(weights, vector).numpy()
        if isinstance(function, ResidualFunction):
            sums = _loss_by_model_and_by_residuals(loss, weights)
            ways = _ways_of_residuals(loss, weights, vector, rng)
    except Exception:  # of any type: random data may not suit the model
        return _UNKNOWN
    if isinstance(function, ResidualFunction):
        _check_residuals(function, *sums)
        return ways
    system = GaussNewton(loss)
    everything = tuple(range(len(system.shapes_of_outputs(weights))))
    activations = system.activations(weights)
    if any(activations):
        of_logits = GaussNewton(loss, Ways(activations=activations))
        expected = of_logits.product(weights, vector).numpy()
    by_products = Ways(by_products=everything, activations=activations)
    if not np.any(expected):
        if np.any(system.curvature_near_targets(weights, rng)):
            # The loss is flat only far from its targets, as Huber's, so these data tell nothing.
            return by_products
        raise ValueError(
            "The loss is piecewise linear in the model's outputs, so there is no Gauss-Newton "
            "step. Use a smooth loss, such as 'mse' or 'huber', or another optimizer, such as "
            f"`LBFGS`. Received: the loss {function.model.loss!r}"
        )
    ways = Ways(by_samples=everything, activations=activations)
    return ways if _is_right(loss, ways, weights, vector, expected) else by_products


def _ways_of_residuals(
    loss: BatchLoss, weights: Any, vector: Any, rng: np.random.Generator
) -> Ways:
    system = GaussNewton(loss)
    shapes = system.shapes_of_outputs(weights)
    larger = BatchLoss(loss.function, _make_up_batch(loss.batch, rng, _OTHER_SAMPLES))
    shapes_of_larger = GaussNewton(larger).shapes_of_outputs(weights)
    by_samples: list[int] = []
    by_rows: list[int] = []
    by_products: list[int] = []
    for place, shape in enumerate(shapes):
        expected = system.product(weights, vector, only=(place,)).numpy()
        count = math.prod(shape)
        is_small = count <= loss.size and count * loss.size <= _MOST_ENTRIES_BY_ROWS
        if shape != shapes_of_larger[place]:
            alone, places = Ways(by_samples=(place,)), by_samples
        elif is_small:
            alone, places = Ways(by_rows=(place,)), by_rows
        else:
            alone, places = Ways(by_products=(place,)), by_products
        is_right = _is_right(loss, alone, weights, vector, expected)
        (places if is_right else by_products).append(place)
    return Ways(tuple(by_samples), tuple(by_rows), tuple(by_products))


def _loss_by_model_and_by_residuals(loss: BatchLoss, weights: Any) -> tuple[float, float]:
    function, arrays = loss.function, loss.trained(weights)
    residuals = function.outputs(arrays, loss.state, loss.batch)
    of_residuals = function.loss_of_outputs(arrays, loss.state, loss.batch, residuals)
    return float(function.loss(arrays, loss.state, loss.batch)[0]), float(of_residuals)


def _check_residuals(function: ModelFunction, compiled: float, of_residuals: float) -> None:
    if not np.isclose(of_residuals, compiled, rtol=1e-4, atol=0.0, equal_nan=True):
        raise ValueError(
            "The mean squares of the residuals must add up to the loss of the model "
            f"'{function.model.name}', regularizers included. Received: on made-up data, "
            f"residuals that add up to {of_residuals:.6g} and a loss of {compiled:.6g}"
        )


def _is_right(loss: BatchLoss, ways: Ways, weights: Any, vector: Any, expected: np.ndarray) -> bool:
    """Whether the product of the matrix by some ways is the expected one."""
    try:
        product = GaussNewton(loss, ways).product_by_jacobian(weights, vector).numpy()
    except Exception:  # of any type: not everything can be vectorized
        return False
    error = np.linalg.norm(product - expected)
    return bool(error <= machine_epsilon(product.dtype) ** 0.5 * np.linalg.norm(expected))


def _make_up_batch(batch: Batch, rng: np.random.Generator, samples: int) -> Batch:
    def array_like(array: Any) -> Any:
        if array is None:
            return None
        shape = (samples, *(_LENGTH if length is None else length for length in array.shape[1:]))
        if array.dtype.is_floating:
            return tf.constant(rng.uniform(0.1, 0.9, shape), array.dtype)
        if array.dtype == tf.string:
            return tf.zeros(shape, array.dtype)
        return tf.cast(rng.integers(0, 2, shape), array.dtype)

    parts = {name: part for name, part in batch._asdict().items() if part is not None}
    made_up = tf.nest.map_structure(array_like, parts)
    if "sample_weight" in made_up:  # none may be 0
        made_up["sample_weight"] = tf.nest.map_structure(
            lambda array: array if array.dtype.is_floating else tf.ones_like(array),
            made_up["sample_weight"],
        )
    return Batch(**made_up)
