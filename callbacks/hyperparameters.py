"""An optimizer's hyper-parameters, in the form that TensorBoard's HParams tab reads."""

import inspect
import json
import warnings
from typing import Any

import keras

from keras_gdopt.callbacks.logs import number
from keras_gdopt.callbacks.optimizer_parts import named_optimizers
from keras_gdopt.optimizers.argument_checks import BASE_ARGUMENTS
from keras_gdopt.optimizers.wrapping_optimizer import is_multi_optimizer

_DEFAULTS = {**BASE_ARGUMENTS, "lazy": False, "skip_nonfinite": False}
# Arguments that are text for one optimizer and a number for another.
_KEYS_OF_TEXT = {"beta": "beta_formula"}

Values = dict[str, "bool | float | str"]


def hyperparameters(optimizer: keras.optimizers.Optimizer) -> Values:
    """The arguments that an optimizer was made with, by name.

    `None` and Keras's base arguments at their defaults are left out. The arguments of a wrapped
    optimizer are listed beside the outer one's, and its class under `inner_optimizer`. Those of
    the optimizers inside a `MultiOptimizer` are prefixed with the name of each and a slash.
    Keras's loss scaling, which a mixed-precision policy adds, is skipped.

    A key has the same type for all optimizers, because TensorBoard shows a key that is text in
    one run as text in all runs. An argument that is usually a number therefore has another key
    when it is not, such as `learning_rate_schedule`, the config in JSON.

    >>> import keras_gdopt as gdopt
    >>> from keras_gdopt.callbacks.hyperparameters import hyperparameters
    >>> hyperparameters(gdopt.Momentum(0.1, clipnorm=1.0))
    {'optimizer': 'Momentum', 'learning_rate': 0.1, 'clipnorm': 1.0, 'momentum': 0.9, \
'classical': False}
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return hyperparameters(inner)
    inside: Values = {}
    if inner is not None:
        inside = hyperparameters(inner)
        inside["inner_optimizer"] = inside.pop("optimizer")
    if is_multi_optimizer(optimizer):
        for name, each in named_optimizers(optimizer).items():
            inside.update({f"{name}/{key}": v for key, v in hyperparameters(each).items()})
    values: Values = {"optimizer": type(optimizer).__name__}
    arguments = inspect.signature(type(optimizer).__init__).parameters
    for name, value in _config(optimizer).items():
        default = arguments[name].default if name in arguments else _DEFAULTS.get(name)
        is_default = name in _DEFAULTS and value == _DEFAULTS[name]
        is_inside = name in ("name", "optimizer", "inner_optimizer")
        if value is not None and not is_default and not is_inside:
            plain = _plain(value, default)
            values[_key(name, value, plain)] = plain
    return {**values, **inside}


def _config(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    if is_multi_optimizer(optimizer):  # the optimizers inside have all of it
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example that a lambda is unsafe to load
        try:
            return optimizer.get_config()
        except (NotImplementedError, TypeError, ValueError):  # it trains, but cannot be saved
            return {}


def _key(name: str, value: Any, plain: bool | float | str) -> str:
    if isinstance(value, dict):  # an object's config
        return f"{name}_schedule"
    return _KEYS_OF_TEXT.get(name, name) if isinstance(plain, str) else name


def _plain(value: Any, default: Any) -> bool | float | str:
    """A value in the type of the argument's default; a number as the user wrote it.

    (The optimizer holds it in float32.)
    """
    if isinstance(default, str) or isinstance(value, str):
        return str(value)
    as_number = number(value)
    if as_number is None:
        return json.dumps(value, sort_keys=True, default=str)
    if isinstance(default, bool):
        return bool(value)
    if isinstance(value, bool) and not isinstance(default, (int, float)):
        return value
    return float(f"{as_number:.7g}")
