"""Nadam: Zhang 2019, Eq. 42; Dozat 2016."""

from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.adaptive_moments import AdaptiveMoments
from keras_gdopt.optimizers.arithmetic import in_dtype
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class Nadam(AdaptiveMoments):
    r"""Adam with Nesterov's momentum.

    $$\begin{aligned}
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, &
    \hat m_t &= m_t / (1 - \beta_1^t) \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, &
    \hat v_t &= v_t / (1 - \beta_2^t) \\
    \theta_t &= \theta_{t-1} - \frac{\eta_t}{\sqrt{\hat v_t + \epsilon_r} + \epsilon}
    \left(\beta_1 \hat m_t + \frac{1 - \beta_1}{1 - \beta_1^t}\, g_t\right)
    \end{aligned}$$

    `keras.optimizers.Nadam` follows a different rule: its first decay follows the
    schedule $\mu_t = \beta_1 (1 - 0.5 \cdot 0.96^t)$, and its correction of the first
    moment looks one step further ahead. torch's does the same with $0.96^{t/250}$. As
    here, both add epsilon (1e-7 in Keras, 1e-8 in torch) to the root of $\hat v_t$.

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.001.
        beta_1: The decay β₁ of the first moment, in [0, 1). Defaults to 0.9.
        beta_2: The decay β₂ of the second moment, in [0, 1). Defaults to 0.999.
        epsilon: Added to the root, non-negative. Defaults to 1e-8.
        epsilon_root: Added under the root, non-negative. Defaults to 0. At least
            one of the two epsilons must be above 0.
        lazy: Whether embedding rows absent from the batch, and their moments, are
            left alone. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `momentum` (m) and `velocity` (v), as Keras names them.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.Nadam(learning_rate=0.1)
    >>> weight = keras.Variable([1.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([5.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))  # 1 - 0.1 (0.9 + 1)
    [0.81]

    Source: Dozat 2016, *Incorporating Nesterov Momentum into Adam*; Zhang 2019,
    *Gradient Descent based Optimization Algorithms for Deep Learning Models
    Training* (arXiv 1903.03614), Eq. 42.
    """

    evolvable = AdaptiveMoments.evolvable

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
        super().__init__(learning_rate, beta_1, beta_2, epsilon, epsilon_root, lazy=lazy, **kwargs)

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        m, v = self._moments(gradient, slots)
        rate, *epsilons = self._bias_corrected(learning_rate, step)
        # rate * (beta_1 * m + (1 - beta_1) * gradient), written with the old moment and one
        # scalar factor for each term: two roundings fewer.
        square = in_dtype(self.beta_1, rate.dtype) ** 2
        ahead = ops.cast(rate * square, m.dtype) * slots["momentum"]
        ahead += ops.cast(rate * (1 - square), m.dtype) * gradient
        return -ahead / self._root(v, *epsilons), {"momentum": m, "velocity": v}
