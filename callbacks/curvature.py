"""The largest eigenvalue of the Hessian of a model's loss."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.functional import Batch, ModelFunction, half_precision_layers
from keras_gdopt.optimizers.recording import RecordingOptimizer
from keras_gdopt.optimizers.wrapping_optimizer import chain
from keras_gdopt.tensor import Tensor

Vector = np.ndarray

_MOST_PRODUCTS = 40
_TOLERANCE = 1e-3


class Curvature:
    """Measures the largest curvature of a model's loss on fixed samples.

    The loss is that of training, regularizers included: batch normalization uses the samples'
    statistics, and random layers keep the mask that the state of their seeds gives.

    Args:
        model: A built and compiled model.
        data: Inputs and targets, or inputs, targets and sample weights.

    Raises:
        ValueError: If the model cannot compute its loss from the data, has a training step of its
            own or layers that compute in half precision.
    """

    def __init__(self, model: keras.Model, data: Sequence[Any]) -> None:
        check_curvature_data(data)
        _check_model(model)
        self._function = ModelFunction(model)
        self._batch = Batch(*keras.tree.map_structure(_tensor, tuple(data)))
        self._product = tf.function(self._traced_product, autograph=False)
        self._layout = BatchLoss(self._function, self._batch, state=[])
        try:
            tf.function(self._traced_loss, autograph=False).get_concrete_function()
        except Exception as error:
            raise ValueError(
                f"The model '{model.name}' cannot compute its loss from `curvature_data`. Expected "
                "(x, y) or (x, y, sample_weight), as `validation_data` of `fit`. Received: "
                f"{_described(data)}. The error was: {error}"
            ) from error

    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue at the model's present weights, to about 0.1 %."""
        variables = self._function.trainable_variables
        weights = self._layout.joined([variable.value for variable in variables])

        def product(vector: Vector) -> Vector:
            return self._product(weights, tf.constant(vector)).numpy()

        size, dtype = self._layout.size, self._layout.dtype.as_numpy_dtype
        return largest_eigenvalue(product, size, dtype)

    # A `BatchLoss` that is made in the function reads the model's state whenever it is called.

    def _traced_product(self, weights: Tensor, vector: Tensor) -> Tensor:
        return BatchLoss(self._function, self._batch).hessian_product(weights, vector)

    def _traced_loss(self) -> Tensor:
        weights = [variable.value for variable in self._function.trainable_variables]
        state = [variable.value for variable in self._function.state_variables]
        return self._function.loss(weights, state, self._batch)[0]


def largest_eigenvalue(
    product: Callable[[Vector], Vector], size: int, dtype: Any = np.float64
) -> float:
    r"""The largest eigenvalue of a symmetric matrix that is known by its products with vectors.

    The method of Lanczos builds an orthonormal basis $q_1, q_2, \dots$ of the vectors $A^k q_1$,
    in which the matrix A is tridiagonal:

    $$\beta_j q_{j+1} = A q_j - \alpha_j q_j - \beta_{j-1} q_{j-1}, \qquad
    \alpha_j = q_j^\top A q_j$$

    The eigenvalues θ of the tridiagonal matrix approach those of A from the largest one on. With
    the last entry s of an eigenvector of it, A has an eigenvalue within $\beta_j |s|$ of θ.

    Rounding makes the vectors lose their orthogonality as soon as an eigenvalue is found, so that
    it is found once more. To prevent this, each vector is made orthogonal to all before it, twice.

    Args:
        product: Returns the matrix times a vector.
        size: The number of rows of the matrix.
        dtype: The dtype of the vectors.

    Returns:
        The eigenvalue, to 0.1 % of the largest absolute value of an eigenvalue, or what 40 products
        give. NaN if a product is not finite.

    Source: Golub and Van Loan 2013, *Matrix Computations*, sections 10.1 and 10.3.
    """
    basis = np.empty((min(size, _MOST_PRODUCTS), size), dtype)
    vector = np.random.default_rng(0).standard_normal(size).astype(dtype)
    basis[0] = vector / np.linalg.norm(vector)
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        count = len(diagonal) + 1
        vector = product(basis[count - 1])
        if not np.all(np.isfinite(vector)):
            return float("nan")
        diagonal.append(float(basis[count - 1] @ vector))
        for _ in range(2):
            vector = vector - (basis[:count] @ vector) @ basis[:count]
        rest = float(np.linalg.norm(vector))
        values, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        bound = rest * abs(vectors[-1, -1])
        if bound <= _TOLERANCE * np.max(np.abs(values)) or count == len(basis):
            return float(values[-1])
        beside.append(rest)
        basis[count] = vector / rest


def highest_stable_learning_rate(
    optimizer: keras.optimizers.Optimizer, eigenvalue: float
) -> float | None:
    """The learning rate above which steps diverge where the curvature is `eigenvalue`.

    Args:
        optimizer: Any optimizer.
        eigenvalue: The largest eigenvalue of the Hessian.

    Returns:
        The rate, or `None` if the curvature is not positive or the optimizer is not gradient
        descent with or without momentum.
    """
    scaling = keras.optimizers.LossScaleOptimizer
    rule = next(each for each in chain(optimizer) if not isinstance(each, scaling))
    bound = None
    if isinstance(rule, RecordingOptimizer):
        bound = rule.stability_bound
    elif type(rule) is keras.optimizers.SGD:
        beta = rule.momentum
        bound = 2 * (1 + beta) / (1 + 2 * beta if rule.nesterov else 1)
    return bound / eigenvalue if bound is not None and eigenvalue > 0 else None


def check_curvature_data(data: Any) -> None:
    """Raises a `ValueError` for what is not (x, y) or (x, y, sample_weight)."""
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        raise ValueError(
            "Argument `curvature_data` must be (x, y) or (x, y, sample_weight), arrays of a few "
            "hundred samples. Received: "
            + (f"{type(data).__name__}" if not isinstance(data, tuple | list) else _described(data))
        )


def _check_model(model: keras.Model) -> None:
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"The model '{model.name}' has a `train_step` of its own, so the loss that it trains "
            "with is not known. Expected a model whose training is Keras's, or no "
            f"`curvature_data`. Received: a model of class {type(model).__name__}"
        )
    half = half_precision_layers(model)
    if half:
        raise ValueError(
            "Second derivatives in half precision have no correct digits. Expected layers that "
            "compute in float32 or float64, or no `curvature_data`. Received: half precision in "
            f"the layers {half[:5]}"
        )


def _tensor(array: Any) -> Tensor:
    """A tensor; floating-point numbers in Keras's float, as `fit` converts them."""
    tensor = tf.convert_to_tensor(array)
    return tf.cast(tensor, keras.config.floatx()) if tensor.dtype.is_floating else tensor


def _described(data: Sequence[Any]) -> str:
    shapes = keras.tree.map_structure(lambda array: np.shape(array), tuple(data))
    return f"arrays of the shapes {shapes}"
