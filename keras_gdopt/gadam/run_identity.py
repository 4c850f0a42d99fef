"""What a run must have in common with the run whose checkpoint it continues."""

import json
from collections.abc import Collection
from typing import Any

import keras


def identify_run(
    model: keras.Model, evolving: Collection[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Describes a run by its model, its optimizer and its settings, as JSON values.

    Args:
        model: The compiled and built model.
        evolving: The names of the hyper-parameters that evolve. The optimizer's own values of
            them are left out, and so is its learning rate.
        settings: The settings of the population, by name.
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
    """Returns a config without the entries of these names, at any depth.

    Nor has it `skip_nonfinite=False`, which version 0.1.0 did not know.
    """
    if isinstance(config, dict):
        return {
            key: _without(value, names)
            for key, value in config.items()
            if key not in names and (key, value) != ("skip_nonfinite", False)
        }
    return config
