"""Workers that finish their tasks even if some of them die or hang."""

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray import exceptions

from keras_gdopt.gadam.cluster.member_parts import MemberParts, unpack
from keras_gdopt.gadam.cluster.worker import Worker

_log = logging.getLogger("keras_gdopt")

# A task that has killed this many workers would kill the next one, too.
_ATTEMPTS = 3
_THREADS_FOR_EACH_PROCESSOR = 16
# Seconds to wait for a small result, and for a process that imports TensorFlow to start.
_TO_GET, _TO_START = 60.0, 300.0
# Seconds without a word while a worker starts.
_PATIENCE = 60.0


class Task:
    """A call of a worker's method.

    Args:
        shard: The number of the worker that should run it.
        method: The name of a method of `Worker`.
        arguments: Makes the arguments; called again for each attempt.
        members: How many members the method returns, after its first value.
    """

    def __init__(
        self, shard: int, method: str, arguments: Callable[[], Sequence[Any]], members: int = 0
    ) -> None:
        self.shard = shard
        self.method = method
        self.arguments = arguments
        self.returns = 1 + len(MemberParts._fields) * members
        self.first: Any = None
        """The first returned value; `None` until the task is done."""
        self.rest: list[Any] = []
        """References to the other values."""
        self.node = ""
        """The node where they lie."""
        self.deaths = 0

    def members(self) -> list[MemberParts]:
        """References to the parts of each member."""
        return unpack(MemberParts, self.rest)


class LostError(RuntimeError):
    """Raised if arguments of tasks were on a node that left."""


class _Running(NamedTuple):
    handle: Any
    node: str
    process: int


class Pool:
    """Numbered actors that are replaced when they die or hang.

    Args:
        workers: The number of workers.
        threads: The number of threads of each worker.
        resources: The other resources that each worker needs.
        setup: A reference to a `Setup`.
        task_timeout: Seconds that a task may take.

    Attributes:
        events: What has happened, in words, since the list was last emptied.
    """

    def __init__(
        self,
        workers: int,
        *,
        threads: int,
        resources: Mapping[str, float],
        setup: Any,
        task_timeout: float,
    ) -> None:
        resources = dict(resources)
        options: dict[str, Any] = {
            "num_cpus": resources.pop("CPU", threads),
            "num_gpus": resources.pop("GPU", 0),
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        if "memory" in resources:
            options["memory"] = resources.pop("memory")
        self._needed = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **resources}
        self._actor = ray.remote(Worker).options(**options, resources=resources)
        self._threads = threads
        self._setup = setup
        self._data: Any = None
        self._timeout = task_timeout
        self.events: list[str] = []
        self._check_resources(workers)
        self._workers: dict[int, _Running] = {}
        gc.collect()  # a population that is no longer in use keeps its workers until then
        starting = [self._actor.remote(threads) for _ in range(workers)]
        for number, handle in enumerate(starting):
            try:
                self._workers[number] = self._prepare(number, handle)
            except exceptions.GetTimeoutError as error:
                for handle in starting:
                    _kill(handle)
                raise RuntimeError(
                    f"Worker {number} of {workers} did not start: {error} Its resources, "
                    f"{self._needed}, may be in use, by another population for example. "
                    f"Available are {ray.available_resources()}"
                ) from error

    @property
    def processes(self) -> dict[int, int]:
        """The process id of each worker on its node, by the worker's number."""
        return {number: worker.process for number, worker in self._workers.items()}

    def use(self, data: Any) -> None:
        """Gives all workers, and their later replacements, a reference to the data."""
        self._data = data
        self.run([Task(number, "use", lambda: [data]) for number in self._workers])

    def run(self, tasks: Sequence[Task]) -> None:
        """Runs all tasks that are not done yet.

        Raises:
            LostError: If arguments of some were on a node that left; others may be done.
            Exception: What a task raised, with a note that names the worker.
        """
        waiting = [task for task in tasks if task.first is None]
        running: dict[Any, tuple[Task, int, list[Any], float]] = {}
        lost: LostError | None = None
        while running or (waiting and lost is None):
            busy = {worker for _, worker, _, _ in running.values()}
            for number in [n for n in self._workers if n not in busy]:
                task = self._next(number, waiting)
                if task is None or lost is not None:
                    continue
                waiting.remove(task)
                first, rest = self._submit(task, number)
                running[first] = (task, number, rest, time.monotonic() + self._timeout)
            until = min((deadline for *_, deadline in running.values()), default=0.0)
            done, _ = ray.wait(
                list(running), num_returns=1, timeout=max(until - time.monotonic(), 0.0)
            )
            for first in done or [one for one in running if self._is_late(running[one])]:
                task, number, rest, _ = running.pop(first)
                try:
                    if not done:
                        raise TimeoutError(f"did not answer within {self._timeout:g} seconds")
                    value = ray.get(first, timeout=_TO_GET)
                except exceptions.RayTaskError as error:
                    if isinstance(error.cause, exceptions.ObjectLostError):
                        lost = LostError(str(error.cause))
                        continue
                    self._raise_from(error, number)
                except exceptions.ObjectLostError as error:
                    lost = LostError(str(error))
                except (exceptions.RayError, TimeoutError) as error:
                    task.deaths += 1
                    self._replace(number, task, error)
                    waiting.append(task)
                else:
                    task.first, task.rest = (True if value is None else value), rest
                    task.node = self._workers[number].node
        if lost is not None:
            raise lost

    def note(self, event: str) -> None:
        """Logs and records what happened to workers."""
        _log.warning(event)
        self.events.append(event)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers.values():
            _kill(worker.handle)
        self._workers = {}

    # --- the parts -----------------------------------------------------------

    def _submit(self, task: Task, number: int) -> tuple[Any, list[Any]]:
        method = getattr(self._workers[number].handle, task.method)
        references = method.options(num_returns=task.returns).remote(*task.arguments())
        if task.returns == 1:
            return references, []
        return references[0], references[1:]

    def _next(self, number: int, waiting: Sequence[Task]) -> Task | None:
        """The next task of a worker: its own come first, then those whose worker is gone."""
        for task in waiting:
            if task.shard == number:
                return task
        return next((task for task in waiting if task.shard not in self._workers), None)

    @staticmethod
    def _is_late(running: tuple[Task, int, list[Any], float]) -> bool:
        return time.monotonic() >= running[-1]

    def _prepare(self, number: int, handle: Any) -> _Running:
        """Makes a worker ready for tasks."""
        try:
            process = self._fetch_while_there_is_room(handle.start.remote(self._setup))
            if self._data is not None:
                self._fetch_while_there_is_room(handle.use.remote(self._data))
        except exceptions.RayTaskError as error:
            self._raise_from(error, number)
        return _Running(handle, _node_of(handle), process)

    def _fetch_while_there_is_room(self, reference: Any) -> Any:
        """Fetches a result of a worker that may never start, because its node may be gone."""
        started, said = time.monotonic(), False
        while not ray.wait([reference], timeout=1.0)[0]:
            waited = time.monotonic() - started
            if waited > _PATIENCE and not said:
                said = True
                _log.warning(
                    f"A worker has not started for {waited:.0f} seconds. It may be importing "
                    f"TensorFlow, or wait for {self._needed}, which another population may use. "
                    f"Available are {ray.available_resources()}. It is given up after "
                    f"{_TO_START:g} seconds."
                )
            if waited > _TO_START:
                raise exceptions.GetTimeoutError(f"It was not ready within {_TO_START:g} seconds.")
            if not self._has_resources():
                raise exceptions.GetTimeoutError("The node that had room for it is gone.")
        return ray.get(reference, timeout=_TO_GET)

    def _replace(self, number: int, task: Task, error: Exception) -> None:
        """Replaces a worker that died or hangs, or goes on without it if there is no room."""
        worker = self._workers.pop(number)
        _kill(worker.handle)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        what = f"Worker {number} (process {worker.process}) was lost in `{task.method}`: {reason}"
        if task.deaths >= _ATTEMPTS:
            raise RuntimeError(
                f"{what}\nThat was the {_ATTEMPTS}rd worker that was lost in the same task, so the "
                "task is given up. A worker may need more memory than its node has: use more nodes "
                "or fewer workers on each; or more time: raise `task_timeout`. The last checkpoint "
                f"is kept. Ray says: {error}"
            ) from error
        started = time.monotonic()
        if self._has_resources():
            handle = self._actor.remote(self._threads)
            try:
                self._workers[number] = self._prepare(number, handle)
            except exceptions.RayError as failure:
                _kill(handle)
                what += f"; its replacement, too: {failure}"
        if number in self._workers:
            self.note(f"{what}. Replaced in {time.monotonic() - started:.1f} s.")
            return
        self.note(
            f"{what}. There is no room for another one: its shard goes to the other "
            f"{len(self._workers)}."
        )
        if not self._workers:
            raise RuntimeError(
                "No worker is left in the Ray cluster, and there are no resources for a new one. "
                "The last checkpoint is kept."
            ) from error

    def _has_resources(self) -> bool:
        """Whether the nodes that are alive can hold one more worker."""
        return self._capacity() > len(self._workers)

    def _capacity(self) -> int:
        """How many workers the nodes that are alive can hold."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needed = {name: amount for name, amount in self._needed.items() if amount}
        return sum(
            min(int(node.get(name, 0.0) // amount) for name, amount in needed.items())
            for node in nodes
        )

    def _check_resources(self, workers: int) -> None:
        capacity = self._capacity()
        if capacity < workers:
            raise ValueError(
                f"The Ray cluster has room for {capacity} worker(s) that need {self._needed} "
                "each. Use fewer workers, fewer `threads_per_worker`, or more nodes. Received: "
                f"num_workers={workers}, and a cluster of {ray.cluster_resources()}"
            )

    def _raise_from(self, error: exceptions.RayTaskError, number: int) -> None:
        """Raises what a worker's task raised, with a note that names the worker."""
        cause = error.cause
        worker = self._workers.get(number)
        process = f" (process {worker.process}, node {worker.node[:8]})" if worker else ""
        cause.add_note(f"Raised in worker {number}{process} of the Ray engine.")
        raise cause from None


def connect(address: str | None, cpus: int) -> None:
    """Joins a cluster, or starts Ray on this machine, unless Ray already runs."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What is lost with a node is made again, so errors of those that read it are not shown.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if address is not None:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(
            address="local",  # not another cluster that happens to run here
            # The most threads that the workers of this `fit` and of later ones may have: this
            # cluster cannot grow, and the user decides how many threads are useful.
            num_cpus=max(cpus, _THREADS_FOR_EACH_PROCESSOR * (os.cpu_count() or 1)),
            include_dashboard=False,
            log_to_driver=False,
            # Workers can import whatever this process can.
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
        )


def alive_nodes() -> set[str]:
    """The nodes of the cluster that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def this_node() -> str:
    """The node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def _node_of(handle: Any) -> str:
    return ray.get(handle.node.remote(), timeout=_TO_GET)


def _kill(handle: Any) -> None:
    try:
        ray.kill(handle, no_restart=True)
    except Exception:  # it is dead, or Ray itself is
        _log.debug("A worker could not be killed.", exc_info=True)
