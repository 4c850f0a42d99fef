"""What a run that goes on from a checkpoint must share with the one that stopped."""

import json
from collections.abc import Collection
from typing import Any

import keras


def identify_run(
    model: keras.Model, evolving: Collection[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """The identity of a run, as JSON has it.

    Args:
        model: Compiled and built.
        evolving: Names of the hyper-parameters that evolve, of which the optimizer's own values
            do not matter.
        settings: The population's, by name.
    """
    names = {"learning_rate", "name", *evolving}
    optimizer = [type(model.optimizer).__name__, _without(model.optimizer.get_config(), names)]
    return {
        "model": [
            [type(layer).__name__, *(list(v.shape) for v in layer.variables)]
            for layer in model.layers
        ],
        "optimizer": json.loads(json.dumps(optimizer, default=str)),
        **settings,
    }


def _without(config: Any, names: set[str]) -> Any:
    """A config without what may change in a run."""
    if isinstance(config, dict):
        return {key: _without(value, names) for key, value in config.items() if key not in names}
    return config
