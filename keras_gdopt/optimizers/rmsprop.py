"""RMSprop: Zhang 2019, Eq. 23-25; Tieleman and Hinton 2012."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import (
    checked_epsilons,
    checked_flag,
    checked_fraction,
)
from keras_gdopt.optimizers.arithmetic import is_known
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class RMSprop(GradientOptimizer):
    r"""Divides each entry's step by a moving average of its gradient's magnitude.

    $$\begin{aligned}
    G_t &= \rho\, G_{t-1} + (1 - \rho)\, g_t^2 \\
    s_t &= \eta_t\, g_t / (\sqrt{G_t + \epsilon_r} + \epsilon) \\
    \theta_t &= \theta_{t-1} - s_t
    \end{aligned}$$

    With `momentum` μ > 0, the steps accumulate:
    $m_t = \mu\, m_{t-1} + s_t$, $\theta_t = \theta_{t-1} - m_t$.

    With `centered=True`, the divisor contains the variance of the gradient instead of $G_t$:

    $$\bar g_t = \rho\, \bar g_{t-1} + (1 - \rho)\, g_t, \qquad
    V_t = G_t - \bar g_t^2 = \rho V_{t-1} + \rho (1 - \rho) (g_t - \bar g_{t-1})^2$$

    This class keeps V in the second form, which is never negative. Keras and torch
    compute the difference, which cancels in float32 where gradients vary little; its
    root may then be NaN.

    Equals `keras.optimizers.RMSprop` with its epsilon (1e-7) as `epsilon_root`,
    except that Keras squares each repetition of an embedding row on its own.

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.001.
        rho: The decay ρ of the averages, in [0, 1). Defaults to 0.9.
        momentum: The decay μ of the accumulated steps, in [0, 1); with 0, steps do not
            accumulate. Defaults to 0.
        epsilon: Added to the root, non-negative. Defaults to 0. (Keras's
            `epsilon` is under the root: it is `epsilon_root` here.)
        epsilon_root: Added under the root, non-negative. Defaults to 1e-6. At least
            one of the two epsilons must be above 0.
        centered: Whether to divide by the root of the variance. Defaults to False.
        lazy: Whether embedding rows absent from the batch, and their averages, are
            left alone. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `velocity` (G; V if centered), `momentum` (m) where μ > 0, and
    `average_gradient` if centered, as Keras names them.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.RMSprop(learning_rate=0.5, rho=0.75)
    >>> weight = keras.Variable([2.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([8.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))  # 2 - 0.5 * 8 / sqrt(0.25 * 64)
    [1.]

    Source: Tieleman and Hinton 2012, *Neural Networks for Machine Learning*,
    lecture 6.5; Zhang 2019 (arXiv 1903.03614), Eq. 23-25. Centered: Graves 2013,
    *Generating Sequences With Recurrent Neural Networks* (arXiv 1308.0850),
    Eq. 38-45.
    """

    hyperparameters = ("rho", "momentum", "epsilon", "epsilon_root", "centered")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 0.0,
        epsilon_root: float = 1e-6,
        centered: bool = False,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, lazy=lazy, **kwargs)
        self.rho = checked_fraction("rho", rho)
        self.momentum = checked_fraction("momentum", momentum)
        self.epsilon, self.epsilon_root = checked_epsilons(epsilon, epsilon_root)
        self.centered = checked_flag("centered", centered)

    @property
    def evolvable(self) -> Mapping[str, str]:
        """The hyper-parameters that may differ, see `GradientOptimizer.evolvable`."""
        names = {"rho": "fraction", "epsilon": "positive", "epsilon_root": "positive"}
        return {**names, "momentum": "fraction"} if self.momentum else names

    @property
    def slots(self) -> Mapping[str, float]:
        """The slots that the arguments require, see `GradientOptimizer.slots`."""
        names = ["velocity"]
        names += ["momentum"] if self.momentum else []
        names += ["average_gradient"] if self.centered else []
        return dict.fromkeys(names, 0.0)

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        del step
        new_slots, added = {}, (1 - self.rho) * ops.square(gradient)
        if self.centered:
            mean = slots["average_gradient"]
            added = self.rho * (1 - self.rho) * ops.square(gradient - mean)
            new_slots["average_gradient"] = self.rho * mean + (1 - self.rho) * gradient
        velocity = self.rho * slots["velocity"] + added
        new_slots["velocity"] = velocity
        divisor = ops.sqrt(velocity + self.epsilon_root) + self.epsilon
        step_back = learning_rate * gradient / divisor
        if not is_known(self.momentum) or self.momentum:
            step_back = self.momentum * slots["momentum"] + step_back
            new_slots["momentum"] = step_back
        return -step_back, new_slots

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """The rate over the root, see `GradientOptimizer.effective_learning_rate`."""
        del step
        root = ops.sqrt(slots["velocity"] + self.epsilon_root) + self.epsilon
        return ops.cast(learning_rate, root.dtype) / root
