"""Zhang 2019, Eq. 42."""

import numpy as np

VARIANTS = [
    {},
    {"beta_1": 0.0, "beta_2": 0.0},
    {"beta_1": 0.5, "beta_2": 0.9},
    {"epsilon": 0.0, "epsilon_root": 1e-4},
    {"epsilon": 0.1, "epsilon_root": 0.01},
]


def slots(beta_1, beta_2, epsilon, epsilon_root):
    return {"momentum": 0.0, "velocity": 0.0}


def update(theta, g, slots, eta, t, beta_1, beta_2, epsilon, epsilon_root):
    m = beta_1 * slots["momentum"] + (1 - beta_1) * g
    v = beta_2 * slots["velocity"] + (1 - beta_2) * g**2
    m_hat = m / (1 - beta_1**t)
    v_hat = v / (1 - beta_2**t)
    ahead = beta_1 * m_hat + (1 - beta_1) * g / (1 - beta_1**t)
    theta = theta - eta / (np.sqrt(v_hat + epsilon_root) + epsilon) * ahead
    return theta, {"momentum": m, "velocity": v}


def terms(g, slots, eta, t, beta_1, beta_2, epsilon, epsilon_root):
    v_hat = (beta_2 * slots["velocity"] + (1 - beta_2) * g**2) / (1 - beta_2**t)
    rate = eta / (1 - beta_1**t) / (np.sqrt(v_hat + epsilon_root) + epsilon)
    return [
        -rate * beta_1**2 * slots["momentum"],
        -rate * (beta_1 * (1 - beta_1) + (1 - beta_1)) * g,
    ]
