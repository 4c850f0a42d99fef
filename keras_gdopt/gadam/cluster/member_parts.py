"""How members travel between processes: parts of each, one after the other in one list."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import tensorflow as tf

from keras_gdopt.gadam.population import Members

Arrays = Any
"""A list of arrays, the nested structure of an optimizer's state, or a reference to one."""


class MemberParts(NamedTuple):
    """A member."""

    weights: Arrays
    state: Arrays
    optimizer: Arrays
    """Its optimizer's state and the number of its batches."""


class ChildParts(NamedTuple):
    """What a child is made of."""

    first: Arrays
    """The weights of its first parent."""
    second: Arrays
    """The weights of its second parent."""
    state: Arrays
    optimizer: Arrays | None
    """Of the parent whose optimizer's state it inherits; `None` if it inherits none."""


class JudgedParts(NamedTuple):
    """What is needed of a member to judge it."""

    weights: Arrays
    state: Arrays


Parts = TypeVar("Parts", MemberParts, ChildParts, JudgedParts)


def pack(members: Sequence[Parts]) -> list[Arrays]:
    """The parts of all members in one list, as the arguments of a worker's method."""
    return [part for member in members for part in member]


def unpack(kind: type[Parts], parts: Sequence[Arrays]) -> list[Parts]:
    """The members that `pack` made a list of.

    Args:
        kind: Of which type they are.
        parts: The list.
    """
    length = len(kind._fields)
    return [kind(*parts[start : start + length]) for start in range(0, len(parts), length)]


def parts_of_member(members: Members, place: int) -> MemberParts:
    """One of several members that are stacked."""
    own = tf.nest.map_structure(lambda array: array[place], members)
    return MemberParts(own.weights, own.state, (own.optimizer, own.batches))
