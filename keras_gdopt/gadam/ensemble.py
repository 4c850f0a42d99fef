"""Combines members of a population into one model, whose output is the mean of theirs."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_gdopt.tensor import Tensor

_LINKS = ("softmax", "sigmoid")


@keras.saving.register_keras_serializable("keras_gdopt")
class AverageOfLogits(keras.layers.Layer):
    r"""Averages the probabilities that logits stand for, and returns the logits of the mean.

    $$z = \log \frac{1}{n} \sum_i \text{softmax}(z_i) \qquad \text{or} \qquad
    z = \log \frac{\bar p}{1 - \bar p},\quad \bar p = \frac{1}{n} \sum_i \sigma(z_i)$$

    A loss with `from_logits=True`, and metrics that take logits, then apply to the mean of the
    probabilities. `keras.layers.Average` takes the mean of the logits instead.

    Args:
        link: `"softmax"` or `"sigmoid"`.
        axis: The axis of the classes, for `"softmax"`. Defaults to -1.
        **kwargs: Keyword arguments of `keras.layers.Layer`, such as `name`.

    Raises:
        ValueError: If `link` is neither of the two.

    Example:

    >>> import keras, numpy as np
    >>> from keras_gdopt.gadam.ensemble import AverageOfLogits
    >>> certain, undecided = np.array([[20.0]]), np.array([[0.0]])
    >>> z = AverageOfLogits("sigmoid")([certain, undecided])
    >>> print(keras.ops.convert_to_numpy(keras.ops.sigmoid(z)).round(4))
    [[0.75]]
    """

    def __init__(self, link: str, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if link not in _LINKS:
            raise ValueError(f"`link` must be one of {list(_LINKS)}. Received: {link=}")
        self.link = link
        self.axis = axis
        self.supports_masking = True

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        """Returns the logits of the mean of the probabilities.

        Args:
            inputs: Tensors of logits, all of the same shape.
        """
        logits = ops.stack(list(inputs))
        if self.link == "softmax":
            axis = self.axis if self.axis < 0 else self.axis + 1  # after the stacked axis
            logs = ops.log_softmax(logits, axis)
            # As `ops.logsumexp`, with half of its operations, which is a percent of `predict`.
            # A class that no member considers possible has no finite logarithm.
            lowest = -3e4 if keras.backend.standardize_dtype(logs.dtype) == "float16" else -1e30
            most = ops.maximum(ops.max(logs, axis=0), lowest)
            return most + ops.log(ops.mean(ops.exp(logs - most), axis=0))
        yes, no = (ops.logsumexp(ops.log_sigmoid(z), axis=0) for z in (logits, -logits))
        return yes - no

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Returns the mask of the first input; all inputs have the same mask."""
        del inputs
        return mask[0] if mask else None

    def compute_output_shape(self, input_shape: Sequence[Any]) -> Any:
        """Returns the shape that all inputs have."""
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        return {**super().get_config(), "link": self.link, "axis": self.axis}


def averaged(members: Sequence[keras.Model], model: keras.Model) -> keras.Model:
    """Combines clones of a model into one functional model that averages their outputs.

    Args:
        members: Clones of the model, not compiled. They are renamed.
        model: The compiled model. Its loss decides how each output is averaged.

    Raises:
        ValueError: If the model has no `inputs`, such as a subclassed one.
    """
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"An ensemble is a functional model, and the model '{model.name}' has no `inputs`. "
            "Build it from `keras.Input`s, or take the mean of `gadam.member(rank).predict(x)`. "
            f"Received: a model of class {type(model).__name__}"
        )
    for rank, member in enumerate(members):
        member.name = f"member_{rank}"
    is_sequential = isinstance(model, keras.Sequential)
    inputs = keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name),
        model.inputs[0] if is_sequential else model.input,
    )
    of_members = [keras.tree.flatten(member(inputs)) for member in members]
    if is_sequential:
        structure, names = model.outputs[0], [model.layers[-1].name]
        losses = keras.tree.flatten(model.loss)[:1]
    else:
        structure, names, losses = model.output, model.output_names, _losses_of_outputs(model)
    merged = [
        _mean_layer(loss, name, outputs[0].dtype)(list(outputs))
        for loss, name, *outputs in zip(losses, _distinct(names), *of_members, strict=True)
    ]
    outputs = keras.tree.pack_sequence_as(structure, merged)
    return keras.Model(inputs, outputs, name=f"ensemble_of_{model.name}")


def _mean_layer(loss: Any, name: str, dtype: Any) -> keras.layers.Layer:
    """Makes the layer that averages an output, as its loss requires.

    It computes in the dtype of the output, whatever Keras's dtype policy is.
    """
    if not _takes_logits(loss):
        return keras.layers.Average(name=name, dtype=dtype)
    of_one = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
    if isinstance(loss, of_one):
        return AverageOfLogits("sigmoid", name=name, dtype=dtype)
    axis = loss.get_config().get("axis", -1)
    return AverageOfLogits("softmax", axis, name=name, dtype=dtype)


def _distinct(names: Sequence[str]) -> list[str]:
    """Makes names distinct by appending a number to those that are repeated."""
    return [
        name if name not in names[:place] else f"{name}_{place}" for place, name in enumerate(names)
    ]


def _takes_logits(loss: Any) -> bool:
    return isinstance(loss, keras.losses.Loss) and bool(loss.get_config().get("from_logits"))


def _losses_of_outputs(model: keras.Model) -> list[Any]:
    """Returns the compiled loss of each output, in the order of the outputs."""
    found = []
    outputs = keras.tree.flatten_with_path(model.output)
    for (path, _), name in zip(outputs, model.output_names, strict=True):
        loss = model.loss
        for key in path:
            if isinstance(loss, dict):
                loss = loss.get(key, loss.get(name))
            elif isinstance(loss, (list, tuple)):
                loss = loss[key]
        if isinstance(loss, dict):  # the loss of the only output, by its name
            loss = loss.get(name)
        elif isinstance(loss, (list, tuple)):
            (loss,) = loss
        found.append(loss)
    return found
