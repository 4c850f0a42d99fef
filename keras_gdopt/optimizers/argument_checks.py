"""Range checks of constructor arguments, with error messages in Keras's form."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import keras

# Bias correction leaves a thousandth of it, which is still a normal number in float32.
_SMALLEST_EPSILON = 1e-30

BASE_ARGUMENTS: dict[str, Any] = {
    "name": None,
    "weight_decay": None,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}
"""The arguments of Keras's base class, except the learning rate, and their defaults."""


def checked_number(
    name: str,
    value: Any,
    *,
    minimum: float = 0.0,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Returns `value` as a float, or raises if it is not a finite number in range.

    Args:
        name: Name of the argument, for the message.
        value: What the user passed.
        minimum: The smallest value allowed. Defaults to 0.
        above: If given, an open lower bound that replaces `minimum`.
        below: If given, an open upper bound.
        most: If given, the largest value allowed.

    Raises:
        ValueError: If `value` is not a real number, not finite or out of range.
    """
    bounds = f"above {above:g}" if above is not None else f"of at least {minimum:g}"
    if below is not None:
        bounds += f" and below {below:g}"
    if most is not None:
        bounds += f" and at most {most:g}"
    if not isinstance(value, Real) or isinstance(value, bool):
        in_range = False
    else:
        number = float(value)
        in_range = (
            math.isfinite(number)
            and (number > above if above is not None else number >= minimum)
            and (below is None or number < below)
            and (most is None or number <= most)
        )
    if not in_range:
        raise ValueError(
            f"Argument `{name}` must be a finite number {bounds}. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    return float(value)


def checked_fraction(name: str, value: Any) -> float:
    """Returns `value` as a float, or raises if it is outside [0, 1), the range of decay rates."""
    return checked_number(name, value, below=1.0)


def checked_epsilons(
    epsilon: Any, epsilon_root: Any, **under_the_root: float
) -> tuple[float, float]:
    """Returns both epsilons of a denominator, or raises if it could become 0.

    Args:
        epsilon: Added to the root.
        epsilon_root: Added under the root.
        under_the_root: Other terms that are under the root from the first step on, by name.

    Raises:
        ValueError: If one is negative or not a finite number, or all are too small.
    """
    epsilon = checked_number("epsilon", epsilon)
    epsilon_root = checked_number("epsilon_root", epsilon_root)
    values = {"epsilon": epsilon, "epsilon_root": epsilon_root, **under_the_root}
    if max(values.values()) < _SMALLEST_EPSILON:
        *names, last = (f"`{name}`" for name in values)
        raise ValueError(
            f"At least one of {', '.join(names)} and {last} must be at least "
            f"{_SMALLEST_EPSILON:g}: below that a gradient of 0 would divide 0 by 0. "
            f"Received: {', '.join(f'{name}={value}' for name, value in values.items())}"
        )
    return epsilon, epsilon_root


def checked_flag(name: str, value: Any) -> bool:
    """Returns `value` if it is a boolean, or raises."""
    if not isinstance(value, bool):
        raise ValueError(
            f"Argument `{name}` must be True or False. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    return value


def checked_count(name: str, value: Any, *, minimum: int) -> int:
    """Returns `value` as an int, or raises if it is not an integer of at least `minimum`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(
            f"Argument `{name}` must be an integer of at least {minimum}. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    return int(value)


def check_is_floating(owner: str, path: str, dtype: Any) -> None:
    """Raises if a variable's dtype cannot hold an update.

    Args:
        owner: Name of the optimizer's class, for the message.
        path: The variable's path, for the message.
        dtype: The variable's dtype.

    Raises:
        ValueError: If the dtype is complex, integer or boolean.
    """
    name = keras.backend.standardize_dtype(dtype)
    if keras.backend.is_float_dtype(name):
        return
    advice = "Make it with `trainable=False`, or in a floating dtype."
    if name.startswith("complex"):
        advice = "Use two real variables, one for each part."
    raise ValueError(
        f"{owner} updates variables in float32, float64 and bfloat16: in any other dtype part of "
        f"an update would be lost. {advice} Received: variable '{path}' of dtype {name}"
    )


def check_tensorflow(owner: str) -> None:
    """Raises if Keras's backend is not TensorFlow.

    Args:
        owner: What needs TensorFlow, for the message.
    """
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise RuntimeError(
            f"{owner} needs the TensorFlow backend: set the environment variable "
            "KERAS_BACKEND=tensorflow before Keras is imported. Received: the backend "
            f"'{backend}'"
        )


def checked_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns `value` if it is one of `choices`, or raises."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}. Received: {name}={value!r}")
    return value


def checked_learning_rate(value: Any) -> Any:
    """Returns a learning rate that Keras accepts, or raises.

    Numbers become floats, as Keras accepts no ints; schedules and callables stay as they are.
    """
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return value
    if callable(value) and not isinstance(value, type):
        return value
    if not isinstance(value, Real):
        raise ValueError(
            "Argument `learning_rate` must be a number, a "
            "`keras.optimizers.schedules.LearningRateSchedule` or a callable without "
            f"arguments. Received: learning_rate={value!r} "
            f"(of type {type(value).__name__})"
        )
    return checked_number("learning_rate", value)


def checked_base_arguments(owner: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of Keras's base optimizer, or raises.

    Args:
        owner: Name of the optimizer's class, for the message.
        arguments: The keyword arguments that the class did not take itself.

    Raises:
        ValueError: If Keras's base class does not know a name, or would silently
            ignore its value.
    """
    unknown = sorted(set(arguments) - set(BASE_ARGUMENTS))
    if unknown:
        raise ValueError(
            f"{owner} does not take the argument(s) {unknown}. Expected, besides its "
            f"own, any of {sorted(BASE_ARGUMENTS)}. "
            f"Received: { ({name: arguments[name] for name in unknown}) }"
        )
    checked = dict(arguments)
    if arguments.get("weight_decay") is not None:
        checked["weight_decay"] = checked_number("weight_decay", arguments["weight_decay"])
    for name in ("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor"):
        if arguments.get(name) is not None:
            checked[name] = checked_number(name, arguments[name], above=0.0)
    if "use_ema" in arguments:
        checked_flag("use_ema", arguments["use_ema"])
    if "ema_momentum" in arguments:
        checked["ema_momentum"] = checked_number("ema_momentum", arguments["ema_momentum"])
    for name, minimum in (("gradient_accumulation_steps", 2), ("ema_overwrite_frequency", 1)):
        if arguments.get(name) is not None:
            checked[name] = checked_count(name, arguments[name], minimum=minimum)
    return checked
