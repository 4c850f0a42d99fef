"""Histograms of arrays of any size, as TensorBoard draws them."""

from collections.abc import Iterator

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram import metadata
from tensorboard.util import tensor_util

_BUCKETS = 30


def histogram(tag: str, array: np.ndarray) -> Iterator[Summary.Value]:
    """Yields the summary of an array's finite entries, or nothing if there are none.

    (`tensorboard.plugins.histogram.summary_v2` would take 30 bytes for each entry.)

    Args:
        tag: The name of the chart.
        array: An array of any shape.
    """
    finite = array[np.isfinite(array)]
    if not finite.size:
        return
    if finite.min() == finite.max():  # as TensorBoard writes it
        counts, edges = np.eye(_BUCKETS)[-1] * finite.size, np.full(_BUCKETS + 1, finite.min())
    else:
        counts, edges = np.histogram(finite.astype("float64"), bins=_BUCKETS)
    buckets = np.stack([edges[:-1], edges[1:], counts], axis=1)
    yield Summary.Value(
        tag=tag,
        metadata=metadata.create_summary_metadata(display_name=None, description=""),
        tensor=tensor_util.make_tensor_proto(buckets, dtype=np.float64),
    )
