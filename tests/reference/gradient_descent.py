"""Zhang 2019, Eq. 15."""

SLOTS = {}
VARIANTS = [{}]


def update(theta, g, slots, eta, t):
    return theta - eta * g, {}
