"""An optimizer's hyper-parameters, as TensorBoard's HParams tab takes them."""

import json
from typing import Any

import keras

from keras_gdopt.optimizers.argument_checks import BASE_ARGUMENTS

_DEFAULTS = {**BASE_ARGUMENTS, "lazy": False}

Values = dict[str, "bool | float | str"]


def hyperparameters(optimizer: keras.optimizers.Optimizer) -> Values:
    """What an optimizer was made with, by the names of its arguments.

    Left out are Keras's base arguments at their defaults. A schedule is written as its
    config, in JSON. The arguments of an optimizer inside another stand beside the outer
    one's, and its class under `inner_optimizer`; Keras's loss scaling, which a
    mixed-precision policy adds, is none of the user's and is looked through.

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
    values: Values = {"optimizer": type(optimizer).__name__}
    for name, value in optimizer.get_config().items():
        is_default = name in _DEFAULTS and value == _DEFAULTS[name]
        if name not in ("name", "optimizer", "inner_optimizer") and not is_default:
            values[name] = _plain(value)
    return {**values, **inside}


def _plain(value: Any) -> bool | float | str:
    """A number as it was written, although the optimizer holds it in float32."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(f"{value:.7g}")
    return json.dumps(value, sort_keys=True, default=str)
