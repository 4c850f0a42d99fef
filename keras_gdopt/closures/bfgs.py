"""BFGS with a dense inverse Hessian."""

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
from keras_gdopt.optimizers.argument_checks import checked_flag
from keras_gdopt.optimizers.arithmetic import machine_epsilon
from keras_gdopt.tensor import Tensor

_MOST_WEIGHTS = 8192


@keras.saving.register_keras_serializable("keras_gdopt")
class BFGS(LineSearchOptimizer):
    r"""BFGS, by default self-scaled, with a line search.

    $$\theta_{t+1} = \theta_t - \alpha_t H_t g_t$$

    where H approximates the inverse Hessian. With $s = \theta_{t+1} - \theta_t$,
    $y = g_{t+1} - g_t$ and $\rho = 1 / y^\top s$, each iteration updates it:

    $$H_{t+1} = (I - \rho s y^\top)\, \frac{H_t}{\tau}\, (I - \rho y s^\top) + \rho s s^\top, \qquad
    \tau = \min\left(1, \frac{y^\top s}{-\alpha_t\, s^\top g_t}\right)$$

    τ is the ratio of the curvature along the step to the curvature that H predicted. Where the
    prediction was too large, τ enlarges H; plain BFGS ($\tau = 1$) takes many iterations to
    correct it. On ill-conditioned losses, such as those of physics-informed networks, self-scaled
    BFGS reaches much smaller losses. The first direction is $-g$. Before the first update, in
    which τ is 1, H is $(y^\top s / y^\top y)\, I$.

    An iteration skips the update where $s^\top y \le \varepsilon\, \|s\| \|y\|$ (ε is the
    machine epsilon of the weights' dtype), because H would no longer be positive definite. H
    depends on all batches seen so far, so train on all samples at once, `batch_size=len(x)`.

    The memory for H grows with the square of the number of weights: 8 MB for 1,000 weights in
    float64, 512 MB for 8,192, the most allowed. Beyond a few thousand weights `LBFGS` is faster.

    Keras has no such optimizer. Use it as `ClosureOptimizer` describes: `attach(model)` once
    after `compile`. Use float64: in float32, rounding ends it early.

    Args:
        learning_rate: The first trial step; along the first direction, a multiple of
            $\min(1, 1/\|g\|_1)$. Defaults to 1.0.
        self_scaled: Whether to compute τ as above; `False` is plain BFGS, with τ = 1. Defaults
            to True.
        line_search: `"wolfe"`, `"armijo"` or `"exact"`. Defaults to `"wolfe"`.
        iterations_per_step: The most iterations in a training step. Defaults to 1.
        **kwargs: `closure_chunks`, `gradient_tolerance`, `relative_gradient_tolerance`,
            `change_tolerance`, `jit_compile` and `name`, see `ClosureOptimizer`.

    Raises:
        ValueError: If an argument is out of range or makes no sense here; in `build`, if the
            model has more than 8,192 weights.

    Step metrics of its own: `updates`, the number of updates of H since it was last reset, and
    `scaling`, the τ of the last update.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 64, dtype="float32").reshape(64, 1)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.BFGS(iterations_per_step=10), "mse")
    >>> model.optimizer.attach(model)
    >>> history = model.fit(x, 3 * x + 1, batch_size=64, epochs=2, verbose=0)
    >>> history.history["loss"][-1] < 1e-10
    True

    Source: Nocedal and Wright 2006, *Numerical Optimization*, Eq. 6.17 and 6.20; Oren and
    Luenberger 1974, *Self-scaling variable metric (SSVM) algorithms*; Al-Baali 1998, *Numerical
    experience with a class of self-scaling quasi-Newton algorithms* (τ at most 1).
    """

    hyperparameters = ("self_scaled",)
    own_metrics = ("updates", "scaling")

    def __init__(
        self,
        learning_rate: Any = 1.0,
        self_scaled: bool = True,
        line_search: str = "wolfe",
        iterations_per_step: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, line_search, iterations_per_step, **kwargs)
        self.self_scaled = checked_flag("self_scaled", self_scaled)

    def check_size(self, size: int) -> None:
        """Raises if there are too many weights for a dense matrix."""
        if size > _MOST_WEIGHTS:
            raise ValueError(
                f"BFGS is for at most {_MOST_WEIGHTS:,} weights. Use `LBFGS`, which needs no "
                f"matrix. Received: a model of {size:,} weights, whose inverse Hessian and its "
                f"update would need about {3 * 8 * size**2 / 2**30:,.1f} GiB in float64"
            )

    def memory_layout(self, size: int) -> dict[str, tuple[tuple[int, ...], float | int]]:
        """The inverse Hessian, the number of its updates, and the τ of the last one."""
        return {
            "inverse_hessian": ((size, size), 0.0),
            "updates": ((), 0),
            "scaling": ((), 1.0),
        }

    def direction(
        self, point: Point, memory: Memory, learning_rate: Tensor, loss: BatchLoss
    ) -> Proposal:
        """The quasi-Newton direction."""
        del loss
        is_known = memory["updates"] > 0
        direction = tf.cond(
            is_known,
            lambda: -tf.linalg.matvec(memory["inverse_hessian"], point.gradient),
            lambda: -point.gradient,
        )
        first = tf.where(
            is_known, learning_rate, first_step_downhill(point.gradient, learning_rate)
        )
        return Proposal(direction, first, memory)

    def remember(self, memory: Memory, before: Point, after: Point, proposal: Proposal) -> Memory:
        """Updates H if it stays positive definite."""
        step, change = after.weights - before.weights, after.gradient - before.gradient
        # Scaling a pair does not change H. With this scale no product over- or underflows, and
        # the product of step and change is the cosine of the angle between them.
        unit = tf.sqrt(norm(step)) * tf.sqrt(norm(change))
        step, change = (tf.math.divide_no_nan(vector, unit) for vector in (step, change))
        curvature = tf.reduce_sum(step * change)
        kept = curvature > machine_epsilon(step.dtype)

        def update() -> tuple[Tensor, Tensor, Tensor]:
            is_first = tf.equal(memory["updates"], 0)
            # With B the inverse of H, s = α d and d = -H g give B s = -α g.
            length = norm(step) / norm(proposal.direction)
            foreseen = -length * tf.reduce_sum(step * before.gradient)
            scaling = tf.ones_like(curvature)
            if self.self_scaled:
                scaling = tf.where(is_first, scaling, tf.minimum(curvature / foreseen, 1.0))
            identity = tf.eye(step.shape[0], dtype=step.dtype)
            scaled = tf.where(
                is_first,
                curvature / tf.reduce_sum(change**2) * identity,
                memory["inverse_hessian"] / scaling,
            )
            product = tf.linalg.matvec(scaled, change)
            rho = 1.0 / curvature
            # As s vᵀ + v sᵀ, the update is exactly symmetric.
            other = 0.5 * rho * (rho * tf.reduce_sum(change * product) + 1.0) * step - rho * product
            outer = step[:, None] * other[None, :]
            return scaled + outer + tf.transpose(outer), memory["updates"] + 1, scaling

        inverse, updates, scaling = tf.cond(
            kept,
            update,
            lambda: (memory["inverse_hessian"], memory["updates"], memory["scaling"]),
        )
        return {"inverse_hessian": inverse, "updates": updates, "scaling": scaling}

    def forget(self, memory: Memory) -> Memory:
        """Makes the next direction the negative gradient."""
        return {**memory, "updates": tf.zeros_like(memory["updates"])}
