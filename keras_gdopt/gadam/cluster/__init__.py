"""Trains a population in the workers of a Ray cluster and rebuilds what is lost with a node."""
