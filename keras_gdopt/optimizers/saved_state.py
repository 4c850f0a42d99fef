"""What of an optimizer is saved, under which names, and how it comes back."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

_CLASS_MARK = "class="
# The group of variables that a subclass added without declaring a slot for them.
_UNNAMED = "variable"


class SavedStateOptimizer(keras.optimizers.Optimizer):
    """A Keras optimizer whose state is saved by name, and never lost in silence.

    Keras saves an optimizer's variables by position and, where their number does
    not fit, goes on without them. This class

    - names the class and each variable in the store (`iteration`, `velocity.0`,
      `velocity.1`, ...: the slot and the index of the model's variable),
    - raises on state that does not fit, before anything is assigned,
    - keeps the arrays that an optimizer receives before it is built and restores
      them in `build`,
    - copies and pickles an optimizer with its state.

    A subclass calls `_restore_loaded_state()` at the end of its `build` and names
    its slots in `_slot_variables()`.
    """

    # NumPy arrays by name that came before `build`; set without Keras's tracking.
    _loaded_state: dict[str, np.ndarray] | None = None

    def _slot_variables(self) -> Mapping[str, list[Any]]:
        """Lists of slot variables by slot name, aligned with the model's variables."""
        return {}

    def _slot_names(self) -> set[str]:
        """The slot names that a built optimizer of this configuration has."""
        return set(self._slot_variables())

    # --- Keras's hooks -------------------------------------------------------

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
                not this optimizer's. Nothing is assigned then.
        """
        saved = {name: store[name] for name in store.keys()}  # noqa: SIM118 (not a dict)
        if not saved:
            warnings.warn(
                f"The file holds no state for the optimizer '{self.name}' "
                f"({_registered_name(self)}): it starts afresh.",
                stacklevel=2,
            )
            return
        self._check_class(saved)
        saved = {k: v for k, v in saved.items() if not k.startswith(_CLASS_MARK)}
        if self.built:
            self._assign_state(saved, self._state_variables())
            return
        # The variables that exist from construction are assigned at once, so that
        # a learning rate set after loading is not undone in `build`.
        self._check_slot_names(saved)
        early = self._state_variables()
        self._check_same_names(
            {name for name in saved if "." not in name},
            {name for name in early if "." not in name},
        )
        for name, variable in early.items():
            variable.assign(saved.pop(name))
        object.__setattr__(self, "_loaded_state", saved)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        state: dict[str, np.ndarray] = {}
        self.save_own_variables(state)
        return _rebuilt, (type(self), self.get_config(), state)

    # --- for subclasses ------------------------------------------------------

    def _restore_loaded_state(self) -> None:
        """Assigns what was loaded before the optimizer was built."""
        saved = self._loaded_state
        if saved is None:
            return
        slots = {name: v for name, v in self._state_variables().items() if "." in name}
        self._assign_state(saved, slots)
        object.__setattr__(self, "_loaded_state", None)

    # --- the parts -----------------------------------------------------------

    def _state_variables(self) -> dict[str, Any]:
        """All variables of the optimizer by the name they are saved under."""
        names: dict[int, str] = {id(self._iterations): "iteration"}
        names[id(self._learning_rate)] = "learning_rate"
        groups = {
            "average": getattr(self, "_model_variables_moving_average", []),
            "gradient_accumulator": getattr(self, "_accumulated_gradients", []),
            **self._slot_variables(),
        }
        for group, variables in groups.items():
            for index, variable in enumerate(variables):
                names[id(variable)] = f"{group}.{index}"
        return {
            names.get(id(variable), f"{_UNNAMED}.{position}"): variable
            for position, variable in enumerate(self.variables)
        }

    def _check_class(self, saved: Mapping[str, Any]) -> None:
        own = _registered_name(self)
        marks = [name[len(_CLASS_MARK) :] for name in saved if name.startswith(_CLASS_MARK)]
        if marks == [own]:
            return
        if marks:
            other = f"of {marks[0]} with the slots {_groups(saved) or 'none'}"
        else:
            other = f"without a class name, as Keras's own optimizers save it ({len(saved)} arrays)"
        raise ValueError(
            f"The saved optimizer state is {other}; this optimizer is {own} with the "
            f"slots {sorted(self._slot_names()) or 'none'}. Compile the model with the "
            "optimizer it was saved with, or pass `skip_mismatch=True` to "
            "`load_weights` to load the weights alone and start this optimizer afresh."
        )

    def _check_slot_names(self, saved: Mapping[str, Any]) -> None:
        expected = set(self._slot_names())
        if self.use_ema:
            expected.add("average")
        if self.gradient_accumulation_steps:
            expected.add("gradient_accumulator")
        self._check_same_names(set(_groups(saved)) - {_UNNAMED}, expected)

    def _check_same_names(self, saved: set[str], own: set[str]) -> None:
        if saved == own:
            return
        raise ValueError(
            f"The saved state does not fit the optimizer '{self.name}' "
            f"({_registered_name(self)}). Only in the saved state: "
            f"{_shortened(saved - own)}; only in this optimizer: {_shortened(own - saved)}. "
            "Build the optimizer with the arguments and the model it was saved with, or "
            "call `optimizer.build(model.trainable_variables)` and then `load_weights` "
            "with `skip_mismatch=True` to start it afresh."
        )

    def _assign_state(self, saved: Mapping[str, np.ndarray], own: Mapping[str, Any]) -> None:
        self._check_same_names(set(saved), set(own))
        misfits = [
            f"{name}: saved {tuple(saved[name].shape)}, expected {tuple(variable.shape)}"
            for name, variable in own.items()
            if tuple(saved[name].shape) != tuple(variable.shape)
        ]
        if misfits:
            raise ValueError(
                f"The saved state does not fit the optimizer '{self.name}' "
                f"({_registered_name(self)}): {len(misfits)} variable(s) have another "
                f"shape, the first {misfits[:3]}. Load it into the model it was saved "
                "with, or pass `skip_mismatch=True` to `load_weights`."
            )
        with _outside_of_tracing():
            for name, variable in own.items():
                variable.assign(saved[name])


def _registered_name(optimizer: Any) -> str:
    return keras.saving.get_registered_name(type(optimizer))


def _groups(names: Any) -> list[str]:
    """The slot names in a list of state names: `velocity` of `velocity.3`."""
    return sorted({name.rsplit(".", 1)[0] for name in names if "." in name})


def _shortened(names: set[str]) -> str:
    listed = sorted(names)
    if not listed:
        return "nothing"
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def _outside_of_tracing() -> contextlib.AbstractContextManager[Any]:
    """A scope in which assignments happen at once, even while TensorFlow traces."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def _rebuilt(
    cls: type[SavedStateOptimizer], config: dict[str, Any], state: dict[str, np.ndarray]
) -> SavedStateOptimizer:
    """A copy of an optimizer; its slots return when it is built."""
    optimizer = cls.from_config(config)
    optimizer.load_own_variables(state)
    return optimizer
