"""Zhang 2019, Eq. 3."""

import numpy as np


def multiclass_hinge(scores, label, margin=1.0):
    """Of one sample, term by term."""
    total = np.float64(0)
    for j, score in enumerate(scores):
        if j != label:
            total += max(0.0, score - scores[label] + margin)
    return total
