"""Callbacks that show what an optimizer does, and one that stops training once it has converged."""

from keras_gdopt.callbacks.convergence_stopping import ConvergenceStopping
from keras_gdopt.callbacks.optimizer_metrics import OptimizerMetrics
from keras_gdopt.callbacks.optimizer_tensorboard import OptimizerTensorBoard
from keras_gdopt.callbacks.population_tensorboard import PopulationTensorBoard
from keras_gdopt.callbacks.training_alarms import TrainingAlarms

__all__ = [
    "ConvergenceStopping",
    "OptimizerMetrics",
    "OptimizerTensorBoard",
    "PopulationTensorBoard",
    "TrainingAlarms",
]
