"""How the functions of a step are compiled, and in which order graphs run them."""

import contextlib
import functools
import math
import platform
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from keras_gdopt.optimizers.dense_step import is_sparse

# Entries. Smaller steps are plain operations: to launch a compiled one costs more than it
# saves (`benchmarks.fit_step mlp-51k` with 0 here).
SMALLEST_COMPILED = 2**16


def after(tensors: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """A scope in whose graph nothing happens before the tensors are there.

    Where data of unknown length ends, the iterator of a train function raises, but operations
    that do not need its data still run: they would count a step that was not made.

    Args:
        tensors: Dense or `tf.IndexedSlices`; `None` for what is not there.
    """
    parts = [t.values if is_sparse(t) else t for t in tensors if t is not None]
    return tf.control_dependencies(parts)


def compiled(function: Callable[..., Any], tensors: Iterable[Any]) -> Callable[..., Any]:
    """A function that XLA compiles wherever it is called.

    To launch compiled code costs more than it saves where there is little to compute; such a
    function runs as plain operations, unless it is called from compiled code.

    Args:
        function: Of tensors and variables.
        tensors: What it computes on, for its size.
    """
    return tf.function(function, jit_compile=is_worth_compiling(tensors), autograph=False)


def is_worth_compiling(tensors: Iterable[Any]) -> bool:
    """Whether a function of tensors is large enough to be compiled, see `compiled`."""
    large = sum(math.prod(tensor.shape) for tensor in tensors) >= SMALLEST_COMPILED
    return large and xla_is_available()


@functools.cache
def xla_is_available() -> bool:
    """Whether TensorFlow can compile with XLA here: not on the GPU of a Mac."""
    return platform.system() != "Darwin" or not tf.config.list_physical_devices("GPU")


def constraint_compiles(constraint: Any) -> bool:
    """Whether a constraint is known to compile: Keras's own and `Bounds`, but not a user's."""
    return type(constraint).__module__.startswith(("keras.", "keras_gdopt."))
