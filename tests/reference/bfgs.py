"""Nocedal and Wright 2006, Eq. 6.17 and 6.20; Al-Baali's self-scaling, by the letter."""

import numpy as np


def updated(inverse, s, y, step_length, gradient, *, self_scaled):
    """The inverse Hessian after a step, and τ.

    Args:
        inverse: Before it; `None` before the first update.
        s: The step.
        y: The gradient's change.
        step_length: α, with which s = -α H g.
        gradient: Before the step.
        self_scaled: Whether to scale.
    """
    identity, rho, scaling = np.eye(len(s)), 1 / (y @ s), 1.0
    if inverse is None:
        inverse = (y @ s) / (y @ y) * identity
    elif self_scaled:
        scaling = min(1.0, (y @ s) / (-step_length * s @ gradient))
    left = identity - rho * np.outer(s, y)
    return left @ (inverse / scaling) @ left.T + rho * np.outer(s, s), scaling
