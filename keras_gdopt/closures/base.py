"""Base class of the optimizers that evaluate the loss themselves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.minimize import (
    STATUSES,
    Iteration,
    Memory,
    Point,
    Progress,
    Run,
    Tolerances,
    gave_up,
    minimize,
)
from keras_gdopt.closures.train_step import TrainStep, check_model, check_variables
from keras_gdopt.closures.vectors import norm
from keras_gdopt.functional import Batch, Data, ModelFunction
from keras_gdopt.optimizers.argument_checks import (
    BASE_ARGUMENTS,
    check_tensorflow,
    checked_count,
    checked_flag,
    checked_learning_rate,
    checked_number,
)
from keras_gdopt.optimizers.arithmetic import common_dtype
from keras_gdopt.optimizers.recording import TIERS, Recorder, RecordingOptimizer
from keras_gdopt.optimizers.saved_state import StateGroup
from keras_gdopt.tensor import Tensor

_NOT_STARTED = "no step was made yet"
_WHY_NOT_CLIPPED = "clipping would change the gradient but not the loss"
_WHY_NOT_AVERAGED = "every step ends at the lowest loss seen, which an average would leave"
_WHY_REFUSED = {
    "weight_decay": "add a regularizer to the layers, so that it is part of the loss",
    "clipnorm": _WHY_NOT_CLIPPED,
    "clipvalue": _WHY_NOT_CLIPPED,
    "global_clipnorm": _WHY_NOT_CLIPPED,
    "use_ema": _WHY_NOT_AVERAGED,
    "ema_momentum": _WHY_NOT_AVERAGED,
    "ema_overwrite_frequency": _WHY_NOT_AVERAGED,
    "loss_scale_factor": "the loss is evaluated in the precision of the weights",
    "gradient_accumulation_steps": "use `closure_chunks` for batches larger than memory",
}


class ClosureOptimizer(RecordingOptimizer):
    r"""An optimizer that evaluates the loss of the current batch as often as it needs.

    Call `attach(model)` once, after `model.compile`. From then on each training step of the
    model makes up to `iterations_per_step` iterations of the algorithm on the step's batch, in
    one compiled loop.

    A subclass defines the state it keeps (`memory_layout`), one iteration (`iterate`, a pure
    function) and the ways an iteration can end (`statuses`); this class does the rest. Optimizers
    with a line search derive from `LineSearchOptimizer`.

    The loss is the compiled one, with sample weights and the layers' own losses. Throughout a
    step, random layers keep one mask and batch normalization uses the batch's statistics; the
    moving statistics move once, at the accepted weights. `fit` shows the loss at these weights.

    For full-batch training, set `batch_size=len(x)`. With smaller batches each step minimizes
    the loss of its own batch in up to `iterations_per_step` iterations. The first direction still
    depends on the memory of the last batch, so use few iterations and large batches.

    Args:
        learning_rate: Learning rate of the algorithm: a number above 0 or a schedule (of
            training steps).
        iterations_per_step: The most iterations in a training step.
        closure_chunks: Number of parts that a batch is split into, for batches larger than
            memory. Defaults to 1. Requires losses that are means over the samples, including
            those that layers add and a model's own `compute_loss`; cannot be combined with
            batch normalization or masks.
        gradient_tolerance: A step has converged where no entry of the gradient is larger than
            this, in units of the loss per unit of the weights. Defaults to 0 (never).
        relative_gradient_tolerance: A step has converged where no entry of the gradient is
            larger than this fraction of the largest entry at the start of training on these
            data. Defaults to 1e-9, or to 0 if `gradient_tolerance` is given, even as 0.
        change_tolerance: A step has converged where an iteration changes the loss by less than
            this fraction of it. Defaults to 0 (never).
        jit_compile: Whether XLA compiles a step. Defaults to `"auto"`: if all layers support it
            and it makes the algorithm faster. (A model that is itself compiled with
            `jit_compile=True` always compiles the step.)
        name: Defaults to the class's name in snake case.

    Raises:
        ValueError: If an argument is out of range, or belongs to Keras's base class and makes
            no sense here; in `attach`, if the model's training step does more than minimize its
            loss; in a step without `attach`.
    """

    hyperparameters: ClassVar[Sequence[str]] = ()
    """Names of the constructor's own arguments; each is kept as an attribute of that name."""

    statuses: ClassVar[Sequence[str]] = ("accepted",)
    """How an iteration can end; the first entry means success."""

    evaluates_loss = True

    takes_bounds: ClassVar[bool] = False
    """Whether it supports the constraints `NonNeg` and `constraints.Bounds`."""

    own_metrics: ClassVar[Sequence[str]] = ()
    """Names of the scalars in the memory that are recorded as step metrics."""

    def __init__(
        self,
        learning_rate: Any,
        *,
        iterations_per_step: int = 1,
        closure_chunks: int = 1,
        gradient_tolerance: float | None = None,
        relative_gradient_tolerance: float | None = None,
        change_tolerance: float = 0.0,
        jit_compile: bool | str = "auto",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_tensorflow(type(self).__name__)
        self._refuse(kwargs)
        rate = checked_learning_rate(learning_rate)
        if isinstance(rate, float) and not rate:
            raise ValueError(
                "Argument `learning_rate`, the first trial step, must be above 0. Received: "
                f"learning_rate={learning_rate!r}"
            )
        super().__init__(rate, name=name)
        self.iterations_per_step = checked_count(
            "iterations_per_step", iterations_per_step, minimum=1
        )
        self.closure_chunks = checked_count("closure_chunks", closure_chunks, minimum=1)
        self.gradient_tolerance = _checked_tolerance("gradient_tolerance", gradient_tolerance)
        self.relative_gradient_tolerance = _checked_tolerance(
            "relative_gradient_tolerance", relative_gradient_tolerance
        )
        self.change_tolerance = checked_number("change_tolerance", change_tolerance)
        if jit_compile != "auto":
            checked_flag("jit_compile", jit_compile)
        self.jit_compile = jit_compile
        self._memory: dict[str, Any] = {}
        self._progress: Any = None
        # Bypass Keras's tracking: neither holds state that is saved.
        object.__setattr__(self, "_recorder", Recorder(records_all=True, dtype=tf.float64))
        object.__setattr__(self, "_outcome", None)

    # --- the algorithm -------------------------------------------------------

    def memory_layout(self, size: int) -> Mapping[str, tuple[tuple[int, ...], float | int]]:
        """The arrays the algorithm keeps: the shape and the initial value of each.

        Args:
            size: The number of weights.
        """
        raise NotImplementedError

    def iterate(
        self,
        point: Point,
        memory: Memory,
        has_failed: Tensor,
        learning_rate: Tensor,
        loss: BatchLoss,
    ) -> Iteration:
        """Makes one iteration from a point; a pure function.

        Args:
            point: Where it begins.
            memory: The memory after the previous iteration.
            has_failed: Whether the previous iteration `failed`. After two failures in a row the
                step ends.
            learning_rate: A scalar.
            loss: The loss of the batch.
        """
        raise NotImplementedError

    def is_worth_compiling(self, size: int) -> bool:
        """Whether a step is faster if XLA compiles it.

        Args:
            size: The number of weights.
        """
        del size
        return True

    def check_size(self, size: int) -> None:
        """Raises a `ValueError` if there are too many weights; called before memory is made.

        Args:
            size: The number of weights.
        """

    def check_model(self, model: Any, loss: Callable[..., ModelFunction]) -> None:
        """Raises a `ValueError` if the algorithm cannot train a model; `attach` calls it.

        Args:
            model: A model compiled with this optimizer.
            loss: Makes the loss function from the model and its weights.
        """

    # --- the loss ------------------------------------------------------------

    def attach(self, model: keras.Model) -> None:
        """Makes the model's training steps minimize the loss with this optimizer.

        Call it once, after `model.compile(optimizer=...)` and again after loading a model. The
        model's class, its saved file, `evaluate` and `predict` do not change. Calling `compile`
        again undoes it.

        Args:
            model: A model compiled with this optimizer.

        Raises:
            ValueError: If the model is not compiled with this optimizer, is compiled without a
                loss, has its own `train_step`, has no trainable weights or some with a
                constraint that the optimizer does not support, computes in half precision, or
                is distributed; or if the optimizer was built for other weights. What depends on
                weights is checked in the first step if the model is not built.
        """
        self._attach(model, ModelFunction)

    def _attach(self, model: keras.Model, loss: Callable[..., ModelFunction]) -> None:
        if isinstance(getattr(model, "train_step", None), TrainStep):
            del model.train_step  # set by an earlier `attach`
        check_model(self, model)
        self.check_model(model, loss)
        model.train_step = TrainStep(model, self, loss)
        model.train_function = None

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Raises a `ValueError`: this optimizer needs the loss, not only a gradient."""
        del grads, trainable_variables
        raise ValueError(
            f"{type(self).__name__} evaluates the loss itself, and no model is attached. After "
            "`model.compile(optimizer=optimizer, ...)`, or after loading the model, call "
            "`model.optimizer.attach(model)`. Received: gradients"
        )

    # --- results -------------------------------------------------------------

    @property
    def converged(self) -> bool:
        """Whether the last step ended at a minimum to within tolerance or rounding.

        It has converged if the gradient, or the change of the loss, is within its tolerance, or
        if rounding keeps the loss from falling: two iterations in a row found no lower loss, or
        neither the loss nor the largest entry of its gradient fell by more than rounding in
        20 iterations. `status` tells which. Steps that start there, on the same batch, evaluate
        the loss once.
        """
        return self._outcome is not None and bool(self._outcome.converged.numpy())

    @property
    def status(self) -> str:
        """How the last iteration ended: `"accepted"`, or the reason why not."""
        if self._outcome is None or int(self._outcome.status.numpy()) < 0:
            return _NOT_STARTED
        return (*self.statuses, *STATUSES)[int(self._outcome.status.numpy())]

    @property
    def recorder(self) -> Recorder:
        """Holds the metrics of the last step; every step is recorded."""
        return self._recorder

    @property
    def step_metrics(self) -> dict[str, float]:
        """The metrics of the last step; empty before the first one.

        - `iterations`: the number of training steps,
        - `learning_rate`,
        - `grad_norm`: the norm of the gradient at the end of the step, without the entries that
          push weights against their bounds,
        - `update_norm`: the norm of the change of all weights,
        - `weight_norm`: the norm of all weights at the end of the step,
        - `step_length`: the step of the last iteration, as a multiple of the proposed one,
        - `evaluations`: evaluations of the loss and its gradient, including trial steps,
        - `steps_made`: iterations of the algorithm,
        - the algorithm's own metrics.
        """
        return super().step_metrics

    # --- what Keras calls ----------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the memory and restores state that was loaded before.

        Args:
            variables: The model's trainable variables.

        Raises:
            ValueError: If there are no variables or too many weights, a variable is not in
                float32 or float64 or has a constraint, or loaded state does not fit.
        """
        if self.built:
            return
        check_variables(self, variables)
        self.check_size(_size(variables))
        self._check_loaded_state_fits(variables)
        super().build(variables)
        dtype = common_dtype(variables)
        for name, (shape, initial) in self.memory_layout(_size(variables)).items():
            self._memory[name] = self.add_variable(
                shape,
                initializer=keras.initializers.Constant(initial),
                dtype="int32" if isinstance(initial, int) else dtype,
                name=name,
            )
        self._progress = self.add_variable(
            (len(Progress._fields),), initializer="zeros", dtype=dtype, name="progress"
        )
        self._recorder.variables = self._trainable_variables
        with tf.init_scope():
            outcome = _Outcome(*(tf.Variable(v, trainable=False) for v in (-1, False)))
        object.__setattr__(self, "_outcome", outcome)
        self._restore_loaded_state()

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        config = super().get_config()
        config = {
            name: value
            for name, value in config.items()
            if name not in BASE_ARGUMENTS or name == "name"
        }
        own = (
            "iterations_per_step",
            "closure_chunks",
            "gradient_tolerance",
            "relative_gradient_tolerance",
            "change_tolerance",
            "jit_compile",
            *self.hyperparameters,
        )
        return {**config, **{name: getattr(self, name) for name in own}}

    def state_layout(self, variables: Sequence[Any]) -> dict[str, StateGroup]:
        """See `SavedStateOptimizer.state_layout`; each array covers all weights together."""
        made = {**self._memory, "progress": self._progress} if self.built else {}
        memory = self.memory_layout(_size(variables))
        arrays = {**memory, "progress": ((len(Progress._fields),), 0.0)}
        groups = {
            name: StateGroup(initial, {0: shape}, [made[name]] if made else ())
            for name, (shape, initial) in arrays.items()
        }
        return {**super().state_layout(variables), **groups}

    def _load(self, saved: dict[str, np.ndarray]) -> None:
        if any(f"{name}.0" in saved for name in self.memory_layout(0)):
            # Version 0.1.0 saved no progress.
            saved = {"progress.0": np.zeros(len(Progress._fields)), **saved}
        super()._load(saved)

    # --- a step --------------------------------------------------------------

    def minimize_on_batch(
        self, function: ModelFunction, data: Data, *, is_compiled: bool
    ) -> Tensor:
        """Makes one training step on a batch; runs inside a compiled function.

        Args:
            function: The model.
            data: The batch.
            is_compiled: Whether XLA compiles the step.

        Returns:
            The loss at the new weights.
        """
        loss = BatchLoss(function, Batch(**data), self.closure_chunks, is_compiled=is_compiled)
        start = loss.joined([v.value for v in function.trainable_variables])
        within = loss.projected(start)
        point = Point(within, *loss.value_and_gradient(within))
        learning_rate = tf.cast(tf.convert_to_tensor(self.learning_rate), start.dtype)
        run = minimize(
            self.iterate,
            point,
            {name: tf.convert_to_tensor(v) for name, v in self._memory.items()},
            Progress(*tf.unstack(tf.convert_to_tensor(self._progress))),
            learning_rate,
            loss,
            iterations=self.iterations_per_step,
            tolerances=Tolerances(
                self.gradient_tolerance, self.relative_gradient_tolerance, self.change_tolerance
            ),
            own_statuses=len(self.statuses),
        )
        arrays = loss.parted(run.point.weights)
        for variable, value in zip(function.trainable_variables, arrays, strict=True):
            variable.assign(value)
        for name, variable in self._memory.items():
            variable.assign(run.memory[name])
        saved = tf.stack(run.progress)
        self._progress.assign(tf.where(gave_up(run), tf.zeros_like(saved), saved))
        # Reaching the end of data of unknown length does not count as a step.
        with tf.control_dependencies([run.point.loss]):
            self._iterations.assign_add(1)
        self._record(run, start, learning_rate, loss)
        return run.point.loss

    # --- recording -----------------------------------------------------------

    def _record(self, run: Run, start: Tensor, learning_rate: Tensor, loss: BatchLoss) -> None:
        point = run.point
        free = loss.free_gradient(point.weights, point.gradient)
        vectors = {
            "grad_norm": free,
            "update_norm": point.weights - start,
            "weight_norm": point.weights,
        }
        numbers = {
            "learning_rate": learning_rate,
            **{name: norm(vector) for name, vector in vectors.items()},
            "step_length": run.step_length,
            "evaluations": run.evaluations,
            "steps_made": run.iterations,
            **{name: run.memory[name] for name in self.own_metrics},
        }
        of_variables = {
            name: [norm(part) for part in loss.parted(vector)] for name, vector in vectors.items()
        }
        gradients = None
        if self._recorder.tier >= TIERS.index("histograms"):
            gradients = dict(enumerate(loss.parted(point.gradient)))
        record = self._recorder.pack(numbers, of_variables, gradients)
        self._recorder.store(record, tf.convert_to_tensor(self._iterations))
        self._outcome.status.assign(run.status)
        self._outcome.converged.assign(run.converged)

    # --- checks --------------------------------------------------------------

    def _refuse(self, arguments: Mapping[str, Any]) -> None:
        """Raises for unknown arguments and for unsupported ones of Keras's base class."""
        for name, value in arguments.items():
            if name not in BASE_ARGUMENTS:
                raise ValueError(
                    f"{type(self).__name__} does not take the argument `{name}`. "
                    f"Received: {name}={value!r}"
                )
            if value != BASE_ARGUMENTS[name]:
                raise ValueError(
                    f"{type(self).__name__} does not take `{name}`: {_WHY_REFUSED[name]}. "
                    f"Received: {name}={value!r}"
                )


class _Outcome(NamedTuple):
    """Variables that record how the last step ended."""

    status: tf.Variable
    """The index among all statuses; -1 before the first step."""
    converged: tf.Variable


def _checked_tolerance(name: str, value: float | None) -> float | None:
    return None if value is None else checked_number(name, value)


def _size(variables: Sequence[Any]) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)
