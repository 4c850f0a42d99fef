"""Tieleman and Hinton 2012; Zhang 2019, Eq. 23-25; centered: Graves 2013, Eq. 38-45.

The centered form's `velocity` is the variance: the mean square less the squared mean.
"""

import numpy as np

VARIANTS = [
    {},
    {"rho": 0.0},
    {"rho": 0.5, "momentum": 0.9},
    {"centered": True},
    {"centered": True, "momentum": 0.5, "rho": 0.95},
    {"epsilon": 1e-3, "epsilon_root": 0.0},
    {"epsilon": 0.1, "epsilon_root": 0.01, "centered": True},
]


def slots(rho, momentum, epsilon, epsilon_root, centered):
    names = ["velocity"]
    names += ["momentum"] if momentum else []
    names += ["average_gradient"] if centered else []
    return dict.fromkeys(names, 0.0)


def _step(g, slots, eta, rho, epsilon, epsilon_root, centered):
    if not centered:
        mean_square = rho * slots["velocity"] + (1 - rho) * g**2
        step = eta * g / (np.sqrt(mean_square + epsilon_root) + epsilon)
        return step, {"velocity": mean_square}
    mean = slots["average_gradient"]
    mean_square = slots["velocity"] + mean**2
    mean_square = rho * mean_square + (1 - rho) * g**2
    mean = rho * mean + (1 - rho) * g
    variance = mean_square - mean**2
    step = eta * g / (np.sqrt(variance + epsilon_root) + epsilon)
    return step, {"velocity": variance, "average_gradient": mean}


def update(theta, g, slots, eta, t, rho, momentum, epsilon, epsilon_root, centered):
    step, new_slots = _step(g, slots, eta, rho, epsilon, epsilon_root, centered)
    if momentum:
        step = momentum * slots["momentum"] + step
        new_slots["momentum"] = step
    return theta - step, new_slots


def terms(g, slots, eta, t, rho, momentum, epsilon, epsilon_root, centered):
    step, _ = _step(g, slots, eta, rho, epsilon, epsilon_root, centered)
    return [-step, -momentum * slots["momentum"]] if momentum else [-step]
