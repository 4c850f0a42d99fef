"""The numbers in the logs that Keras and other callbacks pass to a callback."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def number(value: Any) -> float | None:
    """A log as a float, or `None` if it is not a single number.

    The user's `train_step` and other callbacks may log anything.

    >>> from keras_gdopt.callbacks.logs import number
    >>> number(np.float32(0.5)), number("a note"), number([1.0, 2.0]), number(None)
    (0.5, None, None, None)
    """
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value) if np.ndim(value) == 0 else None
    except (TypeError, ValueError):
        return None


def numbers(logs: Mapping[str, Any] | None) -> dict[str, float]:
    """The logs that are numbers, by name."""
    found = {name: number(value) for name, value in (logs or {}).items()}
    return {name: value for name, value in found.items() if value is not None}
