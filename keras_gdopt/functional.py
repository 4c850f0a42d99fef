"""A compiled Keras model as a pure function of its weights."""

import contextlib
import random
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
from keras.src.backend.common import global_state

# For operations such as `keras.random.normal(shape)`; Keras has no public access to it.
from keras.src.random.seed_generator import global_seed_generator

from keras_gdopt.tensor import Tensor

# Where Keras keeps it. (Not every version that we run on has a constant for it.)
_GLOBAL_SEED_GENERATOR = "global_seed_generator"

Data = dict[str, Any]
"""The parts of a `Batch` that are not `None`, by name."""


class Batch(NamedTuple):
    """What a model computes its loss from; each part is a tensor or a structure of tensors."""

    x: Any
    y: Any = None
    sample_weight: Any = None


class ModelFunction:
    """The loss of a compiled model as a pure function of weights and state.

    It neither reads nor changes a variable of the model. It includes the layers' own
    losses, the compiled loss and its weights, and a `compute_loss` that the model defines.

    Args:
        model: A built and compiled `keras.Model`.
        variables: The weights, which must include all trainable ones. Defaults to those.

    Raises:
        ValueError: If the model is not built.

    Attributes:
        is_frozen: For each weight, whether the model does not train it.
        state_variables: The model's other variables, then two kinds that Keras does not list
            among them: those in which layers remember the previous batch
            (`stateful=True`), and the state of the seed generator that random operations
            without a seed share.
        loses_updates: Whether the last call of `loss` dropped an update of a Keras variable
            that is neither a weight nor part of the state.
    """

    def __init__(
        self, model: keras.Model, variables: Sequence[keras.Variable] | None = None
    ) -> None:
        check_is_built(model)
        self.model = model
        trainable = list(model.trainable_variables)
        self.trainable_variables = trainable if variables is None else list(variables)
        weights = {id(variable) for variable in self.trainable_variables}
        self.state_variables: list[keras.Variable] = [
            variable for variable in model.non_trainable_variables if id(variable) not in weights
        ]
        known = {*weights, *map(id, self.state_variables)}
        self.state_variables += [v for v in _other_state(model) if id(v) not in known]
        self.loses_updates = False
        trained = {id(variable) for variable in trainable}
        self.is_frozen = [id(v) not in trained for v in self.trainable_variables]

    def loss(
        self,
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        batch: Batch,
        *,
        training: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """Computes the loss of a batch and the state after it.

        Args:
            weights: In the order of `trainable_variables`.
            state: In the order of `state_variables`: batch normalization statistics,
                seed generators, frozen weights, what layers remember.
            batch: Inputs, targets and sample weights.
            training: Whether layers behave as in training.

        Returns:
            A scalar, and the new state.
        """
        mapping = self._mapping(weights, state)
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            loss = loss_of(self.model, batch, training=training)
        known = {id(variable) for variable, _ in mapping}
        known.update(id(v) for metric in self.model.metrics for v in metric.variables)
        self.loses_updates = any(changed not in known for changed in scope.state_mapping)
        # In mixed precision, layers of Keras 3.11 leave their state in half precision.
        return loss, [
            keras.ops.cast(scope.get_current_value(variable), variable.dtype)
            for variable in self.state_variables
        ]

    def outputs(self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Batch) -> Any:
        """Computes the model's outputs for a batch in training.

        Args:
            weights: As for `loss`.
            state: As for `loss`.
            batch: As for `loss`.

        Returns:
            A structure of tensors.

        Raises:
            ValueError: If a layer adds a loss of its own, which does not depend on the outputs
                alone.
        """
        mapping = self._mapping(weights, state)
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            outputs = _with_predictions(self.model, batch, training=True)["y_pred"]
        if scope.losses:
            raise ValueError(
                f"The loss of the model '{self.model.name}' is not a function of its outputs "
                f"alone. Received: {len(scope.losses)} loss(es) that layers add by `add_loss` or "
                "an activity regularizer"
            )
        return outputs

    def loss_of_outputs(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Batch, outputs: Any
    ) -> Tensor:
        """Computes the loss from the model's outputs, regularizers included.

        Args:
            weights: As for `loss`.
            state: As for `loss`.
            batch: As for `loss`.
            outputs: As `outputs` returns them.
        """
        with keras.StatelessScope(self._mapping(weights, state), collect_losses=True):
            parts = {**batch._asdict(), "y_pred": outputs}
            return self.model._compute_loss(**parts, training=True)

    @property
    def is_regularized(self) -> bool:
        """Whether weight regularizers add to the loss, which then depends on more than outputs."""
        return any(variable.regularizer is not None for variable in self.trainable_variables)

    def judged(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss and the compiled metrics that `evaluate` gives for this batch alone.

        Args:
            weights: As for `loss`.
            state: As for `loss`.
            batch: As for `loss`.

        Returns:
            A scalar, and the metrics by name; they must be built.
        """
        with keras.StatelessScope(self._mapping(weights, state), collect_losses=True):
            for metric in self.model.metrics:
                metric.reset_state()
            parts = _with_predictions(self.model, batch, training=False)
            loss = self.model._compute_loss(**parts, training=False)
            return loss, self.model.compute_metrics(**parts)

    def _mapping(self, weights: Sequence[Tensor], state: Sequence[Tensor]) -> list[Any]:
        return [
            *zip(self.trainable_variables, weights, strict=True),
            *zip(self.state_variables, state, strict=True),
        ]


class ResidualFunction(ModelFunction):
    """A compiled model whose loss is the sum of the mean squares of arrays of residuals.

    Args:
        model: As for `ModelFunction`.
        variables: As for `ModelFunction`.
        residuals: Takes the arguments of the model's `compute_loss`; returns a structure of
            arrays.
    """

    def __init__(
        self,
        model: keras.Model,
        variables: Sequence[keras.Variable] | None = None,
        *,
        residuals: Callable[..., Any],
    ) -> None:
        super().__init__(model, variables)
        self._residuals = residuals

    @property
    def is_regularized(self) -> bool:
        """False: a regularizer's term would have to be a residual."""
        return False

    def outputs(self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Batch) -> Any:
        """Computes the residuals of a batch.

        Args:
            weights: As for `loss`.
            state: As for `loss`.
            batch: As for `loss`.

        Returns:
            A structure of tensors.
        """
        with keras.StatelessScope(self._mapping(weights, state), collect_losses=True):
            return self._residuals(**_with_predictions(self.model, batch, training=True))

    def loss_of_outputs(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], batch: Batch, outputs: Any
    ) -> Tensor:
        """Computes the sum of the residuals' mean squares.

        Args:
            weights: Ignored.
            state: Ignored.
            batch: Ignored.
            outputs: As `outputs` returns them.
        """
        del weights, state, batch
        return sum(keras.ops.mean(part**2) for part in keras.tree.flatten(outputs))


def in_another_thread(function: Callable[[], Any]) -> Any:
    """Calls a function in a new thread, where nothing is being traced; returns its result.

    Keras has one global seed generator per thread; the new thread uses the caller's.
    """
    generator = global_state.get_global_attribute(_GLOBAL_SEED_GENERATOR)

    def call() -> Any:
        global_state.set_global_attribute(_GLOBAL_SEED_GENERATOR, generator)
        return function()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(call).result()


def _other_state(model: keras.Model) -> list[keras.Variable]:
    """Finds variables that a model's layers use and that the model does not list as its own."""
    # Those in which layers remember the previous batch, as a `stateful` LSTM does.
    states = [
        getattr(layer, "states", None)
        for layer in model._flatten_layers()
        if getattr(layer, "stateful", False)
    ]
    found = [part for part in keras.tree.flatten(states) if isinstance(part, keras.Variable)]
    python_state = random.getstate()  # Keras draws the first seed from `random`
    try:
        with _outside_of_traces():
            found.append(global_seed_generator().state)
    finally:
        random.setstate(python_state)
    return list({id(variable): variable for variable in found}.values())


def _outside_of_traces() -> contextlib.AbstractContextManager[None]:
    """A scope in which a new variable has its value at once, even while a function is traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def loss_of(model: keras.Model, batch: Batch, *, training: bool) -> Tensor:
    """The loss that Keras's `fit` computes for a compiled model with its present weights."""
    return model._compute_loss(**_with_predictions(model, batch, training), training=training)


def _with_predictions(model: keras.Model, batch: Batch, training: bool) -> dict[str, Any]:
    """The arguments of `compute_loss`: a batch and the model's predictions for it."""
    arguments = {"training": training} if model._call_has_training_arg else {}
    return {**batch._asdict(), "y_pred": model(batch.x, **arguments)}


def check_is_trainable_by_its_loss(model: Any) -> None:
    """Raises if its loss alone does not determine how a model is trained.

    Without a compiled loss, it is not always known before the first step whether the layers
    add one; then that step raises.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a `keras.Model`. Received: {model!r}")
    own_step = vars(model).get("train_step")  # a closure optimizer's, until the next `compile`
    if type(model).train_step is not keras.Model.train_step or getattr(
        own_step, "is_in_effect", own_step is not None
    ):
        raise ValueError(
            f"The model '{model.name}' has a `train_step` of its own, so what a step does "
            "cannot be told from its loss. Expected a model whose training is Keras's; a "
            "`compute_loss` of its own is welcome. Received: a model of class "
            f"{type(model).__name__}"
        )
    if not model.compiled or _has_no_loss(model):
        raise ValueError(
            f"The model '{model.name}' must be compiled with a loss. Call "
            "`model.compile(optimizer=..., loss=...)` first, or add one with `add_loss` in the "
            "`call` of a layer."
        )


def _has_no_loss(model: keras.Model) -> bool:
    """Whether a compiled model certainly computes no loss."""
    if (
        getattr(model, "_compile_loss", None) is not None
        or type(model).compute_loss is not keras.Model.compute_loss
        or model.losses
    ):
        return False
    return _losses_of_a_call(model) == 0


def _losses_of_a_call(model: keras.Model) -> int | None:
    """Traces a call to count the losses that it adds; `None` if that needs data."""
    inputs = getattr(model, "inputs", None)
    if not inputs or keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    counts: list[int] = []

    def call(*arguments: Any) -> None:
        with keras.StatelessScope(collect_losses=True):
            model(arguments[0] if len(arguments) == 1 else list(arguments), training=True)
            counts.append(len(model.losses))

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a list may stand for a dictionary here
        tf.function(call, autograph=False).get_concrete_function(*specs)
    return counts[0] if counts else None


def half_precision_layers(model: keras.Model) -> list[str]:
    """The names of the layers that compute in float16 or bfloat16."""
    return [
        layer.name
        for layer in model._flatten_layers()
        if keras.backend.standardize_dtype(layer.compute_dtype) in ("float16", "bfloat16")
    ]


def check_is_built(model: keras.Model) -> None:
    """Raises if a model has no weights yet."""
    if not model.built:
        raise ValueError(
            f"The model '{model.name}' is not built, so it has no weights yet. Call it on a "
            "batch, or `model.build(input_shape)`."
        )
