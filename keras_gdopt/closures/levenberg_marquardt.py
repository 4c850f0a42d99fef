"""The method of Levenberg and Marquardt."""

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.closures.base import ClosureOptimizer, Iteration, Memory, Point, Tensor
from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.damped_systems import diagonal, solve_damped
from keras_gdopt.closures.gauss_newton import GaussNewton, can_be_by_samples
from keras_gdopt.closures.line_search import rounding_of, select
from keras_gdopt.optimizers.argument_checks import checked_number

_MOST_WEIGHTS = 8192
_MOST_TRIES = 60
_ACCEPTED, _NO_DECREASE, _NOT_FINITE = range(3)


@keras.saving.register_keras_serializable("keras_gdopt")
class LevenbergMarquardt(ClosureOptimizer):
    r"""Least squares, and other smooth convex losses of the outputs, to the last digits.

    $$\theta_{t+1} = \theta_t - (G_t + \lambda_t I)^{-1} g_t$$

    where g is the gradient of the batch's loss and G its generalized Gauss–Newton matrix
    $J_z^\top (\nabla_z^2 L) J_z$, with the Jacobian $J_z$ of the model's outputs: for the mean
    squared error $\frac2n J^\top J$. The step is taken if it lowers the loss. By the gain ratio

    $$\rho = \frac{L(\theta) - L(\theta + s)}{-g^\top s - \frac12 s^\top G s}$$

    a step that is taken changes λ to $\lambda \max(\frac13, 1 - (2\rho - 1)^3)$; else λ grows by
    2, 4, 8, … until one is. λ begins at `damping` times the largest diagonal entry of G, so that
    neither the unit of the targets nor that of the loss matters.

    It is for all data in a batch (`batch_size=len(x)`) and up to some thousands of weights.

    Keras has no such optimizer. Use it as `ClosureOptimizer` describes: `attach(model)` once
    after `compile`.

    Args:
        damping: Of the first step, above 0. Defaults to 1e-3.
        iterations_per_step: Iterations in a training step, at most. Defaults to 1.
        **kwargs: `closure_chunks`, `gradient_tolerance`, `change_tolerance`, `jit_compile` and
            `name`, see `ClosureOptimizer`.

    Raises:
        ValueError: If an argument is out of range or makes no sense here; in `attach`, if the
            model has a `compute_loss` of its own or batch normalization that trains; in `build`,
            if it has too many weights; in the first step, if its loss has no curvature in the
            outputs (as `"mae"`) or its layers add losses.

    Step metrics of its own: `damping` (λ for the next iteration) and `gain_ratio` (ρ).

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

    hyperparameters = ("damping",)
    own_metrics = ("damping", "gain_ratio")
    statuses = (
        "accepted",
        "no step, however damped, lowers the loss by more than its rounding",
        "no step, however damped, has a lower loss that is finite",
    )

    def __init__(self, damping: float = 1e-3, iterations_per_step: int = 1, **kwargs: Any) -> None:
        super().__init__(1.0, iterations_per_step=iterations_per_step, **kwargs)
        self.damping = checked_number("damping", damping)
        if not self.damping:
            raise ValueError(
                f"Argument `damping`, of the first step, must be above 0. Received: {damping=!r}"
            )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        config = super().get_config()
        del config["learning_rate"]  # a step is as long as the damping makes it
        return config

    def check_size(self, size: int) -> None:
        """Raises if there are too many weights for a matrix."""
        if size > _MOST_WEIGHTS:
            raise ValueError(
                f"LevenbergMarquardt is for at most {_MOST_WEIGHTS:,} weights. Use `LBFGS`, which "
                f"needs no matrix. Received: a model of {size:,} weights, whose matrix and its "
                f"decomposition would need about {3 * 8 * size**2 / 2**30:,.1f} GiB in float64"
            )

    def check_model(self, model: Any) -> None:
        """Raises if the model's loss is no sum over functions of its outputs."""
        if type(model).compute_loss is not keras.Model.compute_loss:
            raise ValueError(
                "LevenbergMarquardt needs a loss that is a function of the model's outputs. "
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
        """λ (0 before the first step), by what it grows next, and the last gain ratio."""
        del size
        return {"damping": ((), 0.0), "growth": ((), 2.0), "gain_ratio": ((), 0.0)}

    def iterate(
        self,
        point: Point,
        memory: Memory,
        has_failed: Tensor,
        learning_rate: Tensor,
        loss: BatchLoss,
    ) -> Iteration:
        """A step with the least damping that lowers the loss.

        Args:
            point: Where it begins.
            memory: λ, its growth and the last gain ratio.
            has_failed: Of no influence.
            learning_rate: Of no influence.
            loss: Of the batch.
        """
        del has_failed, learning_rate
        system = GaussNewton(loss, by_samples=can_be_by_samples(loss))
        matrix = system.matrix(point.weights)
        largest = tf.reduce_max(diagonal(matrix))
        least = np.finfo(matrix.dtype.as_numpy_dtype).eps ** 2
        at_first = self.damping * tf.where(largest > 0, largest, tf.ones_like(largest))
        damping = tf.where(memory["damping"] > 0, memory["damping"], at_first)

        def tried(tries: _Tries) -> _Tries:
            step = -solve_damped(
                matrix, tries.damping, point.gradient, is_compiled=loss.is_compiled
            )
            step = loss.without_frozen(step)
            curved = tf.reduce_sum(step * tf.linalg.matvec(matrix, step))
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
            lambda tries: (tried(tries),),
            (
                _Tries(
                    tf.constant(0), damping, memory["growth"], point, memory["gain_ratio"],
                    nothing, nothing,
                ),
            ),
        )  # fmt: skip
        failed = ~tries.accepted
        found = {"damping": tries.damping, "growth": tries.growth, "gain_ratio": tries.ratio}
        return Iteration(
            point=tries.point,
            memory=select(failed, memory, found),
            evaluations=tries.count,
            step_length=tf.cast(tries.accepted, matrix.dtype),
            status=tf.where(
                failed, tf.where(tries.is_rounding, _NO_DECREASE, _NOT_FINITE), _ACCEPTED
            ),
            failed=failed,
            is_rounding=tries.is_rounding,
        )


class _Tries(NamedTuple):
    """How far an iteration has come with its damping."""

    count: Tensor
    damping: Tensor
    growth: Tensor
    point: Point
    """The one accepted, or where the iteration began."""
    ratio: Tensor
    accepted: Tensor
    is_rounding: Tensor
