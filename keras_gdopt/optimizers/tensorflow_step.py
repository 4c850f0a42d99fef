"""One training step with TensorFlow: sparse rows, and one XLA cluster for the rest."""

import contextlib
import dataclasses
import functools
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import (
    common_dtype,
    computation_dtype,
    is_known,
    sum_of_squares,
)
from keras_gdopt.optimizers.step_metrics import TIERS, StepMetrics

if TYPE_CHECKING:
    from keras_gdopt.optimizers.base import GradientOptimizer


# Entries. Fewer are updated by plain operations: to launch a cluster costs more than it
# saves (`benchmarks.fit_step mlp-51k` with 0 here).
SMALLEST_CLUSTER = 2**16


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one cluster does; every other plan is another cluster.

    Variables are named by their index among the optimizer's variables.
    """

    dense: tuple[int, ...]  # updated in the cluster
    rows: tuple[int, ...]  # updated before it, by gather and scatter
    update: bool  # False: only add the gradients to the accumulators
    record: int  # which of `step_metrics.TIERS`, -1: nothing
    when_due: bool  # whether to look in the cluster if recording is due, and to store there
    device: str  # of the replica under a strategy, else empty


class TensorFlowStep:
    """Runs a `GradientOptimizer`'s step with TensorFlow.

    Holds no state that is saved: neither Keras nor TensorFlow tracks what is in
    here.
    """

    def __init__(self, optimizer: "GradientOptimizer") -> None:
        self.metrics = StepMetrics(optimizer)
        self._optimizer = optimizer
        self._clusters: dict[_Plan, Callable[..., Any]] = {}
        # Traced once for each shape, however many variables have it.
        self._rules: dict[Any, Callable[..., Any]] = {}
        self._dense_squares: Callable[..., Any] | None = None

    def forget_clusters(self) -> None:
        """Compiles anew at the next step, for a setting of the optimizer has changed."""
        self._clusters.clear()
        self._rules.clear()
        self._dense_squares = None

    # --- a whole step --------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """What Keras's `apply` does, with sparse rows merged first.

        Args:
            grads: Gradients or `None`, aligned with `variables`.
            variables: Variables that the optimizer was built with.
        """
        optimizer = self._optimizer
        with keras.name_scope(optimizer.name, caller=optimizer), after(grads):
            grads, variables = optimizer._filter_empty_gradients(grads, variables)
            grads, variables = optimizer._overwrite_variables_directly_with_gradients(
                grads, variables
            )
            # By index and in its order: neither the order of the arguments nor raw
            # variables in place of Keras's make another cluster.
            gradients = dict(
                sorted(
                    zip(map(optimizer._get_variable_index, variables), grads, strict=True),
                    key=lambda pair: pair[0],
                )
            )
            if gradients:
                gradients = self._merged(gradients)
                if any(is_distributed(variable) for variable in variables):
                    self._apply_on_every_device(gradients)
                else:
                    self._apply_here(gradients)
            optimizer._iterations.assign_add(1)

    def _apply_on_every_device(self, gradients: dict[int, Any]) -> None:
        """Sums the gradients over the replicas, then steps on each device by itself.

        So clipping and accumulation see the gradient of the whole batch, as they do
        on one device.
        """
        optimizer = self._optimizer
        raw = [_raw(optimizer._trainable_variables[index]) for index in gradients]
        reduced = optimizer._all_reduce_sum_gradients(zip(gradients.values(), raw, strict=True))

        def apply_here(grads: Sequence[Any], *, device: str, first: bool) -> None:
            # The same row may come from several replicas.
            summed = self._merged(dict(zip(gradients, grads, strict=True)))
            self._apply_here(summed, device=device, record=first)

        on_every_device(raw[0], apply_here, [gradient for gradient, _ in reduced])

    def _apply_here(
        self, gradients: dict[int, Any], *, device: str = "", record: bool = True
    ) -> None:
        """One step on one device, from gradients without repeated rows."""
        optimizer = self._optimizer
        rows = {i: self._unscaled(g) for i, g in gradients.items() if _is_sparse(g)}
        dense = {i: g for i, g in gradients.items() if not _is_sparse(g)}
        self.metrics.note_trace()
        learning_rate = optimizer.learning_rate
        if isinstance(learning_rate, (int, float)):  # from a callable
            learning_rate = tf.constant(learning_rate, keras.config.floatx())
        learning_rate = tf.convert_to_tensor(learning_rate)
        step = tf.convert_to_tensor(optimizer.iterations + 1)

        def run(*, update: bool, record: bool, when_due: bool = False) -> None:
            tier = self.metrics.tier if record else -1
            plan = _Plan(tuple(dense), tuple(rows), update, tier, when_due, device)
            norm, row_squares = None, {}
            if rows:
                norm = self._global_norm_with_rows(dense, rows)
                changes = self._update_rows_of_all(rows, norm, learning_rate, step)
                if record:
                    row_squares = self._squares_of_step(
                        rows, dict(zip(rows, changes, strict=True)), norm
                    )
            if not self._is_idle(plan):
                cluster = self._cluster(plan)
                recorded = cluster(list(dense.values()), learning_rate, step, norm, row_squares)
                if record and not when_due:
                    if tier == TIERS.index("histograms"):
                        recorded.update((str(i), self._dense(i, g)) for i, g in rows.items())
                    self.metrics.store(recorded)

        plain = _Plan(tuple(dense), tuple(rows), True, -1, False, device)

        def update() -> None:
            if not record or not self.metrics.asked_for:
                run(update=True, record=False)
            elif not rows and not is_worth_compiling(self._computed_on(plain)):
                # A condition around all of the update would cost more than what it saves.
                run(update=True, record=True, when_due=True)
            else:
                tf.cond(
                    self.metrics.due(),
                    lambda: run(update=True, record=True),
                    lambda: run(update=True, record=False),
                )

        accumulated = optimizer.gradient_accumulation_steps
        if accumulated:
            tf.cond(
                tf.equal((optimizer._iterations + 1) % accumulated, 0),
                update,
                lambda: run(update=False, record=False),
            )
        else:
            update()
        for variable in (optimizer._trainable_variables[index] for index in gradients):
            if variable.constraint is not None and not constraint_compiles(variable.constraint):
                variable.assign(variable.constraint(variable))

    def _is_idle(self, plan: _Plan) -> bool:
        """Whether row updates have left nothing to do."""
        variables = self._optimizer._trainable_variables
        return not (
            plan.dense
            or plan.record >= 0
            or self._optimizer.use_ema
            or any(variables[index].constraint is not None for index in plan.rows)
        )

    def _cluster(self, plan: _Plan) -> Callable[..., Any]:
        if plan not in self._clusters:
            self._clusters[plan] = compiled(
                functools.partial(self._cluster_body, plan), self._computed_on(plan)
            )
        return self._clusters[plan]

    def _computed_on(self, plan: _Plan) -> list[Any]:
        """The variables that a cluster reads all of."""
        optimizer = self._optimizer
        variables = optimizer._trainable_variables
        if optimizer.use_ema or (plan.record >= 0 and not plan.when_due):
            return list(variables)
        constrained = [i for i in plan.rows if variables[i].constraint is not None]
        return [variables[index] for index in (*plan.dense, *constrained)]

    def _cluster_body(
        self,
        plan: _Plan,
        grads: Sequence[tf.Tensor],
        learning_rate: tf.Tensor,
        step: tf.Tensor,
        norm: tf.Tensor | None,
        row_squares: Mapping[str, Mapping[int, tf.Tensor]],
    ) -> dict[str, tf.Tensor]:
        """The body of a cluster; `plan` is bound before it is traced.

        Returns:
            What the step records, see `StepMetrics.of_step`.
        """
        optimizer = self._optimizer
        variables = optimizer._trainable_variables
        grads = [
            self._unscaled(tf.cast(g, computation_dtype(variables[i].dtype)))
            for i, g in zip(plan.dense, grads, strict=True)
        ]
        if optimizer.gradient_accumulation_steps:
            grads = self._accumulated(plan, grads)
        values: dict[int, tf.Tensor] = {}
        new_slots: dict[int, dict[str, tf.Tensor]] = {}
        changes: list[tf.Tensor] = []
        if plan.update:
            changes, values, new_slots = self.updated(
                grads,
                {index: variables[index] for index in plan.dense},
                {index: self._slots_of(index) for index in plan.dense},
                learning_rate,
                step,
                norm=norm,
            )
        moves = dict(zip(plan.dense, changes, strict=False))
        sums = values.copy() if optimizer.weight_decay is None else {}
        recorded = {}
        if plan.record >= 0:
            dense = dict(zip(plan.dense, grads, strict=True))

            def record() -> dict[str, tf.Tensor]:
                squares = self._squares_of_step(dense, moves, norm)
                squares = {name: {**row_squares.get(name, {}), **squares[name]} for name in squares}
                return self._recorded(plan, learning_rate, step, squares, values, new_slots, dense)

            if plan.when_due:
                # One operation, which costs little where it is not due; inlined, each of
                # its hundreds would be looked at.
                store = tf.function(
                    lambda: self.metrics.store(record()),
                    autograph=False,
                    experimental_attributes={"_noinline": True},
                )
                tf.cond(self.metrics.due(), store, lambda: None)
            else:
                recorded = record()
        if optimizer.use_ema:
            averages = {
                index: (average, values.get(index, variables[index]))
                for index, average in enumerate(optimizer._model_variables_moving_average)
                if average is not None
            }
            moved, overwriting = self.averaged(averages, step)
            values.update(overwriting)
            for index, average in moved.items():
                optimizer.assign(optimizer._model_variables_moving_average[index], average)
        for index in (*plan.dense, *plan.rows):
            constraint = variables[index].constraint
            if constraint is not None and constraint_compiles(constraint):
                value = values.get(index, tf.convert_to_tensor(variables[index]))
                values[index] = constraint(value)
        for index, slots in new_slots.items():
            for name, value in slots.items():
                optimizer.assign(optimizer._slots[name][index], value)
        for index, value in values.items():
            if value is sums.get(index) and moves[index].dtype == variables[index].dtype:
                optimizer.assign_add(variables[index], moves[index])  # in place
            else:
                optimizer.assign(variables[index], value)
        return recorded

    def _recorded(
        self,
        plan: _Plan,
        learning_rate: tf.Tensor,
        step: tf.Tensor,
        squares: dict[str, dict[int, tf.Tensor]],
        values: Mapping[int, tf.Tensor],
        new_slots: Mapping[int, Mapping[str, tf.Tensor]],
        gradients: Mapping[int, tf.Tensor],
    ) -> dict[str, tf.Tensor]:
        """What a step records, see `StepMetrics.of_step`."""
        optimizer = self._optimizer
        squares["weight_norm"] = self._squares(
            {
                index: values.get(index, variable)
                for index, variable in enumerate(optimizer._trainable_variables)
                if not optimizer._overwrite_variable_with_gradient(variable)
            }
        )
        slots = {
            name: {
                i: new_slots[i][name] if i in new_slots else tf.convert_to_tensor(slot)
                for i, slot in enumerate(slots)
                if slot is not None
            }
            for name, slots in optimizer._slots.items()
        }
        return self.metrics.of_step(plan.record, learning_rate, step, squares, slots, gradients)

    def _rule(self, dtype: Any) -> Callable[..., Any]:
        if dtype not in self._rules:
            self._rules[dtype] = tf.function(
                functools.partial(self._optimizer._ruled, variable_dtype=dtype), autograph=False
            )
        return self._rules[dtype]

    def _accumulated(self, plan: _Plan, grads: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The mean gradients of an update; otherwise adds `grads` to the sums."""
        optimizer = self._optimizer
        means = []
        for index, gradient in zip(plan.dense, grads, strict=True):
            accumulator = optimizer._accumulated_gradients[index]
            total = tf.cast(accumulator, gradient.dtype) + gradient
            optimizer.assign(accumulator, tf.zeros_like(total) if plan.update else total)
            means.append(total / optimizer.gradient_accumulation_steps)
        if plan.update:
            # Of variables without a gradient in this step, as Keras does.
            for index, accumulator in enumerate(optimizer._accumulated_gradients):
                if index not in plan.dense:
                    optimizer.assign(accumulator, tf.zeros_like(accumulator))
        return means

    # --- the parts of a step that are pure -----------------------------------

    def updated(
        self,
        grads: Sequence[tf.Tensor],
        weights: Mapping[int, Any],
        slots: Mapping[int, dict[str, tf.Tensor]],
        learning_rate: tf.Tensor,
        step: tf.Tensor,
        *,
        norm: tf.Tensor | None = None,
        hyperparameters: Mapping[str, tf.Tensor] | None = None,
    ) -> tuple[list[tf.Tensor], dict[int, tf.Tensor], dict[int, dict[str, tf.Tensor]]]:
        """Clips, decays and applies the rule.

        Args:
            grads: Dense gradients, in the order of `weights`.
            weights: Weights by index, as variables or tensors.
            slots: Their slots, by the same index and by name.
            learning_rate: A scalar.
            step: The 1-based count of updates, a scalar.
            norm: For `global_clipnorm`, where `grads` are not all there are.
            hyperparameters: Scalars in place of the optimizer's own numbers, by name:
                `weight_decay`, and those of the rule.

        Returns:
            The changes without decay in the order of `grads`, the new weights in the
            dtype that the rule computes in, and the new slots.
        """
        optimizer = self._optimizer
        changes, values, new_slots = [], {}, {}
        own = dict(hyperparameters or {})
        weight_decay = own.pop("weight_decay", optimizer.weight_decay)
        of_rule = [own] if own else []
        clipped = self._clipped(grads, norm)
        for (index, weight), gradient in zip(weights.items(), clipped, strict=True):
            variable = optimizer._trainable_variables[index]
            change, new_slots[index] = self._rule(variable.dtype)(
                gradient, slots[index], learning_rate, step, *of_rule
            )
            value = tf.cast(tf.convert_to_tensor(weight), change.dtype)
            if weight_decay is not None and optimizer._use_weight_decay(variable):
                value -= value * _decay(learning_rate, weight_decay, value.dtype)
            values[index] = value + change
            changes.append(change)
        return changes, values, new_slots

    def averaged(
        self, averages: Mapping[int, tuple[Any, Any]], step: tf.Tensor
    ) -> tuple[dict[int, tf.Tensor], dict[int, tf.Tensor]]:
        """Moves the moving averages of weights.

        Args:
            averages: The average and the new weight, by index.
            step: The 1-based count of updates, in an integer dtype.

        Returns:
            The new averages, and by the same index the weights with averages in their
            place, where the optimizer has an `ema_overwrite_frequency`.
        """
        optimizer = self._optimizer
        moved, overwriting = {}, {}
        for index, (average, weight) in averages.items():
            dtype = computation_dtype(optimizer._trainable_variables[index].dtype)
            value = tf.cast(weight, dtype)
            if not value.dtype.is_floating:  # no gradient ever moves it
                moved[index] = value
                continue
            # The first average is the weight itself.
            momentum = tf.constant(optimizer.ema_momentum, dtype) * tf.cast(step > 1, dtype)
            moved[index] = momentum * tf.cast(average, dtype) + (1 - momentum) * value
            if optimizer.ema_overwrite_frequency:
                overwrite = tf.equal(step % optimizer.ema_overwrite_frequency, 0)
                overwriting[index] = tf.where(overwrite, moved[index], value)
        return moved, overwriting

    # --- one variable --------------------------------------------------------

    def update_variable(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable by itself: the rule alone.

        Args:
            gradient: Dense or `tf.IndexedSlices`; rows may repeat.
            variable: A Keras or TensorFlow variable.
            learning_rate: Scalar.
        """
        optimizer = self._optimizer
        index = optimizer._get_variable_index(variable)
        step = optimizer.iterations + 1
        gradient = self._merged({index: gradient})[index]
        if _is_sparse(gradient):
            self._update_rows(gradient, variable, index, learning_rate, step, decay=False)
            return
        change, slots = optimizer._ruled(
            gradient, self._slots_of(index), learning_rate, step, variable_dtype=variable.dtype
        )
        for name, value in slots.items():
            optimizer.assign(optimizer._slots[name][index], value)
        optimizer.assign_add(variable, change)

    # --- sparse rows ---------------------------------------------------------

    def _merged(self, gradients: dict[int, Any]) -> dict[int, Any]:
        """Gradients without repeated rows: by row where rows suffice, else dense."""
        optimizer = self._optimizer
        by_row = optimizer.lazy or optimizer.zero_gradient_changes_nothing
        merged = {}
        for index, gradient in gradients.items():
            variable = optimizer._trainable_variables[index]
            if not _is_sparse(gradient):
                known = gradient.shape.is_fully_defined()
                merged[index] = gradient if known else tf.ensure_shape(gradient, variable.shape)
                continue
            values = tf.cast(gradient.values, computation_dtype(variable.dtype))
            if by_row and not optimizer.gradient_accumulation_steps:
                rows, positions = tf.unique(gradient.indices)
                values = tf.math.unsorted_segment_sum(values, positions, tf.size(rows))
                merged[index] = tf.IndexedSlices(values, rows, gradient.dense_shape)
            else:
                dense = tf.math.unsorted_segment_sum(values, gradient.indices, variable.shape[0])
                merged[index] = tf.ensure_shape(dense, variable.shape)
        return merged

    def _dense(self, index: int, gradient: tf.IndexedSlices) -> tf.Tensor:
        """A gradient without repeated rows in its variable's shape."""
        shape = self._optimizer._trainable_variables[index].shape
        rows = tf.cast(gradient.indices, tf.int64)[:, None]
        return tf.scatter_nd(rows, gradient.values, tf.constant(tuple(shape), tf.int64))

    def _update_rows_of_all(
        self,
        rows: dict[int, tf.IndexedSlices],
        norm: tf.Tensor | None,
        learning_rate: tf.Tensor,
        step: tf.Tensor,
    ) -> list[tf.IndexedSlices]:
        """Updates the variables that have a sparse gradient; returns their rows' changes."""
        optimizer = self._optimizer
        changes = []
        clipped = self._clipped(list(rows.values()), norm)
        for index, gradient in zip(rows, clipped, strict=True):
            variable = optimizer._trainable_variables[index]
            decayed = optimizer.weight_decay is not None and optimizer._use_weight_decay(variable)
            if decayed and not optimizer.lazy:
                value = tf.convert_to_tensor(variable)
                decay = _decay(learning_rate, optimizer.weight_decay, value.dtype)
                optimizer.assign_sub(variable, value * decay)
            change = self._update_rows(
                gradient,
                variable,
                index,
                learning_rate,
                step,
                decay=decayed and optimizer.lazy,
            )
            changes.append(tf.IndexedSlices(change, gradient.indices))
        return changes

    def _update_rows(
        self,
        gradient: tf.IndexedSlices,
        variable: Any,
        index: int,
        learning_rate: Any,
        step: Any,
        *,
        decay: bool,
    ) -> tf.Tensor:
        """Updates the rows of a gradient without repeated rows; returns their change."""
        optimizer = self._optimizer
        rows = gradient.indices
        slots = {
            name: tf.gather(_raw(slot[index]), rows) for name, slot in optimizer._slots.items()
        }
        change, slots = optimizer._ruled(
            gradient.values, slots, learning_rate, step, variable_dtype=variable.dtype
        )
        for name, value in slots.items():
            optimizer.assign(optimizer._slots[name][index], tf.IndexedSlices(value, rows))
        moved = change
        if decay:
            before = tf.cast(tf.gather(_raw(variable), rows), change.dtype)
            moved = change - before * _decay(learning_rate, optimizer.weight_decay, change.dtype)
        optimizer.assign_add(variable, tf.IndexedSlices(moved, rows))
        return change

    # --- gradients -----------------------------------------------------------

    def _clipped(self, grads: Sequence[Any], norm: tf.Tensor | None = None) -> list[Any]:
        """Gradients clipped as Keras clips them; sparse ones stay sparse.

        Args:
            grads: Dense gradients, or `tf.IndexedSlices` without repeated rows.
            norm: The norm for `global_clipnorm`, where `grads` are not all there are.
        """
        optimizer = self._optimizer
        if optimizer.clipnorm:
            return [tf.clip_by_norm(g, optimizer.clipnorm) for g in grads]
        if optimizer.clipvalue:
            limit = optimizer.clipvalue
            return [tf.clip_by_value(g, -limit, limit) for g in grads]
        if optimizer.global_clipnorm:
            limit = optimizer.global_clipnorm
            if norm is None:
                norm = tf.sqrt(self._square(grads))
            # Keras's formula: an infinite norm makes the gradients NaN.
            scale = limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)
            return [_scaled(g, tf.cast(scale, g.dtype)) for g in grads]
        return list(grads)

    def _global_norm_with_rows(
        self, dense: dict[int, tf.Tensor], rows: dict[int, tf.IndexedSlices]
    ) -> tf.Tensor | None:
        """The norm that `global_clipnorm` needs before any row is updated."""
        if not self._optimizer.global_clipnorm:
            return None
        square = self._square(rows.values())
        if dense:
            if self._dense_squares is None:
                self._dense_squares = compiled(
                    lambda grads: self._square(
                        [self._unscaled(tf.cast(g, self._norm_dtype)) for g in grads]
                    ),
                    dense.values(),
                )
            square += self._dense_squares(list(dense.values()))
        return tf.sqrt(square)

    def _square(self, tensors: Iterable[Any]) -> tf.Tensor:
        """The squared Euclidean norm of all tensors together, sparse ones merged."""
        squares = list(self._squares(dict(enumerate(tensors))).values())
        return tf.add_n(squares) if squares else tf.zeros((), self._norm_dtype)

    def _squares(self, tensors: Mapping[int, Any]) -> dict[int, tf.Tensor]:
        """The squared Euclidean norms of tensors by index, sparse ones merged."""
        dtype = self._norm_dtype
        return {
            # How many rows there are differs from step to step.
            index: tf.reduce_sum(tf.square(tf.cast(t.values, dtype)))
            if _is_sparse(t)
            else _sum_of_squares(tf.cast(t, dtype))
            for index, t in tensors.items()
        }

    def _squares_of_step(
        self, gradients: Mapping[int, Any], changes: Mapping[int, Any], norm: tf.Tensor | None
    ) -> dict[str, dict[int, tf.Tensor]]:
        """Squared norms by the names of their metrics and by index.

        Args:
            gradients: Before clipping, by index.
            changes: By index.
            norm: For `global_clipnorm`, where `gradients` are not all there are.
        """
        optimizer = self._optimizer
        squares = {"grad_norm": self._squares(gradients)}
        if optimizer.clipnorm or optimizer.clipvalue or optimizer.global_clipnorm:
            clipped = self._clipped(list(gradients.values()), norm)
            squares["clipped_grad_norm"] = self._squares(dict(zip(gradients, clipped, strict=True)))
        return {**squares, "update_norm": self._squares(changes)}

    @functools.cached_property
    def _norm_dtype(self) -> tf.DType:
        return tf.as_dtype(common_dtype(self._optimizer._trainable_variables))

    def _unscaled(self, gradient: Any) -> Any:
        factor = self._optimizer.loss_scale_factor
        return gradient if factor is None else _scaled(gradient, 1.0 / factor)

    def _slots_of(self, index: int) -> dict[str, tf.Tensor]:
        slots = self._optimizer._slots
        return {name: tf.convert_to_tensor(slot[index]) for name, slot in slots.items()}


def after(tensors: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """A scope in whose graph nothing happens before the tensors are there.

    Where data of unknown length ends, the iterator of a train function raises, but operations
    that do not need its data still run: they would count a step that was not made.

    Args:
        tensors: Dense or `tf.IndexedSlices`; `None` for what is not there.
    """
    parts = [t.values if _is_sparse(t) else t for t in tensors if t is not None]
    return tf.control_dependencies(parts)


def compiled(function: Callable[..., Any], tensors: Iterable[Any]) -> Callable[..., Any]:
    """A function as one XLA cluster wherever it is called.

    The launch of a cluster costs more than it saves where there is little to compute;
    such a function runs as plain operations, unless it is called from compiled code.

    Args:
        function: Of tensors and variables.
        tensors: What it computes on, for its size.
    """
    return tf.function(function, jit_compile=is_worth_compiling(tensors), autograph=False)


def is_worth_compiling(tensors: Iterable[Any]) -> bool:
    """Whether a function of tensors is large enough for a cluster, see `compiled`."""
    large = sum(math.prod(tensor.shape) for tensor in tensors) >= SMALLEST_CLUSTER
    return large and xla_is_available()


# Traced once for each shape.
_sum_of_squares = tf.function(sum_of_squares, autograph=False)


@functools.cache
def xla_is_available() -> bool:
    """Whether TensorFlow can compile with XLA here: not on the GPU of a Mac."""
    return platform.system() != "Darwin" or not tf.config.list_physical_devices("GPU")


def is_distributed(variable: Any) -> bool:
    """Whether a strategy keeps a copy of the variable on each of its devices."""
    return isinstance(_raw(variable), tf.distribute.DistributedValues)


def on_every_device(anchor: Any, function: Callable[..., None], *args: Any) -> None:
    """Calls a function on each device that a distributed variable is on.

    There it sees that device's copies of variables and its replica's `args`.

    Args:
        anchor: The distributed variable.
        function: Called as `function(*args, device=name, first=flag)`, where `first`
            says whether it is the first of the devices.
        *args: Structures of tensors, as a replica has them.
    """
    anchor = _raw(anchor)
    strategy = anchor.distribute_strategy

    def across_replicas(_: Any, *args: Any) -> None:
        first = strategy.experimental_local_results(anchor)[0].device

        def on_one_device(component: Any, *args: Any) -> None:
            function(*args, device=component.device, first=component.device == first)

        strategy.extended.update(anchor, on_one_device, args=args, group=False)

    tf.__internal__.distribute.interim.maybe_merge_call(across_replicas, strategy, *args)


def constraint_compiles(constraint: Any) -> bool:
    """Whether a constraint is known to compile: Keras's own and `Bounds`, but not a user's."""
    return type(constraint).__module__.startswith(("keras.", "keras_gdopt."))


def _decay(learning_rate: Any, weight_decay: Any, dtype: tf.DType) -> tf.Tensor:
    """What part of a weight a step takes away."""
    if is_known(weight_decay):  # in float32 it would lose digits on its way to float64
        weight_decay = tf.constant(weight_decay, dtype)
    return tf.cast(learning_rate, dtype) * tf.cast(weight_decay, dtype)


def _raw(variable: Any) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _is_sparse(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)


def _scaled(gradient: Any, scale: Any) -> Any:
    if _is_sparse(gradient):
        return tf.IndexedSlices(gradient.values * scale, gradient.indices, gradient.dense_shape)
    return gradient * scale
