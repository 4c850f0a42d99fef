"""Gradient descent with momentum: Zhang 2019, Eq. 16 and Algorithm 4."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_gdopt.optimizers.argument_checks import checked_flag, checked_fraction
from keras_gdopt.optimizers.arithmetic import global_norm
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class Momentum(GradientOptimizer):
    r"""Gradient descent along a moving average of the gradients.

    $$\begin{aligned}
    v_t &= \rho\, v_{t-1} + (1 - \rho)\, g_t \\
    \theta_t &= \theta_{t-1} - \eta_t\, v_t
    \end{aligned}$$

    With `classical=True`, it is Polyak's heavy ball, whose velocity accumulates steps
    instead of gradients:

    $$\begin{aligned}
    v_t &= \rho\, v_{t-1} - \eta_t\, g_t \\
    \theta_t &= \theta_{t-1} + v_t
    \end{aligned}$$

    At a constant learning rate, the classical form with η(1 - ρ) takes the same
    steps as the default form with η. When the rate changes, the default form
    applies the new rate to the whole average at once; the classical form keeps the
    steps it has accumulated.

    `classical=True` equals `keras.optimizers.SGD(momentum=...)`; Keras has no
    counterpart of the default form.

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.01.
        momentum: The decay ρ of the velocity, in [0, 1). Defaults to 0.9.
        classical: Whether to take the classical form. Defaults to False.
        lazy: Whether embedding rows absent from the batch, and their velocity, are
            left alone. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `velocity` (v). Additional step metric: `velocity_norm`, the norm of all
    velocities together.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.Momentum(learning_rate=1.0, momentum=0.5)
    >>> weight = keras.Variable([1.0])
    >>> for _ in range(2):
    ...     optimizer.apply([keras.ops.convert_to_tensor([1.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))  # 1 - 0.5 - 0.75
    [-0.25]

    Source: Zhang 2019, *Gradient Descent based Optimization Algorithms for Deep
    Learning Models Training* (arXiv 1903.03614), Eq. 16 and Algorithm 4. Classical
    form: Polyak 1964, *Some methods of speeding up the convergence of iteration
    methods*; Goodfellow, Bengio and Courville 2016, *Deep Learning*, Algorithm 8.2.
    """

    hyperparameters = ("momentum", "classical")
    evolvable = {"momentum": "fraction"}
    slots = {"velocity": 0.0}

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.9,
        classical: bool = False,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, lazy=lazy, **kwargs)
        self.momentum = checked_fraction("momentum", momentum)
        self.classical = checked_flag("classical", classical)

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        del step
        if self.classical:
            velocity = self.momentum * slots["velocity"] - learning_rate * gradient
            return velocity, {"velocity": velocity}
        velocity = self.momentum * slots["velocity"] + (1 - self.momentum) * gradient
        return -learning_rate * velocity, {"velocity": velocity}

    @property
    def stability_bound(self) -> float:
        """2(1 + ρ) in the classical form, and 1 / (1 - ρ) times that in the default form."""
        bound = 2 * (1 + self.momentum)
        return bound if self.classical else bound / (1 - self.momentum)

    def rule_metrics(
        self, slots: Mapping[str, Sequence[Tensor]], learning_rate: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        """The norm of the velocity, see `GradientOptimizer.rule_metrics`."""
        del learning_rate, step
        return {"velocity_norm": global_norm(slots["velocity"])}
