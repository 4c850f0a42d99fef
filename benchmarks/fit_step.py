"""A whole step of `model.fit`, ours against Keras's, both as Keras compiles by default.

python -m benchmarks.fit_step                # all models
python -m benchmarks.fit_step mlp-51k        # one of: mlp-2048 mlp-51k guard range
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt
from benchmarks.side_by_side import Contender, Work, run

BATCH, RATES = 32, 100


def _contender(
    name: str,
    optimizer: Callable[[], Any],
    inputs: int,
    hidden: list[int],
    batches: int,
    models: int = 1,
) -> Contender:
    """An epoch of `fit` on batches cached in memory; several models take turns."""

    def make() -> Callable[[], object]:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(BATCH * batches, inputs)).astype("float32")
        y = rng.integers(0, 10, size=BATCH * batches)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache().prefetch(4)
        keras.utils.set_random_seed(0)

        def compiled_model() -> keras.Model:
            layers = [keras.layers.Dense(units, activation="relu") for units in hidden]
            model = keras.Sequential([keras.Input((inputs,)), *layers, keras.layers.Dense(10)])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer(), loss)
            return model

        turns = itertools.cycle([compiled_model() for _ in range(models)])
        return lambda: next(turns).fit(data, epochs=1, verbose=0)

    return Contender(name, make, steps=batches)


def _work(
    name: str, inputs: int, hidden: list[int], *, batches: int, contenders: dict, bounds: dict
) -> list[Work]:
    work = Work(
        f"fit, {name}, batch {BATCH}, epochs of {batches}",
        [
            _contender(label, optimizer, inputs, hidden, batches)
            for label, optimizer in contenders.items()
        ],
        bounds=bounds,
    )
    return [work]


def mlp_2048() -> list[Work]:
    """An MLP of 2048-2048-2048-10 units, 8.4 M parameters: the update is most of a step."""
    return _work(
        "MLP 2048-2048-2048-10",
        2048,
        [2048, 2048],
        batches=20,
        contenders={
            "keras.Adam": keras.optimizers.Adam,
            "Adam": gdopt.Adam,
            "RAdam": gdopt.RAdam,
        },
        bounds={"Adam": 0.8},
    )


def mlp_51k() -> list[Work]:
    """An MLP of 784-64-10 units, 51 thousand parameters: calls cost more than arithmetic."""
    return _work(
        "MLP of 51 k",
        784,
        [64],
        batches=200,
        contenders={
            "keras.Adam": keras.optimizers.Adam,
            "Adam": gdopt.Adam,
            "RAdam": gdopt.RAdam,
            "keras.SGD": keras.optimizers.SGD,
            "GradientDescent": gdopt.GradientDescent,
        },
        bounds={"Adam": 1.03},
    )


def guard() -> list[Work]:
    """The MLP of 51 thousand parameters with a look at the gradients before each step.

    Several models take turns, because one of two equal models may be a few percent faster.
    """
    optimizers: dict[str, Callable[[], Any]] = {
        "Adam": gdopt.Adam,
        "Adam(skip_nonfinite=True)": lambda: gdopt.Adam(skip_nonfinite=True),
    }
    contenders = [
        _contender(name, optimizer, 784, [64], batches=200, models=4)
        for name, optimizer in optimizers.items()
    ]
    bounds = {"Adam(skip_nonfinite=True)": 1.04}
    return [Work("fit, MLP of 51 k, guarded", contenders, calls=4, bounds=bounds)]


def learning_rate_range() -> list[Work]:
    """A search for the learning rate, of 100 rates, against 100 steps of `fit`."""

    def contender(name: str, run: Callable[[keras.Model, tf.data.Dataset], object]) -> Contender:
        def make() -> Callable[[], object]:
            rng = np.random.default_rng(0)
            x = rng.normal(size=(BATCH * RATES, 784)).astype("float32")
            y = rng.integers(0, 10, size=len(x))
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache().prefetch(4)
            keras.utils.set_random_seed(0)
            layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
            model = keras.Sequential([keras.Input((784,)), *layers])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(gdopt.Adam(), loss)
            return lambda: run(model, data)

        return Contender(name, make, steps=RATES)

    search = "find_learning_rate"
    contenders = [
        contender("fit", lambda model, data: model.fit(data, verbose=0)),
        # Rates so low that the loss does not explode, which would end it early.
        contender(
            search,
            lambda model, data: gdopt.find_learning_rate(
                model, data, steps=RATES, max_learning_rate=1e-5, verbose=0
            ),
        ),
    ]
    return [Work(f"{RATES} rates, MLP of 51 k", contenders, calls=3, bounds={search: 1.3})]


WORKS = {
    "mlp-2048": mlp_2048,
    "mlp-51k": mlp_51k,
    "guard": guard,
    "range": learning_rate_range,
}


if __name__ == "__main__":
    run(__doc__.splitlines()[0], WORKS)
