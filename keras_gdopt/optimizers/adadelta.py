"""Adadelta: Zhang 2019, Eq. 32 and Algorithm 8; Zeiler 2012."""

from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_epsilons, checked_fraction
from keras_gdopt.optimizers.arithmetic import is_known
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class Adadelta(GradientOptimizer):
    r"""Takes steps in the units of the weights, so no learning rate needs to be chosen.

    $$\begin{aligned}
    G_t &= \rho\, G_{t-1} + (1 - \rho)\, g_t^2 \\
    \Delta_t &= -\frac{\sqrt{D_{t-1} + \epsilon_r} + \epsilon}
    {\sqrt{G_t + \epsilon_r} + \epsilon}\, g_t \\
    D_t &= \rho\, D_{t-1} + (1 - \rho)\, \Delta_t^2 \\
    \theta_t &= \theta_{t-1} + \eta_t\, \Delta_t
    \end{aligned}$$

    The first steps are small, about $\sqrt{\epsilon_r / (1 - \rho)}$, and grow; the
    epsilons set how fast.

    Equals `keras.optimizers.Adadelta` with its epsilon (1e-7) as `epsilon_root`, with
    two differences: the default learning rate is 0.001 there and 1 here (no rate at
    all, as published), and Keras squares each repetition of an embedding row on its own.

    Args:
        learning_rate: A multiplier η of the steps: a non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable without
            arguments. Defaults to 1.
        rho: The decay ρ of both averages, in [0, 1). Defaults to 0.95.
        epsilon: Added to both roots, non-negative. Defaults to 0. (Keras's
            `epsilon` is under both roots: it is `epsilon_root` here.)
        epsilon_root: Added under both roots, non-negative. Defaults to 1e-6. At
            least one of the two epsilons must be above 0.
        lazy: Whether embedding rows absent from the batch, and their averages, are
            left alone. Defaults to False. See `GradientOptimizer`.
        **kwargs: Keras's base arguments, see `GradientOptimizer`.

    Raises:
        ValueError: If an argument is unknown, of the wrong type or out of range.

    Slots: `accumulated_grad` (G) and `accumulated_delta_var` (D), as Keras names
    them.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.Adadelta(rho=0.75, epsilon_root=0.25)
    >>> weight = keras.Variable([1.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0])], [weight])
    >>> print(f"{float(weight[0]):.4f}")  # 1 - sqrt(0.25) / sqrt(0.25 * 9 + 0.25) * 3
    0.0513

    Source: Zeiler 2012, *ADADELTA: An Adaptive Learning Rate Method* (arXiv
    1212.5701), Algorithm 1; Zhang 2019 (arXiv 1903.03614), Eq. 32 and Algorithm 8.
    """

    hyperparameters = ("rho", "epsilon", "epsilon_root")
    evolvable = {"rho": "fraction", "epsilon": "positive", "epsilon_root": "positive"}
    slots = {"accumulated_grad": 0.0, "accumulated_delta_var": 0.0}

    def __init__(
        self,
        learning_rate: Any = 1.0,
        rho: float = 0.95,
        epsilon: float = 0.0,
        epsilon_root: float = 1e-6,
        *,
        lazy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, lazy=lazy, **kwargs)
        self.rho = checked_fraction("rho", rho)
        self.epsilon, self.epsilon_root = checked_epsilons(epsilon, epsilon_root)

    def update_rule(
        self, gradient: Tensor, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Update:
        """The rule above, see `GradientOptimizer.update_rule`."""
        del step
        squares, deltas = slots["accumulated_grad"], slots["accumulated_delta_var"]
        squares = self.rho * squares + (1 - self.rho) * ops.square(gradient)
        delta = -self._ratio_of_roots(deltas, squares) * gradient
        deltas = self.rho * deltas + (1 - self.rho) * ops.square(delta)
        new_slots = {"accumulated_grad": squares, "accumulated_delta_var": deltas}
        return learning_rate * delta, new_slots

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """The rate times the ratio of roots that the next step takes.

        See `GradientOptimizer.effective_learning_rate`.
        """
        del step
        ratio = self._ratio_of_roots(slots["accumulated_delta_var"], slots["accumulated_grad"])
        return ops.cast(learning_rate, ratio.dtype) * ratio

    def _ratio_of_roots(self, deltas: Tensor, squares: Tensor) -> Tensor:
        deltas, squares = deltas + self.epsilon_root, squares + self.epsilon_root
        if is_known(self.epsilon) and not self.epsilon:
            return ops.sqrt(deltas / squares)  # one rounding fewer
        return (ops.sqrt(deltas) + self.epsilon) / (ops.sqrt(squares) + self.epsilon)
