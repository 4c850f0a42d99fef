"""Adagrad: Zhang 2019, Eq. 22; Duchi, Hazan and Singer 2011."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_epsilons, checked_number
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class Adagrad(GradientOptimizer):
    r"""Divides each entry's step by the root of all its squared gradients so far.

    $$\begin{aligned}
    G_t &= G_{t-1} + g_t^2 \\
    \theta_t &= \theta_{t-1} - \eta_t\, g_t / (\sqrt{G_t + \epsilon_r} + \epsilon)
    \end{aligned}$$

    `keras.optimizers.Adagrad` starts its accumulator at 0.1, which damps the first
    steps of small gradients, and adds its epsilon (1e-7) under the root. The rules are
    the same with `initial_accumulator_value=0.1, epsilon_root=1e-7`, but Keras squares
    each repetition of an embedding row on its own.

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.01.
        initial_accumulator_value: The value that each entry of G starts from,
            non-negative. Defaults to 0.
        epsilon: Added to the root, non-negative. Defaults to 0. (Keras's
            `epsilon` is under the root: it is `epsilon_root` here.)
        epsilon_root: Added under the root, non-negative. Defaults to 1e-8. At least
            one of the two epsilons must be above 0, unless G starts above 0.
        lazy: Whether weight decay leaves embedding rows absent from the batch alone;
            the rule always does. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `accumulator` (G), as Keras names it.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.Adagrad(learning_rate=1.0)
    >>> weight = keras.Variable([1.0])
    >>> for gradient in (3.0, 4.0):
    ...     optimizer.apply([keras.ops.convert_to_tensor([gradient])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))  # 1 - 3 / 3 - 4 / 5
    [-0.8]

    Source: Duchi, Hazan and Singer 2011, *Adaptive Subgradient Methods for Online
    Learning and Stochastic Optimization* (diagonal form); Zhang 2019 (arXiv
    1903.03614), Eq. 22.
    """

    hyperparameters = ("initial_accumulator_value", "epsilon", "epsilon_root")
    evolvable = {"epsilon": "positive", "epsilon_root": "positive"}
    zero_gradient_changes_nothing = True

    def __init__(
        self,
        learning_rate: Any = 0.01,
        initial_accumulator_value: float = 0.0,
        epsilon: float = 0.0,
        epsilon_root: float = 1e-8,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, lazy=lazy, **kwargs)
        self.initial_accumulator_value = checked_number(
            "initial_accumulator_value", initial_accumulator_value
        )
        self.epsilon, self.epsilon_root = checked_epsilons(
            epsilon, epsilon_root, initial_accumulator_value=self.initial_accumulator_value
        )

    @property
    def slots(self) -> Mapping[str, float]:
        """The accumulator, see `GradientOptimizer.slots`."""
        return {"accumulator": self.initial_accumulator_value}

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        del step
        accumulator = slots["accumulator"] + ops.square(gradient)
        divisor = ops.sqrt(accumulator + self.epsilon_root) + self.epsilon
        return -learning_rate * gradient / divisor, {"accumulator": accumulator}

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """The rate over the root, see `GradientOptimizer.effective_learning_rate`."""
        del step
        root = ops.sqrt(slots["accumulator"] + self.epsilon_root) + self.epsilon
        return ops.cast(learning_rate, root.dtype) / root
