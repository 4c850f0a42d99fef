"""A compiled Keras model as a pure function of its weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

Tensor = Any

Data = dict[str, Any]
"""The parts of a `Batch` that there are, by name: structures without `None`."""


class Batch(NamedTuple):
    """What a model computes its loss from, each a tensor or a structure of tensors."""

    x: Any
    y: Any = None
    sample_weight: Any = None


class ModelFunction:
    """The loss of a compiled model as a pure function of weights and state.

    Neither reads nor changes a variable of the model; the layers' own losses, the
    compiled loss and its weights are included, and so is a `compute_loss` of the model's
    own.

    Args:
        model: A built and compiled `keras.Model`.

    Raises:
        ValueError: If the model is not built.
    """

    def __init__(self, model: keras.Model) -> None:
        check_is_built(model)
        self.model = model
        self.trainable_variables: list[keras.Variable] = list(model.trainable_variables)
        self.state_variables: list[keras.Variable] = list(model.non_trainable_variables)

    def loss(
        self,
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        batch: Batch,
        *,
        training: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of a batch, and the state after it.

        Args:
            weights: In the order of `trainable_variables`.
            state: In the order of `state_variables`: statistics of batch normalization,
                seed generators, frozen weights.
            batch: Inputs, targets and sample weights.
            training: Whether layers behave as in training.

        Returns:
            A scalar, and the new state.
        """
        mapping = [
            *zip(self.trainable_variables, weights, strict=True),
            *zip(self.state_variables, state, strict=True),
        ]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            loss = loss_of(self.model, batch, training=training)
        return loss, [scope.get_current_value(variable) for variable in self.state_variables]


def loss_of(model: keras.Model, batch: Batch, *, training: bool) -> Tensor:
    """The loss of a compiled model with the weights that it has, as Keras's `fit` takes it."""
    arguments = {"training": training} if model._call_has_training_arg else {}
    return model._compute_loss(
        x=batch.x,
        y=batch.y,
        y_pred=model(batch.x, **arguments),
        sample_weight=batch.sample_weight,
        training=training,
    )


def check_is_trainable_by_its_loss(model: Any) -> None:
    """Raises if a model's training cannot be told from its loss alone."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a `keras.Model`. Received: {model!r}")
    if not model.compiled or (
        getattr(model, "_compile_loss", None) is None
        and (type(model).compute_loss is keras.Model.compute_loss and not model.losses)
    ):
        raise ValueError(
            f"The model '{model.name}' must be compiled with a loss. Call "
            "`model.compile(optimizer=..., loss=...)` first."
        )
    own_step = vars(model).get("train_step")  # a closure optimizer's, until another `compile`
    if type(model).train_step is not keras.Model.train_step or getattr(
        own_step, "is_in_effect", own_step is not None
    ):
        raise ValueError(
            f"The model '{model.name}' has a `train_step` of its own, so what a step does "
            "cannot be told from its loss. Expected a model whose training is Keras's; a "
            "`compute_loss` of its own is welcome. Received: a model of class "
            f"{type(model).__name__}"
        )


def check_is_built(model: keras.Model) -> None:
    """Raises if a model has no weights yet."""
    if not model.built:
        raise ValueError(
            f"The model '{model.name}' is not built, so it has no weights yet. Call it on a "
            "batch, or `model.build(input_shape)`."
        )
