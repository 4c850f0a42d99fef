"""The training step of a model with a closure optimizer, and checks of the model."""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.closures.box import is_box
from keras_gdopt.functional import (
    Data,
    ModelFunction,
    check_is_trainable_by_its_loss,
    half_precision_layers,
)
from keras_gdopt.optimizers.compilation import xla_is_available
from keras_gdopt.optimizers.saved_state import variable_path
from keras_gdopt.optimizers.wrapping_optimizer import chain, is_multi_optimizer
from keras_gdopt.tensor import Tensor


class TrainStep:
    """A model's training step with a closure optimizer; an attribute of the model.

    It holds weak references only, so it keeps alive neither the model nor the optimizer, which
    holds the model's variables.

    Args:
        model: A model compiled with the optimizer.
        optimizer: A `ClosureOptimizer`.
        loss: Makes the loss function from the model and its weights.
    """

    def __init__(
        self, model: keras.Model, optimizer: Any, loss: Callable[..., ModelFunction]
    ) -> None:
        self._model = weakref.ref(model)
        self._optimizer = weakref.ref(optimizer)
        self._loss = loss
        self._minimizers: dict[int, Callable[..., Tensor]] = {}

    @functools.cached_property
    def _is_compiled(self) -> bool:
        """Whether XLA compiles the step; needs a built optimizer."""
        model, optimizer = self._both()
        if model.jit_compile or optimizer.jit_compile != "auto":
            return bool(model.jit_compile or optimizer.jit_compile)
        size = sum(math.prod(variable.shape) for variable in optimizer.recorder.variables)
        layers_allow_it = all(layer.supports_jit for layer in model._flatten_layers())
        return xla_is_available() and layers_allow_it and optimizer.is_worth_compiling(size)

    def _minimizer(self, tier: int) -> Callable[..., Tensor]:
        """A compiled function for each tier, as only its first trace may create variables."""
        if tier not in self._minimizers:
            self._minimizers[tier] = tf.function(
                self._minimize_on_batch, jit_compile=self._is_compiled, autograph=False
            )
        return self._minimizers[tier]

    @property
    def is_in_effect(self) -> bool:
        """Whether the model is still compiled with the optimizer."""
        model, optimizer = self._both()
        return model.optimizer is optimizer

    def __call__(self, data: Any) -> dict[str, Any]:
        """Makes one training step; returns the model's metrics.

        Args:
            data: A batch from Keras's data adapters.
        """
        model, optimizer = self._both()
        if not self.is_in_effect:
            return type(model).train_step(model, data)
        compiled_loss = getattr(model, "_compile_loss", None)
        if not model.built or not (compiled_loss is None or compiled_loss.built):
            model._symbolic_build(data_batch=data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        check_variables(optimizer, model.trainable_variables)
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        batch = {"x": x, "y": y, "sample_weight": sample_weight}
        loss = self._minimizer(optimizer.recorder.tier)(
            {name: part for name, part in batch.items() if part is not None},
            trained=tuple(id(variable) for variable in model.trainable_variables),
        )
        arguments = {"training": True} if model._call_has_training_arg else {}
        y_pred = model(x, **arguments)  # updates the model's state
        # Updates the losses' own metrics, such as the loss of each output.
        model._compute_loss(x, y, y_pred, sample_weight, training=True)
        count = tf.shape(next(part for part in keras.tree.flatten(x) if part is not None))[0]
        model._loss_tracker.update_state(loss, sample_weight=count)
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _minimize_on_batch(self, data: Data, *, trained: tuple[int, ...]) -> Tensor:
        del trained  # an argument only so that each set of variables has its own trace
        model, optimizer = self._both()
        optimizer.recorder.note_trace()
        function = self._loss(model, optimizer.recorder.variables)
        return optimizer.minimize_on_batch(function, data, is_compiled=self._is_compiled)

    def _both(self) -> tuple[Any, Any]:
        """The model, which is alive during its step, and the optimizer, or `None` if it is gone."""
        return self._model(), self._optimizer()


# --- checks ---------------------------------------------------------------------------


def check_model(optimizer: Any, model: Any) -> None:
    """Raises a `ValueError` for a model that no closure optimizer can train.

    Args:
        optimizer: A `ClosureOptimizer`.
        model: The model; it need not be built.
    """
    name = type(optimizer).__name__
    check_is_trainable_by_its_loss(model)
    compiled_with = model.optimizer
    if isinstance(compiled_with, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            f"{name} does not train in mixed float16: a line search compares "
            "losses whose difference float16 cannot hold. Use float32. "
            "Received: a model whose optimizer is in a LossScaleOptimizer"
        )
    if is_multi_optimizer(chain(compiled_with)[-1]):
        raise ValueError(
            f"{name} evaluates the loss of all weights together, and cannot be one of the "
            "optimizers in a `MultiOptimizer`. Compile with it alone, and freeze the layers that "
            f"it should not train. Received: a model compiled with {compiled_with!r}"
        )
    if compiled_with is not optimizer:
        raise ValueError(
            f"The model '{model.name}' must be compiled with this optimizer. Call "
            "`model.compile(optimizer=optimizer, ...)` and then "
            f"`optimizer.attach(model)`. Received: a model compiled with {compiled_with!r}"
        )
    half = half_precision_layers(model)
    if half:
        raise ValueError(
            f"{name} needs layers that compute in float32 or float64: a line "
            "search compares losses whose difference half precision cannot "
            f"hold. Received: half precision in the layers {half[:5]}"
        )
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1:
        raise ValueError(
            f"{name} trains on one device: its line search needs the loss of "
            "the whole batch at each trial. Make the model outside of the strategy's scope; "
            "for batches larger than a device's memory use `closure_chunks`. Received: a "
            f"model of {type(model.distribute_strategy).__name__} with {replicas} replicas"
        )
    if optimizer.closure_chunks > 1:
        _check_chunks_add_up(model)
    if model.built:
        check_variables(optimizer, model.trainable_variables)


def check_variables(optimizer: Any, variables: Sequence[Any]) -> None:
    """Raises a `ValueError` for variables that an optimizer cannot train or was not built for.

    Args:
        optimizer: A `ClosureOptimizer`.
        variables: The trainable variables of a model.
    """
    name = type(optimizer).__name__
    if not variables:
        raise ValueError(
            f"{name} needs trainable weights. Set `trainable = True` for a layer that has "
            "weights. Received: a model without trainable weights"
        )
    for variable in variables:
        if keras.backend.standardize_dtype(variable.dtype) not in ("float32", "float64"):
            raise ValueError(
                f"{name} needs weights in float32 or float64: a line search compares "
                "losses that differ in their last digits. Received: the variable "
                f"'{variable_path(variable)}' of dtype {variable.dtype}"
            )
        if variable.constraint is None or (optimizer.takes_bounds and is_box(variable.constraint)):
            continue
        taken, instead = "does not take constraints", "`LBFGS` for bounds and "
        if optimizer.takes_bounds:
            taken, instead = "takes no constraints but `NonNeg` and `constraints.Bounds`", ""
        raise ValueError(
            f"{name} {taken}: a step that a constraint changes is not the one that the line "
            f"search accepted. Remove the constraint, or use {instead}a first-order optimizer"
            f"{' for others' if instead else ''}. Received: the variable "
            f"'{variable_path(variable)}' with the constraint {variable.constraint!r}"
        )
    if not optimizer.built:
        return
    known = {id(variable) for variable in optimizer.recorder.variables}
    for variable in variables:
        if id(variable) not in known:
            paths = [variable_path(v) for v in optimizer.recorder.variables]
            raise ValueError(
                f"{name} remembers the weights it was built for, and cannot train others. "
                "For another model, or after unfreezing layers, compile with a new "
                f"optimizer. Received: the variable '{variable_path(variable)}'; built for "
                f"{len(paths)} variable(s): {paths[:3]}{'...' if len(paths) > 3 else ''}"
            )


def _check_chunks_add_up(model: keras.Model) -> None:
    """Raises if a batch's loss is not the mean of its parts' losses."""
    names = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    if names:
        raise ValueError(
            "`closure_chunks` cannot be combined with batch normalization, which would "
            f"normalize each part separately. Received: the layers {names}"
        )
    masking = [
        layer.name
        for layer in model._flatten_layers()
        if getattr(layer, "mask_zero", False) or isinstance(layer, keras.layers.Masking)
    ]
    if masking:
        raise ValueError(
            "`closure_chunks` cannot be combined with masks: a loss is the mean over what is not "
            "masked, and parts of a batch differ in how much that is. Received: the layers "
            f"{masking}"
        )
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction != "sum_over_batch_size":
            raise ValueError(
                "`closure_chunks` needs losses that are means over the samples. Received: the "
                f"loss {loss!r} with reduction={reduction!r}"
            )
