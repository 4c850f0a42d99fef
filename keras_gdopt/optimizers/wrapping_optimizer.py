"""The base class of optimizers that wrap another one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import keras

from keras_gdopt.optimizers.recording import Recorder, RecordingOptimizer
from keras_gdopt.optimizers.saved_state import SavedStateOptimizer, StateGroup
from keras_gdopt.tensor import Tensor

# Since Keras 3.15.
_MULTI_OPTIMIZER: Any = getattr(keras.optimizers, "MultiOptimizer", ())


class WrappingOptimizer(RecordingOptimizer):
    """An optimizer that wraps another one and exposes its rate, count and variables.

    The inner optimizer is in the attribute `inner_optimizer`, where Keras's callbacks look
    for it and under which Keras saves its state. A subclass takes it as its argument
    `optimizer`: an instance, a config, or a name that `keras.optimizers.get` knows.
    """

    hyperparameters: ClassVar[Sequence[str]] = ()
    """Names of the constructor's arguments besides `optimizer` and `name`."""

    slots: ClassVar[Mapping[str, float]] = {}
    """Names of the slots, each with its initial value, 0."""

    def __init__(self, optimizer: Any, name: str | None) -> None:
        inner = _resolve(optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self._unused = len(self._variables)  # Keras's count and rate; the inner one's are used
        self.inner_optimizer = inner
        self._slots: dict[str, list[Any]] = {}
        # Held by a copy until it is built. Bypasses Keras's tracking.
        object.__setattr__(self, "_values_for_inner", None)

    def build(self, variables: Sequence[Any]) -> None:
        """Builds the inner optimizer and creates the slots.

        Args:
            variables: The model's trainable variables.

        Raises:
            ValueError: If loaded state does not fit.
        """
        if self.built:
            return
        self._check_loaded_state_fits(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
            for variable, value in zip(
                self.inner_optimizer.variables, self._values_for_inner or (), strict=False
            ):
                variable.assign(value)
            object.__setattr__(self, "_values_for_inner", None)
        super().build(variables)
        self._slots = {name: self.add_optimizer_variables(variables, name) for name in self.slots}
        self._restore_loaded_state()

    def _build_for(self, trainable_variables: Sequence[Any] | None) -> None:
        """Builds the optimizer if it is not built yet."""
        if self.built:
            return
        if trainable_variables is None:
            raise ValueError(
                f"{type(self).__name__} is not built yet, and `apply` was called without "
                "variables. Pass `trainable_variables`, or call "
                "`optimizer.build(trainable_variables)` first."
            )
        with keras.name_scope(self.name, caller=self):
            self.build(list(trainable_variables))

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of updates."""
        return self.inner_optimizer.iterations

    @property
    def variables(self) -> list[Any]:
        """The optimizer's own variables, followed by the inner optimizer's."""
        return self._own_variables() + self.inner_optimizer.variables

    @property
    def _learning_rate(self) -> Any:  # where Keras's TensorBoard looks
        return self.inner_optimizer._learning_rate

    @_learning_rate.setter
    def _learning_rate(self, value: Any) -> None:
        """Ignores the rate that Keras's constructor sets."""

    @property
    def _model_variables_moving_average(self) -> list[Any]:  # where `SwapEMAWeights` looks
        return self.inner_optimizer._model_variables_moving_average

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's factor of the loss; the initial one if the factor changes."""
        inner = getattr(self, "inner_optimizer", None)
        if isinstance(inner, keras.optimizers.LossScaleOptimizer):
            return inner.initial_scale
        return inner and inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: float | None) -> None:
        if not hasattr(self, "inner_optimizer"):
            return  # Keras's constructor
        if isinstance(self.inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "The loss would be scaled once and unscaled twice. Under a mixed_float16 "
                "policy Keras wraps the optimizer in a LossScaleOptimizer: pass "
                f"`{type(self).__name__}(optimizer)` without one inside, or compile with "
                "`auto_scale_loss=False`. Received: a LossScaleOptimizer inside "
                f"{type(self).__name__}, and loss_scale_factor={value} from outside"
            )
        self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss as the inner optimizer scales it."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from the inner optimizer's weight decay, before `build`."""
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def takes_step(self, grads: Iterable[Tensor | None]) -> Tensor | None:
        """Whether the inner optimizer takes a step, see `RecordingOptimizer.takes_step`."""
        for inner in chain(self.inner_optimizer):
            if isinstance(inner, RecordingOptimizer):
                return inner.takes_step(grads)
        return None

    # --- step metrics --------------------------------------------------------

    @property
    def recorder(self) -> Recorder | None:
        """The inner optimizer's recorder, if there is one."""
        inner = recording_optimizer(self.inner_optimizer)
        return None if inner is None else inner.recorder

    @property
    def own_recorder(self) -> Recorder | None:
        """Records the wrapper's own numbers in the same steps; `None` if it has none."""
        return None

    @property
    def step_metrics(self) -> dict[str, float]:
        """The inner optimizer's metrics and the wrapper's own; empty before a step is recorded."""
        metrics = super().step_metrics
        own = self.own_recorder
        return {**metrics, **own.metrics()} if metrics and own is not None else metrics

    # --- config and state ----------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        return {
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            **self._own_config(),
        }

    def _own_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.hyperparameters, "name")}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "WrappingOptimizer":
        """Creates an optimizer with the arguments of `config`, without state."""
        with keras.saving.custom_object_scope(custom_objects or {}):
            return cls(**config)

    def load_own_variables(self, store: Any) -> None:
        """Reads the optimizer's own state back from `store`.

        Raises:
            ValueError: If the state does not fit, or Keras would drop the inner
                optimizer's.
        """
        for inner in chain(self.inner_optimizer):
            if not inner.built and not isinstance(inner, SavedStateOptimizer):
                raise ValueError(
                    f"{type(inner).__name__} of Keras loads its state only once it is built. "
                    "Call `model.optimizer.build(model.trainable_variables)` before "
                    "`model.load_weights`."
                )
        super().load_own_variables(store)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the variables of the optimizer and of the inner optimizer.

        Args:
            weights: Arrays in the order of `variables`.
        """
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)

    def __reduce__(self) -> tuple[Any, ...]:
        state: dict[str, Any] = {}
        self.save_own_variables(state)
        inner, values = self.inner_optimizer, None
        if not isinstance(inner, SavedStateOptimizer):
            # Keras would drop the copy's state, as the copy is not built yet.
            values = self._values_for_inner
            if inner.built:
                values = [keras.ops.convert_to_numpy(v) for v in inner.variables]
            inner = keras.saving.serialize_keras_object(inner)
        return _rebuilt, (type(self), inner, self._own_config(), state, values)

    @property
    def slot_variables(self) -> Mapping[str, Sequence[Any]]:
        """The wrapper's own slots by name, each in the order of the variables."""
        return self._slots

    def state_layout(self, variables: Sequence[Any]) -> dict[str, StateGroup]:
        """The wrapper's own state; the inner optimizer saves its own."""
        return self.slot_layout(self.slots, variables)

    def _own_variables(self) -> list[Any]:
        return list(self._variables[self._unused :])


def chain(optimizer: Any) -> list[Any]:
    """An optimizer, the one that it wraps, and so on, through Keras's wrappers too."""
    optimizers = []
    while optimizer is not None:
        optimizers.append(optimizer)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizers


def is_multi_optimizer(optimizer: Any) -> bool:
    """Whether it is Keras's `MultiOptimizer`, which older versions of Keras lack."""
    return isinstance(optimizer, _MULTI_OPTIMIZER)


def recording_optimizer(optimizer: Any) -> RecordingOptimizer | None:
    """The outermost optimizer in a chain of wrappers that records its steps, or `None`.

    A wrapper of this package records if its inner optimizer does.
    """
    for each in chain(optimizer):
        if isinstance(each, RecordingOptimizer) and each.recorder is not None:
            return each
    return None


def _resolve(optimizer: Any) -> Any:
    """Returns the optimizer that an instance, a config or a name stands for, or raises."""
    resolved = optimizer
    if isinstance(optimizer, dict) and "registered_name" in optimizer:
        # `keras.optimizers.get` would take Keras's optimizer of the same name.
        resolved = keras.saving.deserialize_keras_object(optimizer)
    elif isinstance(optimizer, (dict, str)):
        resolved = keras.optimizers.get(optimizer)
    if not isinstance(resolved, keras.optimizers.Optimizer):
        raise ValueError(
            "Argument `optimizer` must be an optimizer (of this package or of Keras), its "
            "config or the name of one of Keras's. "
            f"Received: optimizer={optimizer!r} (of type {type(optimizer).__name__})"
        )
    for each in chain(resolved):
        if isinstance(each, RecordingOptimizer) and each.evaluates_loss:
            raise ValueError(
                "Argument `optimizer` must be an optimizer that makes a step from gradients. "
                f"{type(each).__name__} evaluates the loss itself: compile with it and `attach` "
                f"it, without a wrapper. Received: optimizer={type(optimizer).__name__}"
            )
    return resolved


def _rebuilt(
    cls: type[WrappingOptimizer],
    inner: Any,
    config: dict[str, Any],
    state: dict[str, Any],
    values_for_inner: list[Any] | None,
) -> WrappingOptimizer:
    """Creates a copy of an optimizer; `build` restores its slots."""
    optimizer = cls(inner, **config)
    object.__setattr__(optimizer, "_values_for_inner", values_for_inner)
    SavedStateOptimizer.load_own_variables(optimizer, state)
    return optimizer
