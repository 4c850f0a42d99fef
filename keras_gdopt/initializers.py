"""Initializers that Keras does not have: heuristics of Luo 2020, section 4."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_choice, checked_count, checked_number
from keras_gdopt.tensor import Tensor

ACTIVATIONS = ("softmax", "sigmoid")


@keras.saving.register_keras_serializable("keras_gdopt")
class SparseNormal(keras.initializers.RandomNormal):
    r"""Exactly k non-zero weights for each unit, drawn from a normal distribution.

    $$W_{iu} = \begin{cases} z_{iu}, & i \in S_u \\ 0, & \text{else} \end{cases}
    \qquad |S_u| = k, \quad z_{iu} \sim N(0, \sigma^2)$$

    where $S_u$ are k of the inputs of unit u, each choice being equally likely. The input
    of a unit then does not grow or shrink with the size of the previous layer, and units
    differ more than with dense weights.

    The last axis of the kernel counts the units, all other axes together their inputs.
    This holds for `Dense`, `EinsumDense` with two axes and all convolutions except
    depthwise ones; in a convolution, k weights of each filter are not 0.

    Keras's initializers are all dense. `torch.nn.init.sparse_` takes the fraction of
    zero weights instead of the number of non-zero ones.

    Args:
        non_zero: k, from 1 to the number of inputs.
        stddev: σ of the non-zero weights, above 0. Defaults to 1, for inputs of about
            unit size and k around 15, as in Martens 2010.
        seed: An integer or a `keras.random.SeedGenerator`. Defaults to `None`: a random
            seed. As with Keras's initializers, only a `SeedGenerator` gives new weights
            in each call.

    Raises:
        ValueError: If an argument is out of range; in a call, if the shape is not that of
            a kernel or has fewer than k inputs.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> layer = keras.layers.Dense(3, kernel_initializer=gdopt.initializers.SparseNormal(2))
    >>> layer.build((None, 10))
    >>> print(keras.ops.convert_to_numpy(layer.kernel != 0).sum(axis=0))
    [2 2 2]

    Source: Luo 2020, *Optimization in Deep Learning*, section 4; Goodfellow, Bengio and
    Courville 2016, *Deep Learning*, section 8.4; Martens 2010, *Deep Learning via
    Hessian-free Optimization*.
    """

    def __init__(self, non_zero: int, stddev: float = 1.0, seed: Any = None) -> None:
        self.non_zero = checked_count("non_zero", non_zero, minimum=1)
        super().__init__(stddev=checked_number("stddev", stddev, above=0.0), seed=seed)

    def __call__(self, shape: Any, dtype: Any = None) -> Tensor:
        """Draws a kernel.

        Args:
            shape: At least two axes; the last one counts the units.
            dtype: Defaults to Keras's `floatx`.
        """
        shape = tuple(shape)
        inputs = int(np.prod(shape[:-1]))
        if len(shape) < 2 or inputs < self.non_zero:
            raise ValueError(
                "SparseNormal needs a kernel with at least `non_zero` inputs for each unit. "
                "Expected a shape of at least two axes, the last for the units, with a product "
                f"of the others of at least {self.non_zero}. Received: shape={shape}"
            )
        dtype = keras.backend.standardize_dtype(dtype or keras.backend.floatx())
        # One draw for both: with an integer seed, two draws would give the same numbers. In
        # full precision: ties would favor the first inputs.
        drawn = keras.random.normal(
            (2, inputs, shape[-1]),
            seed=self.seed,
            dtype="float64" if dtype == "float64" else "float32",
        )
        places = ops.argsort(ops.argsort(drawn[0], axis=0), axis=0)
        weights = ops.where(places < self.non_zero, self.stddev * drawn[1], 0.0)
        return ops.cast(ops.reshape(weights, shape), dtype)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        config = {**super().get_config(), "non_zero": self.non_zero}
        del config["mean"]
        return config


@keras.saving.register_keras_serializable("keras_gdopt")
class ClassPriorBias(keras.initializers.Initializer):
    r"""A bias that makes an output layer start by predicting the class frequencies.

    $$\operatorname{softmax}(b) = c \;\Leftarrow\; b_j = \ln c_j
    \qquad \operatorname{sigmoid}(b) = c \;\Leftrightarrow\; b_j = \ln \frac{c_j}{1 - c_j}$$

    If the kernel is zero or small, the model's first predictions are then c, and training
    does not have to learn how frequent the classes are. This matters most when they are
    unequal.

    Keras only has `Constant`, which takes these numbers precomputed.

    Args:
        frequencies: c. For softmax, one number above 0 for each class, with any sum, so
            counts work too. For sigmoid, the fraction of samples in which a unit is 1,
            between 0 and 1: one number, or one for each unit. A class that never occurs is
            refused, as its bias would be -∞: count it once, `ClassPriorBias(counts + 1)`.
        activation: The function that the layer, or a loss on its logits, applies:
            `"softmax"` or `"sigmoid"`. Defaults to `"softmax"`.

    Raises:
        ValueError: If an argument is out of range; in a call, if the shape is not that of
            the frequencies.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> prior = gdopt.initializers.ClassPriorBias([900, 90, 10])
    >>> layer = keras.layers.Dense(
    ...     3, "softmax", kernel_initializer="zeros", bias_initializer=prior
    ... )
    >>> print(keras.ops.convert_to_numpy(layer(keras.ops.ones((1, 4)))).round(4))
    [[0.9  0.09 0.01]]

    Source: Luo 2020, *Optimization in Deep Learning*, section 4; Goodfellow, Bengio and
    Courville 2016, *Deep Learning*, section 8.4.
    """

    def __init__(self, frequencies: Any, activation: str = "softmax") -> None:
        self.activation = checked_choice("activation", activation, ACTIVATIONS)
        self.frequencies = _checked_frequencies(frequencies, activation)

    @classmethod
    def from_labels(
        cls, labels: Any, num_classes: int | None = None, activation: str = "softmax"
    ) -> "ClassPriorBias":
        """Creates the initializer from the frequencies in a training set.

        Args:
            labels: For softmax, integers from 0 of shape `(B,)` or `(B, 1)`, or one-hot rows
                of shape `(B, C)`. For sigmoid, 0 and 1 of shape `(B,)` or `(B, units)`.
            num_classes: C, for integer labels. Defaults to the largest label plus 1.
            activation: See the class.

        Raises:
            ValueError: If the labels are not as above, or a class never occurs.
        """
        labels = np.asarray(labels)
        checked_choice("activation", activation, ACTIVATIONS)
        if num_classes is not None:
            checked_count("num_classes", num_classes, minimum=2)
        if labels.ndim not in (1, 2) or not labels.size:
            raise ValueError(
                "Expected `labels` of shape (B,) or (B, C), B at least 1. "
                f"Received: labels.shape={labels.shape}"
            )
        if activation == "softmax" and labels.shape[1:] in ((), (1,)):
            return cls(_count_classes(labels.ravel(), num_classes), activation)
        if np.any((labels != 0) & (labels != 1)):
            raise ValueError(
                "Expected `labels` of 0 and 1, one-hot or for each sigmoid unit. "
                f"Received: labels of {np.unique(labels)[:10].tolist()}"
            )
        columns = labels.reshape(len(labels), -1)
        if num_classes not in (None, columns.shape[1]):
            raise ValueError(
                f"Expected `num_classes` to be the labels' {columns.shape[1]} columns. "
                f"Received: num_classes={num_classes}"
            )
        return cls(columns.mean(axis=0, dtype="float64"), activation)

    def __call__(self, shape: Any, dtype: Any = None) -> Tensor:
        """Computes the bias.

        Args:
            shape: The shape of the frequencies.
            dtype: Defaults to Keras's `floatx`.
        """
        if tuple(shape) != (len(self.frequencies),):
            raise ValueError(
                f"ClassPriorBias has {len(self.frequencies)} frequencies. Expected a bias of "
                f"shape {(len(self.frequencies),)}. Received: shape={tuple(shape)}"
            )
        c = np.array(self.frequencies)
        bias = np.log(c / c.sum()) if self.activation == "softmax" else np.log(c) - np.log1p(-c)
        return ops.convert_to_tensor(bias, dtype=dtype or keras.backend.floatx())

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        return {"frequencies": self.frequencies, "activation": self.activation}


def _checked_frequencies(frequencies: Any, activation: str) -> list[float]:
    """Returns the frequencies as a list of numbers, or raises."""
    c = np.atleast_1d(np.asarray(frequencies, dtype="float64"))
    least = 2 if activation == "softmax" else 1
    below = np.inf if activation == "softmax" else 1.0
    if c.ndim != 1 or len(c) < least or not np.all((c > 0) & (c < below)):
        range_ = "above 0" if activation == "softmax" else "above 0 and below 1"
        raise ValueError(
            f"Argument `frequencies` must be at least {least} finite number(s) {range_} for "
            f"{activation}; a class that never occurs has no finite bias: count it once, as in "
            f"`ClassPriorBias(counts + 1)`. Received: frequencies={frequencies!r}"
        )
    return c.tolist()


def _count_classes(labels: np.ndarray, num_classes: int | None) -> np.ndarray:
    """Counts how often each class occurs; raises if the labels are not integers from 0."""
    classes = labels.astype("int64")
    if np.any(classes != labels) or np.any(classes < 0):
        raise ValueError(
            "Expected `labels` to be integers of at least 0. "
            f"Received: labels of {np.unique(labels)[:10].tolist()}"
        )
    if num_classes is not None and classes.max() >= num_classes:
        raise ValueError(
            f"Expected `labels` below num_classes={num_classes}. Received: {classes.max()}"
        )
    return np.bincount(classes, minlength=num_classes or 0)
