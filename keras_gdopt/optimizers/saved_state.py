"""Saves the state of an optimizer by name, and restores it."""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_gdopt.optimizers.arithmetic import computation_dtype

_CLASS_MARK = "class="
# The group of variables that a subclass adds without declaring a slot for them.
_UNNAMED = "variable"
# What Keras's base class keeps for each variable, whatever the algorithm.
_NO_SLOTS = {"average", "gradient_accumulator"}


class StateGroup(NamedTuple):
    """Arrays saved under one name, numbered by the model's variables."""

    initial: float | None
    """Their initial value; `None` if they keep their value when state starts afresh."""
    shapes: Mapping[int, tuple[int, ...]]
    """Shapes by variable index; empty if the variables are not known yet."""
    variables: Sequence[Any]
    """In the order of the model's, `None` for those without one; empty before `build`."""
    is_single: bool = False
    """Whether it is one array, saved without a number, that exists from construction on."""

    @classmethod
    def single(cls, variable: Any, initial: float | None = 0.0) -> "StateGroup":
        """Creates a group of one array that exists from construction on.

        Args:
            variable: The variable that holds it.
            initial: Its initial value.
        """
        return cls(initial, {0: tuple(variable.shape)}, [variable], is_single=True)


class SavedStateOptimizer(keras.optimizers.Optimizer):
    """A Keras optimizer that saves its state by name, and raises if loaded state does not fit.

    Keras saves an optimizer's variables by position and, if their number does not
    fit, continues without them. This class

    - names the class and each variable in the store (`iteration`, `velocity.0`,
      `velocity.1`, ...: the slot and the index of the model's variable),
    - raises on state that does not fit, and then starts afresh,
    - keeps the arrays that an optimizer receives before it is built and restores
      them in `build`,
    - copies and pickles an optimizer with its state.

    A subclass adds its state to `state_layout`, and calls `_check_loaded_state_fits` at the
    start and `_restore_loaded_state` at the end of its `build`. `tf.train.Checkpoint` follows
    the structure of objects instead; its own `assert_consumed()` reports what did not fit.
    """

    # NumPy arrays by name that were loaded before `build`; set without Keras's tracking.
    _loaded_state: dict[str, np.ndarray] | None = None
    # The store that was read last (a weak reference), and what was wrong with its state.
    _last_load: tuple[weakref.ref[Any], str | None] | None = None

    def _own_variables(self) -> list[Any]:
        """The variables that this optimizer saves; an inner optimizer saves its own."""
        return list(self._variables)

    def state_layout(self, variables: Sequence[Any]) -> dict[str, "StateGroup"]:
        """The saved state, by name.

        Args:
            variables: The model's trainable variables; empty if they are not known yet.
        """
        layout = {"iteration": StateGroup.single(self._iterations)}
        if isinstance(self._learning_rate, keras.Variable):
            layout["learning_rate"] = StateGroup.single(self._learning_rate, initial=None)
        if self.use_ema:
            averages = getattr(self, "_model_variables_moving_average", ())
            shapes = _shapes(variables, lambda variable: tuple(variable.shape))
            layout["average"] = StateGroup(0.0, shapes, averages)
        if self.gradient_accumulation_steps:
            sums = getattr(self, "_accumulated_gradients", ())
            shapes = {index: tuple(v.shape) for index, v in enumerate(variables)}
            layout["gradient_accumulator"] = StateGroup(0.0, shapes, sums)
        return layout

    @property
    def slot_variables(self) -> Mapping[str, Sequence[Any]]:
        """Slots by name, in the order of the model's variables; `None` for a missing slot."""
        return {}

    def slot_layout(
        self, initial: Mapping[str, float], variables: Sequence[Any]
    ) -> dict[str, StateGroup]:
        """Slots for `state_layout`, one array for each variable.

        Args:
            initial: The initial value of each slot's entries, by name.
            variables: The model's trainable variables.
        """
        made = self.slot_variables
        return {
            name: StateGroup(
                value,
                _shapes(variables, functools.partial(self._slot_shape, name)),
                made.get(name, ()),
            )
            for name, value in initial.items()
        }

    def _slot_shape(self, slot: str, variable: Any) -> tuple[int, ...]:
        """The shape of a variable's slot."""
        del slot
        return tuple(variable.shape)

    # --- Keras's hooks -------------------------------------------------------

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """Creates a slot for a variable, in the dtype in which updates are computed."""
        shape = self._slot_shape(name or "", reference_variable)
        dtype = computation_dtype(reference_variable.dtype)
        same_dtype = dtype == keras.backend.standardize_dtype(reference_variable.dtype)
        if same_dtype and shape == tuple(reference_variable.shape):
            return super().add_variable_from_reference(
                reference_variable, name=name, initializer=initializer
            )
        path = variable_path(reference_variable).replace("/", "_").replace(":", "_")
        with _place_like(reference_variable, getattr(self, "_distribution_strategy", None)):
            return self.add_variable(
                shape, initializer=initializer, dtype=dtype, name=f"{path}_{name or 'var'}"
            )

    def save_own_variables(self, store: Any) -> None:
        """Writes the state into `store`, a mapping from name to array."""
        store[_CLASS_MARK + _registered_name(self)] = np.asarray(1, "int32")
        for name, variable in self._state_variables().items():
            store[name] = keras.ops.convert_to_numpy(variable)
        for name, array in (self._loaded_state or {}).items():
            store[name] = array

    def load_own_variables(self, store: Any) -> None:
        """Reads the state back from `store`.

        Raises:
            ValueError: If the state belongs to another class or its variables are
                not this optimizer's. The optimizer then starts afresh, so that loading
                with `skip_mismatch=True` can continue.
        """
        saved = {name: store[name] for name in store.keys()}  # noqa: SIM118 (not a dict)
        if not saved:
            self._load_nothing(store)
            return
        mismatch = None
        try:
            self._load(saved)
        except ValueError as error:
            mismatch = str(error)
            self._start_afresh()
            raise
        finally:
            with contextlib.suppress(TypeError):  # a dict cannot be weakly referenced
                object.__setattr__(self, "_last_load", (weakref.ref(store), mismatch))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        state: dict[str, np.ndarray] = {}
        self.save_own_variables(state)
        config = self.get_config()
        rate = self._learning_rate
        if callable(rate) and not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            config["learning_rate"] = rate  # Keras does not deserialize a lambda
        return _rebuilt, (type(self), config, state)

    # --- for subclasses ------------------------------------------------------

    def _check_loaded_state_fits(self, variables: Sequence[Any]) -> None:
        """Raises if loaded state does not fit `variables`; call it at the start of `build`."""
        if self._loaded_state is None:
            return
        named = {k: v for k, v in self._loaded_state.items() if _group(k) != _UNNAMED}
        shapes = {
            f"{name}.{index}": shape
            for name, group in self.state_layout(variables).items()
            if not group.is_single
            for index, shape in group.shapes.items()
        }
        self._check_fits(named, shapes)

    def _restore_loaded_state(self) -> None:
        """Assigns state that was loaded before `build`; call it at the end of `build`."""
        saved = self._loaded_state
        if saved is None:
            return
        slots = {name: v for name, v in self._state_variables().items() if _group(name)}
        self._assign_state(saved, slots)
        object.__setattr__(self, "_loaded_state", None)

    # --- the parts -----------------------------------------------------------

    def _state_variables(self) -> dict[str, Any]:
        """The optimizer's own variables by the names under which they are saved."""
        names = {}
        for name, group in self.state_layout(self._trainable_variables or ()).items():
            for index, variable in enumerate(group.variables):
                names[id(variable)] = name if group.is_single else f"{name}.{index}"
        return {
            names.get(id(variable), f"{_UNNAMED}.{position}"): variable
            for position, variable in enumerate(self._own_variables())
        }

    def _load(self, saved: dict[str, np.ndarray]) -> None:
        self._check_class(saved)
        saved = {k: v for k, v in saved.items() if not k.startswith(_CLASS_MARK)}
        own = self._state_variables()
        # Variables that exist from construction on are assigned at once, so that `build`
        # does not undo a learning rate that is set after loading.
        early = {name: variable for name, variable in own.items() if not _group(name)}
        self._check_fits(
            {name: array for name, array in saved.items() if not _group(name)},
            {name: tuple(variable.shape) for name, variable in early.items()},
        )
        slots = {name: array for name, array in saved.items() if _group(name)}
        if not slots and self._expected_groups():
            # It was saved before it was built: the state of an optimizer that never stepped.
            self._start_afresh()
        elif self.built:
            self._assign_state(slots, {k: v for k, v in own.items() if k not in early})
        else:
            self._check_names(
                {_group(name) for name in slots} - {_UNNAMED}, self._expected_groups()
            )
            object.__setattr__(self, "_loaded_state", slots)
        self._assign_state({name: saved[name] for name in early}, early)

    def _load_nothing(self, store: Any) -> None:
        """Handles the empty store that Keras passes if a file has no state for an optimizer.

        Keras may also reach an optimizer a second time by another path through the model,
        under which the file has nothing; the result of the first time then holds.
        """
        if self._last_load is not None and self._last_load[0]() is store:
            if self._last_load[1] is not None:
                raise ValueError(self._last_load[1])
            return
        warnings.warn(
            f"The file holds no state for the optimizer '{self.name}' "
            f"({_registered_name(self)}): it keeps the state it has.",
            stacklevel=3,
        )

    def _start_afresh(self) -> None:
        """Resets the state to that of an optimizer that never stepped."""
        object.__setattr__(self, "_loaded_state", None)
        layout = self.state_layout(self._trainable_variables or ())
        own, fresh = self._state_variables(), {}
        for name, variable in own.items():
            group = layout.get(_group(name) or name)
            if group is not None and group.initial is not None:
                fresh[name] = np.full(variable.shape, group.initial)
        self._assign_state(fresh, {name: own[name] for name in fresh})

    def _expected_groups(self) -> set[str]:
        """The groups of variables that a built optimizer of this configuration has."""
        return {name for name, group in self.state_layout(()).items() if not group.is_single}

    def _check_class(self, saved: Mapping[str, Any]) -> None:
        own = _registered_name(self)
        marks = [name[len(_CLASS_MARK) :] for name in saved if name.startswith(_CLASS_MARK)]
        if marks == [own]:
            return
        if marks:
            groups = sorted({_group(name) for name in saved} - {""})
            other = f"of {marks[0]} with the slots {groups or 'none'}"
        else:
            other = f"without a class name, as Keras's own optimizers save it ({len(saved)} arrays)"
        slots = sorted(self._expected_groups() - _NO_SLOTS)
        raise ValueError(
            f"The saved optimizer state is {other}; this optimizer is {own} with the "
            f"slots {slots or 'none'}. Compile the model with the optimizer it was saved with, or "
            "pass `skip_mismatch=True` to `load_weights` to load the weights alone and start this "
            "optimizer afresh."
        )

    def _check_names(self, saved: set[str], own: set[str]) -> None:
        if saved == own:
            return
        raise ValueError(
            f"The saved state does not fit the optimizer '{self.name}' "
            f"({_registered_name(self)}). Only in the saved state: "
            f"{_shorten(saved - own)}; only in this optimizer: {_shorten(own - saved)}. "
            "Build the optimizer with the arguments and the model it was saved with, or "
            "call `optimizer.build(model.trainable_variables)` and then `load_weights` "
            "with `skip_mismatch=True` to start it afresh."
        )

    def _check_fits(
        self, saved: Mapping[str, np.ndarray], own: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._check_names(set(saved), set(own))
        misfits = [
            f"{name}: saved {tuple(saved[name].shape)}, expected {shape}"
            for name, shape in own.items()
            if tuple(saved[name].shape) != shape
        ]
        if misfits:
            raise ValueError(
                f"The saved state does not fit the optimizer '{self.name}' "
                f"({_registered_name(self)}): {len(misfits)} variable(s) have another "
                f"shape, the first {misfits[:3]}. Load it into the model it was saved "
                "with, or pass `skip_mismatch=True` to `load_weights`."
            )

    def _assign_state(self, saved: Mapping[str, np.ndarray], own: Mapping[str, Any]) -> None:
        self._check_fits(saved, {name: tuple(variable.shape) for name, variable in own.items()})
        with _outside_of_tracing():
            for name, variable in own.items():
                variable.assign(saved[name])


def variable_path(variable: Any) -> str:
    """A Keras variable's path, or the name of a variable that has no path."""
    return getattr(variable, "path", None) or variable.name


def _shapes(
    variables: Sequence[Any], shape: Callable[[Any], tuple[int, ...]]
) -> dict[int, tuple[int, ...]]:
    """Shapes by variable index, without variables that Keras overwrites (float8)."""
    return {
        index: shape(variable)
        for index, variable in enumerate(variables)
        if not getattr(variable, "overwrite_with_gradient", False)
    }


def _place_like(variable: Any, strategy: Any) -> contextlib.AbstractContextManager[Any]:
    """A scope in which new variables are placed, and mirrored, like `variable`."""
    if strategy is None:
        return contextlib.nullcontext()
    raw = variable.value if isinstance(variable, keras.Variable) else variable
    return strategy.extended.colocate_vars_with(raw)


def _registered_name(optimizer: Any) -> str:
    return keras.saving.get_registered_name(type(optimizer))


def _group(name: str) -> str:
    """The slot in a state name: `velocity` for `velocity.3`, empty for `iteration`."""
    return name.rpartition(".")[0]


def _shorten(names: set[str]) -> str:
    listed = sorted(names)
    if not listed:
        return "nothing"
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def _outside_of_tracing() -> contextlib.AbstractContextManager[Any]:
    """A scope in which assignments take effect at once, even while TensorFlow traces."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def _rebuilt(
    cls: type[SavedStateOptimizer], config: dict[str, Any], state: dict[str, np.ndarray]
) -> SavedStateOptimizer:
    """Creates a copy of an optimizer; `build` restores its slots."""
    optimizer = cls.from_config(config)
    optimizer.load_own_variables(state)
    return optimizer
