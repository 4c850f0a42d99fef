"""Members as files of TensorFlow's checkpoint format, by generation, in a shared directory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_OF_A_GENERATION = "members-"


def path(directory: str, generation: int, place: int) -> str:
    """What a member's files are called, but for their endings."""
    return f"{directory}/{_OF_A_GENERATION}{generation}/{place:05d}"


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
    """What was written, in the structure of `like`.

    Raises:
        ValueError: If the files are gone or damaged.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        arrays = [
            np.asarray(reader.get_tensor(str(index))) for index in range(len(tf.nest.flatten(like)))
        ]
    except Exception as error:  # whatever reading a damaged file may raise
        raise ValueError(
            f"The member in '{path}' cannot be read. Expected the files that a worker wrote, in a "
            f"directory that all nodes share. Received: {str(error).splitlines()[0]}"
        ) from error
    return tf.nest.pack_sequence_as(like, arrays)


def remove_all_but(directory: str, generations: Sequence[int]) -> None:
    """Removes the members of other generations."""
    kept = {f"{_OF_A_GENERATION}{generation}" for generation in generations}
    for name in tf.io.gfile.listdir(directory):
        name = name.rstrip("/")
        if name.startswith(_OF_A_GENERATION) and name not in kept:
            tf.io.gfile.rmtree(f"{directory}/{name}")
