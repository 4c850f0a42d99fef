"""Zhang 2019, Eq. 15."""

VARIANTS = [{}]


def slots():
    return {}


def update(theta, g, slots, eta, t):
    return theta - eta * g, {}


def terms(g, slots, eta, t):
    return [-eta * g]
