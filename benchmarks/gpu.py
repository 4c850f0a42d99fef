"""Updates, steps of `fit`, closures and populations on a GPU, beside Keras, optax, torch and JAX.

python -m benchmarks.gpu                # all of it
python -m benchmarks.gpu population     # one of: update embedding fit closures population

Needs a GPU that TensorFlow uses, and for the peers builds of torch and JAX that use it, too.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import tensorflow as tf

from benchmarks import closures, fit_step, population, update_step
from benchmarks.side_by_side import Work, run


def _without_bounds(*makers: Callable[[], Sequence[Work]]) -> Callable[[], list[Work]]:
    """The works of other benchmarks, whose bounds are for a CPU."""
    return lambda: [dataclasses.replace(work, bounds={}) for make in makers for work in make()]


WORKS = {
    "update": _without_bounds(update_step.resnet50, update_step.mlp),
    "embedding": _without_bounds(update_step.embedding),
    "fit": _without_bounds(fit_step.mlp_2048, fit_step.mlp_51k),
    "closures": _without_bounds(*closures.WORKS.values()),
    "population": _without_bounds(*(population.WORKS[name] for name in ("mlp-16", "cnn", "lstm"))),
}


if __name__ == "__main__":
    found = tf.config.list_physical_devices("GPU")
    if not found:
        sys.exit("benchmarks.gpu: error: TensorFlow finds no GPU on this machine")
    for gpu in found:
        details = tf.config.experimental.get_device_details(gpu)
        print(f"{gpu.name}: {details.get('device_name', 'unknown')}")
    run(__doc__.splitlines()[0], WORKS)
