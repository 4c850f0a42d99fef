"""RAdam: Liu et al. 2020, Algorithm 2."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.adaptive_moments import AdaptiveMoments
from keras_gdopt.optimizers.argument_checks import checked_number
from keras_gdopt.optimizers.arithmetic import (
    Number,
    in_dtype,
    is_known,
    one_minus_power,
)
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class RAdam(AdaptiveMoments):
    r"""Adam that adapts its rate only once the variance of the rate can be rectified.

    With the moments and corrections of `Adam`, and the length of the simple moving
    average that the second moment is equivalent to,

    $$\rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
    \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t},$$

    a step is

    $$\theta_t = \theta_{t-1} - \eta_t \begin{cases}
    r_t\, \hat m_t / (\sqrt{\hat v_t + \epsilon_r} + \epsilon) & \rho_t > \text{sma\_threshold} \\
    \hat m_t & \text{else}
    \end{cases} \qquad r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}
    {(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}}$$

    At β₂ = 0.999, steps are rectified from the fifth on (from the sixth on with
    `sma_threshold=5`); earlier steps follow the first moment alone. With β₂ of 0.6
    or less, no step is ever rectified.

    Keras has no RAdam. `torch.optim.RAdam` and TF-Addons switch at a threshold of 5,
    which is `sma_threshold=5.0` here. For the warm-up that TF-Addons builds in, use a
    learning rate schedule. (With a backend other than TensorFlow, $\rho_t$ is computed
    in float32 and is exact to about $10^{-7} \rho_\infty$.)

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.001.
        beta_1: The decay β₁ of the first moment, in [0, 1). Defaults to 0.9.
        beta_2: The decay β₂ of the second moment, in [0, 1). Defaults to 0.999.
        epsilon: Added to the root, non-negative. Defaults to 1e-8.
        epsilon_root: Added under the root, non-negative. Defaults to 0. At least
            one of the two epsilons must be above 0.
        sma_threshold: The length of the moving average above which a step is
            rectified; at least 4, where rectification becomes possible. Defaults to 4.
        lazy: Whether embedding rows absent from the batch, and their moments, are
            left alone. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `momentum` (m) and `velocity` (v), as in `Adam`.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.RAdam(learning_rate=0.1)
    >>> weight = keras.Variable([1.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([5.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))  # not rectified yet: 1 - 0.1 * 5
    [0.5]

    Source: Liu, Jiang, He, Chen, Liu, Gao and Han 2020, *On the Variance of the
    Adaptive Learning Rate and Beyond* (arXiv 1908.03265), Algorithm 2.
    """

    hyperparameters = (*AdaptiveMoments.hyperparameters, "sma_threshold")
    evolvable = AdaptiveMoments.evolvable

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        epsilon_root: float = 0.0,
        sma_threshold: float = 4.0,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, epsilon_root, lazy=lazy, **kwargs)
        self.sma_threshold = checked_number("sma_threshold", sma_threshold, minimum=4.0)

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        m, v = self._moments(gradient, slots)
        new_slots = {"momentum": m, "velocity": v}
        learning_rate = ops.cast(learning_rate, step.dtype)
        plain_rate = learning_rate / one_minus_power(self.beta_1, step)
        if self._is_never_rectified:
            return -ops.cast(plain_rate, m.dtype) * m, new_slots
        _, rectified, rectification = self._rectification(step)
        rate, *epsilons = self._bias_corrected(learning_rate * rectification, step)
        rate = ops.cast(ops.where(rectified, rate, plain_rate), m.dtype)
        divisor = ops.where(rectified, self._root(v, *epsilons), 1.0)
        return -rate * m / divisor, new_slots

    def rule_metrics(
        self, slots: Mapping[str, Sequence[Tensor]], learning_rate: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        r"""$\rho_t$, and $r_t$ (0 if the step is not rectified).

        See `GradientOptimizer.rule_metrics`.
        """
        length, rectified, rectification = self._rectification(step)
        return {"rho_t": length, "rectification": ops.where(rectified, rectification, 0.0)}

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """Adam's, rectified, or the rate; see `GradientOptimizer.effective_learning_rate`."""
        _, rectified, rectification = self._rectification(step)
        rate = ops.cast(learning_rate, step.dtype)
        adapted: Tensor = super().effective_learning_rate(slots, rate * rectification, step)
        return ops.where(rectified, adapted, ops.cast(rate, adapted.dtype))

    @property
    def _longest(self) -> Number:
        return 2 / (1 - self.beta_2) - 1

    @property
    def _is_never_rectified(self) -> bool:
        return is_known(self.beta_2) and self._longest <= self.sma_threshold

    def _rectification(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The moving average's length, whether the step is rectified, and the factor if it is."""
        correction = one_minus_power(self.beta_2, step)
        longest = 2 / (1 - in_dtype(self.beta_2, step.dtype)) - 1
        length = longest - 2 * step * (1 - correction) / correction
        rectified = length > self.sma_threshold
        if self._is_never_rectified:
            return length, rectified, ops.zeros_like(length)
        kept = ops.maximum(length, self.sma_threshold)  # keeps the root real
        of_longest = (longest - 4) * (longest - 2) / longest
        return length, rectified, ops.sqrt((kept - 4) * (kept - 2) / (kept * of_longest))
