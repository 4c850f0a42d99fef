"""Losses that Keras does not have: Zhang 2019, Eq. 3."""

from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_number
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class MulticlassHinge(keras.losses.Loss):
    r"""Multi-class hinge loss, summed over all wrong classes.

    $$\ell(\hat y, y) = \sum_{j \neq l_y} \max(0,\; \hat y_j - \hat y_{l_y} + m)$$

    where $l_y$ is the true class. The predictions may be probabilities, as in the
    paper, or scores of any range, for which a margin of 1 is usual.

    `keras.losses.CategoricalHinge` takes only the largest of these terms, has a margin of
    1 and does not accept integer labels.

    The shape of the labels tells which kind they are. For predictions of shape `(..., C)`,
    with C at least 2, they are

    - integer labels of shape `(...)` or `(..., 1)`, from 0 to C - 1: any other value
      gives a loss of NaN;
    - one-hot labels of shape `(..., C)`, whose largest entry marks the true class.

    Both give the same loss. Keras handles masks, sample weights and reductions.

    Args:
        margin: m, the lead that the true class needs over every other class, in units of
            the predictions; above 0. Defaults to 1.
        reduction: How the losses of the samples become one number: `"sum_over_batch_size"`,
            `"mean"`, `"mean_with_sample_weight"`, `"sum"`, or `"none"` or `None` for one
            loss per sample. Defaults to `"sum_over_batch_size"`; the paper's Eq. 11
            is `"sum"`.
        name: Defaults to `"multiclass_hinge"`.
        dtype: The dtype in which the loss is computed, also in mixed precision:
            `"float32"` or `"float64"`. Defaults to Keras's `floatx`. Half precision is
            refused: Keras casts the labels to this dtype too, and bfloat16 cannot hold 257.

    Raises:
        ValueError: If an argument is out of range; in a call, if the labels have neither
            of these shapes or there are fewer than two classes.

    Example:

    >>> import keras_gdopt as gdopt
    >>> loss = gdopt.losses.MulticlassHinge()
    >>> print(f"{float(loss([0], [[0.49, 0.43, 0.08]])):.2f}")
    1.53
    >>> print(f"{float(loss([[0, 1, 0]], [[0.45, 0.53, 0.02]])):.2f}")
    1.41

    Source: Zhang 2019, *Gradient Descent based Optimization Algorithms for Deep Learning
    Models Training* (arXiv 1903.03614), Eq. 3 and Fig. 1; Weston and Watkins 1999,
    *Support Vector Machines for Multi-Class Pattern Recognition*.
    """

    def __init__(
        self,
        margin: float = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "multiclass_hinge",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.margin = checked_number("margin", margin, above=0.0)
        if self.dtype not in ("float32", "float64"):
            raise ValueError(
                "MulticlassHinge computes in float32 or float64, as half precision does not "
                "hold the labels of many classes. Expected dtype='float32' or 'float64'. "
                f"Received: dtype={dtype!r}, with floatx {keras.backend.floatx()!r}"
            )
        self._dtype_asked_for = None if dtype is None else self.dtype

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Computes the loss of each sample.

        Args:
            y_true: Labels, see the class.
            y_pred: Predictions of shape `(..., C)`.

        Returns:
            A tensor of shape `(...)`.
        """
        y_pred = ops.convert_to_tensor(y_pred)
        y_true = ops.convert_to_tensor(y_true)
        is_true = self._is_true_class(y_true, y_pred)
        true_prediction = ops.sum(ops.where(is_true, y_pred, 0.0), axis=-1, keepdims=True)
        terms = ops.relu(y_pred - true_prediction + self.margin)
        losses = ops.sum(ops.where(is_true, 0.0, terms), axis=-1)
        return ops.where(ops.any(is_true, axis=-1), losses, float("nan"))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        config = {**super().get_config(), "margin": self.margin}
        return {**config, "dtype": self._dtype_asked_for}

    def _is_true_class(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """A mask of the predictions' shape that marks each sample's true class."""
        shape, rank = tuple(y_true.shape), len(y_pred.shape)
        classes = y_pred.shape[-1] if rank else None
        if classes is None or classes < 2:
            raise ValueError(
                "MulticlassHinge needs predictions of at least two classes. Expected y_pred of "
                f"shape (..., C). Received: y_pred.shape={tuple(y_pred.shape)}"
            )
        if len(shape) == rank and shape[-1] == classes:
            labels = ops.argmax(y_true, axis=-1, keepdims=True)
        elif len(shape) == rank and shape[-1] == 1:
            labels = y_true
        elif len(shape) == rank - 1:
            labels = ops.expand_dims(y_true, -1)
        else:
            raise ValueError(
                "MulticlassHinge takes integer labels, one for each sample, or one-hot rows. "
                f"Expected y_true of shape {tuple(y_pred.shape[:-1])}, "
                f"{(*y_pred.shape[:-1], 1)} or {tuple(y_pred.shape)}. "
                f"Received: y_true.shape={shape}"
            )
        return ops.equal(labels, ops.arange(classes, dtype=labels.dtype))
