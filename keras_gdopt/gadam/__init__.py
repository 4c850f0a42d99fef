"""Gadam: trains and evolves a population of clones of a Keras model."""
