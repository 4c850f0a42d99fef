"""Optimizers that evaluate the loss themselves."""

from keras_gdopt.closures.base import ClosureOptimizer
from keras_gdopt.closures.line_search_optimizer import LineSearchOptimizer

__all__ = ["ClosureOptimizer", "LineSearchOptimizer"]
