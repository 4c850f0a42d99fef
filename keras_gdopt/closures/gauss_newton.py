"""The generalized Gauss–Newton matrix of a batch's loss."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.functional import Batch, ModelFunction

Tensor = Any

_SAMPLES, _LENGTH = 3, 4  # of made-up data, where the batch's shapes do not say


class GaussNewton:
    r"""The generalized Gauss–Newton matrix, or its products with vectors.

    $$G = J_z^\top \left(\nabla_z^2 L\right) J_z + \nabla^2 R$$

    with the model's outputs z, their Jacobian by the weights, the loss L as a function of them
    and the regularizers R. For the mean squared error it is $\frac2n J^\top J$.

    Args:
        loss: Of the batch.
        by_samples: Whether the Jacobian is taken sample by sample, all at once, as
            `can_be_by_samples` tells. Otherwise the matrix takes one product for each weight.
    """

    def __init__(self, loss: BatchLoss, *, by_samples: bool) -> None:
        self._loss = loss
        self._by_samples = by_samples
        self._outputs_are: Any = None

    def product(self, weights: Tensor, vector: Tensor) -> Tensor:
        """The matrix at `weights` times a vector."""
        (product,) = self._loss.mean_over_chunks(
            lambda batch: (self._product_of_part(batch, weights, vector),), [(self._loss.size,)]
        )
        return product

    def matrix(self, weights: Tensor) -> Tensor:
        """The matrix at `weights`."""
        size, dtype = self._loss.size, self._loss.dtype

        def by_products(product: Any) -> Tensor:
            columns = tf.map_fn(
                lambda place: product(tf.one_hot(place, size, dtype=dtype)),
                tf.range(size),
                fn_output_signature=tf.TensorSpec((size,), dtype),
            )
            return 0.5 * (columns + tf.transpose(columns))

        if not self._by_samples:
            return by_products(lambda vector: self.product(weights, vector))
        (matrix,) = self._loss.mean_over_chunks(
            lambda batch: (self._matrix_of_part(batch, weights),), [(size, size)]
        )
        if self._is_regularized:
            batch = self._loss.batch
            outputs = self._outputs(batch, weights)
            matrix += by_products(
                lambda vector: self._of_regularizers(batch, weights, outputs, vector)
            )
        return matrix

    def curvature_near_targets(self, weights: Tensor, rng: np.random.Generator) -> np.ndarray:
        """The curvature of the loss in outputs that are made up as `_made_up` does it."""
        batch = self._loss.batch
        outputs = _made_up(self._outputs(batch, weights), rng)
        return self._curvature(batch, weights, outputs, tf.ones_like(outputs)).numpy()

    # --- its factors ---------------------------------------------------------

    def _product_of_part(self, batch: Batch, weights: Tensor, vector: Tensor) -> Tensor:
        # Reverse over reverse, as for the Hessian: J v is the derivative of uᵀ J v by u.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(weights)
            outputs = self._outputs(batch, weights)
        towards = tf.zeros_like(outputs)
        with tf.GradientTape() as outer:
            outer.watch(towards)
            pulled = tape.gradient(outputs, weights, towards, unconnected_gradients="zero")
        moved = outer.gradient(pulled, towards, vector, unconnected_gradients="zero")
        curved = self._curvature(batch, weights, outputs, moved)
        product = tape.gradient(outputs, weights, curved, unconnected_gradients="zero")
        if self._is_regularized:
            product += self._of_regularizers(batch, weights, outputs, vector)
        return product

    def _matrix_of_part(self, batch: Batch, weights: Tensor) -> Tensor:
        outputs = self._outputs(batch, weights)
        jacobian = self._jacobian(batch, weights)
        blocks = self._blocks(batch, weights, outputs)
        weighted = tf.einsum("nkl,nld->nkd", blocks, jacobian)
        rows = [-1, self._loss.size]
        return tf.matmul(tf.reshape(jacobian, rows), tf.reshape(weighted, rows), transpose_a=True)

    def _jacobian(self, batch: Batch, weights: Tensor) -> Tensor:
        """Of the outputs of each sample, by that sample alone: samples × outputs × weights."""

        def of_one(sample: Any) -> Tensor:
            one = Batch(tf.nest.map_structure(lambda array: array[None], sample))
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(weights)
                entries = tf.unstack(self._outputs(one, weights)[0])
            return tf.stack(
                [tape.gradient(z, weights, unconnected_gradients="zero") for z in entries]
            )

        return tf.vectorized_map(of_one, batch.x, fallback_to_while_loop=False)

    def _blocks(self, batch: Batch, weights: Tensor, outputs: Tensor) -> Tensor:
        """The second derivatives of the loss by the outputs of each sample."""
        units = tf.eye(outputs.shape[1], dtype=outputs.dtype)
        return tf.stack(
            [
                self._curvature(batch, weights, outputs, tf.zeros_like(outputs) + unit)
                for unit in tf.unstack(units)
            ],
            axis=2,
        )

    def _curvature(self, batch: Batch, weights: Tensor, outputs: Tensor, vector: Tensor) -> Tensor:
        """The second derivative of the loss by the outputs, times a vector."""
        with tf.GradientTape() as outer:
            outer.watch(outputs)
            with tf.GradientTape() as inner:
                inner.watch(outputs)
                loss = self._of_outputs(batch, weights, outputs)
            gradient = inner.gradient(loss, outputs, unconnected_gradients="zero")
        return outer.gradient(gradient, outputs, vector, unconnected_gradients="zero")

    def _of_regularizers(
        self, batch: Batch, weights: Tensor, outputs: Tensor, vector: Tensor
    ) -> Tensor:
        """The second derivative of the loss by the weights at fixed outputs, times a vector."""
        with tf.GradientTape() as outer:
            outer.watch(weights)
            with tf.GradientTape() as inner:
                inner.watch(weights)
                loss = self._of_outputs(batch, weights, outputs)
            gradient = inner.gradient(loss, weights, unconnected_gradients="zero")
        return outer.gradient(gradient, weights, vector, unconnected_gradients="zero")

    # --- the model -----------------------------------------------------------

    @property
    def _is_regularized(self) -> bool:
        variables = self._loss.function.trainable_variables
        return any(variable.regularizer is not None for variable in variables)

    def _outputs(self, batch: Batch, weights: Tensor) -> Tensor:
        """All outputs of each sample, in a row."""
        loss = self._loss
        structure = loss.function.outputs(loss.trained(weights), loss.state, batch)
        self._outputs_are = keras.tree.map_structure(
            lambda array: tf.TensorSpec(array.shape, array.dtype), structure
        )
        rows = [
            tf.cast(tf.reshape(array, [-1, _entries(array)]), loss.dtype)
            for array in keras.tree.flatten(structure)
        ]
        return tf.concat(rows, axis=1)

    def _of_outputs(self, batch: Batch, weights: Tensor, outputs: Tensor) -> Tensor:
        """The loss as a function of all outputs, as `_outputs` has them."""
        loss = self._loss
        specs = keras.tree.flatten(self._outputs_are)
        parts = tf.split(outputs, [_entries(spec) for spec in specs], axis=1)
        arrays = [
            tf.cast(tf.reshape(part, [-1, *spec.shape[1:]]), spec.dtype)
            for part, spec in zip(parts, specs, strict=True)
        ]
        structure = keras.tree.pack_sequence_as(self._outputs_are, arrays)
        value = loss.function.loss_of_outputs(loss.trained(weights), loss.state, batch, structure)
        return tf.cast(value, loss.dtype)


def can_be_by_samples(loss: BatchLoss) -> bool:
    """Whether the matrix can be taken sample by sample, found out with made-up data.

    That is where the outputs of a sample depend on that sample alone, in training too, the loss
    adds up over the samples, and the layers can be vectorized.

    Args:
        loss: Of a batch, which may be one of a function that is being traced.

    Raises:
        ValueError: If the loss has no curvature in the outputs.
    """
    # In a thread of its own there are values, and tapes that record, whatever is being traced.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_found_out, loss.function, loss.batch).result()


def _found_out(function: ModelFunction, batch: Batch) -> bool:
    rng = np.random.default_rng(0)
    parts = {name: part for name, part in batch._asdict().items() if part is not None}
    made_up = tf.nest.map_structure(lambda array: _made_up(array, rng), parts)
    loss = BatchLoss(function, Batch(**made_up))
    weights = loss.joined([v.value for v in function.trainable_variables])
    # Where weights begin at 0, samples may seem to be apart that are not.
    weights += tf.constant(rng.normal(size=loss.size) * 0.1, weights.dtype)
    vector = tf.constant(rng.normal(size=loss.size), weights.dtype)
    try:
        system = GaussNewton(loss, by_samples=False)
        expected = system.product(weights, vector).numpy()
    except Exception:  # of whatever such data are none for
        return False
    if not np.any(expected):
        if np.any(system.curvature_near_targets(weights, rng)):
            return False  # only flat far from its targets, as Huber's, so these data tell nothing
        raise ValueError(
            "The loss has no curvature in the model's outputs, so there is no Gauss-Newton "
            "step. Use a smooth loss, such as 'mse' or 'huber', or another optimizer, such as "
            f"`LBFGS`. Received: the loss {function.model.loss!r}"
        )
    try:
        matrix = GaussNewton(loss, by_samples=True).matrix(weights).numpy()
    except Exception:  # of whatever cannot be vectorized
        return False
    error = np.linalg.norm(matrix @ vector.numpy() - expected)
    return bool(error <= np.finfo(matrix.dtype).eps ** 0.5 * np.linalg.norm(expected))


def _made_up(array: Any, rng: np.random.Generator) -> Any:
    shape = (_SAMPLES, *(_LENGTH if length is None else length for length in array.shape[1:]))
    if array.dtype.is_floating:
        return tf.constant(rng.uniform(0.1, 0.9, shape), array.dtype)
    return tf.zeros(shape, array.dtype)


def _entries(array: Any) -> int:
    return int(np.prod(array.shape[1:]))
