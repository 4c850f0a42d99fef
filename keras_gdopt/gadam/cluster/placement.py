"""Which shard trains which member, so that little has to be moved."""

from collections.abc import Sequence


def balanced(homes: Sequence[int], shards: int, capacity: int) -> list[int]:
    """The shard of each member: its home, unless too many are at home there.

    Args:
        homes: The shard where each member lies.
        shards: How many there are.
        capacity: How many members one of them takes.
    """
    room = [capacity] * shards
    placed: list[int | None] = []
    for home in homes:
        stays = room[home] > 0
        room[home] -= stays
        placed.append(home if stays else None)
    return _with_the_rest(placed, room)


def of_children(
    parents: Sequence[Sequence[int]], homes: Sequence[int], shards: int, capacity: int
) -> list[int]:
    """The shard of each child: where one of its parents lies, as far as there is room.

    Children whose parents lie together come first, for they need nothing moved there; of
    the others each goes where more room is.

    Args:
        parents: Two members for each child.
        homes: The shard where each member lies.
        shards: How many there are.
        capacity: How many children one of them takes.
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
            placed[child] = _swapped(child, placed, of_both, room)
    return _with_the_rest(placed, room)


def _swapped(
    child: int, placed: list[int | None], of_both: list[set[int]], room: list[int]
) -> int | None:
    """A shard for a child where another one makes room, which is as well off elsewhere."""
    for other, shard in enumerate(placed):
        if shard not in of_both[child]:
            continue
        for elsewhere in sorted(of_both[other] - {shard}):
            if room[elsewhere]:
                room[elsewhere] -= 1
                placed[other] = elsewhere
                return shard
    return None


def _with_the_rest(placed: Sequence[int | None], room: list[int]) -> list[int]:
    """Those without a shard go where most room is."""
    shards = []
    for shard in placed:
        if shard is None:
            shard = max(range(len(room)), key=lambda one: room[one])
            room[shard] -= 1
        shards.append(shard)
    return shards
