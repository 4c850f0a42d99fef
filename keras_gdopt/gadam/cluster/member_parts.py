"""Packs members into one list of their parts, in which they travel between processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import tensorflow as tf

from keras_gdopt.gadam.population import Members

Arrays = Any
"""A list of arrays, the nested structure of an optimizer's state, or a reference to one."""


class MemberParts(NamedTuple):
    """The parts of a member."""

    weights: Arrays
    state: Arrays
    optimizer: Arrays
    """Its optimizer's state, and how many batches the optimizer has seen."""


class ChildParts(NamedTuple):
    """The parts of its parents that a child is made of."""

    first: Arrays
    """The first parent's weights."""
    second: Arrays
    """The second parent's weights."""
    state: Arrays
    optimizer: Arrays | None
    """From the parent whose optimizer's state it inherits; `None` if it inherits none."""


class JudgedParts(NamedTuple):
    """The parts of a member that its fitness depends on."""

    weights: Arrays
    state: Arrays


Parts = TypeVar("Parts", MemberParts, ChildParts, JudgedParts)


def pack(members: Sequence[Parts]) -> list[Arrays]:
    """Lists the parts of all members, to be the arguments of a worker's method."""
    return [part for member in members for part in member]


def unpack(kind: type[Parts], parts: Sequence[Arrays]) -> list[Parts]:
    """The members whose parts `pack` listed.

    Args:
        kind: The type of the members.
        parts: The list.
    """
    length = len(kind._fields)
    return [kind(*parts[start : start + length]) for start in range(0, len(parts), length)]


def parts_of_member(members: Members, place: int) -> MemberParts:
    """The member at one place of stacked members."""
    own = tf.nest.map_structure(lambda array: array[place], members)
    return MemberParts(own.weights, own.state, (own.optimizer, own.batches))
