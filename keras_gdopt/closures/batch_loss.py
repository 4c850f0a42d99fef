"""The loss of one batch as a function of one vector of all weights."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_gdopt.closures.box import box_of
from keras_gdopt.closures.vectors import symmetric_matrix
from keras_gdopt.functional import Batch, ModelFunction, in_another_thread
from keras_gdopt.tensor import Tensor


class BatchLoss:
    """A model's loss on one batch, with its gradient and products of its Hessian.

    The model's state, including the seeds of its random layers, is fixed when the object is
    made, so every evaluation is of the same function. Batch normalization uses the batch's
    statistics, as in training.

    Args:
        function: The model.
        batch: Inputs, targets and sample weights.
        chunks: Number of parts that the batch is split into. They are evaluated one after the
            other, so that only one of them has to fit into memory.
        is_compiled: Whether XLA compiles the function that uses the loss.
        state: The model's state. Defaults to its current state.

    Attributes:
        function: The model.
        batch: The batch.
        state: The model's state, in the order of `function.state_variables`.
        chunks: Number of parts that the batch is split into.
        is_compiled: Whether XLA compiles the function that uses the loss.
        dtype: Dtype of the vector of all weights.
        box: The bounds of the weights, or `None` if they have none.
    """

    def __init__(
        self,
        function: ModelFunction,
        batch: Batch,
        chunks: int = 1,
        *,
        is_compiled: bool = False,
        state: Sequence[Tensor] | None = None,
    ) -> None:
        self.is_compiled = is_compiled
        self.function = function
        self.batch = batch
        self.chunks = chunks
        if state is None:
            state = [tf.convert_to_tensor(v) for v in function.state_variables]
        self.state = state
        self._shapes = [tuple(v.shape) for v in function.trainable_variables]
        self._dtypes = [tf.as_dtype(v.dtype) for v in function.trainable_variables]
        self._is_frozen = function.is_frozen
        self._sizes = [tf.TensorShape(shape).num_elements() for shape in self._shapes]
        self.dtype = tf.float64 if tf.float64 in self._dtypes else tf.float32
        self.box = box_of(function.trainable_variables, self._is_frozen, self.dtype)
        # Each is traced once, however many callers it has.
        self._value_and_gradient = tf.function(self._traced_value_and_gradient, autograph=False)
        self._product = tf.function(self._traced_product, autograph=False)

    # --- the layout ----------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(self._sizes)

    def joined(self, arrays: Sequence[Any]) -> Tensor:
        """Flattens arrays, one for each trainable variable, to one vector."""
        flat = [tf.reshape(tf.cast(array, self.dtype), [-1]) for array in arrays]
        return tf.concat(flat, axis=0)

    def parted(self, vector: Tensor) -> list[Tensor]:
        """Splits a vector into one array for each trainable variable; the inverse of `joined`."""
        parts = tf.split(vector, self._sizes)
        return [
            tf.cast(tf.reshape(part, shape), dtype)
            for part, shape, dtype in zip(parts, self._shapes, self._dtypes, strict=True)
        ]

    def trained(self, weights: Tensor) -> list[Tensor]:
        """As `parted`, but no gradient flows through frozen arrays."""
        return [
            tf.stop_gradient(array) if is_frozen else array
            for array, is_frozen in zip(self.parted(weights), self._is_frozen, strict=True)
        ]

    def without_frozen(self, vector: Tensor) -> Tensor:
        """The vector with 0 for frozen weights."""
        if not any(self._is_frozen):
            return vector
        parts = tf.split(vector, self._sizes)
        return tf.concat(
            [
                tf.zeros_like(part) if is_frozen else part
                for part, is_frozen in zip(parts, self._is_frozen, strict=True)
            ],
            axis=0,
        )

    def projected(self, weights: Tensor) -> Tensor:
        """The weights projected onto their bounds."""
        return weights if self.box is None else self.box.projected(weights)

    def inward(self, weights: Tensor, direction: Tensor) -> Tensor:
        """A direction with 0 where it leads out of bounds at once."""
        return direction if self.box is None else self.box.inward(weights, direction)

    def free_gradient(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with 0 where it pushes against a bound, so that it is 0 at a minimum."""
        return -self.inward(weights, -gradient) if self.box else gradient

    # --- the function --------------------------------------------------------

    def value_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient by the weights.

        Args:
            weights: A vector.
        """
        return self._value_and_gradient(weights)

    def hessian_product(self, weights: Tensor, vector: Tensor) -> Tensor:
        """The Hessian at `weights` times a vector: the derivative of gradient times vector."""
        try:
            return self._product(weights, vector)
        except LookupError:  # an operation has no derivative
            return self.apart(lambda loss: loss.hessian_product, weights, vector)

    def hessian(self, weights: Tensor) -> Tensor:
        """The Hessian at `weights`, one product for each of its columns."""
        return symmetric_matrix(
            lambda vector: self.hessian_product(weights, vector), self.size, self.dtype
        )

    def apart(
        self,
        method: "Callable[[BatchLoss], Callable[..., Any]]",
        *vectors: Tensor,
        batch: Batch | None = None,
    ) -> Any:
        """Calls a function of this loss that is traced by itself, outside the current trace.

        In a trace for XLA, TensorFlow makes operations (such as for the derivative of a slice)
        that can neither be differentiated again nor vectorized. (In eager mode, vectorizing
        warns about repeated tracing.)

        Args:
            method: Makes the function from a loss.
            vectors: The arguments of the function.
            batch: The batch of the loss. Defaults to this loss's own.
        """
        batch = batch or self.batch
        parts = {name: part for name, part in batch._asdict().items() if part is not None}
        arguments = (parts, list(self.state), list(vectors))

        def of_arguments(parts: Any, state: Any, vectors: Any) -> Any:
            loss = BatchLoss(self.function, Batch(**parts), self.chunks, state=state)
            return method(loss)(*vectors)

        def traced() -> Any:
            specs = tf.nest.map_structure(
                lambda array: None if array is None else tf.TensorSpec(array.shape, array.dtype),
                arguments,
            )
            return tf.function(of_arguments, autograph=False).get_concrete_function(*specs)

        return in_another_thread(traced)(*arguments)

    # --- the parts -----------------------------------------------------------

    def _traced_value_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = self.mean_over_chunks(
            lambda batch: self._of_part(batch, weights), [(), (self.size,)]
        )
        return loss, gradient

    def _traced_product(self, weights: Tensor, vector: Tensor) -> Tensor:
        # Reverse over reverse mode. With forward over reverse, TensorFlow cannot differentiate
        # loops that accumulate their outputs, such as an LSTM's.
        def of_part(batch: Batch) -> tuple[Tensor]:
            with tf.GradientTape() as tape, _moments_for_second_derivatives():
                tape.watch(weights)
                _, gradient = self._of_part(batch, weights)
            product = tape.gradient(
                gradient, weights, output_gradients=vector, unconnected_gradients="zero"
            )
            return (tf.convert_to_tensor(product),)

        (product,) = self.mean_over_chunks(of_part, [(self.size,)])
        return product

    def _of_part(self, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss, _ = self.function.loss(self.trained(weights), self.state, batch)
            loss = tf.cast(loss, self.dtype)
        gradient = tape.gradient(loss, weights, unconnected_gradients="zero")
        return loss, tf.convert_to_tensor(gradient)

    def mean_over_chunks(
        self,
        of_part: Callable[[Batch], tuple[Tensor, ...]],
        shapes: Sequence[tuple[int, ...]],
        longest: int | None = None,
    ) -> Any:
        """The means over all samples, computed from the means over parts of the batch.

        Args:
            of_part: Returns a tuple of means over a part.
            shapes: The shapes of these means.
            longest: The most samples in a part. Defaults to the size of the batch.
        """
        if self.chunks == 1 and longest is None:
            return of_part(self.batch)
        parts = {name: part for name, part in self.batch._asdict().items() if part is not None}
        count = tf.shape(tf.nest.flatten(parts)[0])[0]
        length = -(-count // self.chunks)
        if longest is not None:
            length = tf.minimum(length, longest)

        def share(begin: Tensor, size: Tensor) -> list[Tensor]:
            def cut(part: Tensor) -> Tensor:
                others = [0] * (part.shape.rank - 1), [-1] * (part.shape.rank - 1)
                return tf.slice(part, [begin, *others[0]], [size, *others[1]])

            values = of_part(Batch(**tf.nest.map_structure(cut, parts)))
            return [value * tf.cast(size / count, self.dtype) for value in values]

        sums = [tf.zeros(shape, self.dtype) for shape in shapes]
        _, sums = tf.while_loop(
            lambda chunk, _: chunk < count // length,
            lambda chunk, sums: (
                chunk + 1,
                [a + b for a, b in zip(sums, share(chunk * length, length), strict=True)],
            ),
            (tf.constant(0), sums),
        )
        rest = count % length
        return tf.cond(
            rest > 0,
            lambda: [a + b for a, b in zip(sums, share(count - rest, rest), strict=True)],
            lambda: sums,
        )


_MOMENTS, _MOMENTS_LOCK = tf.nn.moments, threading.RLock()


@contextlib.contextmanager
def _moments_for_second_derivatives() -> Iterator[None]:
    """Makes the second derivative of `tf.nn.moments` right within the context.

    Keras's normalization layers call it. TensorFlow's version treats the mean in the variance
    as a constant. The first derivative is still right, because deviations from a mean add up to
    0, but the second is not.
    """
    with _MOMENTS_LOCK:
        tf.nn.moments = _moments
        try:
            yield
        finally:
            tf.nn.moments = _MOMENTS


def _moments(
    x: Any, axes: Any, shift: Any = None, keepdims: bool = False, name: str | None = None
) -> tuple[Tensor, Tensor]:
    del shift, name
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=keepdims)
    return (mean if keepdims else tf.reduce_mean(x, axes)), variance
