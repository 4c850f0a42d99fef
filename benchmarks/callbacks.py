"""What the callbacks cost: training with each and without, in turn.

python -m benchmarks.callbacks                 # everything
python -m benchmarks.callbacks population-16   # one part; `--help` lists the parts
"""

import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt
from benchmarks.side_by_side import Contender, Work, run
from benchmarks.update_step import resnet50_shapes
from keras_gdopt.gadam import Lineage

SAMPLES, BATCH, EPOCHS, MODELS = 1797, 32, 20, 6
GENERATIONS, UPDATES = 50, 100
SAMPLES_OF_CURVATURE = 512


def digits_mlp() -> keras.Model:
    """An MLP of 64-64-10 units, for pictures of handwritten digits."""
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(gdopt.Adam(), loss, metrics=["accuracy"])
    return model


def generations(members: int, *, watched: bool) -> Contender:
    """Whole generations of a population, enough for the family tree to be drawn once."""

    def make() -> Callable[[], object]:
        rng = np.random.default_rng(0)
        x, y = rng.random((SAMPLES, 64), "float32"), rng.integers(0, 10, SAMPLES)
        gadam = gdopt.Gadam(digits_mlp(), members, mutation="normal", seed=0)
        gadam._start_population()
        started: Any = gadam._population
        members_at_first = started.members
        directory, number = Path(tempfile.mkdtemp()), itertools.count()

        def step() -> object:
            # Each call is a run from the start, with nothing left to compile.
            started.members = members_at_first
            gadam._generation, gadam.lineage = 0, Lineage()
            gadam._identities = [gadam.lineage.born(0) for _ in range(members)]
            callbacks = []
            if watched:
                callbacks = [gdopt.callbacks.PopulationTensorBoard(directory / str(next(number)))]
            return gadam.fit(x, y, generations=GENERATIONS, callbacks=callbacks, verbose=0)

        return step

    name = "with PopulationTensorBoard" if watched else "without"
    return Contender(name, make, steps=GENERATIONS)


def _population(members: int) -> list[Work]:
    contenders = [generations(members, watched=watched) for watched in (False, True)]
    return [
        Work(
            f"a generation of a digits MLP, g = {members}",
            contenders,
            bounds={contenders[1].name: 1.03},
        )
    ]


def _epochs(name: str, callbacks: Callable[[], list[keras.callbacks.Callback]]) -> Contender:
    """Epochs of `fit` of the digits MLP, on batches cached in memory.

    Several models take turns, because one of two equal models may be a few percent faster than the
    other for as long as both live.
    """

    def make() -> Callable[[], object]:
        rng = np.random.default_rng(0)
        x, y = rng.random((SAMPLES, 64), "float32"), rng.integers(0, 10, SAMPLES)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache().prefetch(4)
        models = itertools.cycle([digits_mlp() for _ in range(MODELS)])

        def step() -> object:
            # Each `fit` is a run.
            return next(models).fit(data, epochs=EPOCHS, callbacks=callbacks(), verbose=0)

        return step

    return Contender(name, make, steps=EPOCHS * math.ceil(SAMPLES / BATCH))


def epochs(tier: str | None) -> Contender:
    """With an `OptimizerTensorBoard` of a tier, or without."""

    def callbacks() -> list[keras.callbacks.Callback]:
        if tier is None:
            return []
        return [gdopt.callbacks.OptimizerTensorBoard(tempfile.mkdtemp(), tier=tier)]

    return _epochs(_name(tier), callbacks)


def _logged() -> list[Work]:
    name = "with OptimizerMetrics(update_freq=10)"
    contenders = [
        _epochs("without", list),
        _epochs(name, lambda: [gdopt.callbacks.OptimizerMetrics(update_freq=10)]),
    ]
    return [
        Work(
            "fit of a digits MLP, logged, processor time",
            contenders,
            bounds={name: 1.08},
            clock=time.process_time,
        )
    ]


def _watched() -> list[Work]:
    """`TrainingAlarms` beside `OptimizerTensorBoard`."""
    name = "and TrainingAlarms"

    def board() -> keras.callbacks.Callback:
        return gdopt.callbacks.OptimizerTensorBoard(tempfile.mkdtemp())

    contenders = [
        _epochs("with OptimizerTensorBoard", lambda: [board()]),
        _epochs(name, lambda: [board(), gdopt.callbacks.TrainingAlarms()]),
    ]
    return [
        Work(
            "fit of a digits MLP, watched, processor time",
            contenders,
            bounds={name: 1.04},
            clock=time.process_time,
        )
    ]


def _measured() -> list[Work]:
    """A measurement of the curvature on 512 samples, in steps of the MLP of 51 thousand."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH * UPDATES, 784)).astype("float32"), rng.integers(0, 10, 3200)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).cache().prefetch(4)
    name = "a measurement of the curvature"

    def trained() -> keras.Model:
        layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
        model = keras.Sequential([keras.Input((784,)), *layers])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(gdopt.GradientDescent(0.01), loss)
        model.fit(data, verbose=0)
        return model

    def steps() -> Callable[[], object]:
        model = trained()
        return lambda: model.fit(data, verbose=0)

    def measurements() -> Callable[[], object]:
        # Not above: with `--before`, the other works run in versions that have no such module.
        from keras_gdopt.callbacks.curvature import Curvature

        curvature = Curvature(trained(), (x[:SAMPLES_OF_CURVATURE], y[:SAMPLES_OF_CURVATURE]))
        return curvature.largest_eigenvalue

    contenders = [
        Contender("a training step", steps, steps=UPDATES),
        Contender(name, measurements, steps=1),
    ]
    return [Work("curvature, MLP of 51 k", contenders, bounds={name: 60})]


class _OfShapes(keras.Model):
    """A model with weights of given shapes, no layers, and the same gradients in each step."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        for shape in shapes:
            self.add_weight(shape=shape, initializer="zeros")
        self.gradients = [tf.constant(rng.normal(size=shape), "float32") for shape in shapes]
        self.built = True

    def train_step(self, data: object) -> dict[str, float]:
        self.optimizer.apply(self.gradients, self.trainable_variables)
        return {"loss": 0.0}


def updates(tier: str | None) -> Contender:
    """Updates of ResNet-50's 25.6 million weights by Adam, in `fit`."""

    def make() -> Callable[[], object]:
        model = _OfShapes(resnet50_shapes())
        model.compile(gdopt.Adam())
        data = tf.data.Dataset.range(UPDATES)

        def step() -> object:
            callbacks = []
            if tier is not None:
                callbacks = [gdopt.callbacks.OptimizerTensorBoard(tempfile.mkdtemp(), tier=tier)]
            return model.fit(data, callbacks=callbacks, verbose=0)

        return step

    return Contender(_name(tier), make, steps=UPDATES)


def _name(tier: str | None) -> str:
    return "without" if tier is None else f"with OptimizerTensorBoard, {tier}"


def _optimizer(
    name: str,
    contender: Callable[[str | None], Contender],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Work]:
    contenders = [contender(tier) for tier in (None, "scalars", "layers")]
    bounds = {_name("scalars"): 1.03, _name("layers"): 1.08}
    return [Work(name, contenders, bounds=bounds, clock=clock)]


WORKS = {
    "logs": _logged,
    "alarms": _watched,
    "curvature": _measured,
    "digits": lambda: _optimizer(
        f"fit of a digits MLP, batch {BATCH}, processor time", epochs, time.process_time
    ),
    "resnet-50": lambda: _optimizer("update of ResNet-50, 25.6 M", updates),
    "population-16": lambda: _population(16),
    "population-64": lambda: _population(64),
}


if __name__ == "__main__":
    run(__doc__.splitlines()[0], WORKS)
