"""The members of a population: their weights, state and optimizers' state, in stacks."""

import os
import random
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.gadam import keys
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.tensor import Tensor


class Members(NamedTuple):
    """All members of a population. Each tensor's first axis counts the members.

    A pure value: whatever changes members returns new ones.
    """

    weights: list[Tensor]
    """In the order of the model's trainable variables."""
    state: list[Tensor]
    """In the order of the model's non-trainable variables; while they are trained and judged of
    a `ModelFunction`'s `state_variables`."""
    optimizer: Any
    """What the optimizers keep, in the structure of their `pure_step`."""
    batches: Tensor
    """How many batches each member's optimizer has seen, in int64."""


def selected(places: Tensor, parents: Members, children: Members) -> Members:
    """Those that survive.

    Args:
        places: For each place the index of a parent, or their number plus a child's.
        parents: The members that were there.
        children: As many others.
    """
    return tf.nest.map_structure(
        lambda a, b: tf.gather(tf.concat([a, b], axis=0), places), parents, children
    )


def diversity(weights: Sequence[Tensor]) -> Tensor:
    """The mean Euclidean distance between two members' weights.

    Args:
        weights: Each of shape `(g, ...)`.

    Returns:
        A scalar in float64.
    """
    count = weights[0].shape[0]
    products = tf.zeros((count, count), tf.float64)
    for weight in weights:
        flat = tf.reshape(weight, (count, -1))
        # Around their mean, so that the difference of the products below keeps its digits.
        flat = tf.cast(flat - tf.reduce_mean(flat, axis=0), tf.float32)
        products += tf.cast(tf.matmul(flat, flat, transpose_b=True), tf.float64)
    norms = tf.linalg.diag_part(products)
    squares = tf.maximum(norms[:, None] + norms[None, :] - 2 * products, 0.0)
    squares = tf.linalg.set_diag(squares, tf.zeros(count, tf.float64))
    return tf.reduce_sum(tf.sqrt(squares)) / (count * (count - 1))


# --- clones ----------------------------------------------------------------------------


def clone(model: keras.Model, seed: int) -> keras.Model:
    """A clone of a model whose initial weights depend on the seed alone.

    Args:
        model: Built; a Sequential or functional model, or one with a `get_config`.
        seed: Takes the place of the seeds of the model's initializers, integer ones
            included: with those all clones would be the same.

    Raises:
        ValueError: If the clone's variables are not the model's.
    """
    drawn = np.random.default_rng(seed)
    python_state = random.getstate()
    random.seed(seed)  # initializers without a seed take theirs from here
    try:
        clones: dict[int, tuple[Any, Any]] = {}
        twin = _clone_layer(model, drawn, clones)
        if not twin.built:
            config = model.get_build_config()
            if config:
                twin.build_from_config(config)
        for layer, other in clones.values():
            if not _is_cloned_by_parts(layer):
                _copy_what_was_adapted(layer, other)
    except Exception as error:
        raise ValueError(
            f"The model '{model.name}' ({type(model).__name__}) cannot be cloned. Expected a "
            "Sequential or functional model, or a subclassed one with a `get_config` that "
            f"says all about it. Received this error: {error}"
        ) from error
    finally:
        random.setstate(python_state)
    for kind in ("trainable_variables", "non_trainable_variables"):
        expected = [tuple(v.shape) for v in getattr(model, kind)]
        received = [tuple(v.shape) for v in getattr(twin, kind)]
        if expected != received:
            raise ValueError(
                f"The model '{model.name}' cannot be cloned: a clone must have the model's "
                f"variables. Expected {kind} of shapes {expected}. Received: {received}"
            )
    return twin


def compiled_as(model: keras.Model, twin: keras.Model) -> keras.Model:
    """A clone, compiled as the model is, with an optimizer and metrics of its own.

    Args:
        model: Compiled.
        twin: Its clone.
    """
    arguments = dict(model._compile_config.config)
    arguments["optimizer"] = type(model.optimizer).from_config(model.optimizer.get_config())
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_metric_of_its_own, arguments.get(name))
    twin.compile(**arguments)
    return twin


def _metric_of_its_own(metric: Any) -> Any:
    if not isinstance(metric, keras.metrics.Metric):
        return metric
    try:
        return type(metric).from_config(metric.get_config())
    except (TypeError, ValueError, NotImplementedError):
        return metric  # of a function that no config can name: reset before each use


def _clone_layer(layer: Any, drawn: np.random.Generator, clones: dict[int, tuple[Any, Any]]) -> Any:
    """A clone of a layer, or of a model and all models that are nested in it.

    Keras's own `clone_model(recursive=True)` enters one level only before Keras 3.14.

    Args:
        layer: What to clone.
        drawn: Draws the seeds of initializers.
        clones: Layers and their clones, by the layers' ids: a shared layer has one.
    """
    if id(layer) in clones:
        return clones[id(layer)][1]
    if _is_cloned_by_parts(layer):
        # Keras would compile the clone through its config, which not every loss has.
        compiled, layer.compiled = layer.compiled, False
        try:
            twin = keras.models.clone_model(
                layer, clone_function=lambda part: _clone_layer(part, drawn, clones)
            )
        finally:
            layer.compiled = compiled
    elif type(layer) is keras.layers.Lambda:
        # Keras does not rebuild a Python lambda from a config.
        twin = keras.layers.Lambda(
            layer.function,
            layer._output_shape,
            layer.mask,
            layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    else:
        twin = type(layer).from_config(layer.get_config())
        if not isinstance(twin, keras.Layer):
            return twin  # a bare operation
        _reseed(twin, drawn)
    clones[id(layer)] = layer, twin
    return twin


def _copy_what_was_adapted(layer: keras.Layer, twin: keras.Layer) -> None:
    """Gives a clone what `adapt` taught a layer, or layers in it: statistics, vocabularies."""
    adapted, others = (
        [part for part in one._flatten_layers() if hasattr(part, "adapt")] for one in (layer, twin)
    )
    for part, other in zip(adapted, others, strict=True):
        if not part.built:
            continue
        store: dict[str, Any] = {}
        part.save_own_variables(store)
        other.load_own_variables(store)
        if hasattr(part, "save_assets"):
            with tempfile.TemporaryDirectory() as directory:
                part.save_assets(directory)
                other.load_assets(directory)


def _is_cloned_by_parts(layer: Any) -> bool:
    """Whether it is a Sequential or functional model, whose layers are cloned one by one."""
    return (
        isinstance(layer, keras.Sequential)
        or type(layer) is keras.Model
        or type(layer).__name__ == "Functional"
    )


def _reseed(layer: Any, drawn: np.random.Generator) -> None:
    """Gives each initializer that has an integer seed another one, before it is used."""
    for part in layer._flatten_layers():
        for value in list(vars(part).values()):
            if isinstance(value, keras.initializers.Initializer) and isinstance(
                getattr(value, "seed", None), int
            ):
                value.seed = int(drawn.integers(2**31))


def new_member(
    model: keras.Model,
    place: int,
    seed: int,
    initializer: Any = None,
    start: str = "initializers",
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The weights and the state that a member starts from.

    Args:
        model: The model that is to be cloned.
        place: In the population.
        seed: Of the run.
        initializer: Draws all trainable weights of all members. Without one, the first
            member has the model's weights, and the layers' own initializers draw the
            others', seeded anew. What the model has frozen stays as it is.
        start: `"model"` gives all members the model's weights and state.
    """
    source = model
    if place and initializer is None and start == "initializers":
        number = int(keys.sequence(seed, 0, Phase.INITIALIZE, place).generate_state(1)[0])
        source = clone(model, number)
    weights = [v.numpy() for v in source.trainable_variables]
    if initializer is not None:
        weights = [
            _drawn(initializer, v, keys.sequence(seed, 0, Phase.INITIALIZE, place, index))
            for index, v in enumerate(model.trainable_variables)
        ]
    frozen = {
        id(v) for layer in model._flatten_layers() if not layer.trainable for v in layer.variables
    }
    state = [
        (own if id(own) in frozen else other).numpy()
        for own, other in zip(
            model.non_trainable_variables, source.non_trainable_variables, strict=True
        )
    ]
    return weights, state


def fill(model: keras.Model, weights: Sequence[Any], state: Sequence[Any]) -> None:
    """Gives a model a member's weights and state, and builds its optimizer."""
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    for variable, value in zip(variables, [*weights, *state], strict=True):
        variable.assign(value)
    model.optimizer.build(model.trainable_variables)


def _drawn(initializer: Any, variable: Any, sequence: np.random.SeedSequence) -> np.ndarray:
    config = initializer.get_config()
    if "seed" in config:
        config["seed"] = int(sequence.generate_state(1)[0])
        initializer = type(initializer).from_config(config)
    return keras.ops.convert_to_numpy(initializer(variable.shape, dtype=variable.dtype))


def forget_sequences(model: keras.Model) -> None:
    """Lets layers begin anew that remember the batch before, as a `stateful` LSTM does."""
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False) and hasattr(layer, "reset_state"):
            layer.reset_state()


def batch_size_of(model: keras.Model) -> int | None:
    """The only number of samples in a batch that a model's inputs take, if they say one."""
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    sizes = {part.shape[0] for part in inputs if part is not None and part.shape}
    return next((size for size in sizes if size is not None), None)


# --- memory ----------------------------------------------------------------------------


def check_fits_in_memory(
    model: keras.Model, optimizer: Any, population_size: int, times: int
) -> None:
    """Raises if a population would not fit into the memory that is free.

    Args:
        model: Of its members.
        optimizer: Built.
        population_size: How many there are.
        times: How often a member's weights, state and optimizer's state are held.
    """
    available = _available_memory()
    variables = [*model.variables, *optimizer.variables]
    size = sum(int(np.prod(v.shape)) * _bytes(v.dtype) for v in variables)
    needed = times * population_size * size
    if available is not None and needed > available:
        raise ValueError(
            f"A population of {population_size} clones of '{model.name}' needs about "
            f"{needed / 2**30:.1f} GiB (a member with its optimizer has {size / 2**20:.1f} MiB, "
            f"times {times}), and {available / 2**30:.1f} GiB are free. Use a smaller "
            f"`population_size`. Received: population_size={population_size}"
        )


def _bytes(dtype: Any) -> int:
    return tf.as_dtype(keras.backend.standardize_dtype(dtype)).size


def _available_memory() -> int | None:
    """Of the host, in bytes."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
