"""What the optimizers that evaluate the loss themselves share."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.closures.batch_loss import BatchLoss
from keras_gdopt.closures.box import is_box
from keras_gdopt.closures.line_search import rounding_of, select
from keras_gdopt.closures.vectors import norm
from keras_gdopt.functional import Batch, Data, ModelFunction, check_is_trainable_by_its_loss
from keras_gdopt.optimizers.argument_checks import (
    BASE_ARGUMENTS,
    check_tensorflow,
    checked_count,
    checked_flag,
    checked_learning_rate,
    checked_number,
)
from keras_gdopt.optimizers.arithmetic import common_dtype
from keras_gdopt.optimizers.compilation import xla_is_available
from keras_gdopt.optimizers.recording import TIERS, Recorder, RecordingOptimizer
from keras_gdopt.optimizers.saved_state import variable_path
from keras_gdopt.tensor import Tensor

Memory = dict[str, Tensor]
"""What an algorithm keeps from one iteration to the next, by name."""

_NOT_STARTED = "no step was made yet"
_STATUSES = (
    "the loss or its gradient is not finite at the weights",
    "neither the loss nor its gradient falls by more than its rounding",
)
"""What a status says that no algorithm's own does."""

_LOSS_NOT_FINITE, _STALLED = range(2)

_RELATIVE_GRADIENT_TOLERANCE = 1e-9
_MOST_FAILURES = 2
_MOST_STALLED = 20
_LESS = 0.9  # a gradient that is less by this factor is not so by rounding

_WHY_REFUSED = {
    "weight_decay": "add a regularizer to the layers, so that it is part of the loss",
    "clipnorm": "a clipped gradient is none of the loss that the line search evaluates",
    "clipvalue": "a clipped gradient is none of the loss that the line search evaluates",
    "global_clipnorm": "a clipped gradient is none of the loss that the line search evaluates",
    "use_ema": "every step ends at the lowest loss seen, which an average would leave",
    "ema_momentum": "every step ends at the lowest loss seen, which an average would leave",
    "ema_overwrite_frequency": "every step ends at the lowest loss seen, which an average "
    "would leave",
    "loss_scale_factor": "the loss is evaluated in the precision of the weights",
    "gradient_accumulation_steps": "use `closure_chunks` for batches larger than memory",
}


class Point(NamedTuple):
    """Weights, and what the loss is there."""

    weights: Tensor
    """All of them, as one vector."""
    loss: Tensor
    gradient: Tensor


class Progress(NamedTuple):
    """How near the iterations are to where rounding ends them; floating-point scalars."""

    failures: Tensor
    """Iterations without a lower loss, one after the other."""
    stalled: Tensor
    """Iterations since the lowest loss or the least gradient."""
    lowest_loss: Tensor
    least_gradient: Tensor
    """Of the gradient, the largest entry."""
    loss: Tensor
    """Where the last iteration ended."""
    gradient: Tensor
    first_gradient: Tensor
    """Where the iterations began that the last step went on with."""


class Iteration(NamedTuple):
    """What came of one iteration of an algorithm."""

    point: Point
    """Where it ended: where it began, if it `failed`."""
    memory: Memory
    evaluations: Tensor
    """Of the loss and its gradient; int32."""
    step_length: Tensor
    status: Tensor
    """The place in the class's `statuses`; int32."""
    failed: Tensor
    """Whether it found no lower loss."""
    is_rounding: Tensor
    """Whether it failed because no loss near by is lower by more than rounding."""


class ClosureOptimizer(RecordingOptimizer):
    r"""An optimizer that evaluates the loss of the current batch as often as it needs.

    `attach(model)`, once after `model.compile`, gives it that loss: from then on a
    training step of the model is `iterations_per_step` iterations of the algorithm on the
    step's batch, in one compiled loop.

    A subclass states what it keeps (`memory_layout`), what an iteration is (`iterate`, a pure
    function) and how it can end (`statuses`); this class does the rest. With a line search,
    `LineSearchOptimizer` is the one to derive from.

    The loss is the compiled one, with sample weights and the layers' own losses. Random
    layers keep one mask, and batch normalization the batch's statistics, all through a
    step; the moving statistics move once, at the accepted weights. The loss that `fit`
    shows is the one there.

    Full-batch training is `batch_size=len(x)`. With smaller batches each step minimizes the
    loss of its own batch, `iterations_per_step` times: what is remembered of the last
    batch still decides the first direction, so few iterations and large batches suit it.

    Args:
        learning_rate: Of the algorithm: a number above 0 or a schedule (of training steps).
        iterations_per_step: Iterations in a training step, at most.
        closure_chunks: In how many parts to go through a batch, for batches larger than
            memory. Defaults to 1. Needs losses that are means over the samples, those that
            layers add and a `compute_loss` of the model's own included; cannot be combined
            with batch normalization or masks.
        gradient_tolerance: Converged where no entry of the gradient is larger, in units of
            the loss by those of the weights. Defaults to 0 (never).
        relative_gradient_tolerance: Converged where no entry of the gradient is larger than
            this part of the largest one where training began on these data. Defaults to
            1e-9, and to 0 where `gradient_tolerance` is given, be it as 0.
        change_tolerance: Converged where an iteration changes the loss by less than this
            part of it. Defaults to 0: never.
        jit_compile: Whether a step is one XLA cluster. Defaults to `"auto"`: where all layers
            support it. (A model that is itself compiled with `jit_compile=True` compiles the
            step in any case.)
        name: Defaults to the class's name in snake case.

    Raises:
        ValueError: If an argument is out of range, or one of Keras's base class that makes
            no sense here; in `attach`, if the model's loss is not all there is to its
            training step; in a step without `attach`.
    """

    hyperparameters: ClassVar[Sequence[str]] = ()
    """Names of the constructor's own arguments, kept as attributes of that name."""

    statuses: ClassVar[Sequence[str]] = ("accepted",)
    """How an iteration can end: as it should at first."""

    takes_bounds: ClassVar[bool] = False
    """Whether it keeps weights within bounds, as `NonNeg` and `constraints.Bounds` ask for."""

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
        # Without Keras's tracking: neither holds state that is saved.
        object.__setattr__(self, "_recorder", Recorder(records_all=True, dtype=tf.float64))
        object.__setattr__(self, "_outcome", None)

    # --- the algorithm -------------------------------------------------------

    def memory_layout(self, size: int) -> Mapping[str, tuple[tuple[int, ...], float | int]]:
        """What the algorithm keeps: shapes, and the value that each entry starts from.

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
        """One iteration from a point; a pure function.

        Args:
            point: Where it begins.
            memory: What the iteration before has left.
            has_failed: Whether that one `failed`. After two in a row the step ends.
            learning_rate: A scalar.
            loss: Of the batch.
        """
        raise NotImplementedError

    def check_size(self, size: int) -> None:
        """Raises a `ValueError` if the algorithm is not for as many weights; before it has any.

        Args:
            size: The number of weights.
        """

    def check_model(self, model: Any, loss: Callable[..., ModelFunction]) -> None:
        """Raises a `ValueError` if the algorithm cannot train a model; part of `attach`.

        Args:
            model: Compiled with this optimizer.
            loss: Makes its loss a function, from the model and its weights.
        """

    # --- the loss ------------------------------------------------------------

    def attach(self, model: keras.Model) -> None:
        """Makes the model's training steps minimize the loss with this optimizer.

        Call it once, after `model.compile(optimizer=...)` and, for a model that was loaded,
        after loading. The model stays what it was: its class, what is saved of it, its
        `evaluate` and `predict`. Another `compile` undoes it.

        Args:
            model: Compiled with this optimizer.

        Raises:
            ValueError: If the model is not compiled with this optimizer or without a loss, has
                a `train_step` of its own, no trainable weights, or some with a constraint that
                the optimizer does not take, computes in half precision, or is distributed; if
                the optimizer belongs to other weights. What cannot be known of a model that is
                not built is checked in its first step.
        """
        self._attach(model, ModelFunction)

    def _attach(self, model: keras.Model, loss: Callable[..., ModelFunction]) -> None:
        self._check_model(model, loss)
        model.train_step = _TrainStep(model, self, loss)
        model.train_function = None

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Raises: a gradient is not enough."""
        del grads, trainable_variables
        raise ValueError(
            f"{type(self).__name__} evaluates the loss itself, and has none. After "
            "`model.compile(optimizer=optimizer, ...)`, or after loading the model, call "
            "`model.optimizer.attach(model)`. Received: gradients"
        )

    # --- what came out -------------------------------------------------------

    @property
    def converged(self) -> bool:
        """Whether the last step ended where there is no more to gain.

        There the gradient, or the change of the loss, is within its tolerance, or rounding
        keeps the loss from falling: two iterations in a row found no lower loss, or
        neither the loss nor the largest entry of its gradient fell by more than rounding in
        20 iterations. `status` tells which. Steps that start there, on the same batch,
        evaluate the loss once.
        """
        return self._outcome is not None and bool(self._outcome.converged.numpy())

    @property
    def status(self) -> str:
        """How the last iteration ended: `"accepted"`, or why not."""
        if self._outcome is None or int(self._outcome.status.numpy()) < 0:
            return _NOT_STARTED
        return (*self.statuses, *_STATUSES)[int(self._outcome.status.numpy())]

    @property
    def recorder(self) -> Recorder:
        """Keeps what the last step was like; every step is recorded."""
        return self._recorder

    @property
    def step_metrics(self) -> dict[str, float]:
        """The metrics of the last step; empty before there is one.

        - `iterations`: the count of training steps,
        - `learning_rate`,
        - `grad_norm`: the norm of the gradient where the step ended, without what bounds hold
          back,
        - `update_norm`: the norm of the change of all weights,
        - `weight_norm`: the norm of all weights where it ended,
        - `step_length`: of the last iteration, as a part of what the algorithm proposed,
        - `evaluations`: of the loss and its gradient, those of trial steps included,
        - `steps_made`: iterations of the algorithm,
        - what the algorithm has of its own.
        """
        return super().step_metrics

    # --- what Keras calls ----------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the memory and restores what was loaded before.

        Args:
            variables: The model's trainable variables.

        Raises:
            ValueError: If there are no variables or too many weights, a variable is not in
                float32 or float64 or has a constraint, or loaded state does not fit.
        """
        if self.built:
            return
        self._check_variables(variables)
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

    def _saved_slots(self) -> Mapping[str, Sequence[Any]]:
        # Each is for all weights together.
        slots = {name: [variable] for name, variable in self._memory.items()}
        return {**slots, "progress": [self._progress]} if self.built else slots

    def _slot_initial_values(self) -> Mapping[str, float]:
        initial = {name: initial for name, (_, initial) in self.memory_layout(0).items()}
        return {**initial, "progress": 0.0}

    def _state_shapes(self, variables: Sequence[Any]) -> dict[str, tuple[int, ...]]:
        layout = self.memory_layout(_size(variables))
        shapes = {f"{name}.0": shape for name, (shape, _) in layout.items()}
        return {**shapes, "progress.0": (len(Progress._fields),)}

    def _load(self, saved: dict[str, np.ndarray]) -> None:
        if any(f"{name}.0" in saved for name in self.memory_layout(0)):
            # Version 0.1.0 saved none.
            saved = {"progress.0": np.zeros(len(Progress._fields)), **saved}
        super()._load(saved)

    # --- a step --------------------------------------------------------------

    def minimize_on_batch(
        self, function: ModelFunction, data: Data, *, is_compiled: bool
    ) -> Tensor:
        """Makes one training step on a batch; part of a compiled function.

        Args:
            function: The model.
            data: The batch.
            is_compiled: Whether XLA compiles it.

        Returns:
            The loss at the weights that the model then has.
        """
        loss = BatchLoss(function, Batch(**data), self.closure_chunks, is_compiled=is_compiled)
        start = loss.joined([v.value for v in function.trainable_variables])
        within = loss.projected(start)
        point = Point(within, *loss.value_and_gradient(within))
        learning_rate = tf.cast(tf.convert_to_tensor(self.learning_rate), start.dtype)
        run = self._iterated(point, learning_rate, loss)
        arrays = loss.parted(run.point.weights)
        for variable, value in zip(function.trainable_variables, arrays, strict=True):
            variable.assign(value)
        for name, variable in self._memory.items():
            variable.assign(run.memory[name])
        saved = tf.stack(run.progress)
        # Where no loss is finite, the next step tries again.
        gave_up = (run.progress.failures >= _MOST_FAILURES) & ~run.converged
        self._progress.assign(tf.where(gave_up, tf.zeros_like(saved), saved))
        # The end of data of unknown length is no step.
        with tf.control_dependencies([run.point.loss]):
            self._iterations.assign_add(1)
        self._record(run, start, learning_rate, loss)
        return run.point.loss

    def _iterated(self, point: Point, learning_rate: Tensor, loss: BatchLoss) -> "_Run":
        def iteration(run: _Run) -> _Run:
            before = run.point
            made = self.iterate(before, run.memory, run.has_failed, learning_rate, loss)
            after = made.point
            progress = _progress_after(
                run.progress, after, _largest_entry(after, loss), made.failed
            )
            stalled = progress.stalled >= _MOST_STALLED
            change = tf.abs(after.loss - before.loss)
            largest = tf.maximum(tf.abs(after.loss), tf.abs(before.loss))
            converged = self._is_flat(progress) | (
                ~made.failed & (change < self.change_tolerance * largest)
            )
            # Steps to losses that are not finite may become shorter.
            rounded = made.failed & made.is_rounding & (progress.failures >= _MOST_FAILURES)
            return _Run(
                iterations=run.iterations + 1,
                evaluations=run.evaluations + made.evaluations,
                point=after,
                memory=made.memory,
                has_failed=made.failed,
                step_length=made.step_length,
                status=tf.where(
                    stalled & ~made.failed & ~converged, self._place(_STALLED), made.status
                ),
                progress=progress,
                converged=converged | stalled | rounded,
            )

        finite = tf.math.is_finite(point.loss) & tf.reduce_all(tf.math.is_finite(point.gradient))
        progress, ended_by_rounding = self._progress_at(point, loss)
        last_failed = self._progress[Progress._fields.index("failures")] > 0
        status = tf.where(ended_by_rounding, self._place(_STALLED), 0)
        run = _Run(
            iterations=tf.constant(0),
            evaluations=tf.constant(1),
            point=point,
            memory={name: tf.convert_to_tensor(v) for name, v in self._memory.items()},
            has_failed=last_failed,
            step_length=tf.zeros_like(point.loss),
            status=tf.where(finite, status, self._place(_LOSS_NOT_FINITE)),
            progress=progress,
            converged=self._is_flat(progress) | ended_by_rounding,
        )
        (run,) = tf.while_loop(
            lambda run: (
                (run.iterations < self.iterations_per_step)
                & ~run.converged
                & (run.progress.failures < _MOST_FAILURES)
                & finite
            ),
            lambda run: (iteration(run),),
            (run,),
        )
        return run

    def _progress_at(self, point: Point, loss: BatchLoss) -> tuple[Progress, Tensor]:
        """What was saved if a step goes on where the last one ended; and if rounding ended it."""
        saved = Progress(*tf.unstack(tf.convert_to_tensor(self._progress)))
        largest = _largest_entry(point, loss)
        # Evaluated again, neither need be the same to the last bit.
        same_loss = tf.abs(point.loss - saved.loss) <= rounding_of(saved.loss)
        same_gradient = tf.abs(largest - saved.gradient) <= (1 - _LESS) * saved.gradient
        goes_on = same_loss & same_gradient & (saved.gradient > 0)
        zero = tf.zeros_like(largest)
        fresh = Progress(zero, zero, point.loss, largest, point.loss, largest, largest)
        ended = (saved.failures >= _MOST_FAILURES) | (saved.stalled >= _MOST_STALLED)
        return select(goes_on, saved, fresh), goes_on & ended

    def _place(self, status: int) -> int:
        """Of one of those that all classes have, behind the class's own."""
        return len(self.statuses) + status

    def _is_flat(self, progress: Progress) -> Tensor:
        absolute, relative = self.gradient_tolerance, self.relative_gradient_tolerance
        if absolute is None and relative is None:
            relative = _RELATIVE_GRADIENT_TOLERANCE
        most = tf.maximum((relative or 0.0) * progress.first_gradient, absolute or 0.0)
        return progress.gradient <= most

    # --- what is recorded ----------------------------------------------------

    def _record(self, run: "_Run", start: Tensor, learning_rate: Tensor, loss: BatchLoss) -> None:
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
        """Raises for arguments of Keras's base class, and for unknown ones."""
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

    def _check_model(self, model: Any, loss: Callable[..., ModelFunction]) -> None:
        if isinstance(getattr(model, "train_step", None), _TrainStep):
            del model.train_step  # of an earlier `attach`
        check_is_trainable_by_its_loss(model)
        optimizer = model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                f"{type(self).__name__} does not train in mixed float16: a line search compares "
                "losses that differ in digits which float16 does not have. Use float32. "
                "Received: a model whose optimizer is in a LossScaleOptimizer"
            )
        if optimizer is not self:
            raise ValueError(
                f"The model '{model.name}' must be compiled with this optimizer. Call "
                "`model.compile(optimizer=optimizer, ...)` and then "
                f"`optimizer.attach(model)`. Received: a model compiled with {optimizer!r}"
            )
        half = [
            layer.name
            for layer in model._flatten_layers()
            if keras.backend.standardize_dtype(layer.compute_dtype) in ("float16", "bfloat16")
        ]
        if half:
            raise ValueError(
                f"{type(self).__name__} needs layers that compute in float32 or float64: a line "
                "search compares losses that differ in digits which half precision does not "
                f"have. Received: half precision in the layers {half[:5]}"
            )
        replicas = model.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            raise ValueError(
                f"{type(self).__name__} trains on one device: its line search needs the loss of "
                "the whole batch at each trial. Make the model outside of the strategy's scope; "
                "for batches larger than a device's memory use `closure_chunks`. Received: a "
                f"model of {type(model.distribute_strategy).__name__} with {replicas} replicas"
            )
        if self.closure_chunks > 1:
            _check_chunks_add_up(model)
        self.check_model(model, loss)
        if model.built:
            self._check_variables(model.trainable_variables)

    def _check_variables(self, variables: Sequence[Any]) -> None:
        """Raises for variables that this optimizer cannot train, or was not built for."""
        name = type(self).__name__
        if not variables:
            raise ValueError(
                f"{name} needs trainable weights. Set `trainable = True` for a layer that has "
                "weights. Received: a model without trainable weights"
            )
        for variable in variables:
            if keras.backend.standardize_dtype(variable.dtype) not in ("float32", "float64"):
                raise ValueError(
                    f"{name} needs weights in float32 or float64, for a line search compares "
                    "losses that differ in their last digits. Received: the variable "
                    f"'{variable_path(variable)}' of dtype {variable.dtype}"
                )
            if variable.constraint is None or (self.takes_bounds and is_box(variable.constraint)):
                continue
            taken, instead = "does not take constraints", "`LBFGS` for bounds and "
            if self.takes_bounds:
                taken, instead = "takes no constraints but `NonNeg` and `constraints.Bounds`", ""
            raise ValueError(
                f"{name} {taken}: a step that a constraint changes is not the one that the line "
                f"search accepted. Remove the constraint, or use {instead}a first-order optimizer"
                f"{' for others' if instead else ''}. Received: the variable "
                f"'{variable_path(variable)}' with the constraint {variable.constraint!r}"
            )
        if not self.built:
            return
        known = {id(variable) for variable in self._trainable_variables}
        for variable in variables:
            if id(variable) not in known:
                paths = [variable_path(v) for v in self._trainable_variables]
                raise ValueError(
                    f"{name} remembers the weights it was built for, and cannot train others. "
                    "For another model, or after unfreezing layers, compile with a new "
                    f"optimizer. Received: the variable '{variable_path(variable)}'; built for "
                    f"{len(paths)} variable(s): {paths[:3]}{'...' if len(paths) > 3 else ''}"
                )


class _Run(NamedTuple):
    """How far a training step has come."""

    iterations: Tensor
    evaluations: Tensor
    point: Point
    memory: Memory
    has_failed: Tensor
    """Whether the last iteration found no lower loss."""
    step_length: Tensor
    status: Tensor
    progress: Progress
    converged: Tensor


class _Outcome(NamedTuple):
    """Variables that tell how the last step ended."""

    status: tf.Variable
    """The place among all statuses; -1 before the first step."""
    converged: tf.Variable


class _TrainStep:
    """A model's training step by a closure optimizer; belongs to the model.

    Does not hold the optimizer, which holds the model's variables, nor by itself the model.
    """

    def __init__(
        self, model: keras.Model, optimizer: ClosureOptimizer, loss: Callable[..., ModelFunction]
    ) -> None:
        self._model = weakref.ref(model)
        self._optimizer = weakref.ref(optimizer)
        self._loss = loss
        self._is_compiled = _is_compiled(model, optimizer.jit_compile)
        self._minimize = tf.function(self._traced, jit_compile=self._is_compiled, autograph=False)

    @property
    def is_in_effect(self) -> bool:
        """Whether the model has not been compiled anew, with another optimizer."""
        model, optimizer = self._both()
        return model.optimizer is optimizer

    def __call__(self, data: Any) -> dict[str, Any]:
        model, optimizer = self._both()
        if not self.is_in_effect:
            return type(model).train_step(model, data)
        compiled_loss = getattr(model, "_compile_loss", None)
        if not model.built or not (compiled_loss is None or compiled_loss.built):
            model._symbolic_build(data_batch=data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        optimizer._check_variables(model.trainable_variables)
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        batch = {"x": x, "y": y, "sample_weight": sample_weight}
        loss = self._minimize(
            {name: part for name, part in batch.items() if part is not None},
            tier=optimizer.recorder.tier,
            trained=tuple(id(variable) for variable in model.trainable_variables),
        )
        arguments = {"training": True} if model._call_has_training_arg else {}
        y_pred = model(x, **arguments)  # moves the model's state
        # Moves what a loss tracks of itself, such as the loss of each output.
        model._compute_loss(x, y, y_pred, sample_weight, training=True)
        count = tf.shape(next(part for part in keras.tree.flatten(x) if part is not None))[0]
        model._loss_tracker.update_state(loss, sample_weight=count)
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _traced(self, data: Data, *, tier: int, trained: tuple[int, ...]) -> Tensor:
        del tier, trained  # another trace for each, as they are read elsewhere
        model, optimizer = self._both()
        optimizer.recorder.note_trace()
        function = self._loss(model, optimizer.recorder.variables)
        return optimizer.minimize_on_batch(function, data, is_compiled=self._is_compiled)

    def _both(self) -> tuple[Any, Any]:
        """The model, which is alive as it makes a step, and the optimizer, if it still is."""
        return self._model(), self._optimizer()


def _checked_tolerance(name: str, value: float | None) -> float | None:
    return None if value is None else checked_number(name, value)


def _progress_after(before: Progress, after: Point, largest: Tensor, failed: Tensor) -> Progress:
    falls = after.loss < before.lowest_loss - rounding_of(before.lowest_loss)
    better = falls | (largest < _LESS * before.least_gradient)
    return Progress(
        failures=tf.where(failed, before.failures + 1, 0.0),
        stalled=tf.where(better, tf.zeros_like(largest), before.stalled + 1),
        lowest_loss=tf.where(better, after.loss, before.lowest_loss),
        least_gradient=tf.where(better, largest, before.least_gradient),
        loss=after.loss,
        gradient=largest,
        first_gradient=before.first_gradient,
    )


def _largest_entry(point: Point, loss: BatchLoss) -> Tensor:
    """Of the gradient, without what bounds hold back."""
    return tf.reduce_max(tf.abs(loss.free_gradient(point.weights, point.gradient)))


def _is_compiled(model: keras.Model, asked: bool | str) -> bool:
    """Whether XLA compiles the step: if asked for, and by default where the layers allow it."""
    if model.jit_compile or asked != "auto":
        return bool(model.jit_compile or asked)
    return xla_is_available() and all(layer.supports_jit for layer in model._flatten_layers())


def _check_chunks_add_up(model: keras.Model) -> None:
    """Raises where a batch's loss is not the mean of its parts' losses."""
    names = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    if names:
        raise ValueError(
            "`closure_chunks` cannot be combined with batch normalization, which would "
            f"normalize each part by itself. Received: the layers {names}"
        )
    masking = [
        layer.name
        for layer in model._flatten_layers()
        if getattr(layer, "mask_zero", False) or isinstance(layer, keras.layers.Masking)
    ]
    if masking:
        raise ValueError(
            "`closure_chunks` cannot be combined with masks: a loss is the mean over what is not "
            "masked, of which each part of a batch has another number. Received: the layers "
            f"{masking}"
        )
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction != "sum_over_batch_size":
            raise ValueError(
                "`closure_chunks` needs losses that are means over the samples. Received: the "
                f"loss {loss!r} with reduction={reduction!r}"
            )


def _size(variables: Sequence[Any]) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)
