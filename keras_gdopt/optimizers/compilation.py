"""Compiles the functions of a step, and orders operations in graphs."""

import contextlib
import functools
import math
import platform
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from keras_gdopt.optimizers.dense_step import is_sparse

# In entries. Smaller steps run as plain operations: launching a compiled step costs more than
# it saves (measure with `benchmarks.fit_step mlp-51k` and 0 here).
SMALLEST_COMPILED = 2**16


def after(tensors: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """A scope whose operations wait, in a graph, until the tensors are computed.

    When data of unknown length ends, the iterator of a train function raises, but operations
    that do not need its data would still run and count a step that did not take place.

    Args:
        tensors: Dense tensors or `tf.IndexedSlices`; `None` is skipped.
    """
    parts = [t.values if is_sparse(t) else t for t in tensors if t is not None]
    return tf.control_dependencies(parts)


def compiled(function: Callable[..., Any], tensors: Iterable[Any]) -> Callable[..., Any]:
    """Wraps a function so that XLA compiles it wherever it is called.

    A function with little to compute runs as plain operations, unless compiled code calls it,
    since launching compiled code would cost more than it saves.

    Args:
        function: A function of tensors and variables.
        tensors: What it computes on; their size decides.
    """
    return tf.function(function, jit_compile=is_worth_compiling(tensors), autograph=False)


def is_worth_compiling(tensors: Iterable[Any]) -> bool:
    """Whether the tensors are so large that compiling a function of them pays, see `compiled`."""
    large = sum(math.prod(tensor.shape) for tensor in tensors) >= SMALLEST_COMPILED
    return large and xla_is_available()


@functools.cache
def xla_is_available() -> bool:
    """Whether TensorFlow can compile with XLA on this machine: not on the GPU of a Mac."""
    return platform.system() != "Darwin" or not tf.config.list_physical_devices("GPU")


def constraint_compiles(constraint: Any) -> bool:
    """Whether a constraint is known to compile: true for Keras's and `Bounds`, not for a user's."""
    return type(constraint).__module__.startswith(("keras.", "keras_gdopt."))
