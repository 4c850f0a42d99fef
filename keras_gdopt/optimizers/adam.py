"""Adam: Zhang 2019, Eq. 33-35; Kingma and Ba 2015."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.adaptive_moments import AdaptiveMoments
from keras_gdopt.optimizers.argument_checks import checked_flag
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class Adam(AdaptiveMoments):
    r"""Adaptive moment estimation, with epsilon in the same place as in the paper.

    $$\begin{aligned}
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, &
    \hat m_t &= m_t / (1 - \beta_1^t) \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, &
    \hat v_t &= v_t / (1 - \beta_2^t) \\
    \theta_t &= \theta_{t-1} - \eta_t\, \hat m_t / (\sqrt{\hat v_t + \epsilon_r} + \epsilon)
    \end{aligned}$$

    With `amsgrad=True`, the step is divided by the largest second moment so far:
    $v^{\max}_t = \max(v^{\max}_{t-1}, v_t)$ and
    $\hat v_t = v^{\max}_t / (1 - \beta_2^t)$. Keras and torch correct the bias in the same
    way; the paper does not correct it.

    `keras.optimizers.Adam` differs in three ways. It adds its epsilon (1e-7) to the root
    of $v_t$ *before* the bias correction, which enlarges it by
    $1/\sqrt{1 - \beta_2^t}$, a factor of 32 in the first step. It squares each
    repetition of an embedding row on its own. It computes $1 - \beta^t$ in float32,
    which costs the first step dozens of units in the last place.

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.001.
        beta_1: The decay β₁ of the first moment, in [0, 1). Defaults to 0.9.
        beta_2: The decay β₂ of the second moment, in [0, 1). Defaults to 0.999.
        epsilon: Added to the root, non-negative. Defaults to 1e-8.
        epsilon_root: Added under the root, non-negative. Defaults to 0. At least
            one of the two epsilons must be above 0.
        amsgrad: Whether to divide by the largest second moment so far. Defaults to
            False.
        lazy: Whether embedding rows absent from the batch, and their moments, are
            left alone. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `momentum` (m), `velocity` (v) and, with `amsgrad`, `velocity_hat`, as
    Keras names them.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.Adam(learning_rate=0.1)
    >>> weight = keras.Variable([1.0, 2.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([5.0, -0.02])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))
    [0.9 2.1]

    Source: Kingma and Ba 2015, *Adam: A Method for Stochastic Optimization*,
    Algorithm 1; Zhang 2019 (arXiv 1903.03614), Eq. 33-35. AMSGrad: Reddi, Kale and
    Kumar 2018, *On the Convergence of Adam and Beyond*, Algorithm 2.
    """

    hyperparameters = (*AdaptiveMoments.hyperparameters, "amsgrad")
    evolvable = AdaptiveMoments.evolvable

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        epsilon_root: float = 0.0,
        amsgrad: bool = False,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, epsilon_root, lazy=lazy, **kwargs)
        self.amsgrad = checked_flag("amsgrad", amsgrad)

    @property
    def slots(self) -> Mapping[str, float]:
        """The moments, see `GradientOptimizer.slots`."""
        return {**super().slots, **({"velocity_hat": 0.0} if self.amsgrad else {})}

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        m, v = self._moments(gradient, slots)
        new_slots = {"momentum": m, "velocity": v}
        if self.amsgrad:
            v = new_slots["velocity_hat"] = ops.maximum(slots["velocity_hat"], v)
        rate, *epsilons = self._bias_corrected(learning_rate, step)
        return -ops.cast(rate, m.dtype) * m / self._root(v, *epsilons), new_slots

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """The rate over the step's root, see `GradientOptimizer.effective_learning_rate`."""
        if self.amsgrad:
            slots = {"velocity": slots["velocity_hat"]}
        return super().effective_learning_rate(slots, learning_rate, step)
