"""Lookahead: Zhang, Lucas, Hinton and Ba 2019, Algorithm 1."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_count, checked_number
from keras_gdopt.optimizers.arithmetic import Tensor
from keras_gdopt.optimizers.saved_state import SavedStateOptimizer


@keras.saving.register_keras_serializable("keras_gdopt")
class Lookahead(SavedStateOptimizer):
    r"""Slow weights that follow k fast steps of another optimizer.

    From $\theta_{t,0} = \phi_{t-1}$, the inner optimizer makes k updates with the
    gradients of k batches; then

    $$\phi_t = \phi_{t-1} + \alpha\, (\theta_{t,k} - \phi_{t-1})$$

    and the next k updates start from $\phi_t$. The result is φ, which
    `finalize_variable_values`, called by Keras at the end of `fit`, puts into the
    model; the next `fit` begins a new cycle.

    The whole inner optimizer runs in each step: its clipping, weight decay, moving
    average, accumulation (k counts updates, not batches) and constraints are its own
    arguments. `learning_rate`, `iterations` and `exclude_from_weight_decay` are the
    inner optimizer's. Around `NAG`, the fast weights are its look-ahead points.

    Keras has no such optimizer. TF-Addons' starts its slow weights from the weights
    at the time it is built, and leaves the fast weights in the model.

    Args:
        optimizer: The inner optimizer: an instance (of this package or of Keras), its
            config, or the name of one of Keras's own.
        sync_period: The number k of inner updates between synchronizations, at least
            1. Defaults to 5.
        slow_step_size: The step α of the slow weights, above 0 and at most 1.
            Defaults to 0.5.
        name: Defaults to "lookahead".

    Raises:
        ValueError: If an argument has the wrong type or is out of range; when state
            is loaded into an inner optimizer of Keras that is not built, for Keras
            would drop it.

    Slots: `slow` (φ), and the count `fast_updates` since φ began. The inner optimizer
    keeps its own.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.Lookahead(gdopt.GradientDescent(learning_rate=1.0), sync_period=2)
    >>> weight = keras.Variable([4.0])
    >>> for _ in range(2):
    ...     optimizer.apply([keras.ops.convert_to_tensor([1.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))  # half of the way from 4 to 2
    [3.]

    Source: Zhang, Lucas, Hinton and Ba 2019, *Lookahead Optimizer: k steps forward,
    1 step back* (arXiv 1907.08610), Algorithm 1.
    """

    def __init__(
        self,
        optimizer: Any,
        sync_period: int = 5,
        slow_step_size: float = 0.5,
        name: str | None = None,
    ) -> None:
        inner = _resolved(optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self._unused = len(self._variables)  # Keras's count and rate: the inner one's hold
        self.inner_optimizer = inner
        self.sync_period = checked_count("sync_period", sync_period, minimum=1)
        self.slow_step_size = checked_number("slow_step_size", slow_step_size, above=0.0, most=1.0)
        self._fast_updates = self.add_variable(
            (), "zeros", dtype="int", aggregation="only_first_replica", name="fast_updates"
        )
        self._slow: list[Any] = []
        # Without Keras's tracking: it holds no state that is saved.
        object.__setattr__(self, "_tensorflow_sync", self._new_tensorflow_sync())

    # --- the algorithm -------------------------------------------------------

    def apply(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """A step of the inner optimizer, and every k updates one of the slow weights.

        Args:
            grads: One gradient for each variable, as the inner optimizer takes them.
            trainable_variables: The variables; may be left out once the optimizer is
                built. Builds the optimizer on the first call.
        """
        if not self.built and trainable_variables is not None:
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        sync = self._tensorflow_sync
        if sync is not None:
            sync.before()
        else:
            self._start(ops.equal(self._fast_updates, 0))
        updates_before = self.iterations + 0  # a value, which the step does not change
        self.inner_optimizer.apply(grads, trainable_variables)
        updates = self.iterations - updates_before
        if sync is not None:
            sync.after(updates)
        else:
            self._fast_updates.assign(self._fast_updates + updates)
            in_step = ops.equal(self._fast_updates % self.sync_period, 0)
            self._synchronize(ops.logical_and(updates > 0, in_step))

    def _start(self, where: Any = True) -> None:
        """Sets the slow weights to the weights."""
        for weight, slow in self._pairs():
            self.assign(slow, ops.where(where, ops.cast(weight, slow.dtype), slow))

    def _synchronize(self, where: Any = True) -> None:
        """Moves the slow weights towards the weights, and the weights there."""
        for weight, slow in self._pairs():
            fast, value = ops.cast(weight, slow.dtype), ops.convert_to_tensor(slow)
            value = ops.where(where, value + self.slow_step_size * (fast - value), value)
            self.assign(slow, value)
            self.assign(weight, ops.cast(ops.where(where, value, fast), weight.dtype))

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Ends the inner optimizer's training, then puts the slow weights into the model.

        Args:
            var_list: The model's trainable variables.
        """
        self.inner_optimizer.finalize_variable_values(var_list)
        if int(ops.convert_to_numpy(self._fast_updates)):
            for weight, slow in self._pairs():
                weight.assign(ops.cast(slow, weight.dtype))
        self._fast_updates.assign(0)

    # --- what Keras calls ----------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Builds the inner optimizer and makes the slow weights.

        Args:
            variables: The model's trainable variables.
        """
        if self.built:
            return
        self._check_loaded_state_fits(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)
        self._slow = self.add_optimizer_variables(variables, "slow")
        self._restore_loaded_state()

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
        """The slow weights and their count, and the inner optimizer's variables."""
        return self._own_variables() + self.inner_optimizer.variables

    @property
    def _learning_rate(self) -> Any:  # where Keras's TensorBoard looks
        return self.inner_optimizer._learning_rate

    @_learning_rate.setter
    def _learning_rate(self, value: Any) -> None:
        """Drops what Keras's constructor makes."""

    @property
    def _model_variables_moving_average(self) -> list[Any]:  # where `SwapEMAWeights` looks
        return self.inner_optimizer._model_variables_moving_average

    @property
    def loss_scale_factor(self) -> float | None:
        """What the inner optimizer multiplies the loss with (at first, where that changes)."""
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
                "`Lookahead(optimizer)` without one inside, or compile with "
                "`auto_scale_loss=False`. Received: a LossScaleOptimizer inside Lookahead, "
                f"and loss_scale_factor={value} from outside"
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

    # --- config and state ----------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        return {
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            **self._own_config(),
        }

    def _own_config(self) -> dict[str, Any]:
        names = ("sync_period", "slow_step_size", "name")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "Lookahead":
        """An optimizer with the arguments of `config`, and without state."""
        with keras.saving.custom_object_scope(custom_objects or {}):
            return cls(**config)

    def load_own_variables(self, store: Any) -> None:
        """Reads the slow weights back from `store`.

        Raises:
            ValueError: If the state does not fit, or Keras would drop the inner
                optimizer's.
        """
        inner = self.inner_optimizer
        while hasattr(inner, "inner_optimizer"):
            inner = inner.inner_optimizer
        if not inner.built and not isinstance(inner, SavedStateOptimizer):
            raise ValueError(
                f"{type(inner).__name__} of Keras loads its state only once it is built. "
                "Call `model.optimizer.build(model.trainable_variables)` before "
                "`model.load_weights`."
            )
        super().load_own_variables(store)

    def __reduce__(self) -> tuple[Any, ...]:
        state: dict[str, Any] = {}
        self.save_own_variables(state)
        return _rebuilt, (type(self), self.inner_optimizer, self._own_config(), state)

    # --- the parts -----------------------------------------------------------

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        pairs = zip(self._trainable_variables, self._slow, strict=True)
        return (pair for pair in pairs if pair[1] is not None)

    def _own_variables(self) -> list[Any]:
        return list(self._variables[self._unused :])

    def _scalar_variables(self) -> Mapping[str, Any]:
        return {"fast_updates": self._fast_updates}

    def _slot_variables(self) -> Mapping[str, list[Any]]:
        return {"slow": self._slow}

    def _slot_initial_values(self) -> Mapping[str, float]:
        return {"slow": 0.0}

    def _new_tensorflow_sync(self) -> Any:
        if keras.backend.backend() != "tensorflow":
            return None
        from keras_gdopt.optimizers.tensorflow_sync import TensorFlowSync

        return TensorFlowSync(self)


def _resolved(optimizer: Any) -> Any:
    """The optimizer that an instance, a config or a name stands for, or raises."""
    resolved = optimizer
    if isinstance(optimizer, dict) and "registered_name" in optimizer:
        # `keras.optimizers.get` would take a built-in of the same name.
        resolved = keras.saving.deserialize_keras_object(optimizer)
    elif isinstance(optimizer, (dict, str)):
        resolved = keras.optimizers.get(optimizer)
    if not isinstance(resolved, keras.optimizers.Optimizer):
        raise ValueError(
            "Argument `optimizer` must be an optimizer (of this package or of Keras), its "
            "config or the name of one of Keras's. "
            f"Received: optimizer={optimizer!r} (of type {type(optimizer).__name__})"
        )
    return resolved


def _rebuilt(
    cls: type[Lookahead], inner: Any, config: dict[str, Any], state: dict[str, Any]
) -> Lookahead:
    """A copy of an optimizer; its slow weights return when it is built."""
    optimizer = cls(inner, **config)
    SavedStateOptimizer.load_own_variables(optimizer, state)
    return optimizer
