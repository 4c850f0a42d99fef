"""The generalized Gauss–Newton matrix of a batch's loss."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.vectors import symmetric_matrix
from keras_gdopt.functional import Batch, Data
from keras_gdopt.tensor import Tensor

Leaves = list[Tensor]

_NEVER_IN_PARTS = 2048  # entries of the Jacobian per sample
_MOST_ENTRIES = 2**25  # of the Jacobian at a time, for samples with more entries than that
_PROBES = 8
_MOST_OUTPUTS = 16  # of a sample, for the exact diagonal


class Ways(NamedTuple):
    """How to compute the matrix: the method for each array of outputs, by index.

    If the loss is not made of residuals, all arrays use one method, because the second
    derivatives of the loss may couple them.
    """

    by_samples: tuple[int, ...] = ()
    """Arrays whose Jacobian is computed for each sample by itself, for all samples at once."""
    by_rows: tuple[int, ...] = ()
    """Arrays of few residuals, whose rows of the Jacobian are computed one by one."""
    by_products: tuple[int, ...] = ()
    """Arrays for which the matrix is multiplied by each unit vector."""
    activations: tuple[str | None, ...] = ()
    """For each array, the activation whose logits Keras's losses use in place of the array."""


class JacobianBySamples(NamedTuple):
    """The parts of the matrix, where each output depends on its own sample alone."""

    rows: Tensor
    """The Jacobian: samples × outputs × weights."""
    blocks: Tensor
    """The second derivatives of the loss by the outputs: samples × outputs × outputs."""
    slopes: Tensor
    """The first derivatives: samples × outputs."""


class GaussNewton:
    r"""The generalized Gauss–Newton matrix, or its products with vectors.

    $$G = J_z^\top \left(\nabla_z^2 L\right) J_z + \nabla^2 R$$

    where z are the model's outputs, $J_z$ their Jacobian by the weights, L the loss as a function
    of the outputs and R the regularizers. For the mean squared error it is $\frac2n J^\top J$. If
    the loss is made of residuals, these take the place of the outputs.

    Args:
        loss: The loss of the batch.
        ways: How to compute the matrix, as `ways_to_the_matrix` returns it. Products do not
            need it.
    """

    def __init__(self, loss: BatchLoss, ways: Ways | None = None) -> None:
        self._loss = loss
        self._ways = ways or Ways()
        self._structure: Any = None

    def product(self, weights: Tensor, vector: Tensor, only: Sequence[int] | None = None) -> Tensor:
        """The matrix at `weights` times a vector.

        Args:
            weights: A vector.
            vector: A vector.
            only: The indices of some arrays of residuals, to use only their part of the
                matrix.
        """
        try:
            (product,) = self._loss.mean_over_chunks(
                lambda batch: (self._product_of_part(batch, weights, vector, only),),
                [(self._loss.size,)],
            )
        except LookupError:  # an operation has no derivative
            return self._loss.apart(
                lambda loss: functools.partial(GaussNewton(loss, self._ways).product, only=only),
                weights,
                vector,
            )
        return product

    def matrix(self, weights: Tensor) -> Tensor:
        """The matrix at `weights`."""
        size, dtype = self._loss.size, self._loss.dtype
        by_samples, by_rows, by_products, _ = self._ways
        matrix = tf.zeros((size, size), dtype)
        if by_samples:
            (part,) = self._loss.mean_over_chunks(
                lambda batch: (_assemble(self._by_samples(batch, weights, by_samples)),),
                [(size, size)],
                self._longest(weights),
            )
            matrix += part
        if by_rows:
            (part,) = self._loss.mean_over_chunks(
                lambda batch: (self._by_rows(batch, weights, by_rows),), [(size, size)]
            )
            matrix += part
        if by_products:
            only = by_products if by_samples or by_rows else None
            matrix += symmetric_matrix(lambda v: self.product(weights, v, only), size, dtype)
        elif self._loss.function.is_regularized:
            batch = self._loss.batch
            leaves = self._leaves(batch, weights)
            matrix += symmetric_matrix(
                lambda v: self._of_regularizers(batch, weights, leaves, v), size, dtype
            )
        return matrix

    def diagonal(self, weights: Tensor) -> Tensor:
        """The diagonal of the matrix at `weights`, or an estimate of the norms of its rows.

        The norms are estimated from products with vectors of random signs (as in AdaHessian, Yao
        et al. 2021, Eq. 9), where the diagonal does not come cheaply from the Jacobian by samples.
        """
        size, dtype = self._loss.size, self._loss.dtype
        by_samples, by_rows, by_products, _ = self._ways
        leaves = self._leaves(self._loss.batch, weights)
        many = sum(_entries(leaves[place]) for place in by_samples) > _MOST_OUTPUTS
        if by_rows or by_products or many or self._loss.function.is_regularized:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], (_PROBES, size))
            squares = tf.map_fn(
                lambda probe: self.product(weights, probe) ** 2, tf.constant(signs, dtype)
            )
            return tf.sqrt(tf.reduce_mean(squares, axis=0))

        def of_part(batch: Batch) -> tuple[Tensor]:
            rows, blocks, _ = self._by_samples(batch, weights, by_samples)
            return (tf.einsum("nkl,nkd,nld->d", blocks, rows, rows),)

        (diagonal,) = self._loss.mean_over_chunks(of_part, [(size,)], self._longest(weights))
        return diagonal

    def jacobian(self, weights: Tensor) -> JacobianBySamples:
        """The parts of the matrix at `weights`, if all of it is computed by samples."""
        return self._by_samples(self._loss.batch, weights, self._ways.by_samples)

    def rows(self, weights: Tensor) -> Tensor | None:
        """The number of rows of the Jacobian; `None` if they do not give the whole matrix."""
        others = self._ways.by_rows or self._ways.by_products or self._loss.chunks > 1
        if others or self._loss.function.is_regularized:
            return None
        leaves = self._leaves(self._loss.batch, weights)
        return tf.shape(leaves[0])[0] * sum(_entries(leaf) for leaf in leaves)

    def product_by_jacobian(self, weights: Tensor, vector: Tensor) -> Tensor:
        """As `product`, but from the Jacobian, for arrays computed by samples or by rows."""
        batch, (by_samples, by_rows, _, _) = self._loss.batch, self._ways
        product = tf.zeros_like(vector)
        if by_samples:
            rows, blocks, _ = self._by_samples(batch, weights, by_samples)
            curved = tf.einsum("nkl,nl->nk", blocks, tf.einsum("nkd,d->nk", rows, vector))
            product += tf.einsum("nkd,nk->d", rows, curved)
        if by_rows:
            rows, shares = self._rows_and_shares(batch, weights, by_rows)
            product += tf.linalg.matvec(
                rows, shares * tf.linalg.matvec(rows, vector), transpose_a=True
            )
        if self._loss.function.is_regularized:
            product += self._of_regularizers(batch, weights, self._leaves(batch, weights), vector)
        return product

    def activations(self, weights: Tensor) -> tuple[str | None, ...]:
        """See `Ways.activations`; works in eager mode only."""
        loss = self._loss
        arrays = loss.trained(weights)
        outputs = loss.function.outputs(arrays, loss.state, loss.batch)
        leaves = keras.tree.flatten(outputs)
        with tf.GradientTape() as tape:
            logits = [tf.identity(tf.stop_gradient(leaf)) for leaf in map(_logits_of, leaves)]
            tape.watch(logits)
            stand_ins = [tf.identity(leaf) for leaf in leaves]
            for stand_in, its_logits, leaf in zip(stand_ins, logits, leaves, strict=True):
                if hasattr(leaf, "_keras_logits"):
                    stand_in._keras_logits = its_logits
            made_of_them = keras.tree.pack_sequence_as(outputs, stand_ins)
            value = loss.function.loss_of_outputs(arrays, loss.state, loss.batch, made_of_them)
        return tuple(
            None if slope is None else _activation_of(leaf)
            for slope, leaf in zip(tape.gradient(value, logits), leaves, strict=True)
        )

    def curvature_near_targets(self, weights: Tensor, rng: np.random.Generator) -> np.ndarray:
        """The curvature of the loss at random outputs between 0.1 and 0.9."""
        batch = self._loss.batch
        leaves = [
            tf.constant(rng.uniform(0.1, 0.9, leaf.shape), leaf.dtype)
            for leaf in self._leaves(batch, weights)
        ]
        curved = self._curvature(batch, weights, leaves, [tf.ones_like(leaf) for leaf in leaves])
        return np.concatenate([np.ravel(leaf) for leaf in curved])

    def shapes_of_outputs(self, weights: Tensor) -> list[tuple[int, ...]]:
        """The shape of each array of outputs, or residuals; works in eager mode only."""
        return [tuple(leaf.shape) for leaf in self._leaves(self._loss.batch, weights)]

    def rows_one_by_one(self, weights: Tensor, places: Sequence[int]) -> Tensor:
        """The Jacobian of some arrays: rows × weights."""
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(weights)
            leaves = self._leaves(self._loss.batch, weights)
            some = tf.concat([tf.reshape(leaves[place], [-1]) for place in places], axis=0)
        return tape.jacobian(some, weights, unconnected_gradients="zero")

    def rows_by_samples(self, weights: Tensor, places: Sequence[int]) -> Tensor:
        """The Jacobian of some arrays: samples × outputs × weights."""

        def of_one(sample: Data) -> Tensor:
            one = Batch(**tf.nest.map_structure(lambda array: array[None], sample))
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(weights)
                entries = _in_rows(self._leaves(one, weights), places)[0]

            def row(unit: Tensor) -> Tensor:
                return tape.gradient(entries, weights, unit, unconnected_gradients="zero")

            if entries.shape[0] == 1:  # compiles faster
                return row(tf.ones_like(entries))[None]
            units = tf.eye(entries.shape[0], dtype=entries.dtype)
            return tf.vectorized_map(row, units, fallback_to_while_loop=False)

        parts = {n: part for n, part in self._loss.batch._asdict().items() if part is not None}
        return tf.vectorized_map(of_one, parts, fallback_to_while_loop=False)

    # --- its parts -----------------------------------------------------------

    def _product_of_part(
        self, batch: Batch, weights: Tensor, vector: Tensor, only: Sequence[int] | None
    ) -> Tensor:
        # Reverse over reverse mode, as for the Hessian: J v is the derivative of uᵀ J v by u.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(weights)
            leaves = self._leaves(batch, weights)
        towards = [tf.zeros_like(leaf) for leaf in leaves]
        with tf.GradientTape() as outer:
            outer.watch(towards)
            pulled = tape.gradient(leaves, weights, towards, unconnected_gradients="zero")
        moved = outer.gradient(pulled, towards, vector, unconnected_gradients="zero")
        if only is not None:
            moved = [
                leaf if place in only else tf.zeros_like(leaf) for place, leaf in enumerate(moved)
            ]
        curved = self._curvature(batch, weights, leaves, moved)
        product = tape.gradient(leaves, weights, curved, unconnected_gradients="zero")
        if self._loss.function.is_regularized:
            product += self._of_regularizers(batch, weights, leaves, vector)
        return product

    def _by_rows(self, batch: Batch, weights: Tensor, places: Sequence[int]) -> Tensor:
        """The part of the matrix from residuals; their second derivatives are diagonal."""
        rows, shares = self._rows_and_shares(batch, weights, places)
        return tf.matmul(rows, shares[:, None] * rows, transpose_a=True)

    def _rows_and_shares(
        self, batch: Batch, weights: Tensor, places: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        def rows_of(loss: BatchLoss) -> Callable[[Tensor], Tensor]:
            system = GaussNewton(loss, self._ways)
            return lambda weights: system.rows_one_by_one(weights, places)

        rows = self._loss.apart(rows_of, weights, batch=batch)
        leaves = self._leaves(batch, weights)
        curved = self._curvature(batch, weights, leaves, [tf.ones_like(leaf) for leaf in leaves])
        return rows, tf.concat([tf.reshape(curved[place], [-1]) for place in places], axis=0)

    def _by_samples(
        self, batch: Batch, weights: Tensor, places: Sequence[int]
    ) -> JacobianBySamples:
        def rows_of(loss: BatchLoss) -> Callable[[Tensor], Tensor]:
            system = GaussNewton(loss, self._ways)
            return lambda weights: system.rows_by_samples(weights, places)

        rows = self._loss.apart(rows_of, weights, batch=batch)
        leaves = self._leaves(batch, weights)

        def column(unit: Tensor) -> Tensor:
            ends = np.cumsum([_entries(leaves[place]) for place in places])[:-1]
            vector = [tf.zeros_like(leaf) for leaf in leaves]
            for place, part in zip(places, np.split(np.arange(unit.shape[0]), ends), strict=True):
                shape = leaves[place].shape[1:]
                vector[place] += tf.reshape(tf.gather(unit, part), shape)
            return _in_rows(self._curvature(batch, weights, leaves, vector), places)

        units = tf.eye(rows.shape[1], dtype=rows.dtype)
        columns = tf.map_fn(column, units) if rows.shape[1] > 1 else column(units[0])[None]
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            value = self._of_leaves(batch, weights, leaves)
        slopes = tape.gradient(value, leaves, unconnected_gradients="zero")
        return JacobianBySamples(rows, tf.transpose(columns, [1, 2, 0]), _in_rows(slopes, places))

    def _curvature(self, batch: Batch, weights: Tensor, leaves: Leaves, vector: Leaves) -> Leaves:
        """The second derivative of the loss by the outputs, times a vector."""
        return _second_derivative(lambda z: self._of_leaves(batch, weights, z), leaves, vector)

    def _of_regularizers(
        self, batch: Batch, weights: Tensor, leaves: Leaves, vector: Tensor
    ) -> Tensor:
        """The second derivative of the loss by the weights at fixed outputs, times a vector."""
        return _second_derivative(lambda w: self._of_leaves(batch, w, leaves), weights, vector)

    # --- the model -----------------------------------------------------------

    def _longest(self, weights: Tensor) -> int | None:
        """The number of samples whose Jacobian fits into memory; `None` for no limit."""
        leaves = self._leaves(self._loss.batch, weights)
        entries = sum(_entries(leaves[place]) for place in self._ways.by_samples) * self._loss.size
        return None if entries <= _NEVER_IN_PARTS else max(1, _MOST_ENTRIES // entries)

    def _leaves(self, batch: Batch, weights: Tensor) -> Leaves:
        """The arrays of outputs, or their logits where `Ways.activations` names an activation."""
        loss = self._loss
        outputs = loss.function.outputs(loss.trained(weights), loss.state, batch)
        self._structure = keras.tree.map_structure(lambda array: array.dtype, outputs)
        arrays = keras.tree.flatten(outputs)
        activations = self._ways.activations or [None] * len(arrays)
        # `identity` drops the logits that Keras attaches to an output and its losses would use.
        return [
            tf.identity(tf.cast(array if activation is None else _logits_of(array), loss.dtype))
            for array, activation in zip(arrays, activations, strict=True)
        ]

    def _of_leaves(self, batch: Batch, weights: Tensor, leaves: Leaves) -> Tensor:
        """The loss as a function of arrays like those of the last call of `_leaves`."""
        loss = self._loss
        dtypes = keras.tree.flatten(self._structure)
        arrays = [tf.cast(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        activations = self._ways.activations or [None] * len(arrays)
        arrays = [
            array if activation is None else _ACTIVATIONS[activation](array)
            for array, activation in zip(arrays, activations, strict=True)
        ]
        outputs = keras.tree.pack_sequence_as(self._structure, arrays)
        value = loss.function.loss_of_outputs(loss.trained(weights), loss.state, batch, outputs)
        return tf.cast(value, loss.dtype)


_ACTIVATIONS = {"softmax": keras.activations.softmax, "sigmoid": keras.activations.sigmoid}


def _logits_of(array: Any) -> Any:
    """The logits that Keras's activations attach for its cross entropies; or the array itself."""
    return getattr(array, "_keras_logits", array)


def _activation_of(array: Any) -> str | None:
    for name, activation in _ACTIVATIONS.items():
        if np.allclose(activation(_logits_of(array)), array):
            return name
    return None


def _second_derivative(function: Callable[[Any], Tensor], at: Any, vector: Any) -> Any:
    """The second derivative of a function, times a vector."""
    with tf.GradientTape() as outer:
        outer.watch(at)
        with tf.GradientTape() as inner:
            inner.watch(at)
            value = function(at)
        gradient = inner.gradient(value, at, unconnected_gradients="zero")
    return outer.gradient(gradient, at, vector, unconnected_gradients="zero")


def _assemble(jacobian: JacobianBySamples) -> Tensor:
    """The matrix, from its parts."""
    rows, blocks, _ = jacobian
    size = rows.shape[2]
    weighted = tf.einsum("nkl,nld->nkd", blocks, rows)
    flat = [tf.reshape(array, [-1, size]) for array in (rows, weighted)]
    return tf.matmul(*flat, transpose_a=True)


def _in_rows(leaves: Leaves, places: Sequence[int]) -> Tensor:
    """Concatenates some arrays, with all entries of a sample in one row."""
    rows = [tf.reshape(leaves[place], [-1, _entries(leaves[place])]) for place in places]
    return tf.concat(rows, axis=1)


def _entries(leaf: Tensor) -> int:
    return int(np.prod(leaf.shape[1:]))
