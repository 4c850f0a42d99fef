"""Zhang 2019, Eq. 44-50, on arrays of all members, by the letter of the paper."""

import numpy as np


def normalized(losses):
    losses = np.asarray(losses, "float64")
    spread = losses.max() - losses.min()
    return (losses - losses.min()) / spread if spread else np.zeros_like(losses)


def selection_probabilities(losses):
    weights = np.exp(-normalized(losses))
    return weights / weights.sum()


def crossover_probability(losses, i, j):
    normal = normalized(losses)
    return np.exp(-normal[i]) / (np.exp(-normal[i]) + np.exp(-normal[j]))


def mutation_probability(rate, losses, i, j):
    chosen = selection_probabilities(losses)
    return max(rate * (1 - chosen[i] - chosen[j]), 0.0)
