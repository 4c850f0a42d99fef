"""Weight constraints that Keras does not have."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class Bounds(keras.constraints.Constraint):
    r"""Keeps weights within bounds.

    $$w \leftarrow \min(\max(w, l), u)$$

    The first-order optimizers of this package, and the members of a `Gadam`, apply it after
    each update. `LBFGS` respects the bounds during its search.

    Keras has `NonNeg`, which is `Bounds(lower=0)`, and norm constraints, but no bounds.

    Args:
        lower: l, a number or an array that broadcasts to the weights. Defaults to `None`: no
            lower bound.
        upper: u, likewise.

    Raises:
        ValueError: If both are `None`, one is not a number, or they cross; in a call, if their
            shapes do not fit the weights.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> weights = keras.ops.array([-2.0, 0.5, 3.0])
    >>> print(keras.ops.convert_to_numpy(gdopt.constraints.Bounds(-1, 1)(weights)))
    [-1.   0.5  1. ]

    Source: Byrd, Lu, Nocedal and Zhu 1995, *A limited memory algorithm for bound constrained
    optimization*, Eq. 2.2.
    """

    def __init__(self, lower: Any = None, upper: Any = None) -> None:
        self.lower = _checked("lower", lower)
        self.upper = _checked("upper", upper)
        if lower is None and upper is None:
            raise ValueError("Bounds needs `lower`, `upper` or both. Received: neither")
        try:
            crossing = np.greater(*self.limits())
        except ValueError as error:
            raise ValueError(
                "`lower` and `upper` must broadcast to one shape. Received: shapes "
                f"{np.shape(lower)} and {np.shape(upper)}"
            ) from error
        if np.any(crossing):
            raise ValueError(
                f"`lower` must not be above `upper`. Received: lower={lower!r}, upper={upper!r}"
            )

    def limits(self, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Both bounds as arrays, infinite where there is none.

        Args:
            shape: The shape of the weights. Defaults to `None`: each bound keeps its own shape.

        Raises:
            ValueError: If the shapes of the bounds do not fit the weights.
        """
        arrays = []
        for name, limit, default in (("lower", self.lower, -np.inf), ("upper", self.upper, np.inf)):
            array = np.asarray(default if limit is None else limit, "float64")
            if shape is not None:
                try:
                    array = np.broadcast_to(array, shape)
                except ValueError as error:
                    raise ValueError(
                        f"`{name}` must broadcast to the shape of the weights. Received: shape "
                        f"{array.shape} for weights of shape {tuple(shape)}"
                    ) from error
            arrays.append(array)
        return arrays[0], arrays[1]

    def __call__(self, w: Tensor) -> Tensor:
        """Clips the weights to the bounds."""
        w = ops.convert_to_tensor(w)
        self.limits(tuple(w.shape))  # raises if the bounds do not fit
        if self.lower is not None:
            w = ops.maximum(w, ops.convert_to_tensor(self.lower, w.dtype))
        if self.upper is not None:
            w = ops.minimum(w, ops.convert_to_tensor(self.upper, w.dtype))
        return w

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        return {"lower": self.lower, "upper": self.upper}


def _checked(name: str, limit: Any) -> Any:
    """A bound as a number or nested lists of numbers, as in a config; or `None`."""
    if limit is None:
        return None
    try:
        array = np.asarray(limit, "float64")
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if np.any(np.isnan(array)):
        raise ValueError(
            f"`{name}` must be a number or an array of numbers. Received: {name}={limit!r}"
        )
    return array.tolist()
