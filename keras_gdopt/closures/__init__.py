"""Optimizers that evaluate the loss themselves."""

from keras_gdopt.closures.base import ClosureOptimizer

__all__ = ["ClosureOptimizer"]
