"""Callbacks for TensorBoard, and one that stops training once it has converged."""

from keras_gdopt.callbacks.convergence_stopping import ConvergenceStopping
from keras_gdopt.callbacks.optimizer_tensorboard import OptimizerTensorBoard
from keras_gdopt.callbacks.population_tensorboard import PopulationTensorBoard

__all__ = ["ConvergenceStopping", "OptimizerTensorBoard", "PopulationTensorBoard"]
