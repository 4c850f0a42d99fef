"""Made the files beside it, with version 0.1.0 of the package (commit 4908798).

PYTHONPATH=<a checkout of that commit> python make.py DIRECTORY
"""

import shutil
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_gdopt as gdopt

OPTIMIZERS = {
    "gradient_descent": lambda: gdopt.GradientDescent(0.1),
    "momentum": lambda: gdopt.Momentum(0.1),
    "nag": lambda: gdopt.NAG(0.1),
    "adagrad": lambda: gdopt.Adagrad(0.1),
    "rmsprop": lambda: gdopt.RMSprop(0.01, momentum=0.5, centered=True),
    "adadelta": lambda: gdopt.Adadelta(),
    "adam": lambda: gdopt.Adam(0.01, amsgrad=True, weight_decay=0.01, use_ema=True),
    "nadam": lambda: gdopt.Nadam(0.01, gradient_accumulation_steps=2),
    "radam": lambda: gdopt.RAdam(0.01),
    "lookahead": lambda: gdopt.Lookahead(gdopt.Adam(0.01), sync_period=2),
    "conjugate_gradient": lambda: gdopt.ConjugateGradient(jit_compile=False),
    "newton": lambda: gdopt.Newton(jit_compile=False),
    "lbfgs": lambda: gdopt.LBFGS(memory=3, jit_compile=False),
}
GADAM = {"population_size": 3, "seed": 1, "engine": "stacked"}


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 3)).astype("float32")
    return x, (x @ np.array([[1.0], [-2.0], [0.5]]) + np.sin(3 * x[:, :1])).astype("float32")


def new_model(optimizer):
    # In float32 a solution of equations, as Newton's, differs in its fifth digit.
    dtype = "float64" if hasattr(optimizer, "attach") else "float32"
    model = keras.Sequential(
        [
            keras.Input((3,), dtype=dtype),
            keras.layers.Dense(2, activation="tanh", dtype=dtype, name="hidden"),
            keras.layers.Dense(1, dtype=dtype, name="last"),
        ],
        name="small",
    )
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape) * 0.5 for w in model.get_weights()])
    model.compile(optimizer, "mse")
    return model


def steps(model, count):
    """So many training steps, without the end of a `fit`."""
    if hasattr(model.optimizer, "attach"):
        model.optimizer.attach(model)
    for _ in range(count):
        model.train_on_batch(*data())


def arrays(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def fit_gadam(directory, generations):
    gadam = gdopt.Gadam(new_model(gdopt.Adam(0.01)), **GADAM)
    gadam.fit(
        *data(), batch_size=4, generations=generations, checkpoint_dir=str(directory), verbose=0
    )
    return gadam


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    kept = {}
    for name, optimizer in OPTIMIZERS.items():
        model = new_model(optimizer())
        steps(model, 3)
        model.save(directory / f"{name}.keras")
        kept.update({f"{name}/saved/{i}": a for i, a in enumerate(arrays(model))})
        model = keras.models.load_model(directory / f"{name}.keras")
        steps(model, 2)
        kept.update({f"{name}/later/{i}": a for i, a in enumerate(model.get_weights())})
    fit_gadam(directory / "population", 1)
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(directory / "population", copy, dirs_exist_ok=True)
        later = fit_gadam(copy, 2).model.get_weights()
    kept.update({f"population/later/{i}": a for i, a in enumerate(later)})
    np.savez_compressed(directory / "arrays.npz", **kept)
