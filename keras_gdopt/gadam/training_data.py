"""What training data is to a population, wherever it comes from."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from keras_gdopt.functional import Data
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.tensor import Tensor

MOST_STEPS = 16
"""Steps that are handed to the device at a time, at most."""


class Portion(NamedTuple):
    """Steps that are made in one call.

    `data` and `order` are what an engine's `train` takes. Where batches differ in shape or are
    ragged, `data` has a list for each step, with a batch for each member, as `train_apart` takes.
    """

    data: Data | list[list[Data]]
    order: Tensor | None
    steps: int


class TrainingData(Protocol):
    """Samples, and which of them each member sees in each step."""

    steps_per_epoch: int

    def first_batch(self) -> Data | list[Data]:
        """A batch from the beginning; in a list where batches differ in shape."""

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """The steps of one epoch of the members in some places of the population."""

    def fitness_batch(self, generation: int, phase: Phase, size: int) -> Data | list[Data]:
        """What all members are judged by in a phase, of about `size` samples.

        Batches that differ in shape come as a list.
        """


def check_batch_size(size: int, rest: int, fixed: int | None) -> None:
    """Raises a `ValueError` if the model does not take batches of this size, or the last one's.

    Args:
        size: Of batches.
        rest: Of the last batch, if it is smaller.
        fixed: The only size that the model takes, or `None`.
    """
    if fixed is not None and (size != fixed or rest):
        smaller = f", the last of {rest}" if rest else ""
        raise ValueError(
            f"The model's input has a batch size of its own (as stateful layers need): expected "
            f"batches of {fixed} samples. Use `batch_size={fixed}` and a multiple of {fixed} "
            f"samples, or `steps_per_epoch`. Received: batches of {size} samples{smaller}"
        )
