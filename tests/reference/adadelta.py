"""Zeiler 2012, Algorithm 1; Zhang 2019, Algorithm 8."""

import numpy as np

VARIANTS = [
    {},
    {"rho": 0.0},
    {"rho": 0.5, "epsilon_root": 1e-4},
    {"epsilon": 1e-3, "epsilon_root": 0.0},
    {"epsilon": 0.1, "epsilon_root": 0.01},
]


def slots(rho, epsilon, epsilon_root):
    return {"accumulated_grad": 0.0, "accumulated_delta_var": 0.0}


def update(theta, g, slots, eta, t, rho, epsilon, epsilon_root):
    squares, deltas = slots["accumulated_grad"], slots["accumulated_delta_var"]
    squares = rho * squares + (1 - rho) * g**2
    rms_of_deltas = np.sqrt(deltas + epsilon_root) + epsilon
    rms_of_gradients = np.sqrt(squares + epsilon_root) + epsilon
    delta = -rms_of_deltas / rms_of_gradients * g
    deltas = rho * deltas + (1 - rho) * delta**2
    return theta + eta * delta, {"accumulated_grad": squares, "accumulated_delta_var": deltas}


def terms(g, slots, eta, t, **hyperparameters):
    return [update(0.0, g, slots, eta, t, **hyperparameters)[0]]
