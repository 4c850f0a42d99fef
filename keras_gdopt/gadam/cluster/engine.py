"""What a user says of the cluster that trains a population."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from keras_gdopt.optimizers.argument_checks import checked_choice, checked_count, checked_number


class RayEngine:
    """Trains the members of a population in the workers of a Ray cluster.

    Each worker trains a shard of the population: `population_size / num_workers` members,
    trained as on one machine. Which member is trained where, and in what order workers finish,
    changes nothing in the result. A child is trained where one of its parents is, as far as
    there is room, so that only the other one's weights move.

    A worker that dies or hangs is replaced, and only what it was doing is done again. On a
    node that leaves the cluster others take over its shards, from a copy of the survivors.

    Args:
        num_workers: How many, at most the population's size.
        address: Of a Ray cluster, `"auto"` for the one that this machine belongs to.
            Defaults to `None`: a Ray of its own on this machine, or the one that
            `ray.init` was called for.
        threads_per_worker: CPUs that a worker asks for, and threads that TensorFlow
            uses in it. Defaults to 1.
        resources_per_worker: What else it asks for, as `{"GPU": 1}`; `"memory"` in bytes.
        data_fn: Called without arguments in each worker and here, instead of sending
            arrays: returns `x`, `(x, y)`, `(x, y, sample_weight)`, or a dataset of
            batches. `fit` then takes no data.
        task_timeout: Seconds after which a worker counts as hanging, which trains its
            shard for one generation, or evaluates it. Defaults to 600.
        safekeeping: Where the survivors are copied to, so that no worker can lose them:
            `"driver"`, the memory of the process of `fit`, or `"checkpoint_dir"`, files in
            the `checkpoint_dir` of `fit`, which must be on storage that all nodes share;
            then no process ever holds more than its shard. Defaults to `"driver"`.
        safekeeping_freq: Generations from one copy of the survivors (with their
            optimizers' state) to the next. What was made since then is trained again if
            it is lost. Defaults to 1.

    Raises:
        ImportError: Without Ray, which the extra `keras-gdopt[ray]` brings.
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
