"""Validation of the best member between generations."""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_gdopt.gadam.samples import check_ends, check_is_no_generator, split


class Validation(NamedTuple):
    """The data to validate on, and how often."""

    data: Any
    """As Keras's `fit` takes it, or `None`."""
    batch_size: int | None
    freq: int
    """Generations from one validation to the next."""

    def logs(self, model: keras.Model, generation: int, callbacks: Any) -> dict[str, Any]:
        """The model's `val_*` metrics; empty in a generation without a validation.

        Args:
            model: Holds the best member.
            generation: Counted from 0.
            callbacks: A `keras.callbacks.CallbackList`.
        """
        if self.data is None or (generation + 1) % self.freq:
            return {}
        arguments = {"verbose": 0, "return_dict": True, "callbacks": callbacks}
        if isinstance(self.data, (tuple, list)):
            names = ("x", "y", "sample_weight")
            parts = dict(zip(names, self.data, strict=False))
            values = model.evaluate(**parts, batch_size=self.batch_size, **arguments)
        else:
            values = model.evaluate(self.data, **arguments)
        return {f"val_{name}": number_or_array(value) for name, value in values.items()}


def split_off_validation(
    arrays: tuple[Any, Any, Any], validation_data: Any, validation_split: float
) -> tuple[tuple[Any, ...], Any]:
    """The data to train on and the data to validate on, as the arguments of `fit` say.

    Args:
        arrays: Inputs, targets and sample weights.
        validation_data: What the user gave to validate on, or `None`.
        validation_split: The part of the arrays, from their end, to validate on.

    Raises:
        ValueError: If both were given, or the data to validate on cannot be gone through again
            and again.
    """
    if validation_split:
        if validation_data is not None:
            raise ValueError("Expected `validation_split` or `validation_data`. Received: both")
        return split(arrays, validation_split)
    check_ends("validation_data", validation_data)
    check_is_no_generator("validation_data", validation_data)
    return arrays, validation_data


def number_or_array(value: Any) -> Any:
    """A metric as a float, or as an array if it has several numbers, such as one per class."""
    value = np.asarray(value)
    return float(value) if value.ndim == 0 else value
