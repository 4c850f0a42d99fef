"""One training step with TensorFlow: reads variables, runs one compiled step, writes them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_gdopt.optimizers.arithmetic import common_dtype, computation_dtype
from keras_gdopt.optimizers.compilation import (
    compiled,
    constraint_compiles,
    is_worth_compiling,
)
from keras_gdopt.optimizers.dense_step import (
    accumulate,
    clip,
    decayed_part,
    is_sparse,
    squares,
    take_step,
    total_square,
    trained_variables,
    unscale,
)
from keras_gdopt.optimizers.nonfinite import all_finite, all_finite_by_squares, has_finite_norm
from keras_gdopt.optimizers.recording import Record, Recorder, summarize_step
from keras_gdopt.optimizers.replicas import is_distributed, on_every_device, raw_variable
from keras_gdopt.optimizers.rule import (
    RuleOptimizer,
    StepSettings,
    StepVariables,
    TrainedVariable,
)
from keras_gdopt.optimizers.sparse_rows import merge_rows, scatter_rows, step_rows, sum_rows
from keras_gdopt.tensor import Tensor


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a compiled step does; each plan has its own compiled step.

    Variables are given by their index among the optimizer's variables.
    """

    dense: tuple[int, ...]  # updated in the compiled step
    rows: tuple[int, ...]  # updated before it, by gather and scatter
    update: bool  # False: only add the gradients to the accumulators
    record: int  # an index in `TIERS`; -1: nothing
    when_due: bool  # whether the compiled step itself checks if recording is due, and stores
    device: str  # the replica's under a strategy, else empty


class TensorFlowStep:
    """Runs a `GradientOptimizer`'s step with TensorFlow.

    Neither Keras nor TensorFlow tracks its contents, which are not saved. An optimizer replaces
    it when one of its arguments changes, as arguments are constants in a compiled step.

    Args:
        optimizer: The optimizer; it must be built before the first step.
        recorder: Records the optimizer's steps.
    """

    def __init__(self, optimizer: RuleOptimizer, recorder: Recorder) -> None:
        self._optimizer = optimizer
        self._recorder = recorder
        self._compiled_steps: dict[_Plan, Callable[..., Any]] = {}
        self._dense_square: Callable[..., Any] | None = None
        self._all_finite: Callable[..., Any] | None = None

    @property
    def compiled_steps(self) -> Mapping[_Plan, Callable[..., Any]]:
        """The functions made so far, one for each plan."""
        return self._compiled_steps

    # --- what it knows about the optimizer -----------------------------------

    @property
    def _variables(self) -> StepVariables:
        return self._optimizer.step_variables

    @functools.cached_property
    def _settings(self) -> StepSettings:
        return self._optimizer.step_settings

    @functools.cached_property
    def _trained(self) -> Sequence[TrainedVariable]:
        return trained_variables(self._optimizer)

    @functools.cached_property
    def _norm_dtype(self) -> str:
        return common_dtype(self._variables.trainable)

    def _slots_of(self, index: int) -> dict[str, Tensor]:
        slots = self._variables.slots
        return {name: tf.convert_to_tensor(slot[index]) for name, slot in slots.items()}

    # --- a whole step --------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def apply(
        self, gradients: Mapping[int, Any], all_reduce: Callable[..., Sequence[Any]]
    ) -> Tensor | None:
        """Updates the variables, after summing the repeated rows of sparse gradients.

        Args:
            gradients: Gradients by variable index. Each order of the indices has its own
                compiled step.
            all_reduce: Sums the gradients in pairs of gradient and variable over the replicas
                of a strategy.

        Returns:
            Whether the step was taken; `None` if it always is.
        """
        gradients = self._merge(gradients)
        variables = [self._variables.trainable[index] for index in gradients]
        if not any(is_distributed(variable) for variable in variables):
            is_taken = self.takes_step(gradients.values())
            self._apply_if(is_taken, gradients)
            return is_taken
        # Each device makes the whole step by itself, so that clipping and accumulation see the
        # gradient of the whole batch, as they do on a single device.
        raw = [raw_variable(variable) for variable in variables]
        reduced = [g for g, _ in all_reduce(zip(gradients.values(), raw, strict=True))]
        is_taken = self.takes_step(reduced)

        def apply_here(
            grads: Sequence[Any], is_taken: Tensor | None, *, device: str, first: bool
        ) -> None:
            # The same row may come from several replicas.
            summed = self._merge(dict(zip(gradients, grads, strict=True)))
            self._apply_if(is_taken, summed, device=device, record=first)

        on_every_device(raw[0], apply_here, reduced, is_taken)
        return is_taken

    def takes_step(self, gradients: Iterable[Any]) -> Tensor | None:
        """Whether a step with these gradients is taken; `None` if it always is.

        Args:
            gradients: Dense tensors or `tf.IndexedSlices`, at least one.
        """
        if not self._settings.skip_nonfinite:
            return None
        gradients = list(gradients)
        is_good, is_good_if_small = all_finite, all_finite_by_squares
        if self._settings.clips_by_norm:
            gradients = [unscale(gradient, self._settings) for gradient in gradients]
            is_good = is_good_if_small = has_finite_norm
        rows = [gradient for gradient in gradients if is_sparse(gradient)]
        dense = [gradient for gradient in gradients if not is_sparse(gradient)]
        found = []
        if rows:  # not compiled, as their number differs from step to step
            found.append(is_good(rows))
        if dense and is_worth_compiling(dense):
            if self._all_finite is None:
                self._all_finite = compiled(is_good, dense)
            found.append(self._all_finite(dense))
        elif dense:
            found.append(is_good_if_small(dense))
        return functools.reduce(tf.logical_and, found)

    def _apply_if(
        self,
        is_taken: Tensor | None,
        gradients: Mapping[int, Any],
        *,
        device: str = "",
        record: bool = True,
    ) -> None:
        """Makes one step on one device, or skips and counts it."""

        def apply() -> None:
            self._apply_here(gradients, device=device, record=record)

        if is_taken is None:
            apply()
            return
        self._recorder.expect_skipped()
        step: Callable[[], None] = apply
        if not is_worth_compiling([g for g in gradients.values() if not is_sparse(g)]):
            # Not inlined, it is one operation under the condition, and not hundreds.
            step = tf.function(apply, autograph=False, experimental_attributes={"_noinline": True})
        tf.cond(is_taken, step, self._recorder.add_skipped if record else lambda: None)

    def _apply_here(self, gradients: Mapping[int, Any], *, device: str, record: bool) -> None:
        """Makes one step on one device, from gradients without repeated rows."""
        optimizer, recorder = self._optimizer, self._recorder
        rows = {i: unscale(g, self._settings) for i, g in gradients.items() if is_sparse(g)}
        dense = {i: g for i, g in gradients.items() if not is_sparse(g)}
        recorder.note_trace()
        learning_rate = optimizer.learning_rate
        if isinstance(learning_rate, (int, float)):  # from a callable
            learning_rate = tf.constant(learning_rate, keras.config.floatx())
        learning_rate = tf.convert_to_tensor(learning_rate)
        step = tf.convert_to_tensor(optimizer.iterations + 1)

        def run(*, update: bool, record: bool, when_due: bool = False) -> None:
            tier = recorder.tier if record else -1
            plan = _Plan(tuple(dense), tuple(rows), update, tier, when_due, device)
            norm, row_squares = None, {}
            if rows:
                norm = self._global_norm_with_rows(dense, rows)
                changes = self._update_rows_of_all(rows, norm, learning_rate, step)
                if record:
                    row_squares = self._squares_of_step(rows, changes, norm)
            if self._is_idle(plan):
                return
            compiled_step = self._compiled_step(plan)
            recorded = compiled_step(list(dense.values()), learning_rate, step, norm, row_squares)
            if record and not when_due:
                recorder.store(self._with_rows(recorded, rows), step)

        accumulated = self._settings.gradient_accumulation_steps or 1
        iterations = self._variables.iterations
        plain = _Plan(tuple(dense), tuple(rows), True, -1, False, device)

        def update() -> None:
            if not record or not recorder.asked_for:
                run(update=True, record=False)
            elif not rows and not is_worth_compiling(self._computed_on(plain)):
                # A condition around the whole update would cost more than it saves.
                run(update=True, record=True, when_due=True)
            else:
                tf.cond(
                    recorder.due(iterations, accumulated),
                    lambda: run(update=True, record=True),
                    lambda: run(update=True, record=False),
                )

        if accumulated > 1:
            tf.cond(
                tf.equal((iterations + 1) % accumulated, 0),
                update,
                lambda: run(update=False, record=False),
            )
        else:
            update()
        for index in gradients:
            variable = self._variables.trainable[index]
            if variable.constraint is not None and not constraint_compiles(variable.constraint):
                variable.assign(variable.constraint(variable))

    def _merge(self, gradients: Mapping[int, Any]) -> dict[int, Any]:
        """Merges repeated rows: gradients stay sparse if rows suffice, else become dense."""
        optimizer = self._optimizer
        by_row = optimizer.lazy or optimizer.zero_gradient_changes_nothing
        by_row = by_row and not self._settings.gradient_accumulation_steps
        merged = {}
        for index, gradient in gradients.items():
            variable = self._variables.trainable[index]
            if is_sparse(gradient) and by_row:
                merged[index] = merge_rows(gradient, variable.dtype)
            elif is_sparse(gradient):
                merged[index] = sum_rows(gradient, variable.shape, variable.dtype)
            else:
                known = gradient.shape.is_fully_defined()
                merged[index] = gradient if known else tf.ensure_shape(gradient, variable.shape)
        return merged

    # --- the compiled step ---------------------------------------------------

    def _is_idle(self, plan: _Plan) -> bool:
        """Whether nothing is left to do after the row updates."""
        variables = self._variables.trainable
        return not (
            plan.dense
            or plan.record >= 0
            or self._variables.averages
            or any(variables[index].constraint is not None for index in plan.rows)
        )

    def _compiled_step(self, plan: _Plan) -> Callable[..., Any]:
        if plan not in self._compiled_steps:
            body = functools.partial(self._run, plan)
            self._compiled_steps[plan] = compiled(body, self._computed_on(plan))
        return self._compiled_steps[plan]

    def _computed_on(self, plan: _Plan) -> list[Any]:
        """The variables that a compiled step reads in full."""
        variables = self._variables.trainable
        if self._variables.averages or (plan.record >= 0 and not plan.when_due):
            return list(variables)
        constrained = [i for i in plan.rows if variables[i].constraint is not None]
        return [variables[index] for index in (*plan.dense, *constrained)]

    def _run(
        self,
        plan: _Plan,
        grads: Sequence[Tensor],
        learning_rate: Tensor,
        step: Tensor,
        norm: Tensor | None,
        row_squares: Mapping[str, Mapping[int, Tensor]],
    ) -> Record | None:
        """The body of a compiled step; `plan` is bound before tracing.

        Returns:
            The step's record, unless the step stores it itself.
        """
        variables, settings = self._variables, self._settings
        gradients = {
            index: unscale(
                tf.cast(gradient, computation_dtype(self._trained[index].dtype)), settings
            )
            for index, gradient in zip(plan.dense, grads, strict=True)
        }
        if settings.gradient_accumulation_steps:
            gradients = self._accumulate(plan, gradients)
        averages = {
            index: average
            for index, average in enumerate(variables.averages)
            if average is not None
        }
        done = take_step(
            self._trained,
            gradients if plan.update else {},
            dict(enumerate(variables.trainable)),
            {index: self._slots_of(index) for index in plan.dense} if plan.update else {},
            averages,
            learning_rate,
            step,
            settings,
            constrained=[
                index
                for index in (*plan.dense, *plan.rows)
                if constraint_compiles(self._trained[index].constraint)
            ],
            norm=norm,
        )
        recorded = None
        if plan.record >= 0:

            def record() -> Record:
                own = self._squares_of_step(gradients, done.changes, norm)
                merged = {name: {**row_squares.get(name, {}), **own[name]} for name in own}
                return self._summarize(plan, learning_rate, step, merged, done, gradients)

            if plan.when_due:
                # Not inlined, it is one operation and costs little when it is not due; inlined,
                # TensorFlow would have to look at each of its hundreds of operations.
                store = tf.function(
                    lambda: self._recorder.store(record(), step),
                    autograph=False,
                    experimental_attributes={"_noinline": True},
                )
                due = self._recorder.due(
                    variables.iterations, settings.gradient_accumulation_steps or 1
                )
                tf.cond(due, store, lambda: None)
            else:
                recorded = record()
        for index, average in done.averages.items():
            self._optimizer.assign(variables.averages[index], average)
        for index, slots in done.slots.items():
            for name, value in slots.items():
                self._optimizer.assign(variables.slots[name][index], value)
        for index, value in done.weights.items():
            variable, change = variables.trainable[index], done.changes.get(index)
            is_sum = settings.weight_decay is None and value is done.moved.get(index)
            if is_sum and change is not None and change.dtype == variable.dtype:
                self._optimizer.assign_add(variable, change)  # in place
            else:
                self._optimizer.assign(variable, value)
        return recorded

    def _accumulate(self, plan: _Plan, gradients: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Adds gradients to their sums; returns the mean gradients for an update."""
        sums, count = self._variables.accumulators, self._settings.gradient_accumulation_steps
        means = {}
        for index, gradient in gradients.items():
            total, means[index] = accumulate(sums[index], gradient, count or 1)
            self._optimizer.assign(sums[index], tf.zeros_like(total) if plan.update else total)
        if plan.update:
            # Like Keras, also reset the sums of variables without a gradient in this step.
            for index, total in enumerate(sums):
                if index not in plan.dense:
                    self._optimizer.assign(total, tf.zeros_like(total))
        return means

    # --- one variable --------------------------------------------------------

    def update_variable(self, index: int, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates a single variable by the rule only.

        Args:
            index: The variable's index among the optimizer's.
            gradient: A dense tensor or `tf.IndexedSlices`, whose rows may repeat.
            variable: A Keras or TensorFlow variable.
            learning_rate: A scalar.
        """
        step = self._optimizer.iterations + 1
        gradient = self._merge({index: gradient})[index]
        if is_sparse(gradient):
            self._update_rows(index, gradient, variable, learning_rate, step, None)
            return
        change, slots = self._optimizer.apply_rule(
            gradient, self._slots_of(index), learning_rate, step, variable_dtype=variable.dtype
        )
        for name, value in slots.items():
            self._optimizer.assign(self._variables.slots[name][index], value)
        self._optimizer.assign_add(variable, change)

    # --- sparse rows ---------------------------------------------------------

    def _update_rows_of_all(
        self,
        rows: Mapping[int, tf.IndexedSlices],
        norm: Tensor | None,
        learning_rate: Tensor,
        step: Tensor,
    ) -> dict[int, tf.IndexedSlices]:
        """Updates the variables with sparse gradients; returns the changes of their rows."""
        settings, lazy = self._settings, self._optimizer.lazy
        changes = {}
        clipped = clip(list(rows.values()), settings, self._norm_dtype, norm)
        for index, gradient in zip(rows, clipped, strict=True):
            variable = self._variables.trainable[index]
            weight_decay = settings.weight_decay if self._trained[index].decays else None
            if weight_decay is not None and not lazy:
                value = tf.convert_to_tensor(variable)
                self._optimizer.assign_sub(
                    variable, value * decayed_part(learning_rate, weight_decay, value.dtype)
                )
            change = self._update_rows(
                index, gradient, variable, learning_rate, step, weight_decay if lazy else None
            )
            changes[index] = tf.IndexedSlices(change, gradient.indices)
        return changes

    def _update_rows(
        self,
        index: int,
        gradient: tf.IndexedSlices,
        variable: Any,
        learning_rate: Any,
        step: Any,
        weight_decay: Any,
    ) -> Tensor:
        """Updates the rows in a gradient without repeated rows; returns the rule's change."""
        slots = {name: raw_variable(slot[index]) for name, slot in self._variables.slots.items()}
        # Not the traced functions in `_trained`: the number of rows differs from step to step.
        rule = functools.partial(self._optimizer.apply_rule, variable_dtype=variable.dtype)
        done = step_rows(
            rule,
            gradient,
            raw_variable(variable),
            slots,
            learning_rate,
            step,
            weight_decay,
        )
        for name, value in done.slots.items():
            self._optimizer.assign(
                self._variables.slots[name][index], tf.IndexedSlices(value, gradient.indices)
            )
        self._optimizer.assign_add(variable, tf.IndexedSlices(done.moved, gradient.indices))
        return done.change

    def _global_norm_with_rows(
        self, dense: Mapping[int, Tensor], rows: Mapping[int, tf.IndexedSlices]
    ) -> Tensor | None:
        """The norm that `global_clipnorm` needs before any row is updated."""
        settings, dtype = self._settings, self._norm_dtype
        if not settings.global_clipnorm:
            return None
        square = total_square(list(rows.values()), dtype)
        if dense:
            if self._dense_square is None:
                self._dense_square = compiled(
                    lambda grads: total_square(
                        [unscale(tf.cast(gradient, dtype), settings) for gradient in grads], dtype
                    ),
                    dense.values(),
                )
            square += self._dense_square(list(dense.values()))
        return tf.sqrt(square)

    # --- what is recorded ----------------------------------------------------

    def _squares_of_step(
        self, gradients: Mapping[int, Any], changes: Mapping[int, Any], norm: Tensor | None
    ) -> dict[str, dict[int, Tensor]]:
        """Squared norms by metric name and variable index.

        Args:
            gradients: Gradients before clipping, by index.
            changes: The rule's changes, by index.
            norm: The norm for `global_clipnorm`, if there are gradients besides `gradients`.
        """
        dtype = self._norm_dtype
        found = {"grad_norm": squares(gradients, dtype)}
        if self._settings.clips:
            clipped = clip(list(gradients.values()), self._settings, dtype, norm)
            found["clipped_grad_norm"] = squares(dict(zip(gradients, clipped, strict=True)), dtype)
        return {**found, "update_norm": squares(changes, dtype)}

    def _summarize(
        self,
        plan: _Plan,
        learning_rate: Tensor,
        step: Tensor,
        found: dict[str, dict[int, Tensor]],
        done: Any,
        gradients: Mapping[int, Tensor],
    ) -> Record:
        """Makes a step's record from squared norms and the step's result."""
        slots = self._variables.slots
        weights = {
            index: done.moved.get(index, variable)
            for index, variable in enumerate(self._variables.trainable)
            if not self._trained[index].is_overwritten
        }
        found["weight_norm"] = squares(weights, self._norm_dtype)
        all_slots = {
            name: {
                index: done.slots[index][name]
                if index in done.slots
                else tf.convert_to_tensor(slot)
                for index, slot in enumerate(of_variables)
                if slot is not None
            }
            for name, of_variables in slots.items()
        }
        return summarize_step(
            self._recorder,
            self._optimizer,
            learning_rate,
            step,
            found,
            all_slots,
            gradients,
            plan.record,
        )

    def _with_rows(self, record: Record, rows: Mapping[int, tf.IndexedSlices]) -> Record:
        """Adds the sparse gradients to a record that holds gradients."""
        if record.gradients is None:
            return record
        dense = {
            str(index): scatter_rows(gradient, self._variables.trainable[index].shape)
            for index, gradient in rows.items()
        }
        return record._replace(gradients={**record.gradients, **dense})
