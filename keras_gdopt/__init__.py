"""Gradient-descent optimizers and their TensorBoard callbacks for Keras 3."""

import importlib
from importlib.metadata import version
from types import ModuleType

from keras_gdopt import constraints, initializers, losses
from keras_gdopt.closures.bfgs import BFGS
from keras_gdopt.closures.conjugate_gradient import ConjugateGradient
from keras_gdopt.closures.lbfgs import LBFGS
from keras_gdopt.closures.levenberg_marquardt import LevenbergMarquardt
from keras_gdopt.closures.newton import Newton
from keras_gdopt.gadam import Gadam, RayEngine
from keras_gdopt.learning_rate_range import find_learning_rate
from keras_gdopt.optimizers.adadelta import Adadelta
from keras_gdopt.optimizers.adagrad import Adagrad
from keras_gdopt.optimizers.adam import Adam
from keras_gdopt.optimizers.base import GradientOptimizer
from keras_gdopt.optimizers.gradient_descent import GradientDescent
from keras_gdopt.optimizers.lookahead import Lookahead
from keras_gdopt.optimizers.momentum import Momentum
from keras_gdopt.optimizers.nadam import Nadam
from keras_gdopt.optimizers.nag import NAG
from keras_gdopt.optimizers.radam import RAdam
from keras_gdopt.optimizers.rmsprop import RMSprop

__version__ = version("keras-gdopt")

__all__ = [
    "BFGS",
    "LBFGS",
    "NAG",
    "Adadelta",
    "Adagrad",
    "Adam",
    "ConjugateGradient",
    "Gadam",
    "GradientDescent",
    "GradientOptimizer",
    "LevenbergMarquardt",
    "Lookahead",
    "Momentum",
    "Nadam",
    "Newton",
    "RAdam",
    "RMSprop",
    "RayEngine",
    "__version__",
    "callbacks",
    "constraints",
    "find_learning_rate",
    "initializers",
    "losses",
]


def __getattr__(name: str) -> ModuleType:
    # The callbacks are imported on first use; the package itself never imports them.
    if name == "callbacks":
        return importlib.import_module("keras_gdopt.callbacks")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
