"""Callbacks that listen to the optimizers and write TensorBoard event files."""

from keras_gdopt.callbacks.optimizer_tensorboard import OptimizerTensorBoard

__all__ = ["OptimizerTensorBoard"]
