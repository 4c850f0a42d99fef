"""Types of an update rule, and the interface that a step needs of its optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import keras

from keras_gdopt.tensor import Tensor

Slots = Mapping[str, Tensor]
"""One variable's slots by name."""

Update = tuple[Tensor, dict[str, Tensor]]
"""The change to add to a variable, and its new slots by name."""


class StepSettings(NamedTuple):
    """What an optimizer does around its rule; `None` turns a part off.

    Names and meanings are those of Keras's arguments.
    """

    learning_rate: Any
    """A variable that holds a number, a schedule, or a callable without arguments."""
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    weight_decay: Any
    """A number, or a scalar tensor for a member of a population."""
    ema_momentum: float | None
    """`None` without `use_ema`."""
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None
    skip_nonfinite: bool
    """Whether gradients that are not all finite, or have no norm to clip by, change nothing."""

    @property
    def schedule(self) -> keras.optimizers.schedules.LearningRateSchedule | None:
        """The learning rate schedule, if there is one."""
        is_schedule = isinstance(
            self.learning_rate, keras.optimizers.schedules.LearningRateSchedule
        )
        return self.learning_rate if is_schedule else None

    @property
    def has_fixed_learning_rate(self) -> bool:
        """Whether the learning rate is a number, which can be set."""
        return isinstance(self.learning_rate, keras.Variable)

    @property
    def clips_by_norm(self) -> bool:
        """Whether gradients are clipped by a norm."""
        return bool(self.clipnorm or self.global_clipnorm)

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped."""
        return bool(self.clips_by_norm or self.clipvalue)


class StepVariables(NamedTuple):
    """The variables that a step reads and writes, in the order the optimizer was built with."""

    trainable: Sequence[Any]
    slots: Mapping[str, Sequence[Any]]
    """By slot name; `None` for a variable that Keras overwrites with its gradient (float8)."""
    averages: Sequence[Any]
    """Moving averages of the weights; empty without `use_ema`."""
    accumulators: Sequence[Any]
    """Sums of gradients; empty without accumulation."""
    iterations: Any
    """The count of calls of `apply`."""


class RuleOptimizer(Protocol):
    """The part of a `GradientOptimizer` that a step uses."""

    name: str
    lazy: bool
    zero_gradient_changes_nothing: bool

    @property
    def slots(self) -> Mapping[str, float]:
        """Slot names and the value that each entry starts from."""

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the next step."""

    @property
    def iterations(self) -> Any:
        """The count of updates."""

    @property
    def step_settings(self) -> StepSettings:
        """What it does around its rule."""

    @property
    def step_variables(self) -> StepVariables:
        """Its variables, once it is built."""

    def assign(self, variable: Any, value: Tensor) -> None:
        """Sets a variable, or the rows of `tf.IndexedSlices`."""

    def assign_add(self, variable: Any, value: Tensor) -> None:
        """Adds to a variable, or to the rows of `tf.IndexedSlices`."""

    def assign_sub(self, variable: Any, value: Tensor) -> None:
        """Subtracts from a variable."""

    def uses_weight_decay(self, variable: Any) -> bool:
        """Whether a variable takes part in weight decay, if there is any."""

    def apply_rule(
        self,
        gradient: Tensor,
        slots: Slots,
        learning_rate: Any,
        step: Any,
        hyperparameters: Mapping[str, Tensor] | None = None,
        *,
        variable_dtype: Any,
    ) -> Update:
        """Calls the rule; returns its change and new slots in the dtype that it computes in."""

    def rule_metrics(
        self, slots: Mapping[str, Sequence[Tensor]], learning_rate: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        """Additional scalars of the algorithm to record."""

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """The factor of each entry's gradient; `None` if it is the learning rate for all."""


class TrainedVariable(NamedTuple):
    """What a step must know about a variable besides its value."""

    dtype: str
    apply_rule: Callable[..., Update]
    """As `RuleOptimizer.apply_rule`, for the variable's dtype."""
    decays: bool
    """Whether weight decay applies to it."""
    constraint: Callable[[Tensor], Tensor] | None
    is_overwritten: bool
    """Whether Keras overwrites it with its gradient, as it does the scales of float8 layers."""
