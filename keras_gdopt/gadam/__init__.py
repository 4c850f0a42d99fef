"""Gadam: trains and evolves a population of clones of a Keras model."""

from keras_gdopt.gadam.callback import PopulationCallback
from keras_gdopt.gadam.cluster.engine import RayEngine
from keras_gdopt.gadam.driver import Gadam
from keras_gdopt.gadam.lineage import Lineage

__all__ = ["Gadam", "Lineage", "PopulationCallback", "RayEngine"]
