"""Turns the user's data into tensors and batches: checks, joins and cuts it."""

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_gdopt.functional import Data
from keras_gdopt.gadam.class_weight import with_class_weight

# Seconds of reading data before a warning says what takes so long.
_PATIENCE = 10.0


def in_memory(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: dict[int, float] | None = None,
    *,
    what: str = "The training data",
) -> Data:
    """Checks samples and returns them as tensors; errors call them `what`.

    Raises:
        ValueError: If there are no samples, the parts differ in their number of samples, or a
            part cannot be converted to tensors.
    """
    parts = {"x": x, "y": y, "sample_weight": sample_weight}
    data = {name: _tensors(name, part) for name, part in parts.items() if part is not None}
    counts = {part.shape[0] if part.shape.rank else None for part in tf.nest.flatten(data)}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            "All inputs, targets and sample weights must have the same number of samples. "
            f"Received: {what[0].lower()}{what[1:]} with {_sizes(data)}"
        )
    if not counts.pop():
        raise ValueError(f"{what} is empty. Expected at least one sample.")
    return with_class_weight(data, class_weight)


def split(arrays: tuple[Any, Any, Any], part: float) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Splits inputs, targets and sample weights into their beginning and their end.

    Args:
        arrays: The inputs, the targets and the sample weights; the last two may be `None`.
        part: The fraction of the samples that goes to the end.

    Raises:
        ValueError: If `part` is not between 0 and 1, the data is not arrays, or one of the two
            would be empty.
    """
    x = arrays[0]
    if x is None or is_dataset(x) or not 0.0 < part < 1.0:
        raise ValueError(
            "`validation_split` must be between 0 and 1, of arrays. Received: "
            f"validation_split={part} with x of type {type(x).__name__}"
        )
    check_is_no_generator("x", x)
    data = in_memory(*arrays)
    count = sample_count(data)
    at = math.floor(count * (1.0 - part))
    if not 0 < at < count:
        raise ValueError(
            f"`validation_split` leaves nothing to train or to validate on. Received: "
            f"validation_split={part} of {count} sample(s)"
        )

    def cut(rows: slice) -> tuple[Any, ...]:
        return tuple(
            tf.nest.map_structure(lambda part: part[rows], data[name]) if name in data else None
            for name in ("x", "y", "sample_weight")
        )

    return cut(slice(0, at)), cut(slice(at, count))


def is_endless(data: Any) -> bool:
    """Whether data is a dataset that declares itself endless."""
    if isinstance(data, tf.data.Dataset):
        return int(data.cardinality()) == tf.data.INFINITE_CARDINALITY
    return isinstance(data, keras.utils.PyDataset) and _batches_of(data) is None


def check_is_no_generator(name: str, data: Any) -> None:
    """Raises a `ValueError` for a generator, which can be read only once, or PyTorch's data."""
    if hasattr(data, "__next__"):
        problem = (
            "A generator can be read only once, but each generation and each resumed run read the "
            "data anew."
        )
    elif type(data).__module__.startswith("torch.utils"):
        problem = "Data of PyTorch is not read, because its order cannot be repeated."
    else:
        return
    raise ValueError(
        f"{problem} Use arrays, a `tf.data.Dataset` (such as "
        "`tf.data.Dataset.from_generator(...)`) or a `keras.utils.PyDataset`. "
        f"Received: {name}={data!r}"
    )


def check_ends(name: str, data: Any) -> None:
    """Raises a `ValueError` if a dataset declares itself endless."""
    if is_endless(data):
        raise ValueError(
            f"`{name}` must be finite, because all of it is read. Take as many batches as it "
            f"needs: `{name}=dataset.take(n)`. Received: {name}={data!r}, which is endless"
        )


def all_of(data: Any) -> Data | list[Data]:
    """Reads all fitness data into memory; returns a list if batches differ in shape."""
    if is_dataset(data):
        check_ends("fitness_data", data)
        dataset = as_dataset(data, what="`fitness_data`")
        batches = list(
            _patiently(
                dataset, "reads `fitness_data` into memory", "`fitness_data=dataset.take(n)`"
            )
        )
        if not batches:
            raise ValueError("`fitness_data` is empty. Expected at least one batch.")
        return concatenate(batches)
    if not isinstance(data, (tuple, list)) or not 1 <= len(data) <= 3:
        raise ValueError(
            "`fitness_data` must be `(x, y)`, `(x, y, sample_weight)` or a dataset. Received: "
            f"{type(data).__name__}"
        )
    return in_memory(*data, what="`fitness_data`")


def count_batches(batches: tf.data.Dataset) -> int:
    """Counts the batches of a dataset that does not know its length."""
    what = "counts the batches of the training data, which does not tell its length"
    return sum(1 for _ in _patiently(batches, what, "`steps_per_epoch=...`"))


def _patiently(batches: tf.data.Dataset, what: str, instead: str) -> Iterator[Data]:
    """Yields batches, and warns once if that takes long.

    The warning says `what` Gadam is doing, and what to use `instead`.
    """
    started, said = time.monotonic(), False
    for number, batch in enumerate(batches):
        if not said and time.monotonic() - started > _PATIENCE:
            said = True
            warnings.warn(
                f"Gadam {what}: {number + 1} batches so far. If it takes too long, or the data "
                f"has no end, use {instead}.",
                stacklevel=2,
            )
        yield batch


def as_dataset(
    dataset: Any,
    class_weight: dict[int, float] | None = None,
    *,
    what: str = "The training data",
) -> tf.data.Dataset:
    """Makes a dataset of `Data` from one of tuples or a `PyDataset`; errors call it `what`."""
    if isinstance(dataset, keras.utils.PyDataset):
        dataset = _from_py_dataset(dataset, what)
    specs = [spec for spec in tf.nest.flatten(dataset.element_spec) if hasattr(spec, "shape")]
    if any(spec.shape.rank == 0 for spec in specs):
        raise ValueError(
            f"{what} must be a dataset of batches. Call `dataset.batch(batch_size)`. Received: "
            f"samples, {dataset.element_spec}"
        )
    names = ("x", "y", "sample_weight")

    def named(*parts: Any) -> Data:
        if len(parts) > len(names):
            raise ValueError(
                f"{what} must be a dataset of `x`, `(x, y)` or `(x, y, sample_weight)`. Received: "
                f"tuples of {len(parts)}"
            )
        data = {n: p for n, p in zip(names, parts, strict=False) if p is not None}
        return with_class_weight(data, class_weight)

    return dataset.map(tf.autograph.experimental.do_not_convert(named))  # keeps errors readable


def is_dataset(data: Any) -> bool:
    """Whether data is a dataset, which brings its own targets and batches."""
    return isinstance(data, (tf.data.Dataset, keras.utils.PyDataset))


def _batches_of(source: keras.utils.PyDataset) -> int | None:
    """The number of batches of a `PyDataset`, or `None` if it is endless."""
    try:
        return source.num_batches
    except NotImplementedError as error:
        raise ValueError(
            "Expected a `PyDataset` that tells its length. Received: one without `__len__`"
        ) from error


def _from_py_dataset(source: keras.utils.PyDataset, what: str) -> tf.data.Dataset:
    """Makes a `tf.data.Dataset` of the batches of a `PyDataset`, in their order."""
    count = _batches_of(source)
    if count == 0:
        raise ValueError(f"{what} is empty. Expected at least one batch.")

    def batch(index: int) -> Any:
        own = source[index]
        return tuple(own) if isinstance(own, list) else own

    # Like Keras: a dimension that differs between the first two batches may differ in all.
    examples = [
        tf.nest.map_structure(_as_tensor, batch(index))
        for index in range(2 if count is None else min(2, count))
    ]
    signature = tf.nest.map_structure(_spec, *examples)

    def batches() -> Iterator[Any]:
        for index in itertools.count() if count is None else range(count):
            yield batch(index)

    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    length = tf.data.INFINITE_CARDINALITY if count is None else count
    return dataset.apply(tf.data.experimental.assert_cardinality(length))


def _spec(*parts: Any) -> tf.TypeSpec:
    """The type that all batches have, inferred from examples, for any number of samples."""
    shape = parts[0].shape.most_specific_compatible_shape(parts[-1].shape)
    if not isinstance(parts[0], tf.RaggedTensor):
        return tf.TensorSpec([None, *shape[1:]], parts[0].dtype)
    return tf.RaggedTensorSpec(
        [None, *shape[1:]],
        parts[0].dtype,
        ragged_rank=parts[0].ragged_rank,
        row_splits_dtype=parts[0].row_splits.dtype,
    )


def sample_count(data: Data) -> int:
    """The number of samples."""
    return int(tf.nest.flatten(data)[0].shape[0])


def drawn(data: Data, size: int, draw: np.random.Generator) -> Data:
    """Draws `size` samples without repetition, or returns all if there are fewer."""
    count = sample_count(data)
    if size >= count:
        return data
    return take_rows(data, draw.choice(count, size, replace=False).astype("int32"))


def drawn_batches(batches: list[Data], size: int, draw: np.random.Generator) -> list[Data]:
    """Draws whole batches without repetition until they have `size` samples or none is left."""
    chosen: list[Data] = []
    for index in draw.permutation(len(batches)):
        if sum(map(sample_count, chosen)) >= size:
            break
        chosen.append(batches[index])
    return chosen


def take_rows(data: Data, indices: np.ndarray) -> Data:
    """Returns the samples with these indices."""
    return tf.nest.map_structure(lambda part: tf.gather(part, tf.constant(indices)), data)


def stack_batches(batches: Sequence[Data]) -> Data:
    """Stacks batches of one shape along a new first axis."""
    return tf.nest.map_structure(lambda *parts: tf.stack(parts), *batches)


def cut_to_size(batch: Data | list[Data], size: int) -> list[Data]:
    """Cuts each batch into batches of `size` samples, and drops the rest.

    Raises:
        ValueError: If no batch has as many samples.
    """
    batches = batch if isinstance(batch, list) else [batch]
    cut = [
        take_rows(one, np.arange(first, first + size, dtype="int32"))
        for one in batches
        for first in range(0, sample_count(one) - size + 1, size)
    ]
    if not cut:
        raise ValueError(
            f"The model takes batches of {size} samples, so fitness needs as many. Received: "
            f"{sum(map(sample_count, batches))} sample(s) to judge members by; use a larger "
            "`fitness_batch_size`, or more `fitness_data`"
        )
    return cut


# --- shapes -------------------------------------------------------------------------------


def tells_its_shapes(batches: tf.data.Dataset) -> bool:
    """Whether a dataset declares dense tensors, and the shape of a sample of each."""
    return all(
        isinstance(part, tf.TensorSpec)
        and part.shape.rank is not None
        and part.shape[1:].is_fully_defined()
        for part in tf.nest.flatten(batches.element_spec)
    )


def are_alike(batches: Sequence[Data], *, but_for_samples: bool = False) -> bool:
    """Whether batches are dense and of one shape, except perhaps the number of samples."""
    first = 1 if but_for_samples else 0
    shapes = [
        [
            tuple(part.shape[first:]) if isinstance(part, tf.Tensor) else None
            for part in tf.nest.flatten(batch)
        ]
        for batch in batches
    ]
    return None not in shapes[0] and all(shape == shapes[0] for shape in shapes)


def concatenate(batches: list[Data]) -> Data | list[Data]:
    """Joins batches into one, or returns them unchanged if their shapes do not match."""
    if not are_alike(batches, but_for_samples=True):
        return batches
    return tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *batches)


def check_counts(batch: Data) -> None:
    """Raises a `ValueError` if the parts of a batch differ in their number of samples."""
    if len({int(part.shape[0]) for part in tf.nest.flatten(batch)}) > 1:
        raise ValueError(
            "All inputs, targets and sample weights of a batch must have the same number of "
            "samples; a dataset of single samples needs `dataset.batch(batch_size)`. Received: "
            f"a first batch with {_sizes(batch)}"
        )


def _sizes(data: Data) -> str:
    """Describes how many samples each part has."""
    words = []
    for (name, *path), part in keras.tree.flatten_with_path(data):
        count = f"{part.shape[0]} sample(s)" if part.shape.rank else "no axis of samples"
        words.append(f"{name}{''.join(f'[{key!r}]' for key in path)} of {count}")
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")


# --- conversion to tensors ----------------------------------------------------------------


def _tensors(name: str, part: Any) -> Any:
    """Converts a part of the data to tensors.

    Raises:
        ValueError: If the part cannot be trained on.
    """
    try:
        return tf.nest.map_structure(_as_tensor, _without_lists(part))
    except (ValueError, TypeError) as error:
        leaves = [part] if isinstance(part, list) else tf.nest.flatten(part)
        found = sorted({_kind(leaf) for leaf in leaves})
        raise ValueError(
            f"`{name}` must be arrays of numbers or strings, whose samples have one shape, or "
            "`tf.RaggedTensor`s. Pad samples of different lengths "
            "(`keras.utils.pad_sequences`) or use `tf.ragged.constant`; make sparse arrays "
            "dense, or use a `tf.data.Dataset` of batches. "
            f"Received: {name} with {', '.join(found[:4])}"
        ) from error


def _kind(leaf: Any) -> str:
    """Describes what a leaf of the data is."""
    if isinstance(leaf, np.ndarray) and leaf.dtype == object and leaf.size:
        return f"an array of objects ({type(leaf.flat[0]).__name__}) of shape {leaf.shape}"
    if isinstance(leaf, list):
        return f"a list of {', '.join(sorted({type(item).__name__ for item in leaf}))}"
    return type(leaf).__name__


def _as_tensor(part: Any) -> Any:
    if not isinstance(part, tf.RaggedTensor):
        part = tf.convert_to_tensor(part)
    # Like Keras: float64, which Python and NumPy use by default, becomes floatx.
    return tf.cast(part, keras.config.floatx()) if part.dtype == tf.float64 else part


def _without_lists(part: Any) -> Any:
    """Turns a list of arrays into a tuple, and a list of numbers into an array."""
    if isinstance(part, dict):
        return {name: _without_lists(value) for name, value in part.items()}
    if type(part) not in (list, tuple):
        return part
    if part and (getattr(part[0], "shape", ()) or isinstance(part[0], dict)):
        return tuple(_without_lists(value) for value in part)
    return np.asarray(part)
