"""Nonlinear conjugate gradient."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.line_search_optimizer import (
    LineSearchOptimizer,
    Proposal,
    first_step_downhill,
)
from keras_gdopt.closures.minimize import Memory, Point
from keras_gdopt.closures.vectors import norm
from keras_gdopt.optimizers.argument_checks import checked_choice
from keras_gdopt.tensor import Tensor


def polak_ribiere(old: Tensor, new: Tensor) -> Tensor:
    r"""$\beta^{PR}$ of the gradients before and after an iteration, where the old's norm is 1."""
    return tf.reduce_sum((new - old) * new)


def fletcher_reeves(old: Tensor, new: Tensor) -> Tensor:
    r"""$\beta^{FR}$, as `polak_ribiere`."""
    del old
    return tf.reduce_sum(new * new)


BETAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "polak_ribiere": polak_ribiere,
    "fletcher_reeves": fletcher_reeves,
}


@keras.saving.register_keras_serializable("keras_gdopt")
class ConjugateGradient(LineSearchOptimizer):
    r"""Nonlinear conjugate gradient with a line search.

    $$d_t = -g_t + \beta_t d_{t-1}, \qquad \theta_{t+1} = \theta_t + \alpha_t d_t$$

    $$\beta_t^{PR} = \frac{(g_t - g_{t-1})^\top g_t}{g_{t-1}^\top g_{t-1}}, \qquad
    \beta_t^{FR} = \frac{g_t^\top g_t}{g_{t-1}^\top g_{t-1}}, \qquad \beta_1 = 0$$

    where a line search finds α. The direction is $-g_t$ where β is negative, where the conjugate
    direction does not descend, and after a line search that found no lower loss. Both gradients
    in β are of the same batch, that of the iteration that ends at $\theta_t$.

    Keras has no such optimizer. Use it as `ClosureOptimizer` describes: `attach(model)` once
    after `compile`.

    Args:
        learning_rate: The first trial step, as a multiple of the step at which the loss would
            fall as much as in the previous iteration (in the first iteration, of
            $\min(1, 1/\|g\|_1)$). Defaults to 1.0.
        beta: `"polak_ribiere"` or `"fletcher_reeves"`. Defaults to `"polak_ribiere"`.
        line_search: `"wolfe"`, `"armijo"` or `"exact"`. With `"exact"` a quadratic of n weights
            is minimized in n iterations. `"armijo"` does not test the slope at the end of a
            step, so directions are hardly conjugate: where features differ much in scale, it is
            as slow as steepest descent. Defaults to `"wolfe"`.
        iterations_per_step: The most iterations in a training step. Defaults to 1.
        **kwargs: `closure_chunks`, `gradient_tolerance`, `relative_gradient_tolerance`,
            `change_tolerance`, `jit_compile` and `name`, see `ClosureOptimizer`.

    Raises:
        ValueError: If an argument is out of range or makes no sense here.

    Step metrics of its own: `beta`, the β of the next direction.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 64, dtype="float32").reshape(64, 1)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.ConjugateGradient(iterations_per_step=10), "mse")
    >>> model.optimizer.attach(model)
    >>> history = model.fit(x, 3 * x + 1, batch_size=64, epochs=2, verbose=0)
    >>> history.history["loss"][-1] < 1e-10
    True

    Source: Luo's notes on Goodfellow, Bengio and Courville 2016, *Deep Learning*, Algorithm 8.9
    (8 in the notes); Nocedal and Wright 2006, *Numerical Optimization*, Eq. 5.41, 5.44
    and 5.45.
    """

    hyperparameters = ("beta",)
    own_metrics = ("beta",)
    curvature = 0.2

    def __init__(
        self,
        learning_rate: Any = 1.0,
        beta: str = "polak_ribiere",
        line_search: str = "wolfe",
        iterations_per_step: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, line_search, iterations_per_step, **kwargs)
        self.beta = checked_choice("beta", beta, tuple(BETAS))

    def memory_layout(self, size: int) -> dict[str, tuple[tuple[int, ...], float | int]]:
        """The last direction, β for the next one, and the fall of the loss to aim for next."""
        return {"direction": ((size,), 0.0), "beta": ((), 0.0), "descent": ((), 0.0)}

    def direction(
        self, point: Point, memory: Memory, learning_rate: Tensor, loss: BatchLoss
    ) -> Proposal:
        """The conjugate direction."""
        del loss
        direction = -point.gradient + memory["beta"] * memory["direction"]
        slope = tf.reduce_sum(direction * point.gradient)
        first = tf.where(
            memory["descent"] < 0,
            learning_rate * memory["descent"] / slope,
            first_step_downhill(point.gradient, learning_rate),
        )
        return Proposal(direction, first, memory)

    def remember(self, memory: Memory, before: Point, after: Point, proposal: Proposal) -> Memory:
        """Computes β from the gradients at both ends of the iteration."""
        scale = norm(before.gradient)  # so that no square over- or underflows
        beta = BETAS[self.beta](before.gradient / scale, after.gradient / scale)
        moved = after.weights - before.weights
        descent = tf.reduce_sum(moved * before.gradient)
        # A search that only shortens steps may accept one that is far too short, so aim for a
        # longer one next time.
        steepness = tf.reduce_sum(moved * after.gradient) / descent
        longer = 1.0 / tf.maximum(1.0 - steepness, 0.1)
        return {
            "direction": proposal.direction,
            "beta": tf.maximum(beta, 0.0),
            "descent": tf.where(steepness > self.curvature, longer * descent, descent),
        }

    def forget(self, memory: Memory) -> Memory:
        """Makes the next direction the negative gradient."""
        zero = tf.zeros_like(memory["beta"])
        return {**memory, "beta": zero, "descent": zero}
