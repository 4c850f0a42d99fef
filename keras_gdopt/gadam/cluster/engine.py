"""The settings of the Ray cluster that trains a population."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from keras_gdopt.optimizers.argument_checks import checked_choice, checked_count, checked_number


class RayEngine:
    """Trains the members of a population in the workers of a Ray cluster.

    Each worker trains a shard of the population, `population_size / num_workers` members, in
    the same way as one machine would. The result does not depend on which worker trains a
    member or on the order in which workers finish. A child is trained where one of its parents
    is, as long as there is room, so that only the other parent's weights move.

    A worker that dies or hangs is replaced, and only its unfinished task is repeated. If a node
    leaves the cluster, other workers take over its shards from a copy of the survivors.

    Args:
        num_workers: The number of workers, at most the population's size.
        address: The address of a Ray cluster; `"auto"` for the one that this machine belongs
            to. Defaults to `None`: the Ray that `ray.init` was called for, or else a new one
            on this machine.
        threads_per_worker: CPUs that each worker requests, and threads that TensorFlow
            uses in it. Defaults to 1.
        resources_per_worker: Other resources that each worker requests, such as
            `{"GPU": 1}`; `"memory"` in bytes.
        data_fn: A function without arguments that each worker and this process call,
            instead of sending arrays. It returns `x`, `(x, y)`, `(x, y, sample_weight)`, or
            a dataset of batches. `fit` then takes no data.
        task_timeout: Seconds that a worker may take to train its shard for one generation,
            or to evaluate it, before it counts as hanging. Defaults to 600.
        safekeeping: Where the survivors are copied, so that no worker can lose them:
            `"driver"`, the memory of the process that runs `fit`, or `"checkpoint_dir"`,
            files in the `checkpoint_dir` of `fit`, which must be on storage that all nodes
            share; then no process ever holds more than its shard. Defaults to `"driver"`.
        safekeeping_freq: Generations between two copies of the survivors (with their
            optimizers' state). What was made since the last copy is trained again if it is
            lost. Defaults to 1.

    Raises:
        ImportError: If Ray is not installed; the extra `keras-gdopt[ray]` installs it.
        ValueError: If an argument is out of range.

    Example:

    ```python
    engine = gdopt.RayEngine(num_workers=2)
    gadam = gdopt.Gadam(model, population_size=16, engine=engine)
    gadam.fit(x, y, generations=10)
    ```
    """

    def __init__(
        self,
        num_workers: int,
        address: str | None = None,
        threads_per_worker: int = 1,
        resources_per_worker: Mapping[str, float] | None = None,
        data_fn: Callable[[], Any] | None = None,
        task_timeout: float = 600.0,
        safekeeping: str = "driver",
        safekeeping_freq: int = 1,
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ImportError(
                "`RayEngine` needs Ray, which is not installed. Run "
                "`pip install 'keras-gdopt[ray]'`."
            )
        self.num_workers = checked_count("num_workers", num_workers, minimum=1)
        self.address = address
        self.threads_per_worker = checked_count("threads_per_worker", threads_per_worker, minimum=1)
        self.resources_per_worker = dict(resources_per_worker or {})
        if data_fn is not None and not callable(data_fn):
            raise ValueError(
                "`data_fn` must be a function that returns the training data. Received: "
                f"data_fn={data_fn!r}"
            )
        self.data_fn = data_fn
        self.task_timeout = checked_number("task_timeout", task_timeout, above=0.0)
        self.safekeeping = checked_choice("safekeeping", safekeeping, ("driver", "checkpoint_dir"))
        self.safekeeping_freq = checked_count("safekeeping_freq", safekeeping_freq, minimum=1)
