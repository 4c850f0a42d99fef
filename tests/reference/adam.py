"""Kingma and Ba 2015, Algorithm 1; AMSGrad: Reddi et al. 2018, with Adam's corrections."""

import numpy as np

VARIANTS = [
    {},
    {"beta_1": 0.0, "beta_2": 0.0},
    {"beta_1": 0.5, "beta_2": 0.9},
    {"epsilon": 0.0, "epsilon_root": 1e-4},
    {"epsilon": 0.1, "epsilon_root": 0.01},
    {"amsgrad": True, "beta_2": 0.9},
]


def slots(beta_1, beta_2, epsilon, epsilon_root, amsgrad):
    names = ["momentum", "velocity"] + (["velocity_hat"] if amsgrad else [])
    return dict.fromkeys(names, 0.0)


def _rate(g, slots, eta, t, beta_1, beta_2, epsilon, epsilon_root, amsgrad):
    """What the first moment is multiplied with, and the new second moments."""
    v = beta_2 * slots["velocity"] + (1 - beta_2) * g**2
    new_slots = {"velocity": v}
    if amsgrad:
        v = new_slots["velocity_hat"] = np.maximum(slots["velocity_hat"], v)
    v_hat = v / (1 - beta_2**t)
    return eta / (1 - beta_1**t) / (np.sqrt(v_hat + epsilon_root) + epsilon), new_slots


def update(theta, g, slots, eta, t, beta_1, **hyperparameters):
    rate, new_slots = _rate(g, slots, eta, t, beta_1, **hyperparameters)
    m = beta_1 * slots["momentum"] + (1 - beta_1) * g
    return theta - rate * m, {"momentum": m, **new_slots}


def terms(g, slots, eta, t, beta_1, **hyperparameters):
    rate, _ = _rate(g, slots, eta, t, beta_1, **hyperparameters)
    return [-rate * beta_1 * slots["momentum"], -rate * (1 - beta_1) * g]
