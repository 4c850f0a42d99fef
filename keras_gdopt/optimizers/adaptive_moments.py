"""What Adam, Nadam and RAdam share: two moments, their decays and two epsilons."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_epsilons, checked_fraction
from keras_gdopt.optimizers.arithmetic import (
    in_dtype,
    is_known,
    moving_average,
    one_minus_power,
)
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.rule import Slots
from keras_gdopt.tensor import Tensor


class AdaptiveMoments(GradientOptimizer):
    """Keeps moving averages of the gradient (`momentum`) and of its square (`velocity`)."""

    hyperparameters: ClassVar[Sequence[str]] = ("beta_1", "beta_2", "epsilon", "epsilon_root")
    evolvable = {
        "beta_1": "fraction",
        "beta_2": "fraction",
        "epsilon": "positive",
        "epsilon_root": "positive",
    }

    def __init__(
        self,
        learning_rate: Any,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        epsilon_root: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        self.beta_1 = checked_fraction("beta_1", beta_1)
        self.beta_2 = checked_fraction("beta_2", beta_2)
        self.epsilon, self.epsilon_root = checked_epsilons(epsilon, epsilon_root)

    @property
    def slots(self) -> Mapping[str, float]:
        """The moments, see `GradientOptimizer.slots`."""
        return {"momentum": 0.0, "velocity": 0.0}

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """The rate over the root, see `GradientOptimizer.effective_learning_rate`."""
        v = slots["velocity"]
        v = v / ops.cast(one_minus_power(self.beta_2, step), v.dtype)
        root = ops.sqrt(v + self.epsilon_root) + self.epsilon
        return ops.cast(learning_rate, v.dtype) / root

    def _moments(self, gradient: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Both new moving averages, without bias correction."""
        m = moving_average(slots["momentum"], gradient, self.beta_1)
        return m, moving_average(slots["velocity"], ops.square(gradient), self.beta_2)

    def _bias_corrected(self, learning_rate: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""A rate and two epsilons with which the raw moments give the published step.

        With $c_1 = 1 - \beta_1^t$ and $c_2 = 1 - \beta_2^t$,
        $\eta (m / c_1) / (\sqrt{v / c_2 + \epsilon_r} + \epsilon)$ equals
        $(\eta \sqrt{c_2} / c_1)\, m / (\sqrt{v + c_2 \epsilon_r} + \sqrt{c_2} \epsilon)$:
        the corrections cost one rounding in all instead of one for each entry.

        Returns:
            Rate, epsilon and epsilon_root, in the dtype of `step`.
        """
        correction = one_minus_power(self.beta_2, step)
        root = ops.sqrt(correction)
        rate = ops.cast(learning_rate, step.dtype) * root / one_minus_power(self.beta_1, step)
        epsilon, epsilon_root = (
            in_dtype(value, step.dtype) for value in (self.epsilon, self.epsilon_root)
        )
        return rate, epsilon * root, epsilon_root * correction

    def _root(self, v: Tensor, epsilon: Tensor, epsilon_root: Tensor) -> Tensor:
        """The root of the second moment, with both epsilons added."""
        if not is_known(self.epsilon_root) or self.epsilon_root:
            v = v + ops.cast(epsilon_root, v.dtype)
        return ops.sqrt(v) + ops.cast(epsilon, v.dtype)
