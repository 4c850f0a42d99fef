"""Callbacks that listen to the optimizers and write TensorBoard event files."""

from keras_gdopt.callbacks.optimizer_tensorboard import OptimizerTensorBoard
from keras_gdopt.callbacks.population_tensorboard import PopulationTensorBoard

__all__ = ["OptimizerTensorBoard", "PopulationTensorBoard"]
