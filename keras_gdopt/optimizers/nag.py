"""Nesterov's accelerated gradient: Zhang 2019, Eq. 21 and Algorithm 5."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_gdopt.optimizers.argument_checks import checked_flag, checked_fraction
from keras_gdopt.optimizers.arithmetic import constrain, global_norm, is_known
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.rule import Slots, Update
from keras_gdopt.tensor import Tensor


@keras.saving.register_keras_serializable("keras_gdopt")
class NAG(GradientOptimizer):
    r"""Momentum whose gradient is taken at the point where the velocity is about to lead.

    $$\begin{aligned}
    \hat\theta_t &= \theta_{t-1} - c_{t-1} v_{t-1}, \qquad c_{t-1} = \eta_{t-1}\, \rho \\
    v_t &= \rho\, v_{t-1} + (1 - \rho)\, \nabla L(\hat\theta_t) \\
    \theta_t &= \theta_{t-1} - \eta_t\, v_t
    \end{aligned}$$

    With `classical=True`, the velocity accumulates steps instead of gradients:

    $$\begin{aligned}
    \hat\theta_t &= \theta_{t-1} + \rho\, v_{t-1} \\
    v_t &= \rho\, v_{t-1} - \eta_t\, \nabla L(\hat\theta_t) \\
    \theta_t &= \theta_{t-1} + v_t
    \end{aligned}$$

    Keras computes the gradient at the model's weights, so while `fit` runs, *the model
    holds the look-ahead point* $\hat\theta_{t+1}$: validation, `ModelCheckpoint`, moving
    averages and constraints see it, and `EarlyStopping(restore_best_weights=True)`
    restores one. At the end of `fit`, Keras calls `finalize_variable_values`, which puts
    $\theta_t$ itself, within its constraints, into the model; $\theta_t$ follows the rule
    exactly under any learning rate schedule. The next step takes its gradient at
    $\theta_t$. Neither `train_on_batch` nor a `fit` that an exception ends (Ctrl-C)
    finalizes; there, and in your own training loop, call
    `optimizer.finalize_variable_values(model.trainable_variables)` before you use the
    weights. Training can continue from either point.

    `keras.optimizers.SGD(nesterov=True)` takes the same look-ahead points as
    `classical=True`, but leaves the last one in the model, while this class leaves
    $\theta_t$. Keras has no counterpart of the default form.

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

    Slots: `velocity` (v) and `look_ahead`, one number per variable: how many velocities
    the model is ahead. It is the last rate times ρ (ρ in the classical form), and 0 after
    finalizing. Additional step metric: `velocity_norm`, the norm of all velocities
    together.

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> optimizer = gdopt.NAG(learning_rate=1.0, momentum=0.5)
    >>> weight = keras.Variable([1.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([1.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))  # 1 - 0.5, and half of that ahead
    [0.25]
    >>> optimizer.finalize_variable_values([weight])
    >>> print(keras.ops.convert_to_numpy(weight))
    [0.5]

    Source: Zhang 2019, *Gradient Descent based Optimization Algorithms for Deep
    Learning Models Training* (arXiv 1903.03614), Eq. 21 and Algorithm 5. Classical
    form: Nesterov 1983; Sutskever, Martens, Dahl and Hinton 2013, *On the importance
    of initialization and momentum in deep learning*, Eq. 3-4; Goodfellow, Bengio and
    Courville 2016, *Deep Learning*, Algorithm 8.3.
    """

    hyperparameters = ("momentum", "classical")
    evolvable = {"momentum": "fraction"}
    slots = {"velocity": 0.0}
    scalar_slots = {"look_ahead": 0.0}

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
        """Moves one look-ahead point to the next, see `GradientOptimizer.update_rule`."""
        del step
        # `move` velocities are the step, and ρ as many the look-ahead; `sign` is that of `move`.
        rho, old_velocity = self.momentum, slots["velocity"]
        if self.classical:
            move, of_gradient, sign = 1.0, -learning_rate, 1.0
        else:
            move, of_gradient, sign = -learning_rate, 1 - rho, -1.0
        velocity = rho * old_velocity + of_gradient * gradient
        ahead = sign * slots["look_ahead"]
        if is_known(rho) and rho > 0.0:
            # The old look-ahead, `ahead` old velocities, is expressed by the new velocity, so
            # that XLA can overwrite the old one without keeping a copy.
            ahead = ahead / rho
            change = (move * (1 + rho) - ahead) * velocity + ahead * of_gradient * gradient
        else:
            change = move * (1 + rho) * velocity - ahead * old_velocity
        return change, {"velocity": velocity, "look_ahead": sign * move * rho}

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Replaces the look-ahead point in the model by the weights themselves.

        Args:
            var_list: The model's trainable variables.
        """
        for variable in var_list:
            index = self._trainable_variables_indices.get(self._var_key(variable))
            if index is None or self.slot_variables["velocity"][index] is None:
                continue  # not trained by this optimizer
            slots = {name: slot[index] for name, slot in self.slot_variables.items()}
            weight, final_slots = self.finalize_weight(variable, slots)
            variable.assign(constrain(variable.constraint, weight))
            slots["look_ahead"].assign(final_slots["look_ahead"])
        super().finalize_variable_values(var_list)

    def finalize_weight(self, weight: Any, slots: Slots) -> Update:
        """The weight itself, see `GradientOptimizer.finalize_weight`."""
        way = slots["look_ahead"] * slots["velocity"]
        way = ops.cast(-way if self.classical else way, weight.dtype)
        rest = {"look_ahead": ops.zeros_like(ops.convert_to_tensor(slots["look_ahead"]))}
        return weight + way, {**slots, **rest}

    @property
    def stability_bound(self) -> float:
        """2(1 + ρ) / (1 + 2ρ) in the classical form; in the default form 1 / (1 - ρ) times that."""
        bound = 2 * (1 + self.momentum) / (1 + 2 * self.momentum)
        return bound if self.classical else bound / (1 - self.momentum)

    def rule_metrics(
        self, slots: Mapping[str, Sequence[Tensor]], learning_rate: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        """The norm of the velocity, see `GradientOptimizer.rule_metrics`."""
        del learning_rate, step
        return {"velocity_norm": global_norm(slots["velocity"])}
