"""The interface of training data, wherever it comes from."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from keras_gdopt.functional import Data
from keras_gdopt.gadam.keys import Phase
from keras_gdopt.tensor import Tensor

MOST_STEPS = 16
"""The largest number of steps that are handed to the device at a time."""


class Portion(NamedTuple):
    """Consecutive steps that are handed to the engine together.

    `data` and `order` are arguments of `Engine.train`. If batches differ in shape or are ragged,
    `data` has a list for each step, with a batch for each member, as `Engine.train_apart` takes.
    """

    data: Data | list[list[Data]]
    order: Tensor | None
    steps: int


class TrainingData(Protocol):
    """Samples, and which of them each member sees in each step."""

    steps_per_epoch: int

    def first_batch(self) -> Data | list[Data]:
        """Returns a batch from the beginning, in a list if batches may differ in shape."""

    def epoch(
        self, generation: int, phase: Phase, epoch: int, places: Sequence[int]
    ) -> Iterator[Portion]:
        """Yields the steps of one epoch for the members at some places of the population."""

    def fitness_batch(self, generation: int, phase: Phase, size: int) -> Data | list[Data]:
        """Returns about `size` samples that all members are judged by in a phase.

        If batches differ in shape, it returns a list of them.
        """


def check_batch_size(size: int, rest: int, fixed: int | None) -> None:
    """Raises a `ValueError` if batches do not have the size that the model accepts.

    Args:
        size: The batch size.
        rest: The size of the last batch if it is smaller, else 0.
        fixed: The only batch size that the model accepts, or `None`.
    """
    if fixed is not None and (size != fixed or rest):
        smaller = f", the last of {rest}" if rest else ""
        raise ValueError(
            f"The model's input has a batch size of its own (as stateful layers need): expected "
            f"batches of {fixed} samples. Use `batch_size={fixed}` and a multiple of {fixed} "
            f"samples, or `steps_per_epoch`. Received: batches of {size} samples{smaller}"
        )
