"""The update alone: ours, Keras's, optax's and torch's on the same shapes.

python -m benchmarks.update_step              # all of it
python -m benchmarks.update_step resnet50     # one of: resnet50 rules one-tensor mlp
                                              #   embedding settings metrics guard lookahead

The contenders from optax and torch need the extra `bench`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_gdopt as gdopt
from benchmarks.side_by_side import Contender, Work, run

IDS = 256


def resnet50_shapes() -> list[tuple[int, ...]]:
    """161 tensors, 25.6 million parameters: the convolutions without biases, as published."""
    model = keras.applications.ResNet50(weights=None)
    return [
        tuple(variable.shape)
        for layer in model.layers
        for variable in layer.trainable_variables
        if not (isinstance(layer, keras.layers.Conv2D) and variable is layer.bias)
    ]


MLP_SHAPES = [(784, 64), (64,), (64, 10), (10,)]
ONE_TENSOR = [(25_000_000,)]


def _arrays(shapes: Sequence[tuple[int, ...]], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(scale=0.01, size=shape).astype("float32") for shape in shapes]


def with_keras(
    name: str, optimizer: Callable[[], Any], shapes: Sequence[tuple[int, ...]], *, every: int = 0
) -> Contender:
    """A Keras optimizer as Keras compiles it on a CPU: in a `tf.function` without XLA.

    Args:
        name: The name in the table.
        optimizer: Makes the optimizer.
        shapes: The shapes of the variables.
        every: The number of steps between records of the step metrics; 0 for none.
    """

    def make() -> Callable[[], object]:
        variables = [keras.Variable(w) for w in _arrays(shapes, seed=0)]
        gradients = [tf.constant(g) for g in _arrays(shapes, seed=1)]
        made = optimizer()
        made.build(variables)
        if every:
            made.record_step_metrics(every)
        # Capture the gradients: in training they come from within the graph and are not passed
        # one by one from Python.
        step = tf.function(lambda: made.apply(gradients))

        def timed() -> object:
            step()
            return made.iterations.numpy()  # returns when the step is done

        return timed

    return Contender(name, make)


def with_optax(name: str, shapes: Sequence[tuple[int, ...]]) -> Contender:
    """Adam of optax, jitted, with donated buffers."""

    def make() -> Callable[[], object]:
        import jax
        import optax

        optimizer = optax.adam(1e-3)
        weights = [jax.numpy.asarray(w) for w in _arrays(shapes, seed=0)]
        gradients = [jax.numpy.asarray(g) for g in _arrays(shapes, seed=1)]

        def update(weights: Any, state: Any, gradients: Any) -> Any:
            changes, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, changes), state

        jitted = jax.jit(update, donate_argnums=(0, 1))
        held = [weights, optimizer.init(weights)]

        def timed() -> object:
            held[:] = jitted(*held, gradients)
            return jax.block_until_ready(held[0])

        return timed

    return Contender(name, make)


def torch_device() -> str:
    """Where torch's contenders run: on the GPU, if its build uses one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def with_torch(name: str, shapes: Sequence[tuple[int, ...]]) -> Contender:
    """Adam of torch, fused: one pass over the memory."""

    def make() -> Callable[[], object]:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        device = torch_device()
        weights = [torch.nn.Parameter(torch.tensor(w, device=device)) for w in _arrays(shapes, 0)]
        for weight, gradient in zip(weights, _arrays(shapes, seed=1), strict=True):
            weight.grad = torch.tensor(gradient, device=device)
        optimizer = torch.optim.Adam(weights, lr=1e-3, fused=True)

        def timed() -> object:
            optimizer.step()
            return weights[0][..., :1].flatten()[0].item()  # returns when the step is done

        return timed

    return Contender(name, make)


def _peers(shapes: Sequence[tuple[int, ...]]) -> list[Contender]:
    peers = []
    for package, contender in (("optax", with_optax), ("torch", with_torch)):
        try:
            __import__(package)
        except ImportError:
            print(f"Without {package}: pip install -e '.[bench]' for the peers.")
        else:
            peers.append(contender(package + (" fused" if package == "torch" else ""), shapes))
    return peers


def resnet50() -> list[Work]:
    """Adam on ResNet-50's shapes."""
    shapes = resnet50_shapes()
    against_keras = Work(
        "Adam, ResNet-50",
        [
            with_keras("keras.Adam", keras.optimizers.Adam, shapes),
            with_keras("Adam", gdopt.Adam, shapes),
            *_peers(shapes),
        ],
        bounds={"Adam": 0.55},
    )
    works = [against_keras]
    if any(contender.name == "optax" for contender in against_keras.contenders):
        works.append(
            Work(
                "Adam, ResNet-50, to optax",
                [with_optax("optax", shapes), with_keras("Adam", gdopt.Adam, shapes)],
                bounds={"Adam": 1.3},
            )
        )
    return works


def rules() -> list[Work]:
    """All other rules on ResNet-50's shapes, against Keras's rules of the same names."""
    shapes = resnet50_shapes()
    sgd = keras.optimizers.SGD
    pairs: list[tuple[str, Callable[[], Any], Callable[[], Any], float]] = [
        ("GradientDescent", sgd, gdopt.GradientDescent, 1.0),
        (
            "Momentum(classical=True)",
            lambda: sgd(momentum=0.9),
            lambda: gdopt.Momentum(classical=True),
            0.75,
        ),
        ("Momentum", lambda: sgd(momentum=0.9), gdopt.Momentum, 0.75),
        (
            "NAG(classical=True)",
            lambda: sgd(momentum=0.9, nesterov=True),
            lambda: gdopt.NAG(classical=True),
            0.75,
        ),
        ("NAG", lambda: sgd(momentum=0.9, nesterov=True), gdopt.NAG, 0.75),
        ("Adagrad", keras.optimizers.Adagrad, gdopt.Adagrad, 0.75),
        ("RMSprop", keras.optimizers.RMSprop, gdopt.RMSprop, 0.75),
        (
            "RMSprop(momentum=0.9)",
            lambda: keras.optimizers.RMSprop(momentum=0.9),
            lambda: gdopt.RMSprop(momentum=0.9),
            0.75,
        ),
        (
            "RMSprop(centered=True)",
            lambda: keras.optimizers.RMSprop(centered=True),
            lambda: gdopt.RMSprop(centered=True),
            0.75,
        ),
        ("Adadelta", keras.optimizers.Adadelta, gdopt.Adadelta, 0.75),
        ("Nadam", keras.optimizers.Nadam, gdopt.Nadam, 0.75),
        (
            "Adam(amsgrad=True)",
            lambda: keras.optimizers.Adam(amsgrad=True),
            lambda: gdopt.Adam(amsgrad=True),
            0.75,
        ),
        ("RAdam", keras.optimizers.Adam, gdopt.RAdam, 0.75),  # Keras has none
    ]
    return [
        Work(
            f"{name}, ResNet-50",
            [with_keras(f"keras.{its().__class__.__name__}", its, shapes),
             with_keras(name, ours, shapes)],
            bounds={name: bound},
        )
        for name, its, ours, bound in pairs
    ]  # fmt: skip


def one_tensor() -> list[Work]:
    """Adam on one tensor of 25 million entries."""
    return [_adam("Adam, one tensor of 25 M", ONE_TENSOR)]


def mlp() -> list[Work]:
    """Adam on an MLP of 51 thousand parameters, where calls cost more than arithmetic."""
    return [_adam("Adam, MLP of 51 k", MLP_SHAPES, steps=50)]


def _adam(name: str, shapes: Sequence[tuple[int, ...]], steps: int = 1) -> Work:
    contenders = [
        with_keras("keras.Adam", keras.optimizers.Adam, shapes),
        with_keras("Adam", gdopt.Adam, shapes),
        *_peers(shapes),
    ]
    return Work(name, contenders, calls=steps)


def settings() -> list[Work]:
    """Adam with the settings that are usual in training language models."""
    shapes = resnet50_shapes()
    added: dict[str, Any] = {"weight_decay": 0.01, "global_clipnorm": 1.0, "use_ema": True}
    contenders = [
        with_keras("keras.Adam", lambda: keras.optimizers.Adam(**added), shapes),
        with_keras("Adam", lambda: gdopt.Adam(**added), shapes),
    ]
    name = "Adam with decay, global_clipnorm and EMA, ResNet-50"
    return [Work(name, contenders, bounds={"Adam": 0.5})]


def metrics() -> list[Work]:
    """The cost of recording the step metrics."""
    shapes = resnet50_shapes()
    every_step = [
        with_keras("Adam", gdopt.Adam, shapes),
        with_keras("recorded every step", gdopt.Adam, shapes, every=1),
    ]
    now_and_then = [
        with_keras("Adam", gdopt.Adam, shapes),
        with_keras("recorded every 50th step", gdopt.Adam, shapes, every=50),
    ]
    return [
        Work("Step metrics, ResNet-50", every_step, bounds={"recorded every step": 1.4}),
        Work(
            "Step metrics, ResNet-50, now and then",
            now_and_then,
            calls=50,
            bounds={"recorded every 50th step": 1.03},
        ),
    ]


def guard() -> list[Work]:
    """The cost of looking for gradients that are not finite before each step."""
    shapes = resnet50_shapes()
    contenders = [
        with_keras("Adam", gdopt.Adam, shapes),
        with_keras("Adam(skip_nonfinite=True)", lambda: gdopt.Adam(skip_nonfinite=True), shapes),
    ]
    return [Work("Guard, ResNet-50", contenders, bounds={"Adam(skip_nonfinite=True)": 1.25})]


def lookahead() -> list[Work]:
    """The cost that Lookahead adds to steps, without and with a synchronization."""
    shapes = resnet50_shapes()
    contenders = [
        with_keras("Adam", gdopt.Adam, shapes),
        with_keras(
            "Lookahead(Adam), no synchronization",
            lambda: gdopt.Lookahead(gdopt.Adam(), sync_period=10**9),
            shapes,
        ),
    ]
    every_fifth = [
        with_keras("Adam", gdopt.Adam, shapes),
        with_keras("Lookahead(Adam)", lambda: gdopt.Lookahead(gdopt.Adam()), shapes),
    ]
    bounds = {"Lookahead(Adam), no synchronization": 1.05}
    return [
        Work("Lookahead, ResNet-50", contenders, bounds=bounds),
        Work("Lookahead, ResNet-50, k = 5", every_fifth, calls=5),
    ]


def embedding() -> list[Work]:
    """Adam on embeddings of 3.2 million weights, with 256 ids in a batch."""
    bounds = {"Adam": 1.0, "Adam(lazy=True)": 0.1}
    return [_embedding(200_000, 16, bounds), _embedding(100_000, 32, bounds)]


def _embedding(count: int, width: int, bounds: dict[str, float]) -> Work:
    def contender(name: str, optimizer: Callable[[], Any]) -> Contender:
        def make() -> Callable[[], object]:
            rng = np.random.default_rng(0)
            (start,) = _arrays([(count, width)], seed=0)
            embeddings, made = keras.Variable(start), optimizer()
            made.build([embeddings])
            ids = tf.constant(rng.integers(0, count, size=IDS))
            values = tf.constant(rng.normal(size=(IDS, width)).astype("float32"))
            shape = tf.constant([count, width], "int64")

            step = tf.function(lambda: made.apply([tf.IndexedSlices(values, ids, shape)]))

            def timed() -> object:
                step()
                return made.iterations.numpy()

            return timed

        return Contender(name, make)

    contenders = [
        contender("keras.Adam, wrong on repeated ids", keras.optimizers.Adam),
        contender("Adam", gdopt.Adam),
        contender("Adam(lazy=True)", lambda: gdopt.Adam(lazy=True)),
    ]
    name = f"Adam, embedding {count:,} × {width}, {IDS} ids"
    return Work(name, contenders, calls=10, bounds=bounds)


WORKS = {
    function.__name__.replace("_", "-"): function
    for function in (
        resnet50, rules, one_tensor, mlp, embedding, settings, metrics, guard, lookahead,
    )
}  # fmt: skip


if __name__ == "__main__":
    run(__doc__.splitlines()[0], WORKS)
