"""Zhang 2019, Algorithm 5; Goodfellow et al. 2016, Algorithm 8.3.

The variable holds the look-ahead point; `look_ahead` is how many velocities it is away
from the weights.
"""

VARIANTS = [
    {},
    {"momentum": 0.0},
    {"momentum": 0.5},
    {"classical": True},
    {"classical": True, "momentum": 0.99},
]


def slots(momentum, classical):
    return {"velocity": 0.0, "look_ahead": 0.0}


def update(theta, g, slots, eta, t, momentum, classical):
    v, c = slots["velocity"], slots["look_ahead"]
    if classical:
        weights = theta - c * v
        v = momentum * v - eta * g
        weights = weights + v
        c = momentum + 0 * c
        return weights + c * v, {"velocity": v, "look_ahead": c}
    weights = theta + c * v
    v = momentum * v + (1 - momentum) * g
    weights = weights - eta * v
    c = eta * momentum + 0 * c
    return weights - c * v, {"velocity": v, "look_ahead": c}


def terms(g, slots, eta, t, momentum, classical):
    v, c = slots["velocity"], slots["look_ahead"]
    if classical:
        return [-c * v, (1 + momentum) * momentum * v, -(1 + momentum) * eta * g]
    far = eta * (1 + momentum)
    return [c * v, -far * momentum * v, -far * (1 - momentum) * g]
