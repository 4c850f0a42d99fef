"""The keys of all random draws. A draw depends on its key alone."""

import enum

import numpy as np


class Phase(enum.IntEnum):
    """The purpose of a random draw. Its number is part of the key: append, never reorder."""

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
        seed: The seed of the run.
        generation: The number of the generation.
        phase: The purpose of the draw.
        *more: The number of a member, an epoch and so on.
    """
    return np.random.SeedSequence(seed, spawn_key=(int(phase), generation, *more))


def key(seed: int, generation: int, phase: Phase, *more: int) -> np.ndarray:
    """Two integers as a key of TensorFlow's stateless draws, see `sequence`."""
    return sequence(seed, generation, phase, *more).generate_state(2).view(np.int32)


def generator(seed: int, generation: int, phase: Phase, *more: int) -> np.random.Generator:
    """A generator for draws on the host, see `sequence`."""
    return np.random.Generator(np.random.Philox(sequence(seed, generation, phase, *more)))
