"""Newton's method."""

from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.damped_systems import (
    conjugate_gradient,
    diagonal,
    with_unit_diagonal,
)
from keras_gdopt.closures.line_search_optimizer import LineSearchOptimizer, Proposal
from keras_gdopt.closures.minimize import Memory, Point
from keras_gdopt.closures.vectors import norm
from keras_gdopt.optimizers.argument_checks import checked_choice, checked_number
from keras_gdopt.optimizers.arithmetic import machine_epsilon
from keras_gdopt.tensor import Tensor

SOLVERS = ("auto", "exact", "cg")

_MOST_EXACT = 8192
_MOST_EXACT_BY_DEFAULT = 256
_MOST_INNER = 250
_MOST_RAISES = 40
_GOLDEN = (1 + 5**0.5) / 2


@keras.saving.register_keras_serializable("keras_gdopt")
class Newton(LineSearchOptimizer):
    r"""Newton's method, with the exact Hessian or its products with vectors.

    $$\theta_{t+1} = \theta_t - \alpha_t (H_t + \lambda_t I)^{-1} g_t$$

    where H is the Hessian of the batch's loss and a line search finds α.

    - `solver="exact"` builds H, raises λ until $H + \lambda I$ is positive definite, and solves by
      Cholesky decomposition. If the matrix is only singular, it adds $\sqrt\varepsilon$ times the
      diagonal instead. In a step that XLA does not compile (`jit_compile=False`), it uses the
      eigenvalues of H and, where H is singular, its pseudo-inverse. H is scaled to a unit diagonal
      before the test for singularity, so that the features' units do not matter.
    - `solver="cg"` never builds H. Conjugate gradient solves for the direction until the residual
      is below $\eta_t \|g_t\|$ with $\eta_t = 0.9\, (\|g_t\| / \|g_{t-1}\|)^{1.618}$ (at most
      0.5), or until it meets negative curvature. Then it returns the direction found so far, which
      is $-g$ if the first curvature is negative.

    After each iteration λ adapts. It falls by a factor of 10 if the loss fell about as much as the
    quadratic model predicted, and rises by a factor of 10 if the loss fell by less than a quarter
    of that or not at all.

    Keras has no such optimizer. Use it as `ClosureOptimizer` describes: `attach(model)` once
    after `compile`.

    Args:
        learning_rate: The first trial step. Defaults to 1.0.
        solver: `"exact"`, for at most 8,192 weights; `"cg"`; or `"auto"`, exact for at most 256
            weights. Defaults to `"auto"`.
        damping: The initial λ, at least 0. Defaults to 0.
        line_search: `"wolfe"`, `"armijo"` or `"exact"`. Defaults to `"wolfe"`.
        iterations_per_step: The most iterations in a training step. Defaults to 1.
        **kwargs: `closure_chunks`, `gradient_tolerance`, `relative_gradient_tolerance`,
            `change_tolerance`, `jit_compile` and `name`, see `ClosureOptimizer`.

    Raises:
        ValueError: If an argument is out of range or makes no sense here; in `build`, if the
            model has too many weights for `solver="exact"`.

    Step metrics of its own: `damping` (λ for the next iteration) and `inner_iterations` (of
    conjugate gradient, in the last iteration; 0 for `"exact"`).

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 64, dtype="float32").reshape(64, 1)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.Newton(), "mse")
    >>> model.optimizer.attach(model)
    >>> history = model.fit(x, 3 * x + 1, batch_size=64, epochs=2, verbose=0)
    >>> history.history["loss"][-1] < 1e-10
    True

    Source: Luo's notes on Goodfellow, Bengio and Courville 2016, *Deep Learning*, Algorithm 8.8
    (7 in the notes); Nocedal and Wright 2006, *Numerical Optimization*, Algorithms 3.3 and
    7.1; Eisenstat and Walker 1996, *Choosing the forcing terms in an inexact Newton method*,
    Eq. 2.6.
    """

    hyperparameters = ("solver", "damping")
    own_metrics = ("damping", "inner_iterations")

    def __init__(
        self,
        learning_rate: Any = 1.0,
        solver: str = "auto",
        damping: float = 0.0,
        line_search: str = "wolfe",
        iterations_per_step: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, line_search, iterations_per_step, **kwargs)
        self.solver = checked_choice("solver", solver, SOLVERS)
        self.damping = checked_number("damping", damping)

    def check_size(self, size: int) -> None:
        """Raises if there are too many weights for `solver="exact"`."""
        if self.solver == "exact" and size > _MOST_EXACT:
            raise ValueError(
                f'`solver="exact"` is for at most {_MOST_EXACT:,} weights. Use '
                '`solver="cg"`, which needs no Hessian. Received: a model of '
                f"{size:,} weights, whose Hessian and its decomposition would need about "
                f"{3 * 4 * size**2 / 2**30:,.1f} GiB in float32"
            )

    def memory_layout(self, size: int) -> dict[str, tuple[tuple[int, ...], float | int]]:
        """λ, and the numbers that set the next λ and the tolerance of conjugate gradient."""
        del size
        return {
            "damping": ((), float(self.damping)),
            "inner_iterations": ((), 0),
            "curvature": ((), 0.0),
            "gradient_norm": ((), 0.0),
            "tolerance": ((), 0.5),
        }

    def direction(
        self, point: Point, memory: Memory, learning_rate: Tensor, loss: BatchLoss
    ) -> Proposal:
        """Newton's direction."""
        memory = dict(memory)
        is_small = loss.size <= _MOST_EXACT_BY_DEFAULT
        if self.solver == "exact" or (self.solver == "auto" and is_small):
            hessian = loss.hessian(point.weights)
            solve = _by_cholesky if loss.is_compiled else _by_eigenvalues
            direction, memory["damping"] = solve(hessian, point.gradient, memory["damping"])
            product = tf.linalg.matvec(hessian, direction)
        else:
            tolerance = _forcing_term(point.gradient, memory)
            # If the first curvature is negative, this is the negative gradient.
            (direction, product, memory["inner_iterations"]), _ = conjugate_gradient(
                lambda vector: loss.hessian_product(point.weights, vector),
                -point.gradient,
                memory["damping"],
                scale=tf.ones_like(point.gradient),
                tolerance=tolerance,
                most=min(2 * loss.size, _MOST_INNER),
            )
            memory["tolerance"] = tolerance
        length = norm(direction)
        along = tf.math.divide_no_nan(direction, length)
        memory["curvature"] = tf.math.divide_no_nan(tf.reduce_sum(along * product), length)
        memory["gradient_norm"] = norm(point.gradient)
        return Proposal(direction, learning_rate, memory)

    def remember(self, memory: Memory, before: Point, after: Point, proposal: Proposal) -> Memory:
        """Adapts λ to how well the quadratic model predicted the loss."""
        del proposal
        step = after.weights - before.weights
        curvature, damping = memory["curvature"], memory["damping"]
        length = norm(step)
        promised = tf.reduce_sum(step * before.gradient) + 0.5 * curvature * length * length
        rounding = 8 * machine_epsilon(curvature.dtype) * tf.abs(before.loss)
        kept = (after.loss - before.loss - rounding) / (promised - rounding)
        lowered = tf.where(damping > 1e-6 * tf.abs(curvature), 0.1 * damping, 0.0)
        damping = tf.where(kept > 0.75, lowered, damping)
        return {**memory, "damping": tf.where(kept < 0.25, self._raise_damping(memory), damping)}

    def forget(self, memory: Memory) -> Memory:
        """Turns the next direction towards the negative gradient and limits its length to about 1.

        Where the loss is almost flat along a direction, its curvature does not tell how far the
        gradient can be followed.
        """
        damping = tf.maximum(self._raise_damping(memory), memory["gradient_norm"])
        return {**memory, "damping": damping}

    @staticmethod
    def _raise_damping(memory: Memory) -> Tensor:
        return tf.maximum(10.0 * memory["damping"], 1e-3 * tf.abs(memory["curvature"]))


# --- solvers ------------------------------------------------------------------------------


def _by_cholesky(hessian: Tensor, gradient: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The direction, and the λ that makes the Hessian positive definite."""
    largest = tf.reduce_max(tf.abs(tf.linalg.diag_part(hessian)))
    epsilon = machine_epsilon(hessian.dtype)
    # A pivot below `zero` is rounding; `half` is half way (in digits) between 1 and rounding.
    zero, half = hessian.shape[0] * epsilon, epsilon**0.5

    def solve(damping: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        matrix, scale = with_unit_diagonal(hessian, damping)
        # In a compiled step, a decomposition that fails returns NaN.
        factor = tf.linalg.cholesky(tf.linalg.set_diag(matrix, diagonal(matrix) + ridge))
        direction = -tf.linalg.cholesky_solve(factor, (gradient / scale)[:, None])[:, 0] / scale
        positive = tf.reduce_min(diagonal(factor) ** 2) > zero
        return direction, positive & tf.reduce_all(tf.math.is_finite(direction))

    def raise_damping(raises: Tensor, damping: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        # First add a fraction of the diagonal, which is enough for a singular Hessian.
        at_first = tf.equal(raises, 0)
        ridge = tf.where(at_first, tf.cast(half, damping.dtype), 0.0)
        damping = tf.where(at_first, damping, tf.maximum(10.0 * damping, half * largest))
        return raises + 1, damping, *solve(damping, ridge)

    _, damping, direction, _ = tf.while_loop(
        lambda raises, _damping, _direction, positive: ~positive & (raises < _MOST_RAISES),
        raise_damping,
        (tf.constant(0), damping, *solve(damping, tf.zeros_like(damping))),
    )
    return direction, damping


def _by_eigenvalues(hessian: Tensor, gradient: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """As `_by_cholesky`, but with the pseudo-inverse where the Hessian is singular."""
    epsilon = machine_epsilon(hessian.dtype)
    zero = epsilon * hessian.shape[0]
    values, vectors = tf.linalg.eigh(hessian)
    largest = tf.reduce_max(tf.abs(values))
    negative = values[0] < -zero * largest
    damping = tf.where(negative, tf.maximum(damping, 1e-3 * largest - values[0]), damping)
    shifted = values + damping

    def by_all() -> Tensor:
        parts = tf.linalg.matvec(vectors, gradient, transpose_a=True)
        return tf.linalg.matvec(vectors, parts / shifted)

    def by_the_pseudo_inverse() -> Tensor:
        # Without scaling, small eigenvalues beside a large one may only look like rounding.
        matrix, scale = with_unit_diagonal(hessian, damping)
        values, vectors = tf.linalg.eigh(matrix)
        values = tf.abs(values)
        inverse = tf.where(values > zero * tf.reduce_max(values), 1.0 / values, 0.0)
        parts = tf.linalg.matvec(vectors, gradient / scale, transpose_a=True)
        return tf.linalg.matvec(vectors, inverse * parts) / scale

    is_regular = tf.reduce_min(shifted) > epsilon**0.5 * largest
    return -tf.cond(is_regular, by_all, by_the_pseudo_inverse), damping


def _forcing_term(gradient: Tensor, memory: Memory) -> Tensor:
    """The η of Eisenstat and Walker, choice 2, with their safeguard."""
    before = memory["gradient_norm"]
    term = 0.9 * tf.math.divide_no_nan(norm(gradient), before) ** _GOLDEN
    safeguard = 0.9 * memory["tolerance"] ** _GOLDEN
    term = tf.where(safeguard > 0.1, tf.maximum(term, safeguard), term)
    return tf.where(before > 0, tf.minimum(term, 0.5), 0.5)
