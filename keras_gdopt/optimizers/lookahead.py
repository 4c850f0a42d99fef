"""Lookahead: Zhang, Lucas, Hinton and Ba 2019, Algorithm 1."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_count, checked_number
from keras_gdopt.optimizers.recording import Recorder
from keras_gdopt.optimizers.saved_state import StateGroup
from keras_gdopt.optimizers.slow_weights import (
    final_weight,
    start_slow_weight,
    synchronize_weight,
)
from keras_gdopt.optimizers.wrapping_optimizer import WrappingOptimizer
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class Lookahead(WrappingOptimizer):
    r"""Slow weights that follow k fast steps of another optimizer.

    From $\theta_{t,0} = \phi_{t-1}$, the inner optimizer makes k updates with the
    gradients of k batches; then

    $$\phi_t = \phi_{t-1} + \alpha\, (\theta_{t,k} - \phi_{t-1})$$

    and the next k updates start from $\phi_t$. The result is φ, which
    `finalize_variable_values`, called by Keras at the end of `fit`, puts into the
    model; the next `fit` begins a new cycle.

    Each step runs the whole inner optimizer, whose arguments set clipping, weight decay,
    the moving average and accumulation (k counts updates, not batches). Constraints
    apply to both θ and φ. `learning_rate`, `iterations` and `exclude_from_weight_decay`
    are the inner optimizer's. So are the step metrics, except `slow_fast_distance`, the
    norm of θ − φ before a synchronization, and `syncs`, the number of synchronizations
    since φ began. Around `NAG`, the fast weights are its look-ahead points.

    While `fit` runs, the model holds the fast weights: validation and `ModelCheckpoint`
    see them. Neither `train_on_batch` nor a `fit` that an exception ends (Ctrl-C)
    finalizes; there, and in your own training loop, call
    `optimizer.finalize_variable_values(model.trainable_variables)` at the end. With
    `use_ema` inside, φ replaces the average in the model, so only
    `ema_overwrite_frequency` and `keras.callbacks.SwapEMAWeights` show the average. If
    you set weights by hand within a cycle, its end pulls them towards the φ from before.

    Keras has no such optimizer. That of TF-Addons starts its slow weights from the
    weights at the time it is built, and leaves the fast weights in the model.

    Args:
        optimizer: The inner optimizer: an instance (of this package or of Keras), its
            config, or the name of a Keras optimizer.
        sync_period: The number k of inner updates between synchronizations, at least
            1. Defaults to 5.
        slow_step_size: The step α of the slow weights, above 0 and at most 1.
            Defaults to 0.5.
        name: Defaults to "lookahead".

    Raises:
        ValueError: If an argument has the wrong type or is out of range, or the inner
            optimizer evaluates the loss itself, as `LBFGS` does; when state is loaded
            into an inner Keras optimizer that is not built, since Keras would drop it.

    Slots: `slow` (φ), and `fast_updates`, the count of updates since φ began. The inner
    optimizer keeps its own slots.

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

    hyperparameters = ("sync_period", "slow_step_size")
    slots = {"slow": 0.0}

    def __init__(
        self,
        optimizer: Any,
        sync_period: int = 5,
        slow_step_size: float = 0.5,
        name: str | None = None,
    ) -> None:
        super().__init__(optimizer, name)
        self.sync_period = checked_count("sync_period", sync_period, minimum=1)
        self.slow_step_size = checked_number("slow_step_size", slow_step_size, above=0.0, most=1.0)
        self._fast_updates = self.add_variable(
            (), "zeros", dtype="int", aggregation="only_first_replica", name="fast_updates"
        )
        # Bypasses Keras's tracking: it holds no state that is saved.
        object.__setattr__(self, "_tensorflow_sync", self._new_tensorflow_sync())

    # --- the algorithm -------------------------------------------------------

    def apply(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """Makes a step of the inner optimizer and, every k updates, one of the slow weights.

        Args:
            grads: One gradient for each variable, as the inner optimizer takes them.
            trainable_variables: The variables; may be left out once the optimizer is
                built. Builds the optimizer on the first call.

        Raises:
            ValueError: If the optimizer is not built and no variables are given.
        """
        self._build_for(trainable_variables)
        sync = self._tensorflow_sync
        if sync is not None:
            with sync.around_step(grads):
                self.inner_optimizer.apply(grads, trainable_variables)
            return
        self._start(ops.equal(self._fast_updates, 0))
        updates_before = self.iterations + 0  # copies the value, which the step changes
        self.inner_optimizer.apply(grads, trainable_variables)
        updates = self.iterations - updates_before
        self._fast_updates.assign(self._fast_updates + updates)
        in_step = ops.equal(self._fast_updates % self.sync_period, 0)
        self._synchronize(ops.logical_and(updates > 0, in_step))

    def _start(self, where: Any = True) -> None:
        """Sets the slow weights to the weights.

        Args:
            where: Whether to do so.
        """
        for weight, slow in self._pairs():
            self.assign(slow, start_slow_weight(weight, ops.convert_to_tensor(slow), where))

    def _synchronize(self, where: Any = True) -> None:
        """Moves the slow weights towards the weights, then sets the weights to them.

        Args:
            where: Whether to do so.
        """
        for weight, slow in self._pairs():
            new_weight, new_slow = synchronize_weight(
                weight, ops.convert_to_tensor(slow), self.slow_step_size, weight.constraint, where
            )
            self.assign(slow, new_slow)
            self.assign(weight, new_weight)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Ends the inner optimizer's training, then puts the slow weights into the model.

        Args:
            var_list: The model's trainable variables.
        """
        self.inner_optimizer.finalize_variable_values(var_list)
        if int(ops.convert_to_numpy(self._fast_updates)):
            for weight, slow in self._pairs():
                weight.assign(final_weight(weight, slow, weight.constraint, where=True))
        self._fast_updates.assign(0)

    # --- the parts -----------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The arguments are constants in the compiled functions.
        if name in self.hyperparameters and hasattr(self, "_tensorflow_sync"):
            object.__setattr__(self, "_tensorflow_sync", self._new_tensorflow_sync())

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        """Pairs of weight and slow weight, without integers, which gradients never move."""
        pairs = zip(self._trainable_variables, self._slots.get("slow", ()), strict=True)
        is_float = keras.backend.is_float_dtype
        return (pair for pair in pairs if pair[1] is not None and is_float(pair[1].dtype))

    @property
    def own_recorder(self) -> Recorder | None:
        """Records `slow_fast_distance` and `syncs`."""
        return self._tensorflow_sync and self._tensorflow_sync.recorder

    @property
    def cycle_variables(self) -> dict[str, Any]:
        """The slow weights and the count of updates since they began."""
        return {"slow": list(self._slots["slow"]), "fast_updates": self._fast_updates}

    def state_layout(self, variables: Sequence[Any]) -> dict[str, StateGroup]:
        """See `SavedStateOptimizer.state_layout`."""
        count = StateGroup.single(self._fast_updates)
        return {"fast_updates": count, **super().state_layout(variables)}

    def _new_tensorflow_sync(self) -> Any:
        if keras.backend.backend() != "tensorflow":
            return None
        from keras_gdopt.optimizers.tensorflow_sync import SlowWeights, TensorFlowSync

        return TensorFlowSync(
            SlowWeights(
                sync_period=self.sync_period,
                fast_updates=self._fast_updates,
                iterations=lambda: self.iterations,
                pairs=self._pairs,
                start=self._start,
                synchronize=self._synchronize,
                assign=self.assign,
                takes_step=self.takes_step,
                inner_recorder=lambda: self.recorder,
            )
        )
