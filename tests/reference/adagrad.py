"""Duchi et al. 2011; Zhang 2019, Eq. 22."""

import numpy as np

VARIANTS = [
    {},
    {"initial_accumulator_value": 0.1},
    {"initial_accumulator_value": 0.1, "epsilon_root": 0.0},
    {"epsilon": 1e-7, "epsilon_root": 0.0},
    {"epsilon": 0.1, "epsilon_root": 0.01},
]


def slots(initial_accumulator_value, epsilon, epsilon_root):
    return {"accumulator": initial_accumulator_value}


def update(theta, g, slots, eta, t, initial_accumulator_value, epsilon, epsilon_root):
    total = slots["accumulator"] + g**2
    theta = theta - eta * g / (np.sqrt(total + epsilon_root) + epsilon)
    return theta, {"accumulator": total}


def terms(g, slots, eta, t, **hyperparameters):
    return [update(0.0, g, slots, eta, t, **hyperparameters)[0]]
