"""Checks whether `Gadam` can train a population of a model."""

from typing import Any

import keras

from keras_gdopt.functional import check_is_built, check_is_trainable_by_its_loss
from keras_gdopt.optimizers.argument_checks import check_is_floating
from keras_gdopt.optimizers.pure_step import AnyPureStep, pure_step
from keras_gdopt.optimizers.recording import RecordingOptimizer


def check_model(model: Any) -> None:
    """Raises a `ValueError` if `Gadam` cannot train a population of a model.

    Args:
        model: The model that the user passed.
    """
    _check_optimizer(model)
    check_is_trainable_by_its_loss(model)
    check_is_built(model)
    _check_trainable_weights(model)
    _check_precision(model)


def _check_optimizer(model: Any) -> None:
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, RecordingOptimizer) and optimizer.evaluates_loss:
        name = type(optimizer).__name__
        raise ValueError(
            f"Gadam does not train with {name}, which evaluates the loss itself: members train on "
            "mini-batches, by their gradients. Compile with a first-order optimizer, such as "
            f"keras_gdopt.Adam(); the best member can go on with {name} afterwards. "
            f"Received: {optimizer!r}"
        )


def pure_step_of(model: keras.Model) -> AnyPureStep:
    """Returns the pure step of a model's optimizer; a `ValueError` says why there is none."""
    built_for = [id(variable) for variable in model.optimizer._trainable_variables]
    if built_for != [id(variable) for variable in model.trainable_variables]:
        raise ValueError(
            f"The optimizer of the model '{model.name}' was built for other weights than the model "
            "trains now, as layers were frozen or unfrozen. Compile the model again, with a new "
            f"optimizer. Received: an optimizer for {len(built_for)} variables, and "
            f"{len(model.trainable_variables)} trainable ones"
        )
    try:
        return pure_step(model.optimizer)
    except ValueError as error:
        raise ValueError(
            f"Gadam cannot train the model '{model.name}' with its optimizer. {error}"
        ) from None


def _check_trainable_weights(model: keras.Model) -> None:
    for variable in model.trainable_variables:
        # Mutation would replace its entries by fractions.
        check_is_floating("Gadam", variable.path, variable.dtype)
    if not model.trainable_variables:
        raise ValueError(
            f"The model '{model.name}' has no trainable weights. Expected a population of models "
            "that differ in something. Set `layer.trainable = True` for some layers, and compile "
            f"the model again. Received: {len(model.non_trainable_variables)} variables, all of "
            "them not trainable"
        )


def _check_precision(model: keras.Model) -> None:
    layers = [
        layer.name
        for layer in model._flatten_layers()
        if keras.backend.standardize_dtype(layer.compute_dtype) == "float16"
    ]
    if layers or isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Gadam does not train in mixed float16: the loss scale belongs to one optimizer, and "
            "members whose gradients overflow would skip steps. Use `mixed_bfloat16` or "
            f"float32. Received: layers in float16: {layers[:5]}"
        )
