"""Zhang 2019, Algorithm 4; Goodfellow et al. 2016, Algorithm 8.2."""

VARIANTS = [
    {},
    {"momentum": 0.0},
    {"momentum": 0.5},
    {"classical": True},
    {"classical": True, "momentum": 0.99},
]


def slots(momentum, classical):
    return {"velocity": 0.0}


def update(theta, g, slots, eta, t, momentum, classical):
    v = slots["velocity"]
    if classical:
        v = momentum * v - eta * g
        return theta + v, {"velocity": v}
    v = momentum * v + (1 - momentum) * g
    return theta - eta * v, {"velocity": v}


def terms(g, slots, eta, t, momentum, classical):
    v = slots["velocity"]
    if classical:
        return [momentum * v, -eta * g]
    return [-eta * momentum * v, -eta * (1 - momentum) * g]
