"""The Levenberg–Marquardt method."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_gdopt.closures.base import ClosureOptimizer
from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.damped_systems import (
    DampedSystem,
    DenseSystem,
    SystemOfProducts,
    SystemOfRows,
)
from keras_gdopt.closures.gauss_newton import GaussNewton, Ways
from keras_gdopt.closures.line_search import rounding_of, select
from keras_gdopt.closures.minimize import Iteration, Memory, Point
from keras_gdopt.closures.ways_to_the_matrix import ways_to_the_matrix
from keras_gdopt.functional import ModelFunction, ResidualFunction
from keras_gdopt.optimizers.argument_checks import checked_choice, checked_number
from keras_gdopt.optimizers.arithmetic import machine_epsilon
from keras_gdopt.tensor import Tensor

SOLVERS = ("auto", "exact", "cg")

_MOST_EXACT = 8192
_MOST_BY_DEFAULT = 4096
_MOST_BY_PRODUCTS = 256
_MOST_COMPILED = 128
_FEW_WEIGHTS = 512  # up to here, a matrix of weights costs less than compiling a second solver
_TOLERANCE = 1e-3
_MOST_INNER = 250
_MOST_TRIES = 60
_ACCEPTED, _NO_DECREASE, _NOT_FINITE = range(3)


@keras.saving.register_keras_serializable("keras_gdopt")
class LevenbergMarquardt(ClosureOptimizer):
    r"""Minimizes least squares, and other smooth convex losses of the outputs, to the last digits.

    $$\theta_{t+1} = \theta_t - (G_t + \lambda_t I)^{-1} g_t$$

    where g is the gradient of the batch's loss, G its generalized Gauss–Newton matrix
    $J_z^\top (\nabla_z^2 L) J_z$ and $J_z$ the Jacobian of the model's outputs. For the mean
    squared error, G is $\frac2n J^\top J$. The step is accepted if it lowers the loss. With the
    gain ratio

    $$\rho = \frac{L(\theta) - L(\theta + s)}{-g^\top s - \frac12 s^\top G s}$$

    an accepted step changes λ to $\lambda \max(\frac13, 1 - (2\rho - 1)^3)$; otherwise λ grows by
    2, 4, 8, … until a step is accepted. λ begins at `damping` times the largest diagonal entry of
    G, so the units of the targets and of the loss do not matter.

    Use it with all data in one batch (`batch_size=len(x)`).

    - `solver="exact"` builds G and solves directly. It builds G by samples where the outputs of a
      sample depend on that sample alone and the layers can be vectorized (it tests this with
      random data), and elsewhere by one product for each weight. With more than 512 weights and
      fewer outputs than weights, and if the loss depends on these outputs alone, it solves
      $(\nabla_z^2 L\, J_z J_z^\top + \lambda_t I)\, w = \nabla_z L$ instead and steps by
      $-J_z^\top w$, which is the same step.
    - `solver="cg"` never builds G. Conjugate gradient, preconditioned with an estimate of the
      diagonal, solves until the residual is below a thousandth of the gradient, in at most 250
      iterations.

    A model with its own `compute_loss`, such as a physics-informed network, needs its residuals:
    `attach(model, residuals=function)`.

    Keras has no such optimizer. Use it as `ClosureOptimizer` describes: `attach(model)` once
    after `compile`.

    Args:
        damping: The damping of the first step, above 0, as a multiple of the largest diagonal
            entry of G. Defaults to 1e-3.
        solver: `"exact"`, for at most 8,192 weights; `"cg"`; or `"auto"`, exact for at most 4,096
            weights, or 256 where G takes one product for each. Defaults to `"auto"`.
        iterations_per_step: The most iterations in a training step. Defaults to 1.
        **kwargs: `closure_chunks`, `gradient_tolerance`, `relative_gradient_tolerance`,
            `change_tolerance`, `jit_compile` and `name`, see `ClosureOptimizer`.

    Raises:
        ValueError: If an argument is out of range or makes no sense here; in `attach`, if the
            model has its own `compute_loss` and no `residuals` are given, or has trainable batch
            normalization; in `build`, if it has too many weights for `solver="exact"`; in the
            first step, if its loss has no curvature in the outputs (such as `"mae"`), its layers
            add losses, or the residuals do not match the loss.

    Step metrics of its own: `damping` (λ for the next iteration), `gain_ratio` (ρ) and
    `inner_iterations` (of conjugate gradient, in the last iteration; 0 for `"exact"`).

    Example:

    >>> import keras, numpy as np
    >>> import keras_gdopt as gdopt
    >>> x = np.linspace(-1, 1, 64, dtype="float32").reshape(64, 1)
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(gdopt.LevenbergMarquardt(iterations_per_step=10), "mse")
    >>> model.optimizer.attach(model)
    >>> history = model.fit(x, 3 * x + 1, batch_size=64, epochs=2, verbose=0)
    >>> history.history["loss"][-1] < 1e-10
    True

    Source: Marquardt 1963, *An algorithm for least-squares estimation of nonlinear parameters*,
    Eq. 12; Madsen, Nielsen and Tingleff 2004, *Methods for non-linear least squares problems*,
    Eq. 2.21 and Algorithm 3.16; Schraudolph 2002, *Fast curvature matrix-vector products*, Eq. 5.
    """

    hyperparameters = ("damping", "solver")
    own_metrics = ("damping", "gain_ratio", "inner_iterations")
    statuses = (
        "accepted",
        "no step, however damped, lowers the loss by more than its rounding",
        "no step, however damped, has a lower loss that is finite",
    )

    def __init__(
        self,
        damping: float = 1e-3,
        solver: str = "auto",
        iterations_per_step: int = 1,
        **kwargs: Any,
    ) -> None:
        if "learning_rate" in kwargs:
            raise ValueError(
                "LevenbergMarquardt does not take `learning_rate`: a step is as long as `damping` "
                f"makes it. Received: learning_rate={kwargs['learning_rate']!r}"
            )
        super().__init__(1.0, iterations_per_step=iterations_per_step, **kwargs)
        self.solver = checked_choice("solver", solver, SOLVERS)
        self.damping = checked_number("damping", damping)
        if not self.damping:
            raise ValueError(
                f"Argument `damping`, of the first step, must be above 0. Received: {damping=!r}"
            )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        config = super().get_config()
        del config["learning_rate"]  # the damping alone sets the length of a step
        return config

    def attach(self, model: keras.Model, residuals: Callable[..., Any] | None = None) -> None:
        """Makes the model's training steps minimize the loss with this optimizer.

        See `ClosureOptimizer.attach`.

        Args:
            model: A model compiled with this optimizer.
            residuals: For a model with its own `compute_loss`: a function with the same arguments
                `x`, `y`, `y_pred` and `sample_weight` that returns an array, or a structure of
                arrays, whose mean squares add up to the loss. The matrix is cheap for an array
                whose entry i depends on sample i alone, and for one with few entries that do not
                grow in number with the batch.

        Raises:
            ValueError: As in `ClosureOptimizer.attach`; in the first step, if the mean squares
                do not add up to the loss.
        """
        loss: Callable[..., ModelFunction] = ModelFunction
        if residuals is not None:
            loss = functools.partial(ResidualFunction, residuals=residuals)
        self._attach(model, loss)

    def is_worth_compiling(self, size: int) -> bool:
        """Whether XLA is faster: not with large dense matrices on a CPU, which it solves slowly."""
        is_dense = self.solver == "exact" or (self.solver == "auto" and size <= _MOST_BY_DEFAULT)
        on_gpu = bool(tf.config.list_physical_devices("GPU"))
        return on_gpu or not is_dense or size <= _MOST_COMPILED

    def check_size(self, size: int) -> None:
        """Raises if there are too many weights for `solver="exact"`."""
        if self.solver == "exact" and size > _MOST_EXACT:
            raise ValueError(
                f'`solver="exact"` is for at most {_MOST_EXACT:,} weights. Use `solver="cg"`, '
                f"which needs no matrix, or `LBFGS`. Received: a model of {size:,} weights, whose "
                "matrix and its decomposition would need about "
                f"{3 * 8 * size**2 / 2**30:,.1f} GiB in float64"
            )

    def check_model(self, model: Any, loss: Callable[..., ModelFunction]) -> None:
        """Raises if the loss is not a function of the model's outputs or of residuals."""
        has_own_loss = type(model).compute_loss is not keras.Model.compute_loss
        if has_own_loss and loss is ModelFunction:
            raise ValueError(
                "LevenbergMarquardt needs a loss that is a function of the model's outputs, or "
                "residuals whose mean squares add up to it: `attach(model, residuals=function)`. "
                f"Received: the model '{model.name}' with a `compute_loss` of its own"
            )
        names = [
            layer.name
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        if names:
            raise ValueError(
                "LevenbergMarquardt needs outputs of each sample by itself, which batch "
                "normalization mixes in training. Use another normalization, or set `trainable = "
                f"False`. Received: the layers {names[:5]}"
            )

    def memory_layout(self, size: int) -> dict[str, tuple[tuple[int, ...], float | int]]:
        """λ (0 before the first step), its next growth factor, and the step metrics."""
        del size
        return {
            "damping": ((), 0.0),
            "growth": ((), 2.0),
            "gain_ratio": ((), 0.0),
            "inner_iterations": ((), 0),
        }

    def iterate(
        self,
        point: Point,
        memory: Memory,
        has_failed: Tensor,
        learning_rate: Tensor,
        loss: BatchLoss,
    ) -> Iteration:
        """Makes a step, with more and more damping until it lowers the loss.

        Args:
            point: Where it begins.
            memory: λ, its growth and the last gain ratio.
            has_failed: Not used.
            learning_rate: Not used.
            loss: The loss of the batch.
        """
        del has_failed, learning_rate
        ways = ways_to_the_matrix(loss)
        matrix = GaussNewton(loss, ways)
        if self._takes_products(loss, ways):
            system: DampedSystem = SystemOfProducts(
                lambda vector: matrix.product(point.weights, vector),
                point.gradient,
                matrix.diagonal(point.weights),
                tolerance=_TOLERANCE,
                most=min(2 * loss.size, _MOST_INNER),
            )
            return self._step_with(system, point, memory, loss)

        def by_the_matrix() -> Iteration:
            system = DenseSystem(matrix.matrix(point.weights), point.gradient)
            return self._step_with(system, point, memory, loss)

        def by_the_rows() -> Iteration:
            system = SystemOfRows(*matrix.jacobian(point.weights))
            return self._step_with(system, point, memory, loss)

        count = matrix.rows(point.weights)
        if count is None or loss.size <= _FEW_WEIGHTS:
            return by_the_matrix()
        return tf.cond(count < loss.size, by_the_rows, by_the_matrix)

    def _takes_products(self, loss: BatchLoss, ways: Ways) -> bool:
        if self.solver != "auto":
            return self.solver == "cg"
        return loss.size > (_MOST_BY_PRODUCTS if ways.by_products else _MOST_BY_DEFAULT)

    def _step_with(
        self, system: DampedSystem, point: Point, memory: Memory, loss: BatchLoss
    ) -> Iteration:
        """Tries steps with growing damping until one lowers the loss or rounding hides a gain."""
        dtype = loss.dtype
        largest = system.largest
        least = machine_epsilon(dtype) ** 2
        at_first = self.damping * tf.where(largest > 0, largest, tf.ones_like(largest))
        damping = tf.where(memory["damping"] > 0, memory["damping"], at_first)

        def try_step(tries: _Tries) -> _Tries:
            """Solves with the present damping, evaluates the step and adapts the damping."""
            solution = system.solve(tries.damping)
            step = loss.without_frozen(-solution.vector)
            curved = tf.reduce_sum(solution.vector * solution.product)
            promised = -tf.reduce_sum(step * point.gradient) - 0.5 * curved
            weights = point.weights + step
            after = Point(weights, *loss.value_and_gradient(weights))
            is_finite = tf.math.is_finite(after.loss) & tf.reduce_all(
                tf.math.is_finite(after.gradient)
            )
            accepted = is_finite & (after.loss < point.loss)
            ratio = (point.loss - after.loss) / promised
            shrunk = tries.damping * tf.maximum(1 - (2 * ratio - 1) ** 3, 1 / 3)
            return _Tries(
                count=tries.count + 1,
                inner=tries.inner + solution.iterations,
                damping=tf.where(
                    accepted,
                    tf.maximum(shrunk, least * largest),
                    tries.damping * tries.growth,
                ),
                growth=tf.where(accepted, tf.ones_like(damping), tries.growth) * 2,
                point=select(accepted, after, point),
                ratio=tf.where(accepted, ratio, tries.ratio),
                accepted=accepted,
                is_rounding=~accepted & (promised <= rounding_of(point.loss)),
            )

        nothing = tf.constant(False)
        (tries,) = tf.while_loop(
            lambda tries: ~tries.accepted & ~tries.is_rounding & (tries.count < _MOST_TRIES),
            lambda tries: (try_step(tries),),
            (
                _Tries(
                    tf.constant(0), tf.constant(0), damping, memory["growth"], point,
                    memory["gain_ratio"], nothing, nothing,
                ),
            ),
        )  # fmt: skip
        failed = ~tries.accepted
        found = {
            "damping": tries.damping,
            "growth": tries.growth,
            "gain_ratio": tries.ratio,
            "inner_iterations": tries.inner,
        }
        return Iteration(
            point=tries.point,
            memory=select(failed, memory, found),
            evaluations=tries.count,
            step_length=tf.cast(tries.accepted, dtype),
            status=tf.where(
                failed, tf.where(tries.is_rounding, _NO_DECREASE, _NOT_FINITE), _ACCEPTED
            ),
            failed=failed,
            is_rounding=tries.is_rounding,
        )


class _Tries(NamedTuple):
    """The state of the search for a damping with which a step lowers the loss."""

    count: Tensor
    inner: Tensor
    """Iterations of conjugate gradient, in all tries."""
    damping: Tensor
    """The damping of the next try."""
    growth: Tensor
    point: Point
    """The accepted point, or where the iteration began."""
    ratio: Tensor
    accepted: Tensor
    is_rounding: Tensor
    """Whether a rejected step promised to lower the loss by no more than its rounding."""
