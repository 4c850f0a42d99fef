"""Chooses the shard that trains each member, so that little has to move."""

from collections.abc import Sequence


def balanced(homes: Sequence[int], shards: int, capacity: int) -> list[int]:
    """The shard of each member: its home, unless that is full.

    Args:
        homes: The shard where each member lies.
        shards: The number of shards.
        capacity: How many members each shard takes.
    """
    room = [capacity] * shards
    placed: list[int | None] = []
    for home in homes:
        stays = room[home] > 0
        room[home] -= stays
        placed.append(home if stays else None)
    return _place_the_rest(placed, room)


def of_children(
    parents: Sequence[Sequence[int]], homes: Sequence[int], shards: int, capacity: int
) -> list[int]:
    """The shard of each child: one where a parent lies, as long as there is room.

    Children whose parents lie in the same shard are placed first, because nothing has to move
    for them there. Each of the others goes to the parent whose shard has more room.

    Args:
        parents: The two parents of each child.
        homes: The shard where each member lies.
        shards: The number of shards.
        capacity: How many children each shard takes.
    """
    room = [capacity] * shards
    placed: list[int | None] = [None] * len(parents)
    of_both = [{homes[first], homes[second]} for first, second in parents]
    for child in sorted(range(len(parents)), key=lambda child: len(of_both[child])):
        shard = max(sorted(of_both[child]), key=lambda shard: room[shard])
        if room[shard]:
            room[shard] -= 1
            placed[child] = shard
        elif len(of_both[child]) == 2:
            placed[child] = _swap(child, placed, of_both, room)
    return _place_the_rest(placed, room)


def _swap(
    child: int, placed: list[int | None], of_both: list[set[int]], room: list[int]
) -> int | None:
    """Moves another child to its other parent's shard; returns the shard that this one gets."""
    for other, shard in enumerate(placed):
        if shard not in of_both[child]:
            continue
        for elsewhere in sorted(of_both[other] - {shard}):
            if room[elsewhere]:
                room[elsewhere] -= 1
                placed[other] = elsewhere
                return shard
    return None


def _place_the_rest(placed: Sequence[int | None], room: list[int]) -> list[int]:
    """Puts each child without a shard where there is the most room."""
    shards = []
    for shard in placed:
        if shard is None:
            shard = max(range(len(room)), key=lambda one: room[one])
            room[shard] -= 1
        shards.append(shard)
    return shards
