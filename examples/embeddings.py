"""Trains embeddings on real texts: how optimizers treat words that repeat.

    python examples/embeddings.py
    python examples/embeddings.py --rules Adam RMSprop Adagrad --epochs 10
    python examples/embeddings.py --data r8

The model classifies texts by the mean of their words' embeddings. In a batch, common words occur
many times and most words not at all, so the gradient of the embedding table is a list of rows
with repeated ids. For each rule, three optimizers train with the same initial weights and batches:

- exact: ours; the same result as with the dense gradient, which has a row for each word;
- lazy: ours with `lazy=True`; rows absent from the batch, and their slots, are not updated;
- Keras: the built-in one, which squares each repetition of a row separately.

The last column of the table shows how far the weights are, after some steps, from those that
the same optimizer reaches with dense gradients, relative to the distance that these moved.

The built-in texts are the docstrings of four Python packages that the examples need anyway:
the prose above the first section, without the packages' names. The model predicts which package
a text comes from; whole modules are held out. `--data` reads texts of yours from a folder. It
contains either `train.txt` and `test.txt` with one line for each text, its label, a tab and the
text (the format of Reuters R8); or a folder of files for each label (the format of the
SpamAssassin mails), of which a fifth is held out.
"""

import argparse
import ast
import collections
import functools
import importlib.util
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides most start-up messages

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt

PACKAGES = ("numpy", "sklearn", "matplotlib", "keras")
NAMES = {*PACKAGES, "scikit", "tensorflow", "pyplot", "np", "plt", "tf"}
"""Words that would reveal the package."""
HELD_OUT = 5  # one in so many
WORDS_OF_A_TEXT = 60
DIMENSIONS = 64
BATCH_SIZE = 64
RULES = {"Adam": 0.003, "RMSprop": 0.003, "Adagrad": 0.1}
"""The rules, with learning rates that suit them here."""

Text = tuple[str, str]
"""A label and the text."""


class Data(NamedTuple):
    """Texts as word ids, 0 for padding and 1 for unknown words, and labels from 0."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    words: int
    labels: list[str]


class Result(NamedTuple):
    """What the table and the pictures show of one optimizer."""

    accuracies: list[float]
    loss: float
    step_milliseconds: float
    off_dense: float
    first_steps: dict[int, float]


# --- texts -------------------------------------------------------------------------------


def docstrings() -> tuple[list[Text], list[Text]]:
    """The prose of docstrings, labelled by package, for training and for testing."""
    texts: tuple[list[Text], list[Text]] = [], []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            stop(f"needs the package {package}: pip install 'keras-gdopt[examples]'")
        root = Path(spec.submodule_search_locations[0])
        modules = sorted(path for path in root.rglob("*.py") if "test" not in str(path.name))
        seen = set()
        for number, module in enumerate(modules):
            for text in _prose(module):
                if text not in seen:
                    seen.add(text)
                    texts[number % HELD_OUT == 0].append((package, text))
    return texts


def _prose(module: Path) -> Iterator[str]:
    """Yields the prose above sections and examples in docstrings, if it has ten words or more."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            text = re.split(r"\n\s*(?:[A-Z]\w+:\n|[A-Z]\w+\n\s*---|>>>|\.\. )", text)[0]
            words = [word for word in _words(text) if word not in NAMES]
            if len(words) >= 10:
                yield " ".join(words)


def given_texts(folder: Path, seed: int) -> tuple[list[Text], list[Text]]:
    """The texts in a folder, for training and for testing."""
    if (folder / "train.txt").exists():
        parts = [_lines(folder / name) for name in ("train.txt", "test.txt")]
        return parts[0], parts[1]
    texts = [
        (kind.name, path.read_text(encoding="utf-8", errors="replace"))
        for kind in sorted(folder.iterdir())
        if kind.is_dir()
        for path in sorted(kind.rglob("*"))
        if path.is_file()
    ]
    order = np.random.default_rng(seed).permutation(len(texts))
    held_out = len(texts) // HELD_OUT
    return [texts[i] for i in order[held_out:]], [texts[i] for i in order[:held_out]]


def _lines(path: Path) -> list[Text]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.partition("\t") for line in lines)
    return [(label.strip(), text) for label, tab, text in pairs if tab]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())[:WORDS_OF_A_TEXT]


def as_ids(train: list[Text], test: list[Text], words: int) -> Data:
    """Converts texts to ids of the most frequent words of the training texts."""
    counts = collections.Counter(word for _, text in train for word in _words(text))
    ids = {word: i for i, (word, _) in enumerate(counts.most_common(words - 2), start=2)}
    labels = sorted({label for label, _ in train})
    number = {label: i for i, label in enumerate(labels)}

    def arrays(texts: list[Text]) -> tuple[np.ndarray, np.ndarray]:
        x = np.zeros((len(texts), WORDS_OF_A_TEXT), "int32")
        for row, (_, text) in zip(x, texts, strict=True):
            found = [ids.get(word, 1) for word in _words(text)]
            row[: len(found)] = found
        return x, np.array([number[label] for label, _ in texts], "int32")

    known = [(label, text) for label, text in test if label in number]
    return Data(*arrays(train), *arrays(known), len(ids) + 2, labels)


# --- training ----------------------------------------------------------------------------


class DenseGradientEmbedding(keras.layers.Embedding):
    """An embedding whose gradient has a row for each word: exact but slow."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.take(self._embeddings * 1.0, inputs, axis=0)


def new_model(data: Data, embedding: type[keras.layers.Embedding]) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((WORDS_OF_A_TEXT,), dtype="int32"),
            embedding(data.words, DIMENSIONS, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(len(data.labels), activation="softmax"),
        ]
    )


def contenders(rules: list[str]) -> dict[str, Callable[[], keras.optimizers.Optimizer]]:
    found: dict[str, Callable[[], keras.optimizers.Optimizer]] = {}
    for rule in rules:
        ours, keras_own = getattr(gdopt, rule), getattr(keras.optimizers, rule)
        rate = RULES[rule]
        found[f"{rule}, exact"] = functools.partial(ours, rate)
        found[f"{rule}, lazy"] = functools.partial(ours, rate, lazy=True)
        found[f"{rule}, Keras"] = functools.partial(keras_own, rate)
    return found


class StepTimes(keras.callbacks.Callback):
    """Times each training step as `fit` runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def median_milliseconds(self) -> float:
        """The median without the first step, which compiles."""
        return 1e3 * statistics.median(self.seconds[1:] or self.seconds)


class Progress(keras.callbacks.Callback):
    """Shows the epochs of an optimizer as a progress bar on one line."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        print(f"{self._label:16} ", end="", flush=True)
        self._bar = keras.utils.Progbar(
            self.params["epochs"], stateful_metrics=["loss", "val_accuracy"], unit_name="epoch"
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        shown = [(name, (logs or {})[name]) for name in ("loss", "val_accuracy")]
        self._bar.update(epoch + 1, shown, finalize=epoch + 1 == self.params["epochs"])


def batches_of(data: Data, seed: int) -> tf.data.Dataset:
    """The same batches for every optimizer, in a new order in each epoch."""
    samples = tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train))
    return samples.shuffle(len(data.x_train), seed=seed).batch(BATCH_SIZE).prefetch(2)


def compiled(
    data: Data, start: list[np.ndarray], optimizer: keras.optimizers.Optimizer, **arguments: Any
) -> keras.Model:
    model = new_model(data, **arguments)
    model.set_weights(start)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(
    name: str,
    optimizer: Callable[[], keras.optimizers.Optimizer],
    data: Data,
    start: list[np.ndarray],
    args: argparse.Namespace,
) -> Result:
    model = compiled(data, start, optimizer(), embedding=keras.layers.Embedding)
    times = StepTimes()
    history = model.fit(
        batches_of(data, args.seed),
        epochs=args.epochs,
        validation_data=(data.x_test, data.y_test),
        shuffle=False,  # the data set shuffles itself
        verbose=0,
        callbacks=[times, Progress(name)],
    ).history
    return Result(
        history["val_accuracy"],
        history["loss"][-1],
        times.median_milliseconds(),
        off_dense(optimizer, data, start, args, args.steps),
        first_steps(optimizer, data, start, args),
    )


def moved(
    optimizer: Callable[[], keras.optimizers.Optimizer],
    data: Data,
    start: list[np.ndarray],
    args: argparse.Namespace,
    steps: int,
) -> list[np.ndarray]:
    """How far some steps move the embeddings, by sparse gradients and by dense ones."""
    changes = []
    for embedding in (keras.layers.Embedding, DenseGradientEmbedding):
        model = compiled(data, start, optimizer(), embedding=embedding)
        model.fit(batches_of(data, args.seed).take(steps), shuffle=False, verbose=0)
        changes.append(model.get_weights()[0].astype("float64") - start[0])
    return changes


def off_dense(*arguments: Any) -> float:
    """The distance to the embeddings from dense gradients, relative to how far those moved."""
    sparse, dense = moved(*arguments)
    return float(np.linalg.norm(sparse - dense) / np.linalg.norm(dense))


def first_steps(
    optimizer: Callable[[], keras.optimizers.Optimizer],
    data: Data,
    start: list[np.ndarray],
    args: argparse.Namespace,
) -> dict[int, float]:
    """The length of a word's first step, relative to that from the dense gradient.

    The median over the words that are in the first batch as often, by that number.
    """
    sparse, dense = (
        np.linalg.norm(part, axis=1) for part in moved(optimizer, data, start, args, 1)
    )
    (batch, _), *_ = batches_of(data, args.seed).take(1)
    words, times = np.unique(batch, return_counts=True)
    words, times = words[words > 0], times[words > 0]  # 0 fills short texts up
    lengths = sparse[words] / dense[words]
    return {int(n): float(np.median(lengths[times == n])) for n in np.unique(times)}


# --- results -----------------------------------------------------------------------------


def print_data(data: Data, kind: str) -> None:
    batch = data.x_train[:BATCH_SIZE]
    print(
        f"{kind}: {len(data.x_train):,} texts to train on, {len(data.x_test):,} to test with, "
        f"{len(data.labels)} labels, {data.words:,} words\n"
        f"A batch of {BATCH_SIZE} texts has {np.count_nonzero(batch):,} words, "
        f"{len(np.unique(batch)):,} different ones. The most frequent label is "
        f"{max(np.bincount(data.y_test)) / len(data.y_test):.3f} of the test texts."
    )


def print_table(results: dict[str, Result], steps: int) -> None:
    print(f"\n{'optimizer':16}{'test accuracy':>14}{'loss':>9}{'ms a step':>11}"
          f"{f'off dense, {steps} steps':>22}")  # fmt: skip
    for name, result in results.items():
        print(
            f"{name:16}{result.accuracies[-1]:>14.4f}{result.loss:>9.4f}"
            f"{result.step_milliseconds:>11.2f}{result.off_dense:>22.1e}"
        )


def draw(results: dict[str, Result], directory: Path) -> list[Path]:
    """Draws the first steps in one picture, accuracy and time in another; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    first, steps = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    training, (curves, bars) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colors = {"exact": "tab:blue", "lazy": "tab:green", "Keras": "tab:orange"}
    styles = dict(zip(RULES, ("-", "--", ":"), strict=True))
    for name, result in results.items():
        rule, kind = name.split(", ")
        epochs = range(1, len(result.accuracies) + 1)
        style: dict[str, Any] = {"color": colors[kind], "linestyle": styles[rule], "marker": "."}
        curves.plot(epochs, result.accuracies, label=name, **style)
        if kind != "lazy":  # whose first steps are the exact ones
            lengths = result.first_steps
            steps.plot(list(lengths), list(lengths.values()), label=name, **style | {"lw": 0.6})
    steps.set(
        xscale="log",
        ylim=(0, None),
        xlabel="times that a word is in the batch",
        ylabel="length of its first step,\nrelative to the dense gradient's",
    )
    steps.xaxis.set_major_formatter("{x:g}")
    steps.grid(alpha=0.3)
    steps.legend()
    curves.set(xlabel="epoch", ylabel="test accuracy")
    curves.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    curves.grid(alpha=0.3)
    curves.legend()
    names = list(results)
    times = [results[name].step_milliseconds for name in names]
    shown = bars.barh(names, times, color=[colors[name.split(", ")[1]] for name in names])
    bars.bar_label(shown, fmt="%.1f", padding=3)
    bars.invert_yaxis()
    bars.margins(x=0.12)
    bars.set_xlabel("ms a training step (median)")
    paths = []
    for name, figure in (("embeddings_first_steps", first), ("embeddings", training)):
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        pyplot.close(figure)
    return paths


# --- the command line --------------------------------------------------------------------


def stop(message: str) -> NoReturn:
    sys.exit(f"embeddings: error: {message}")


def parsed_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder with texts of yours")
    parser.add_argument(
        "--rules", nargs="+", metavar="RULE", default=["Adam"], help=f"some of {', '.join(RULES)}"
    )
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training texts")
    parser.add_argument("--texts", type=int, default=5_000, help="to train on, at most")
    parser.add_argument("--words", type=int, default=10_000, help="rows of the table, at most")
    parser.add_argument("--steps", type=int, default=20, help="made with dense gradients, too")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="for the pictures")
    args = parser.parse_args(argv)
    unknown = [rule for rule in args.rules if rule not in RULES]
    if unknown:
        stop(f"unknown --rules {' '.join(unknown)}; expected some of {' '.join(RULES)}")
    for name, least in (("epochs", 1), ("texts", 1), ("words", 3), ("steps", 1), ("seed", 0)):
        if getattr(args, name) < least:
            stop(f"--{name} must be at least {least}; received {getattr(args, name)}")
    if importlib.util.find_spec("matplotlib") is None:
        stop("the pictures need matplotlib: pip install 'keras-gdopt[examples]'")
    try:
        args.logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"cannot write to --logdir {args.logdir}: {error.strerror}")
    return args


def load(args: argparse.Namespace) -> Data:
    try:
        train, test = given_texts(args.data, args.seed) if args.data else docstrings()
    except OSError as error:
        stop(f"cannot read {error.filename}: {error.strerror}")
    order = np.random.default_rng(args.seed).permutation(len(train))[: args.texts]
    data = as_ids([train[i] for i in order], test, args.words)
    if len(data.labels) < 2 or not len(data.x_test):
        stop(
            f"--data {args.data} needs texts of at least two labels, and some to test with: "
            "train.txt and test.txt with lines of a label, a tab and a text, or a folder of "
            f"files for each label; found {len(train)} and {len(test)} texts"
        )
    return data


def main(argv: list[str] | None = None) -> None:
    args = parsed_arguments(argv)
    data = load(args)
    print_data(data, str(args.data or f"docstrings of {', '.join(PACKAGES)}"))
    keras.utils.set_random_seed(args.seed)
    start = new_model(data, keras.layers.Embedding).get_weights()
    results = {
        name: train(name, optimizer, data, start, args)
        for name, optimizer in contenders(list(dict.fromkeys(args.rules))).items()
    }
    print_table(results, args.steps)
    print(
        "\nA word's first step, relative to the dense gradient's, by how often it is in the batch:"
    )
    for name, result in results.items():
        lengths = result.first_steps.values()
        print(f"{name:16}{min(lengths):.2f} to {max(lengths):.2f}")
    pictures = draw(results, args.logdir)
    print(f"\nPictures: {', '.join(map(str, pictures))}")


if __name__ == "__main__":
    main()
