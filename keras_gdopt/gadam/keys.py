"""The keys of every random draw: what is drawn depends on nothing else."""

import enum

import numpy as np


class Phase(enum.IntEnum):
    """What a random draw is for. The numbers are part of every key: append, never reorder."""

    INITIALIZE = 0
    TRAIN_PARENTS = 1
    TRAIN_CHILDREN = 2
    SELECT = 3
    CROSS_OVER = 4
    MUTATE = 5
    FITNESS = 6
    SURVIVAL = 7
    DRAW_HYPERPARAMETERS = 8
    PERTURB_HYPERPARAMETERS = 9


def sequence(seed: int, generation: int, phase: Phase, *more: int) -> np.random.SeedSequence:
    """The source of randomness for one purpose.

    Args:
        seed: Of the whole run.
        generation: The generation's number.
        phase: What is drawn.
        *more: A member's number, an epoch's, and so on.
    """
    return np.random.SeedSequence(seed, spawn_key=(int(phase), generation, *more))


def key(seed: int, generation: int, phase: Phase, *more: int) -> np.ndarray:
    """Two integers for TensorFlow's stateless draws, see `sequence`."""
    return sequence(seed, generation, phase, *more).generate_state(2).view(np.int32)


def generator(seed: int, generation: int, phase: Phase, *more: int) -> np.random.Generator:
    """A generator for draws on the host, see `sequence`."""
    return np.random.Generator(np.random.Philox(sequence(seed, generation, phase, *more)))
