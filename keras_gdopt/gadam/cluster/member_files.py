"""Stores members by generation in a shared directory, in TensorFlow's checkpoint format."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_PREFIX = "members-"


def path(directory: str, generation: int, place: int) -> str:
    """The path of a member's files without their endings."""
    return f"{directory}/{_PREFIX}{generation}/{place:05d}"


def write(path: str, member: Any) -> None:
    """Writes a nested structure of arrays."""
    arrays = [tf.convert_to_tensor(array) for array in tf.nest.flatten(member)]
    tf.io.gfile.makedirs(path.rpartition("/")[0])
    tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=[str(index) for index in range(len(arrays))],
        shape_and_slices=[""] * len(arrays),
        tensors=arrays,
    )


def read(path: str, like: Any) -> Any:
    """Reads what `write` wrote, in the structure of `like`.

    Raises:
        ValueError: If the files are gone or damaged.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        arrays = [
            np.asarray(reader.get_tensor(str(index))) for index in range(len(tf.nest.flatten(like)))
        ]
    except Exception as error:  # reading a damaged file may raise anything
        raise ValueError(
            f"The member in '{path}' cannot be read. Expected the files that a worker wrote, in a "
            f"directory that all nodes share. Received: {str(error).splitlines()[0]}"
        ) from error
    return tf.nest.pack_sequence_as(like, arrays)


def remove_all_but(directory: str, generations: Sequence[int]) -> None:
    """Removes the members of all other generations."""
    kept = {f"{_PREFIX}{generation}" for generation in generations}
    for name in tf.io.gfile.listdir(directory):
        name = name.rstrip("/")
        if name.startswith(_PREFIX) and name not in kept:
            tf.io.gfile.rmtree(f"{directory}/{name}")
