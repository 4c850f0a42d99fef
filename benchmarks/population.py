"""Training a population: ours, Keras's `fit` member after member, and JAX's `vmap`.

python -m benchmarks.population            # everything
python -m benchmarks.population mlp-16     # one part; `--help` lists the parts
python -m benchmarks.population maps --before DIRECTORY  # beside a checkout of another version
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_gdopt as gdopt
from benchmarks.side_by_side import Contender, Work, run
from keras_gdopt.gadam.data import DataArguments
from keras_gdopt.gadam.keys import Phase

Samples = Callable[[], tuple[np.ndarray, np.ndarray]]

BATCH, STEPS = 64, 78
SAMPLES = BATCH * STEPS


def data() -> tuple[np.ndarray, np.ndarray]:
    """Random pictures and labels: one epoch of full batches."""
    rng = np.random.default_rng(0)
    return rng.random((SAMPLES, 784), "float32"), rng.integers(0, 10, SAMPLES)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Random data of the size of scikit-learn's digits: 28 full batches and a smaller one."""
    rng = np.random.default_rng(0)
    return rng.random((1797, 8, 8, 1), "float32"), rng.integers(0, 10, 1797)


def mlp() -> keras.Model:
    """An MLP of 784-64-10 units."""
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((784,)), *layers])


def mlp_with_normalization_and_dropout() -> keras.Model:
    """The same MLP with batch normalization and dropout."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )


def cnn() -> keras.Model:
    """A CNN like LeNet."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Reshape((28, 28, 1)),
            keras.layers.Conv2D(6, 5, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(16, 5, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(120, activation="relu"),
            keras.layers.Dense(84, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def cnn_for_digits() -> keras.Model:
    """A small CNN that takes longer to trace than to train."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def lstm() -> keras.Model:
    """An LSTM over the 28 rows of a picture."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Reshape((28, 28)),
            keras.layers.LSTM(32),
            keras.layers.Dense(10),
        ]
    )


def compiled(build: Callable[[], keras.Model], optimizer: Any) -> keras.Model:
    """A model compiled to classify digits."""
    model = build()
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def sequential(build: Callable[[], keras.Model]) -> Contender:
    """Keras's `fit` of one member; a population takes this long for each member."""

    def make() -> Callable[[], object]:
        x, y = data()
        model = compiled(build, keras.optimizers.Adam())
        return lambda: model.fit(x, y, batch_size=BATCH, verbose=0)

    return Contender("Keras's fit, one after the other", make, steps=STEPS)


EVOLVE = {"learning_rate": (1e-4, 1e-1), "weight_decay": (1e-4, 1.0), "beta_1": (0.0, 0.99)}


def generation(
    build: Callable[[], keras.Model], members: int, name: str = "", **arguments: Any
) -> Contender:
    """A whole generation of Gadam: training twice, fitness, selection, crossover, mutation."""

    def make() -> Callable[[], object]:
        x, y = data()
        gadam = gdopt.Gadam(compiled(build, gdopt.Adam()), members, seed=0, **arguments)
        return lambda: gadam.fit(x, y, generations=1, batch_size=BATCH, verbose=0)

    return Contender(name or "Gadam, whole generation", make, steps=2 * members * STEPS)


def random_search(members: int, generations: int) -> Contender:
    """Keras's `fit` with one random setting after the other, including tracing."""

    def step() -> object:
        x, y = data()
        rng = np.random.default_rng(0)
        best = np.inf
        for _ in range(members):
            drawn = {
                n: float(np.exp(rng.uniform(*np.log(EVOLVE[n])))) for n in EVOLVE if n[0] != "b"
            }
            model = compiled(mlp, keras.optimizers.Adam(**drawn, beta_1=rng.uniform(0.0, 0.99)))
            model.fit(x, y, batch_size=BATCH, epochs=2 * generations, verbose=0)
            best = min(best, model.evaluate(x[:1024], y[:1024], verbose=0))
        return best

    return Contender("Keras's fit, a random search", lambda: step)


def evolving_search(members: int, generations: int) -> Contender:
    """An evolving population with as many steps, including tracing."""

    def step() -> object:
        x, y = data()
        gadam = gdopt.Gadam(compiled(mlp, gdopt.Adam()), members, seed=0, evolve=EVOLVE)
        return gadam.fit(x, y, generations=generations, batch_size=BATCH, verbose=0)

    return Contender("Gadam, evolving", lambda: step)


def mlp_of_probabilities() -> keras.Model:
    """The MLP with a softmax at its end."""
    model = mlp()
    model.add(keras.layers.Softmax())
    return model


def average_of_models(build: Callable[[], keras.Model], members: int) -> Contender:
    """`predict` of models under `keras.layers.Average`."""

    def make() -> Callable[[], object]:
        x, _ = data()
        inputs = keras.Input((784,))
        outputs = keras.layers.Average()([build()(inputs) for _ in range(members)])
        model = keras.Model(inputs, outputs)
        return lambda: model.predict(x[:1024], verbose=0)

    return Contender("Keras's Average of models", make)


def ensemble(build: Callable[[], keras.Model], members: int) -> Contender:
    """`predict` of a population's ensemble, which averages probabilities, also those of logits."""

    def make() -> Callable[[], object]:
        x, y = data()
        model = build()
        takes_logits = not isinstance(model.layers[-1], keras.layers.Softmax)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=takes_logits)
        model.compile(gdopt.Adam(), loss)
        gadam = gdopt.Gadam(model, members, seed=0)
        gadam.fit(x, y, generations=1, batch_size=BATCH, steps_per_epoch=1, verbose=0)
        model = gadam.ensemble()
        return lambda: model.predict(x[:1024], verbose=0)

    return Contender("Gadam's ensemble", make)


def training(
    build: Callable[[], keras.Model],
    members: int,
    engine: str,
    steps: int = STEPS,
    evolve: dict[str, tuple[float, float]] | None = None,
) -> Contender:
    """Only the training of all members, for one epoch or its first steps."""

    def make() -> Callable[[], object]:
        x, y = data()
        arguments: dict[str, Any] = (
            {"evolve": evolve} if evolve else {}
        )  # version 0.1.0 has no such argument
        gadam = gdopt.Gadam(
            compiled(build, gdopt.Adam()), members, seed=0, engine=engine, **arguments
        )
        samples = DataArguments(x, y, batch_size=BATCH, members=members).made()
        gadam._start_population()
        (portion,) = samples.epoch(0, Phase.TRAIN_PARENTS, 0, range(members))
        started: Any = gadam._population
        runner, population = started._training.engine, started.members
        if hasattr(runner, "with_sequences"):  # versions after 0.1.0
            population = runner.with_sequences(population)
        own = [gadam._hyperparameters] if hasattr(gadam, "_hyperparameters") else []

        def step() -> object:
            nonlocal population
            population, losses = runner.train(
                population, portion.data, portion.order, 0, steps, *own
            )
            return losses

        return step

    name = f"Gadam's training, {engine}" + (", evolving" if evolve else "")
    return Contender(name, make, steps=members * steps)


def first_fit(build: Callable[[], keras.Model], data: Samples = data) -> Contender:
    """Keras's first `fit` of a new model, including tracing."""

    def step() -> object:
        x, y = data()
        return compiled(build, keras.optimizers.Adam()).fit(x, y, batch_size=BATCH, verbose=0)

    return Contender("Keras's first fit", lambda: step)


def first_generation(
    build: Callable[[], keras.Model], members: int, data: Samples = data
) -> Contender:
    """The first generation, including making the population."""

    def step() -> object:
        x, y = data()
        gadam = gdopt.Gadam(compiled(build, gdopt.Adam()), members, seed=0)
        return gadam.fit(x, y, generations=1, batch_size=BATCH, verbose=0)

    return Contender("Gadam, first generation", lambda: step)


def jax_mlp(members: int) -> Contender:
    """`vmap` over the members, `scan` over the steps, optax's Adam, all in one `jit`."""

    def make() -> Callable[[], object]:
        import jax
        import jax.numpy as jnp
        import optax

        inputs, labels = jax.tree.map(jnp.asarray, data())
        rng = np.random.default_rng(0)
        order = np.stack([rng.permutation(SAMPLES) for _ in range(members)])
        rows = jnp.asarray(order.reshape(members, STEPS, BATCH).swapaxes(0, 1))

        def start(key: Any) -> dict[str, Any]:
            one, two = jax.random.split(key)
            glorot = jax.nn.initializers.glorot_uniform()
            return {
                "w1": glorot(one, (784, 64)), "b1": jnp.zeros(64),
                "w2": glorot(two, (64, 10)), "b2": jnp.zeros(10),
            }  # fmt: skip

        def loss(weights: dict[str, Any], x: Any, y: Any) -> Any:
            hidden = jax.nn.relu(x @ weights["w1"] + weights["b1"])
            logits = hidden @ weights["w2"] + weights["b2"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        adam = optax.adam(1e-3)

        def member_step(weights: Any, state: Any, rows: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(weights, inputs[rows], labels[rows])
            updates, state = adam.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state, value

        def epoch(weights: Any, state: Any, order: Any) -> Any:
            def body(carry: Any, rows: Any) -> Any:
                *carry, losses = jax.vmap(member_step)(carry[0], carry[1], rows)
                return tuple(carry), losses

            carry, losses = jax.lax.scan(body, (weights, state), order)
            return *carry, losses

        compiled = jax.jit(epoch, donate_argnums=(0, 1))
        weights = jax.vmap(start)(jax.random.split(jax.random.PRNGKey(0), members))
        state = jax.vmap(adam.init)(weights)

        def step() -> object:
            nonlocal weights, state
            weights, state, losses = compiled(weights, state, rows)
            return losses.block_until_ready()

        return step

    return Contender("JAX, vmap and scan", make, steps=members * STEPS)


def _against_fit(
    name: str, build: Callable[[], keras.Model], members: int, times_faster: float | None
) -> list[Work]:
    bounds = {} if times_faster is None else {"Gadam, whole generation": 1 / times_faster}
    return [
        Work(f"{name}, g = {members}", [sequential(build), generation(build, members)],
             bounds=bounds)
    ]  # fmt: skip


def _mlp_of(members: int, times_jax: float, times_fit: float | None) -> list[Work]:
    bounds = {"Gadam's training, stacked": 1 / times_jax}
    contenders = [jax_mlp(members), training(mlp, members, "stacked")]
    return [
        Work(f"MLP 784-64-10, g = {members}, steps alone", contenders, bounds=bounds),
        *_against_fit("MLP 784-64-10", mlp, members, times_fit),
    ]


def _maps() -> list[Work]:
    """Members side by side: the time of steps, and the time before the first one."""
    return [
        Work(f"{build.__name__.upper()}, g = 16, {what}", [training(build, 16, "auto", steps)],
             bound_before=1.1)
        for build in (cnn, lstm)
        for steps, what in ((20, "steps alone"), (1, "single steps"))
    ]  # fmt: skip


def _stacks() -> list[Work]:
    return [
        Work(f"{build.__name__}, g = 16, steps alone", [training(build, 16, "stacked")])
        for build in (mlp, mlp_with_normalization_and_dropout)
    ]


def _evolving() -> list[Work]:
    return [
        Work(
            "MLP 784-64-10, g = 16, three hyper-parameters",
            [generation(mlp, 16), generation(mlp, 16, "Gadam, evolving", evolve=EVOLVE)],
            bounds={"Gadam, evolving": 1.1},
        ),
        Work(
            "MLP 784-64-10, g = 16, single steps",
            [training(mlp, 16, "stacked", 1), training(mlp, 16, "stacked", 1, EVOLVE)],
        ),
        Work(
            "MLP 784-64-10, 16 settings, whole",
            [random_search(16, 5), evolving_search(16, 5)],
            bounds={"Gadam, evolving": 1 / 8},
        ),
        *(
            Work(
                f"10 MLPs, {name}, predict 1,024",
                [average_of_models(build, 10), ensemble(build, 10)],
                calls=3,
                bounds={"Gadam's ensemble": 1.0},
            )
            for name, build in (("probabilities", mlp_of_probabilities), ("logits", mlp))
        ),
    ]


WORKS = {
    "maps": _maps,
    "stacks": _stacks,
    "first-generation": lambda: [
        Work(
            "CNN, 29 batches of digits, g = 16, from nothing",
            [first_fit(cnn_for_digits, digits), first_generation(cnn_for_digits, 16, digits)],
            bounds={"Gadam, first generation": 5.0},
        ),
        Work("CNN, 78 batches, g = 16, from nothing", [first_fit(cnn), first_generation(cnn, 16)]),
    ],
    "evolving": _evolving,
    "mlp-4": lambda: _mlp_of(4, 0.95, None),
    "mlp-16": lambda: _mlp_of(16, 1.1, 10.0),
    "mlp-64": lambda: _mlp_of(64, 1.1, None),
    "normalization-dropout": lambda: _against_fit(
        "MLP with BatchNormalization and Dropout", mlp_with_normalization_and_dropout, 16, 4.0
    ),
    "cnn": lambda: _against_fit("CNN", cnn, 16, 2.0),
    "lstm": lambda: _against_fit("LSTM", lstm, 16, None),
}


if __name__ == "__main__":
    run(__doc__.splitlines()[0], WORKS)
