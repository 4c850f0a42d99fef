r"""Trains a population of small convolutional networks in the workers of a Ray cluster.

On this machine, where the workers are processes:

    python examples/gadam_ray.py --workers 2

On a cluster that was started with `ray start`, run it from any machine of the cluster. All
machines need `pip install 'keras-gdopt[ray]' scikit-learn` and share the checkpoint directory:

    python examples/gadam_ray.py --address auto --workers 16 --population 64 \
        --checkpoint-dir /shared/gadam

The same command continues a run that was interrupted. Kill a worker (on Linux
`pkill -9 -o -f ray::Worker`), and the run still reaches the same result. It prints a table of
the generations and then the test accuracy of the best member.
`tensorboard --logdir runs/gadam_ray` shows the population.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import keras_gdopt as gdopt

TEST_SAMPLES = 360


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits of 8 by 8 pixels, shuffled."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order] / 16.0).reshape(-1, 8, 8, 1).astype("float32"), y[order]


def training_data() -> tuple[np.ndarray, np.ndarray]:
    """The training data, which each worker loads by itself."""
    x, y = digits()
    return x[TEST_SAMPLES:], y[TEST_SAMPLES:]


def new_model() -> keras.Model:
    """Two convolutions and a dense layer."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(gdopt.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Table(gdopt.gadam.PopulationCallback):
    """Prints a line for each generation when it ends."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        print(f"{'generation':>10}{'fitness':>10}{'accuracy':>10}{'seconds':>9}"
              f"{'MB to breed':>13}{'MB kept':>9}")  # fmt: skip

    def on_generation_begin(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        self._began = time.perf_counter()

    def on_generation_end(self, generation: int, logs: dict[str, Any] | None = None) -> None:
        assert logs is not None
        seconds = time.perf_counter() - self._began
        print(
            f"{generation + 1:>10}{logs['fitness']:>10.4f}{logs['accuracy']:>10.4f}{seconds:>9.1f}"
            f"{logs['bytes_moved'] / 1e6:>13.2f}{logs['bytes_kept'] / 1e6:>9.2f}",
            flush=True,
        )
        for event in logs["events"]:
            print(f"{'':10}{event}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Trains the population and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--address", help="of a Ray cluster; default: one on this machine")
    parser.add_argument("--population", type=int, default=8, help="members; default: 8")
    parser.add_argument("--generations", type=int, default=5, help="default: 5")
    parser.add_argument("--epochs", type=int, default=2, help="of a generation; default: 2")
    parser.add_argument("--checkpoint-dir", help="where to save the run, and to go on from")
    parser.add_argument("--logdir", type=Path, default=Path("runs/gadam_ray"))
    arguments = parser.parse_args(argv)
    for name, least in (("workers", 1), ("population", 2), ("generations", 1), ("epochs", 1)):
        if getattr(arguments, name) < least:
            sys.exit(f"--{name} must be at least {least}; received {getattr(arguments, name)}")

    model = new_model()
    engine = gdopt.RayEngine(arguments.workers, arguments.address, data_fn=training_data)
    gadam = gdopt.Gadam(model, arguments.population, mutation="normal", engine=engine, seed=0)
    gadam.fit(
        generations=arguments.generations,
        epochs=arguments.epochs,
        batch_size=32,
        callbacks=[Table(), gdopt.callbacks.PopulationTensorBoard(arguments.logdir)],
        checkpoint_dir=arguments.checkpoint_dir,
        verbose=0,
    )
    x, y = digits()
    loss, accuracy = model.evaluate(x[:TEST_SAMPLES], y[:TEST_SAMPLES], verbose=0)
    print(f"\nthe best member on {TEST_SAMPLES} other digits: accuracy {accuracy:.4f}, "
          f"loss {loss:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
