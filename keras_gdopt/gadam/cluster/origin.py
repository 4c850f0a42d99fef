"""Sources from which lost survivors can be rebuilt."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray

from keras_gdopt.gadam.cluster import member_files
from keras_gdopt.gadam.cluster.member_parts import MemberParts, pack, parts_of_member
from keras_gdopt.gadam.cluster.pool import Pool, Task, this_node
from keras_gdopt.gadam.population import Members


class Held(NamedTuple):
    """A member that is somewhere in the cluster."""

    parts: MemberParts
    """References to them."""
    home: int
    """The shard that trained it."""
    node: str


class FromKeys:
    """The members that a run starts from, which workers draw from their keys.

    Args:
        pool: The workers.
        homes: The shard of each member.
    """

    def __init__(self, pool: Pool, homes: Sequence[int]) -> None:
        self._pool = pool
        self._homes = homes

    def held(self, places: Sequence[int]) -> list[Held]:
        """Puts some of the members into the cluster, and returns them."""
        return _run_by_shard(self._pool, "new_members", lambda own: [own], self._homes, places)


class InDriver:
    """A copy in the process that runs `fit`.

    Args:
        members: All members, as arrays.
        homes: The shard of each member.
    """

    def __init__(self, members: Members, homes: Sequence[int]) -> None:
        self.members = members
        self._homes = homes

    def held(self, places: Sequence[int]) -> list[Held]:
        """Puts some of the members into the cluster, and returns them."""
        node, found = this_node(), []
        for place in places:
            parts = MemberParts(*map(ray.put, parts_of_member(self.members, place)))
            found.append(Held(parts, self._homes[place], node))
        return found


class InDirectory:
    """Files that workers write and read, one for each member.

    Args:
        pool: The workers.
        directory: A directory that all nodes share.
        generation: How many generations had ended when the files were written.
        homes: The shard of each member.
    """

    def __init__(self, pool: Pool, directory: str, generation: int, homes: Sequence[int]) -> None:
        self._pool = pool
        self._directory = directory
        self._homes = homes
        self.generation = generation

    def write(self, members: Sequence[Held]) -> None:
        """Writes all members, each by the worker of its shard."""
        tasks = []
        for shard, own in _group_by_shard(self._homes, range(len(members))).items():

            def arguments(own: list[int] = own) -> list[Any]:
                return [self._paths(own), *pack([members[place].parts for place in own])]

            tasks.append(Task(shard, "write", arguments))
        self._pool.run(tasks)

    def held(self, places: Sequence[int]) -> list[Held]:
        """Puts some of the members into the cluster, and returns them."""
        return _run_by_shard(
            self._pool, "read", lambda own: [self._paths(own)], self._homes, places
        )

    def _paths(self, places: Sequence[int]) -> list[str]:
        return [member_files.path(self._directory, self.generation, place) for place in places]


def _run_by_shard(
    pool: Pool,
    method: str,
    arguments: Callable[[list[int]], list[Any]],
    homes: Sequence[int],
    places: Sequence[int],
) -> list[Held]:
    """Runs a worker's method in each shard, and returns the members that it returned."""
    shards = _group_by_shard(homes, places)
    tasks = {
        shard: Task(shard, method, partial(arguments, own), members=len(own))
        for shard, own in shards.items()
    }
    pool.run(list(tasks.values()))
    found = {}
    for shard, own in shards.items():
        for place, parts in zip(own, tasks[shard].members(), strict=True):
            found[place] = Held(parts, home=shard, node=tasks[shard].node)
    return [found[place] for place in places]


def _group_by_shard(homes: Sequence[int], places: Sequence[int]) -> dict[int, list[int]]:
    shards: dict[int, list[int]] = {}
    for place in places:
        shards.setdefault(homes[place], []).append(place)
    return shards
