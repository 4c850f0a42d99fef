"""Zhang et al. 2019, *Lookahead Optimizer*, Algorithm 1, around momentum."""

from tests.reference import momentum as inner

VARIANTS = [{"sync_period": 2}, {"sync_period": 3, "slow_step_size": 0.8}]


def slots(sync_period, slow_step_size, **of_inner):
    return {"slow": 0.0, **inner.slots(**of_inner)}


def update(theta, g, slots, eta, t, sync_period, slow_step_size, **of_inner):
    slow = theta if t == 1 else slots["slow"]
    theta, new_slots = inner.update(theta, g, slots, eta, t, **of_inner)
    if t % sync_period == 0:
        slow = slow + slow_step_size * (theta - slow)
        theta = slow
    return theta, {"slow": slow, **new_slots}
