"""What the callbacks cost: training with each and without, in turn.

python -m benchmarks.callbacks                 # everything
python -m benchmarks.callbacks population-16   # one part; `--help` lists the parts
"""

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_gdopt as gdopt
from benchmarks.side_by_side import Contender, Work, run
from keras_gdopt.callbacks import PopulationTensorBoard
from keras_gdopt.gadam import Lineage

SAMPLES, GENERATIONS = 1797, 50


def digits_mlp() -> keras.Model:
    """Of 64-64-10 units, for pictures of handwritten digits."""
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(gdopt.Adam(), loss, metrics=["accuracy"])
    return model


def generations(members: int, *, watched: bool) -> Contender:
    """Whole generations of a population, as many as it takes to draw one family tree."""

    def make() -> Callable[[], object]:
        rng = np.random.default_rng(0)
        x, y = rng.random((SAMPLES, 64), "float32"), rng.integers(0, 10, SAMPLES)
        gadam = gdopt.Gadam(digits_mlp(), members, mutation="normal", seed=0)
        gadam._start_members()
        members_at_first = gadam._members
        directory, number = Path(tempfile.mkdtemp()), itertools.count()

        def step() -> object:
            # A run from the start each time, with nothing to compile.
            gadam._members, gadam._generation, gadam.lineage = members_at_first, 0, Lineage()
            gadam._identities = [gadam.lineage.born(0) for _ in range(members)]
            callbacks = []
            if watched:
                callbacks = [PopulationTensorBoard(directory / str(next(number)))]
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


WORKS = {"population-16": lambda: _population(16), "population-64": lambda: _population(64)}


if __name__ == "__main__":
    run(__doc__.splitlines()[0], WORKS)
