"""Limited-memory BFGS."""

from typing import Any, NamedTuple

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
from keras_gdopt.optimizers.argument_checks import checked_count
from keras_gdopt.optimizers.arithmetic import machine_epsilon
from keras_gdopt.tensor import Tensor

_LEAST_PART = 0.1
"""The part of a pair's product sᵀy that must come from the free weights for it to count."""


@keras.saving.register_keras_serializable("keras_gdopt")
class LBFGS(LineSearchOptimizer):
    r"""Limited-memory BFGS with a line search.

    $$\theta_{t+1} = \theta_t - \alpha_t H_t g_t$$

    where $H_t$ approximates the inverse Hessian by BFGS updates with the last m pairs

    $$s_k = \theta_{k+1} - \theta_k, \qquad y_k = g_{k+1} - g_k, \qquad
    H_t^0 = \gamma_t I, \quad
    \gamma_t = \frac{s_{t-1}^\top y_{t-1}}{y_{t-1}^\top y_{t-1}}$$

    The two-loop recursion computes $H_t g_t$:

    - $q = g_t$; for k from the newest pair to the oldest:
      $a_k = s_k^\top q / s_k^\top y_k$, $q \leftarrow q - a_k y_k$;
    - $r = \gamma_t q$; for k from the oldest to the newest:
      $r \leftarrow r + s_k (a_k - y_k^\top r / s_k^\top y_k)$; then $H_t g_t = r$.

    A pair is skipped where $s^\top y \le \varepsilon\, \|s\| \|y\|$ (ε is the machine epsilon
    of the weights' dtype), because H would no longer be positive definite. The test depends only
    on the angle between s and y, not on the units of the loss or the weights. Both gradients of a
    pair are of the same batch.

    Weights with the constraint `constraints.Bounds`, or Keras's `NonNeg`, stay within their bounds.
    A weight that its gradient pushes against a bound is held there, H covers the other weights,
    and the line search follows $P(\theta_t - \alpha H_t g_t)$, projected onto the bounds.
    (L-BFGS-B begins each direction at a generalized Cauchy point instead.)

    Keras has no such optimizer. Use it as `ClosureOptimizer` describes: `attach(model)` once
    after `compile`.

    Args:
        learning_rate: The first trial step; while there is no pair yet, a multiple of
            $\min(1, 1/\|g\|_1)$. Defaults to 1.0.
        memory: The number of pairs m to keep; each takes twice the memory of the weights.
            Defaults to 10.
        line_search: `"wolfe"`, `"armijo"` or `"exact"`. Defaults to `"wolfe"`.
        iterations_per_step: The most iterations in a training step. Defaults to 1.
        **kwargs: `closure_chunks`, `gradient_tolerance`, `relative_gradient_tolerance`,
            `change_tolerance`, `jit_compile` and `name`, see `ClosureOptimizer`.

    Raises:
        ValueError: If an argument is out of range or makes no sense here.

    Step metrics of its own: `memory_pairs`, the number of pairs in memory.

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 64, dtype="float32").reshape(64, 1)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.LBFGS(iterations_per_step=10), "mse")
    >>> model.optimizer.attach(model)
    >>> history = model.fit(x, 3 * x + 1, batch_size=64, epochs=2, verbose=0)
    >>> history.history["loss"][-1] < 1e-10
    True

    Source: Nocedal 1980, *Updating quasi-Newton matrices with limited storage*; Nocedal and
    Wright 2006, *Numerical Optimization*, Algorithms 7.4 and 7.5, Eq. 7.20. With bounds: Bertsekas
    1982, *Projected Newton methods for optimization problems with simple constraints*, section 2.
    """

    hyperparameters = ("memory",)
    own_metrics = ("memory_pairs",)
    takes_bounds = True

    def __init__(
        self,
        learning_rate: Any = 1.0,
        memory: int = 10,
        line_search: str = "wolfe",
        iterations_per_step: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, line_search, iterations_per_step, **kwargs)
        self.memory = checked_count("memory", memory, minimum=1)

    def memory_layout(self, size: int) -> dict[str, tuple[tuple[int, ...], float | int]]:
        """The pairs, the product sᵀy of each, their number, and the row of the next one."""
        return {
            "steps": ((self.memory, size), 0.0),
            "changes": ((self.memory, size), 0.0),
            "products": ((self.memory,), 0.0),
            "memory_pairs": ((), 0),
            "next_pair": ((), 0),
        }

    def direction(
        self, point: Point, memory: Memory, learning_rate: Tensor, loss: BatchLoss
    ) -> Proposal:
        """The quasi-Newton direction, by the two-loop recursion."""
        gradient = loss.free_gradient(point.weights, point.gradient)
        pairs = _Pairs.of(memory)
        if loss.box is not None:
            is_held = loss.box.leads_out(point.weights, -point.gradient)
            pairs = pairs.of_free(is_held)
        first = tf.where(
            tf.reduce_any(pairs.count), learning_rate, first_step_downhill(gradient, learning_rate)
        )
        direction = -_inverse_hessian_product(pairs, gradient)
        return Proposal(direction, first, memory)

    def remember(self, memory: Memory, before: Point, after: Point, proposal: Proposal) -> Memory:
        """Adds a pair if H stays positive definite."""
        del proposal
        step, change = after.weights - before.weights, after.gradient - before.gradient
        # Scaling a pair does not change H. With this scale no product over- or underflows, and
        # the product of step and change is the cosine of the angle between them.
        scale = tf.sqrt(norm(step)) * tf.sqrt(norm(change))
        step, change = (tf.math.divide_no_nan(vector, scale) for vector in (step, change))
        product = tf.reduce_sum(step * change)
        kept = product > machine_epsilon(step.dtype)
        place, size = memory["next_pair"], memory["products"].shape[0]

        def with_row(name: str, row: Tensor) -> Tensor:
            old = tf.gather(memory[name], place)
            row = tf.where(kept, row, old)
            return tf.tensor_scatter_nd_update(memory[name], [[place]], [row])

        return {
            "steps": with_row("steps", step),
            "changes": with_row("changes", change),
            "products": with_row("products", product),
            "memory_pairs": tf.where(
                kept, tf.minimum(memory["memory_pairs"] + 1, size), memory["memory_pairs"]
            ),
            "next_pair": tf.where(kept, (place + 1) % size, place),
        }

    def forget(self, memory: Memory) -> Memory:
        """Makes the next direction the negative gradient."""
        return {**memory, "memory_pairs": tf.zeros_like(memory["memory_pairs"])}


class _Pairs(NamedTuple):
    """The pairs that define H, in a ring buffer."""

    steps: Tensor
    changes: Tensor
    products: Tensor
    known: Tensor
    """The number of pairs in memory."""
    next: Tensor
    """The row after the newest pair."""
    count: Tensor
    """Which rows count."""

    @classmethod
    def of(cls, memory: Memory) -> "_Pairs":
        """The pairs of a memory; all that are known count."""
        known, place = memory["memory_pairs"], memory["next_pair"]
        rows = (memory["steps"], memory["changes"], memory["products"])
        pairs = cls(*rows, known, place, count=tf.constant(True))
        return pairs._replace(count=pairs.age < known)

    @property
    def age(self) -> Tensor:
        """The age of each row: 0 for the newest."""
        size = self.products.shape[0]
        return (self.next - 1 - tf.range(size)) % size

    def of_free(self, is_held: Tensor) -> "_Pairs":
        """The pairs restricted to the weights that no bound holds, for a step of those alone.

        The change of their gradient is partly due to the step of the held weights, so a pair
        counts only if more than `_LEAST_PART` of its product sᵀy comes from the free weights.
        """
        steps, changes = (
            tf.where(is_held, tf.zeros_like(rows), rows) for rows in (self.steps, self.changes)
        )
        products = tf.reduce_sum(steps * changes, axis=1)
        count = self.count & (products > _LEAST_PART * self.products)
        return self._replace(
            steps=tf.where(count[:, None], steps, tf.zeros_like(steps)),
            changes=tf.where(count[:, None], changes, tf.zeros_like(changes)),
            products=tf.where(count, products, tf.ones_like(products)),
            count=count,
        )

    def newest(self) -> Tensor:
        """The row of the newest pair that counts, if there is one."""
        return tf.argmin(tf.where(self.count, self.age, self.products.shape[0]))


def _inverse_hessian_product(pairs: _Pairs, gradient: Tensor) -> Tensor:
    """H times the gradient, by the two-loop recursion.

    The first loop goes from the newest pair to the oldest, subtracts a y from the gradient and
    keeps the factor a of each pair. The newest pair that counts then gives the scale γ. The second
    loop goes from the oldest pair to the newest and adds s (a − yᵀr / sᵀy). A pair that does not
    count is 0 and changes nothing.
    """
    size = pairs.products.shape[0]

    def pair(age: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        place = (pairs.next - 1 - age) % size
        return (
            place,
            tf.gather(pairs.steps, place),
            tf.gather(pairs.changes, place),
            tf.gather(pairs.products, place),
        )

    def backward(age: Tensor, vector: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place, step, change, product = pair(age)
        factor = tf.reduce_sum(step * vector) / product
        factors = tf.tensor_scatter_nd_update(factors, [[place]], [factor])
        return age + 1, vector - factor * change, factors

    def forward(age: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        place, step, change, product = pair(age)
        factor = tf.gather(factors, place) - tf.reduce_sum(change * vector) / product
        return age - 1, vector + factor * step

    _, vector, factors = tf.while_loop(
        lambda age, *_: age < pairs.known,
        backward,
        (tf.constant(0), gradient, tf.zeros_like(pairs.products)),
    )
    newest = pairs.newest()
    change, product = tf.gather(pairs.changes, newest), tf.gather(pairs.products, newest)
    scale = tf.where(tf.reduce_any(pairs.count), product / tf.reduce_sum(change**2), 1.0)
    _, vector = tf.while_loop(lambda age, _: age >= 0, forward, (pairs.known - 1, scale * vector))
    return vector
