"""Kingma and Ba 2015, Algorithm 1."""

import numpy as np

SLOTS = {"momentum": 0.0, "velocity": 0.0}
VARIANTS = [
    {},
    {"beta_1": 0.0, "beta_2": 0.0},
    {"beta_1": 0.5, "beta_2": 0.9},
    {"epsilon": 0.0, "epsilon_root": 1e-4},
    {"epsilon": 0.1, "epsilon_root": 0.01},
]


def update(theta, g, slots, eta, t, beta_1, beta_2, epsilon, epsilon_root):
    m = beta_1 * slots["momentum"] + (1 - beta_1) * g
    v = beta_2 * slots["velocity"] + (1 - beta_2) * g**2
    m_hat = m / (1 - beta_1**t)
    v_hat = v / (1 - beta_2**t)
    theta = theta - eta * m_hat / (np.sqrt(v_hat + epsilon_root) + epsilon)
    return theta, {"momentum": m, "velocity": v}
