"""Zhang 2019, Algorithm 5; Goodfellow et al. 2016, Algorithm 8.3.

The variable holds the look-ahead point, which is `look_ahead` velocities away from the
weights.
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
    v, ahead = slots["velocity"], slots["look_ahead"]
    if classical:
        weights = theta - ahead * v
        v = momentum * v - eta * g
        weights = weights + v
        return weights + momentum * v, {"velocity": v, "look_ahead": momentum + 0 * ahead}
    weights = theta + ahead * v
    v = momentum * v + (1 - momentum) * g
    weights = weights - eta * v
    return weights - eta * momentum * v, {"velocity": v, "look_ahead": eta * momentum + 0 * ahead}


def terms(g, slots, eta, t, momentum, classical):
    v, ahead = slots["velocity"], slots["look_ahead"]
    if classical:
        return [
            -ahead * v,
            (1 + momentum) * momentum * v,
            -(1 + momentum) * eta * g,
        ]
    far = eta * (1 + momentum)
    return [ahead * v, -far * momentum * v, -far * (1 - momentum) * g]
