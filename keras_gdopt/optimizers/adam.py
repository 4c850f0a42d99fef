"""Adam: Zhang 2019, Eq. 33-35; Kingma and Ba 2015."""

from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_epsilons, checked_fraction
from keras_gdopt.optimizers.arithmetic import Tensor, one_minus_power
from keras_gdopt.optimizers.base import GradientOptimizer, Slots, Update


@keras.saving.register_keras_serializable("keras_gdopt")
class Adam(GradientOptimizer):
    r"""Adaptive moment estimation, with epsilon where the paper has it.

    $$\begin{aligned}
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, &
    \hat m_t &= m_t / (1 - \beta_1^t) \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, &
    \hat v_t &= v_t / (1 - \beta_2^t) \\
    \theta_t &= \theta_{t-1} - \eta_t\, \hat m_t / (\sqrt{\hat v_t + \epsilon_r} + \epsilon)
    \end{aligned}$$

    `keras.optimizers.Adam` adds its epsilon (1e-7) to the root of $v_t$ *before*
    the bias correction, which makes it larger by $1/\sqrt{1 - \beta_2^t}$, a factor
    of 32 in the first step; squares each repetition of an embedding row on its own;
    and computes $1 - \beta^t$ in float32, which costs the first step dozens of
    units in the last place.

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.001.
        beta_1: The decay β₁ of the first moment, in [0, 1). Defaults to 0.9.
        beta_2: The decay β₂ of the second moment, in [0, 1). Defaults to 0.999.
        epsilon: Added to the root, not negative. Defaults to 1e-8.
        epsilon_root: Added under the root, not negative. Defaults to 0. At least
            one of both epsilons must be above 0.
        lazy: Whether embedding rows absent from the batch, and their moments, are
            left alone. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `momentum` (m) and `velocity` (v), as Keras names them.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.Adam(learning_rate=0.1)
    >>> weight = keras.Variable([1.0, 2.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([5.0, -0.02])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))
    [0.9 2.1]

    Source: Kingma and Ba 2015, *Adam: A Method for Stochastic Optimization*,
    Algorithm 1; Zhang 2019 (arXiv 1903.03614), Eq. 33-35.
    """

    hyperparameters = ("beta_1", "beta_2", "epsilon", "epsilon_root")
    slots = {"momentum": 0.0, "velocity": 0.0}

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        epsilon_root: float = 0.0,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, lazy=lazy, **kwargs)
        self.beta_1 = checked_fraction("beta_1", beta_1)
        self.beta_2 = checked_fraction("beta_2", beta_2)
        self.epsilon, self.epsilon_root = checked_epsilons(epsilon, epsilon_root)

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        m = self.beta_1 * slots["momentum"] + (1 - self.beta_1) * gradient
        v = self.beta_2 * slots["velocity"] + (1 - self.beta_2) * ops.square(gradient)
        # The bias corrections of m and v are moved to the scalars, where they cost
        # one rounding instead of one for each entry.
        correction = one_minus_power(self.beta_2, step)
        root = ops.sqrt(correction)
        rate = ops.cast(learning_rate, step.dtype) * root / one_minus_power(self.beta_1, step)
        rate, epsilon, epsilon_root = (
            ops.cast(scalar, gradient.dtype)
            for scalar in (rate, self.epsilon * root, self.epsilon_root * correction)
        )
        change = -rate * m / (ops.sqrt(v + epsilon_root) + epsilon)
        return change, {"momentum": m, "velocity": v}
