"""Variables that a distribution strategy keeps a copy of on each device."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def is_distributed(variable: Any) -> bool:
    """Whether a strategy keeps a copy of the variable on each of its devices."""
    return isinstance(raw_variable(variable), tf.distribute.DistributedValues)


def on_every_device(anchor: Any, function: Callable[..., None], *args: Any) -> None:
    """Calls a function on each device that holds a copy of a distributed variable.

    The function sees that device's copies of variables and its replica's `args`.

    Args:
        anchor: The distributed variable.
        function: Called as `function(*args, device=name, first=flag)`, where `first`
            says whether this is the first device.
        *args: Structures of tensors, as each replica has them.
    """
    anchor = raw_variable(anchor)
    strategy = anchor.distribute_strategy

    def across_replicas(_: Any, *args: Any) -> None:
        first = strategy.experimental_local_results(anchor)[0].device

        def on_one_device(component: Any, *args: Any) -> None:
            function(*args, device=component.device, first=component.device == first)

        strategy.extended.update(anchor, on_one_device, args=args, group=False)

    tf.__internal__.distribute.interim.maybe_merge_call(across_replicas, strategy, *args)


def true_on_all_replicas(flag: tf.Tensor) -> tf.Tensor:
    """Whether a replica's flag is true on every replica of a strategy; a scalar."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return flag
    others = context.all_reduce(
        tf.distribute.ReduceOp.SUM, tf.cast(tf.logical_not(flag), tf.float32)
    )
    return tf.equal(others, 0.0)


def raw_variable(variable: Any) -> tf.Variable:
    """The TensorFlow variable inside a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable
