"""The base class that turns a pure update rule into a Keras optimizer."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from keras_gdopt.optimizers.argument_checks import (
    check_is_floating,
    check_tensorflow,
    checked_base_arguments,
    checked_flag,
    checked_learning_rate,
)
from keras_gdopt.optimizers.arithmetic import computation_dtype, constrain
from keras_gdopt.optimizers.compilation import after
from keras_gdopt.optimizers.recording import Recorder, RecordingOptimizer
from keras_gdopt.optimizers.rule import Slots, StepSettings, StepVariables, Update
from keras_gdopt.optimizers.saved_state import StateGroup, variable_path
from keras_gdopt.tensor import Tensor


class GradientOptimizer(RecordingOptimizer):
    r"""Turns a pure update rule into a Keras optimizer.

    A subclass declares its slots, its hyper-parameters and one pure function,

    $$(\Delta\theta_t,\ \text{slots}_t) = \text{update\_rule}(g_t,\
    \text{slots}_{t-1},\ \eta_t,\ t), \qquad \theta_t = \theta_{t-1} + \Delta\theta_t$$

    and this class does the rest. With TensorFlow, *one* compiled step updates all
    dense variables: XLA compiles clipping, weight decay, the rule, the moving average
    of the weights and Keras's own constraints together, even where Keras leaves the
    train function uncompiled, as it does on a CPU. (With fewer than 65,536 entries,
    launching a compiled step costs more than the update; the step is then a graph of
    plain operations, unless the train function is compiled.) In gradients of
    embeddings, repeated rows are summed before anything else. Under a distribution
    strategy, the gradients are first summed over the replicas; each device then runs
    the same step by itself, so that clipping, accumulation and the step metrics mean
    the same on any number of devices. With the JAX and torch backends, the rule runs
    through Keras's own code.

    Args:
        learning_rate: A non-negative number, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments that returns the rate.
        lazy: What happens to embedding rows that are absent from the batch. With
            `False` (the default), the same as with a dense gradient: their slots decay
            and, if the rule says so, the rows move. With `True`, the rows and their
            slots stay as they are, weight decay included, and the time of a step is
            proportional to the number of rows in the batch. `True` needs the TensorFlow
            backend and cannot be combined with `gradient_accumulation_steps`, whose
            accumulators are dense. `use_ema` and constraints apply to the whole
            variable in either case.
        skip_nonfinite: Whether a step is skipped if an entry of its gradients is not
            finite (under a strategy, of their sum over the replicas), or if they are to
            be clipped by a norm that overflows. A skipped step changes neither the
            weights nor the optimizer's state: `iterations` does not advance, so
            schedules, bias corrections, moving averages and accumulation stand still.
            `step_metrics` counts such steps as `skipped_steps`. The state of
            layers, such as the statistics of batch normalization, is not undone. With
            `False` (the default), NaN reaches the weights, as with Keras's optimizers.
            `True` needs the TensorFlow backend.
        **kwargs: The arguments of Keras's base class, with its defaults:

            - `weight_decay` (`None`): each step subtracts
              `weight_decay * learning_rate * variable`, before the rule's change.
            - `clipnorm`, `clipvalue`, `global_clipnorm` (`None`): clip each gradient's
              norm, each entry, or the norm of all gradients together; at most one may
              be set. Under a strategy, the sum over the replicas is clipped (Keras's
              own optimizers clip each replica's share of it).
            - `use_ema` (`False`), `ema_momentum` (0.99) and
              `ema_overwrite_frequency` (`None`): keep a moving average of the
              weights, and overwrite the weights with it every
              `ema_overwrite_frequency` steps and at the end of `fit`.
            - `loss_scale_factor` (`None`): multiplies the loss, and divides the
              gradients.
            - `gradient_accumulation_steps` (`None`): the number of steps per update,
              which uses the mean of their gradients. Bias corrections count updates.
              Schedules and the moving average count steps, as in Keras, so with n
              steps per update a schedule needs n times as many steps.
            - `name`: defaults to the class's name in snake case.

    Raises:
        ValueError: If an argument is unknown, has the wrong type or is out of
            range; in `build`, if a variable is in float16 (where an epsilon of 1e-8 is
            0: use the `mixed_float16` policy, which keeps the weights in float32); in
            `apply`, if a gradient does not fit its variable, a variable has a complex or
            integer dtype, or the optimizer was not built for a variable.

    Variables in bfloat16 are updated in float32; their slots, moving averages and
    accumulators are in float32.

    The arguments become attributes. A changed attribute takes effect when a step is
    traced again, as with Keras's optimizers, or from the next eager step on. (A new
    `learning_rate` takes effect at once everywhere.)

    Example:

    >>> import keras
    >>> import keras_gdopt as gdopt
    >>> @keras.saving.register_keras_serializable("my_package")
    ... class SignDescent(gdopt.GradientOptimizer):
    ...     hyperparameters = ("momentum",)
    ...     slots = {"velocity": 0.0}
    ...
    ...     def __init__(self, learning_rate=0.01, momentum=0.9, **kwargs):
    ...         super().__init__(learning_rate, **kwargs)
    ...         self.momentum = momentum
    ...
    ...     def update_rule(self, gradient, slots, learning_rate, step):
    ...         velocity = self.momentum * slots["velocity"] + gradient
    ...         return -learning_rate * keras.ops.sign(velocity), {"velocity": velocity}
    >>> optimizer = SignDescent(learning_rate=0.1)
    >>> weight = keras.Variable([1.0, -2.0])
    >>> optimizer.apply([keras.ops.convert_to_tensor([0.5, 3.0])], [weight])
    >>> print(keras.ops.convert_to_numpy(weight))
    [ 0.9 -2.1]
    """

    hyperparameters: ClassVar[Sequence[str]] = ()
    """Names of the class's own constructor arguments, which are attributes too."""

    @property
    def evolvable(self) -> Mapping[str, str]:
        """Hyper-parameters that may differ between members of a population.

        Maps each name to its kind: `"positive"` for a number above 0 that mutates by factors;
        `"fraction"` for a number in [0, 1), such as a momentum, whose distance from 1 does.

        `Gadam(evolve=...)` gives `update_rule` a scalar tensor of the gradient's dtype in place
        of the number, so the rule must neither branch on it nor need a Python number. A class
        attribute is enough, unless the mapping depends on other hyper-parameters. The learning
        rate and `weight_decay` need no declaration.
        """
        return {}

    zero_gradient_changes_nothing: ClassVar[bool] = False
    """Whether an entry whose gradient is 0 keeps its value and its slots. Then the time of a
    step is proportional to the number of rows in the batch with `lazy=False`, too."""

    def __init__(
        self,
        learning_rate: Any,
        *,
        lazy: bool = False,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        arguments = checked_base_arguments(type(self).__name__, kwargs)
        lazy = checked_flag("lazy", lazy)
        if lazy and arguments.get("gradient_accumulation_steps"):
            raise ValueError(
                "`lazy=True` cannot be combined with `gradient_accumulation_steps`: the "
                "accumulators are dense, so which rows a batch had is lost. Received: "
                f"lazy={lazy}, "
                f"gradient_accumulation_steps={arguments['gradient_accumulation_steps']}"
            )
        skip_nonfinite = checked_flag("skip_nonfinite", skip_nonfinite)
        if skip_nonfinite:
            check_tensorflow("`skip_nonfinite=True`")
        if lazy and keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`lazy=True` needs the TensorFlow backend, whose embeddings have sparse "
                f"gradients. Received: lazy={lazy} with the backend "
                f"'{keras.backend.backend()}'"
            )
        super().__init__(checked_learning_rate(learning_rate), **arguments)
        self.lazy = lazy
        self.skip_nonfinite = skip_nonfinite
        self._slots: dict[str, list[Any]] = {}
        self._excluded_from_weight_decay: dict[str, list[Any]] = {}
        # Bypasses Keras's tracking: neither holds state that is saved.
        uses_tensorflow = keras.backend.backend() == "tensorflow"
        object.__setattr__(self, "_recorder", Recorder() if uses_tensorflow else None)
        object.__setattr__(self, "_tensorflow_step", self._new_tensorflow_step())

    # --- the rule ------------------------------------------------------------

    @property
    def slots(self) -> Mapping[str, float]:
        """Slot names, each with the initial value of its entries.

        A class attribute is enough, unless the slots depend on hyper-parameters.
        """
        return {}

    scalar_slots: ClassVar[Mapping[str, float]] = {}
    """Slots that hold one number for a whole variable, each with its initial value. For
    variables updated by rows (see `lazy`), they hold one number per row."""

    def update_rule(
        self,
        gradient: Tensor,
        slots: Slots,
        learning_rate: Tensor,
        step: Tensor,
    ) -> Update:
        """The algorithm, as a pure function written in `keras.ops`.

        Args:
            gradient: The gradient of one variable, of any shape.
            slots: This variable's slots by name, each of the gradient's shape and
                dtype; scalar slots of a shape that broadcasts against it.
            learning_rate: Scalar of the gradient's dtype, or an array that
                broadcasts against the gradient.
            step: The 1-based count of updates, as a floating-point scalar (float64
                with TensorFlow) or an array that broadcasts against the gradient.

        Returns:
            The change to add to the variable, and the new slots by name. For a scalar
            slot, a scalar is enough.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `update_rule`.")

    def rule_metrics(
        self,
        slots: Mapping[str, Sequence[Tensor]],
        learning_rate: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        """Additional scalars to record with the step metrics.

        Args:
            slots: The new slots of all variables, lists by slot name.
            learning_rate: As for `update_rule`.
            step: As for `update_rule`.

        Returns:
            Scalar tensors by metric name; none by default.
        """
        del slots, learning_rate, step
        return {}

    def effective_learning_rate(
        self, slots: Slots, learning_rate: Tensor, step: Tensor
    ) -> Tensor | None:
        """The factor of each entry's gradient, or of its average if the rule keeps one.

        Its quantiles are recorded with the step metrics.

        Args:
            slots: New slots, as vectors of the same entries.
            learning_rate: As for `update_rule`.
            step: As for `update_rule`.

        Returns:
            A vector; `None`, the default, if the factor is the learning rate for all entries.
        """
        del slots, learning_rate, step
        return None

    # --- what Keras calls ----------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the slots and restores state that was loaded before.

        Args:
            variables: The model's trainable variables.

        Raises:
            ValueError: If a variable is in float16, or loaded state does not fit.
        """
        if self.built:
            return
        variables = list(variables)
        self._check_loaded_state_fits(variables)
        for variable in variables:
            if keras.backend.standardize_dtype(variable.dtype) == "float16":
                raise ValueError(
                    f"{type(self).__name__} does not update variables in float16, where "
                    "small numbers such as an epsilon of 1e-8 are 0. Use the "
                    "`mixed_float16` policy, which computes in float16 and keeps the "
                    f"weights in float32. Received: variable '{variable_path(variable)}' of "
                    "dtype float16"
                )
        self._find_excluded_from_weight_decay(variables)
        super().build(variables)
        self._slots = {
            name: self.add_optimizer_variables(variables, name, functools.partial(_fill, initial))
            for name, initial in {**self.slots, **self.scalar_slots}.items()
        }
        if self._recorder is not None:
            self._recorder.variables = self._trainable_variables
        self._restore_loaded_state()

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Any) -> None:
        """Updates one variable and its slots. Keras calls it in strategies and loops.

        Args:
            gradient: A dense tensor, or a `tf.IndexedSlices` that may repeat rows.
            variable: A variable that the optimizer was built with.
            learning_rate: A scalar.

        Raises:
            ValueError: If the variable is of a complex or integer dtype.
        """
        check_is_floating(type(self).__name__, variable_path(variable), variable.dtype)
        index = self._get_variable_index(variable)
        if self._tensorflow_step is not None:
            self._tensorflow_step.update_variable(index, gradient, variable, learning_rate)
            return
        change, slots = self.apply_rule(
            gradient,
            {name: ops.convert_to_tensor(slot[index]) for name, slot in self._slots.items()},
            learning_rate,
            self.iterations + 1,
            variable_dtype=variable.dtype,
        )
        for name, value in slots.items():
            self.assign(self._slots[name][index], value)
        self.assign_add(variable, ops.cast(change, variable.dtype))

    def apply(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """Updates the variables with their gradients; builds the optimizer on the first call.

        Args:
            grads: One gradient for each variable: a dense tensor, a `tf.IndexedSlices`,
                or `None` for a variable that the loss does not depend on.
            trainable_variables: The variables; may be left out once the optimizer
                is built.

        Raises:
            ValueError: If a gradient does not fit its variable, is for a variable of a
                complex or integer dtype, or the optimizer was not built for a variable.
        """
        grads = [
            ops.convert_to_tensor(g) if isinstance(g, (list, tuple, float, int)) else g
            for g in grads
        ]
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    f"{type(self).__name__} is not built yet, and `apply` was called "
                    "without variables. Pass `trainable_variables`, or call "
                    "`optimizer.build(trainable_variables)` first."
                )
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        _check_gradients_fit(grads, variables)
        for gradient, variable in zip(grads, variables, strict=True):
            if gradient is not None:  # a variable without a gradient stays as it is
                check_is_floating(type(self).__name__, variable_path(variable), variable.dtype)
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        self._check_variables_are_known(variables)
        self._check_variables_are_distinct(variables)
        if self._tensorflow_step is None:
            super().apply(grads, variables)
        else:
            self._apply_with_tensorflow(grads, variables)

    @tf.autograph.experimental.do_not_convert
    def _apply_with_tensorflow(
        self, grads: Sequence[Tensor | None], variables: Sequence[Any]
    ) -> None:
        with keras.name_scope(self.name, caller=self), after(grads):
            grads, variables = self._filter_empty_gradients(grads, variables)
            grads, variables = self._overwrite_variables_directly_with_gradients(grads, variables)
            # Sorted by index, so that another order of the arguments, or raw variables in
            # place of Keras's, do not require another compiled step.
            indices = map(self._get_variable_index, variables)
            gradients = dict(sorted(zip(indices, grads, strict=True), key=lambda pair: pair[0]))
            is_taken = None
            if gradients:
                is_taken = self._tensorflow_step.apply(gradients, self._all_reduce_sum_gradients)
            count = 1 if is_taken is None else tf.cast(is_taken, self._iterations.dtype)
            self._iterations.assign_add(count)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for `from_config`."""
        config = super().get_config()
        config["lazy"] = self.lazy
        config["skip_nonfinite"] = self.skip_nonfinite
        for name in self.hyperparameters:
            config[name] = getattr(self, name)
        if self._excluded_from_weight_decay:
            excluded = {k: list(v) for k, v in self._excluded_from_weight_decay.items()}
            if self.built:
                paths = [variable_path(variable) for variable in self._trainable_variables]
                indices = [
                    index
                    for index, variable in enumerate(self._trainable_variables)
                    if self._var_key(variable) in self._exclude_from_weight_decay
                ]
                excluded["var_indices"] = indices
                excluded["var_paths"] = [paths[index] for index in indices]
            config["exclude_from_weight_decay"] = excluded
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "GradientOptimizer":
        """Creates an optimizer with the arguments of `config`, without state."""
        config = dict(config)
        excluded = config.pop("exclude_from_weight_decay", None)
        optimizer = super().from_config(config, custom_objects=custom_objects)
        if excluded:
            optimizer.exclude_from_weight_decay(var_names=excluded["var_names"])
            optimizer._excluded_from_weight_decay = excluded
        return optimizer

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from weight decay; call it before `build`.

        Unlike in Keras, the exclusions are part of the config, so they persist when a
        model is saved and loaded.

        Args:
            var_list: Variables to exclude.
            var_names: Regular expressions; a variable is excluded if one of them
                matches a part of its path (such as `sequential/dense/bias`).

        Raises:
            ValueError: If the optimizer is already built; in `build`, if a variable that
                a loaded config excludes cannot be identified among the model's.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` must be called before the optimizer is "
                "built, that is, before `model.fit` or `optimizer.build`."
            )
        super().exclude_from_weight_decay(var_list=var_list, var_names=var_names)
        self._excluded_from_weight_decay = {
            "var_paths": [variable_path(variable) for variable in var_list or ()],
            "var_indices": [None for _ in var_list or ()],  # known once built
            "var_names": list(var_names or ()),
        }

    # --- step metrics --------------------------------------------------------

    @property
    def recorder(self) -> Recorder | None:
        """Decides which steps are recorded and keeps the last record; TensorFlow only."""
        return self._recorder

    @property
    def step_metrics(self) -> dict[str, float]:
        """The metrics of the last recorded step; empty before there is one.

        - `iterations`: the count of updates at the recorded step,
        - `learning_rate`,
        - `grad_norm`: the norm of all gradients together, before clipping; under a
          strategy, of their sum over the replicas,
        - `clipped_grad_norm`: the same after clipping, if the optimizer clips,
        - `update_norm`: the norm of the rule's change to all weights, without
          weight decay,
        - `weight_norm`: the norm of all weights after the change, before constraints,
        - the metrics that the algorithm adds in `rule_metrics`,
        - `effective_learning_rate_p10`, `_p50` and `_p90`: quantiles of
          `effective_learning_rate` over a fixed sample of at most 512 entries, if it
          differs between entries,
        - `skipped_steps`: with `skip_nonfinite`, how many steps were skipped since the
          optimizer was made; known even without a recorded step.
        """
        return super().step_metrics

    def takes_step(self, grads: Iterable[Tensor | None]) -> Tensor | None:
        """See `RecordingOptimizer.takes_step`."""
        known = [gradient for gradient in grads if gradient is not None]
        if self._tensorflow_step is None or not known:
            return None
        return self._tensorflow_step.takes_step(known)

    # --- what a step needs ---------------------------------------------------

    @property
    def step_settings(self) -> StepSettings:
        """What the optimizer does around its rule, as its arguments say."""
        return StepSettings(
            learning_rate=self._learning_rate,
            clipnorm=self.clipnorm,
            clipvalue=self.clipvalue,
            global_clipnorm=self.global_clipnorm,
            weight_decay=self.weight_decay,
            ema_momentum=self.ema_momentum if self.use_ema else None,
            ema_overwrite_frequency=self.ema_overwrite_frequency if self.use_ema else None,
            loss_scale_factor=self.loss_scale_factor,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            skip_nonfinite=self.skip_nonfinite,
        )

    @property
    def step_variables(self) -> StepVariables:
        """The variables that a step reads and writes; the optimizer must be built."""
        return StepVariables(
            trainable=self._trainable_variables,
            slots=self._slots,
            averages=self._model_variables_moving_average if self.use_ema else (),
            accumulators=self._accumulated_gradients if self.gradient_accumulation_steps else (),
            iterations=self._iterations,
        )

    def uses_weight_decay(self, variable: Any) -> bool:
        """Whether a variable takes part in weight decay, if there is any.

        Args:
            variable: A variable that the optimizer was built with.
        """
        return self._use_weight_decay(variable)

    # --- the parts -----------------------------------------------------------

    def _new_tensorflow_step(self) -> Any:
        if keras.backend.backend() != "tensorflow":
            return None
        from keras_gdopt.optimizers.tensorflow_step import TensorFlowStep

        return TensorFlowStep(self, self._recorder)

    @property
    def slot_variables(self) -> Mapping[str, Sequence[Any]]:
        """The slots by name, each in the order of the variables; empty before `build`."""
        return self._slots

    def state_layout(self, variables: Sequence[Any]) -> dict[str, StateGroup]:
        """See `SavedStateOptimizer.state_layout`."""
        slots = self.slot_layout({**self.slots, **self.scalar_slots}, variables)
        return {**super().state_layout(variables), **slots}

    def _slot_shape(self, slot: str, variable: Any) -> tuple[int, ...]:
        shape = tuple(variable.shape)
        if slot not in self.scalar_slots:
            return shape
        by_row = self.lazy or self.zero_gradient_changes_nothing
        return shape[:1] + (1,) * (len(shape) - 1) if by_row else ()

    def apply_rule(
        self,
        gradient: Tensor,
        slots: Slots,
        learning_rate: Any,
        step: Any,
        hyperparameters: Mapping[str, Tensor] | None = None,
        *,
        variable_dtype: Any,
    ) -> Update:
        """Calls `update_rule` in the dtype that it computes in, and checks what it returns.

        Args:
            gradient: The gradient of one variable, or of some of its rows.
            slots: As for `update_rule`.
            learning_rate: A scalar.
            step: The 1-based count of updates.
            hyperparameters: Scalars that replace the optimizer's own numbers, by name.
            variable_dtype: The dtype of the variable.

        Returns:
            The change, and the new slots by name.
        """
        dtype = computation_dtype(variable_dtype)
        step_dtype = "float64" if keras.backend.backend() == "tensorflow" else "float32"
        values = {name: ops.cast(value, dtype) for name, value in (hyperparameters or {}).items()}
        change, new_slots = self._with(values).update_rule(
            ops.cast(gradient, dtype),
            slots,
            ops.cast(learning_rate, dtype),
            ops.cast(step, step_dtype),
        )
        if set(new_slots) != set(slots):
            raise ValueError(
                f"`{type(self).__name__}.update_rule` must return a value for each of its "
                f"slots {sorted(slots)}. Received: values for {sorted(new_slots)}"
            )
        for name in self.scalar_slots:
            value = ops.convert_to_tensor(new_slots[name], dtype)
            new_slots[name] = value + ops.zeros_like(slots[name])
        return change, new_slots

    def _with(self, hyperparameters: Mapping[str, Tensor]) -> "GradientOptimizer":
        """The optimizer itself, or a copy with other values that serves one trace only."""
        if not hyperparameters:
            return self
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **hyperparameters)
        for name, value in hyperparameters.items():
            if getattr(other, name) is not value:
                raise ValueError(
                    f"{type(self).__name__} declares `{name}` as evolvable. Expected it to be an "
                    "attribute that the rule reads. Received: a property"
                )
        return other

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """With `use_ema`, puts the averages, within the weights' constraints, into the model.

        Args:
            var_list: The model's trainable variables.
        """
        super().finalize_variable_values(var_list)
        if self.use_ema:
            for variable in var_list:
                if variable.constraint is not None:
                    variable.assign(constrain(variable.constraint, variable.value))

    def finalize_weight(self, weight: Any, slots: Slots) -> Update:
        """The weight that training ends with, and its slots; a pure function.

        Args:
            weight: A weight during training.
            slots: Its slots by name.

        Returns:
            Both, unchanged by default.
        """
        return weight, dict(slots)

    def _check_variables_are_known(self, variables: Sequence[Any]) -> None:
        for variable in variables:
            if self._var_key(variable) not in self._trainable_variables_indices:
                known = [variable_path(v) for v in self._trainable_variables]
                raise ValueError(
                    f"{type(self).__name__} was not built for the variable "
                    f"'{variable_path(variable)}'. It was built for {len(known)} variable(s): "
                    f"{known[:5]}{'...' if len(known) > 5 else ''}. "
                    "An optimizer is made for one set of variables: after unfreezing layers, or "
                    "for another model, compile with a new one."
                )

    def _check_variables_are_distinct(self, variables: Sequence[Any]) -> None:
        seen = set()
        for variable in variables:
            if self._var_key(variable) in seen:
                raise ValueError(
                    f"Expected each variable once. Received: '{variable_path(variable)}' twice. A "
                    "layer that two models share has one gradient, which holds what both "
                    "contribute: leave the second one out."
                )
            seen.add(self._var_key(variable))

    def _use_weight_decay(self, variable: Any) -> bool:
        if self._var_key(variable) in getattr(self, "_exclude_from_weight_decay", ()):
            return False
        pattern = getattr(self, "_exclude_from_weight_decay_pattern", None)
        own = self._trainable_variables[self._get_variable_index(variable)]
        return pattern is None or pattern.search(variable_path(own)) is None

    def _find_excluded_from_weight_decay(self, variables: Sequence[Any]) -> None:
        """Finds the variables that a config excludes among those the optimizer is built for."""
        excluded = self._excluded_from_weight_decay
        if not excluded or self._exclude_from_weight_decay:
            return
        for position, path in enumerate(excluded.get("var_paths", ())):
            index = excluded["var_indices"][position]
            if index is None or index >= len(variables):
                index = _index_of_path(path, [variable_path(variable) for variable in variables])
            self._exclude_from_weight_decay.add(self._var_key(variables[index]))

    def _overwrite_model_variables_with_average_value(self, variables: Sequence[Any]) -> None:
        if not self.built:  # the model has no trainable weights
            return
        for variable, average in zip(variables, self._model_variables_moving_average, strict=True):
            if average is not None:
                variable.assign(ops.cast(average, variable.dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The arguments are constants in a compiled step. (The learning rate is an input.)
        is_built_in = not name.startswith("_") and name != "learning_rate"
        if is_built_in and getattr(self, "_tensorflow_step", None) is not None:
            object.__setattr__(self, "_tensorflow_step", self._new_tensorflow_step())


def _fill(value: float, shape: Sequence[int], dtype: Any = None) -> Tensor:
    """An initializer with one value that, unlike Keras's `Constant`, is exact in float64."""
    return ops.full(shape, ops.convert_to_tensor(value, dtype), dtype=dtype)


def _index_of_path(path: str, paths: Sequence[str]) -> int:
    """The index of a path; loading may have added or removed the path's outermost part."""
    for same in (
        lambda other: other == path,
        lambda other: f"/{other}".endswith(f"/{path}") or f"/{path}".endswith(f"/{other}"),
    ):
        found = [index for index, other in enumerate(paths) if same(other)]
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"Expected one variable '{path}', which is excluded from weight decay. "
        f"Received: variables {list(paths)}"
    )


def _check_gradients_fit(grads: Sequence[Tensor | None], variables: Sequence[Any]) -> None:
    if len(grads) != len(variables):
        raise ValueError(
            "Expected one gradient for each variable. Received: "
            f"{len(grads)} gradient(s) for {len(variables)} variable(s): "
            f"{[variable_path(variable) for variable in variables[:5]]}"
            f"{'...' if len(variables) > 5 else ''}"
        )
    for gradient, variable in zip(grads, variables, strict=True):
        if gradient is None:
            continue
        expected = tuple(variable.shape)
        if hasattr(gradient, "values") and hasattr(gradient, "dense_shape"):
            if getattr(gradient.values.shape, "rank", 0) is None:
                continue
            received = (*expected[:1], *gradient.values.shape[1:])  # rows of IndexedSlices
        elif getattr(gradient.shape, "rank", 0) is None:
            continue
        else:
            received = tuple(gradient.shape)
        if len(received) != len(expected) or any(
            size is not None and size != wanted
            for size, wanted in zip(received, expected, strict=True)
        ):
            raise ValueError(
                f"The gradient for the variable '{variable_path(variable)}' must have the "
                f"variable's shape {expected}. Received: a gradient of shape {received}"
            )
