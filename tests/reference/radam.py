"""Liu et al. 2020, Algorithm 2."""

import numpy as np

VARIANTS = [
    {},
    {"sma_threshold": 5.0},
    {"beta_1": 0.0, "beta_2": 0.0},
    {"beta_1": 0.5, "beta_2": 0.9},
    {"beta_2": 0.6},
    {"epsilon": 0.0, "epsilon_root": 1e-4},
    {"epsilon": 0.1, "epsilon_root": 0.01},
]


def slots(beta_1, beta_2, epsilon, epsilon_root, sma_threshold):
    return {"momentum": 0.0, "velocity": 0.0}


def _rate(g, slots, eta, t, beta_1, beta_2, epsilon, epsilon_root, sma_threshold):
    """What the first moment is multiplied with, and the new second moment."""
    v = beta_2 * slots["velocity"] + (1 - beta_2) * g**2
    rate = eta / (1 - beta_1**t)
    rho_inf = 2 / (1 - beta_2) - 1
    rho = rho_inf - 2 * t * beta_2**t / (1 - beta_2**t)
    if rho > sma_threshold:
        r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        v_hat = v / (1 - beta_2**t)
        rate = rate * r / (np.sqrt(v_hat + epsilon_root) + epsilon)
    return rate, v


def update(theta, g, slots, eta, t, beta_1, **hyperparameters):
    rate, v = _rate(g, slots, eta, t, beta_1, **hyperparameters)
    m = beta_1 * slots["momentum"] + (1 - beta_1) * g
    return theta - rate * m, {"momentum": m, "velocity": v}


def terms(g, slots, eta, t, beta_1, **hyperparameters):
    rate, _ = _rate(g, slots, eta, t, beta_1, **hyperparameters)
    return [-rate * beta_1 * slots["momentum"], -rate * (1 - beta_1) * g]
