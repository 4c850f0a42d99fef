"""Gradient-descent optimizers and their TensorBoard callbacks for Keras 3."""

import importlib
from importlib.metadata import version
from types import ModuleType

from keras_gdopt.optimizers.adam import Adam
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.gradient_descent import GradientDescent
from keras_gdopt.optimizers.momentum import Momentum

__version__ = version("keras-gdopt")

__all__ = ["Adam", "GradientDescent", "GradientOptimizer", "Momentum", "__version__", "callbacks"]


def __getattr__(name: str) -> ModuleType:
    # Imported on first use: the package itself never imports its callbacks.
    if name == "callbacks":
        return importlib.import_module("keras_gdopt.callbacks")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
