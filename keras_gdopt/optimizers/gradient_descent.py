"""Gradient descent: Zhang 2019, Eq. 13-15."""

from typing import Any

import keras

from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class GradientDescent(GradientOptimizer):
    r"""Plain gradient descent.

    $$\theta_t = \theta_{t-1} - \eta_t\, g_t$$

    Vanilla, stochastic and mini-batch descent differ only in the batch size: `len(x)`,
    1 and anything in between.

    Equals `keras.optimizers.SGD` without momentum, except for repeated embedding rows:
    under clipping, Keras clips each repetition on its own; with `loss_scale_factor`, it
    refuses them.

    Args:
        learning_rate: The rate η: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 0.01.
        lazy: Whether weight decay leaves embedding rows absent from the batch alone;
            the rule always does. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.GradientDescent(learning_rate=0.5)
    >>> weight = keras.Variable([1.0, 2.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, -2.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))
    [0.5 3. ]

    Source: Zhang 2019, *Gradient Descent based Optimization Algorithms for Deep
    Learning Models Training* (arXiv 1903.03614), Eq. 13-15.
    """

    zero_gradient_changes_nothing = True

    def __init__(
        self,
        learning_rate: Any = 0.01,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, lazy=lazy, **kwargs)

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        del slots, step
        return -learning_rate * gradient, {}

    @property
    def stability_bound(self) -> float:
        """2: a step on a curvature of λ multiplies the distance to the minimum by 1 - ηλ."""
        return 2.0
