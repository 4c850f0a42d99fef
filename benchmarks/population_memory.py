"""Whether a population's memory stays flat: resident memory over 200 generations.

python -m benchmarks.population_memory
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_gdopt as gdopt
from benchmarks.population import BATCH, compiled, data, mlp
from benchmarks.side_by_side import environment, resident

EARLY, LATE = 20, 200


class _Memory(gdopt.gadam.PopulationCallback):
    """Resident memory after each generation, in bytes: of this process and of Ray's workers."""

    def __init__(self) -> None:
        super().__init__()
        self.here: list[float] = []
        self.workers: list[float] = []

    def on_generation_end(self, generation: int, logs: dict | None = None) -> None:
        self.here.append(resident())
        pool = getattr(self.gadam._population, "_pool", None)
        if pool is not None:
            self.workers.append(sum(map(resident, pool.processes.values())))


def main() -> None:
    """Measures all engines and prints one table."""
    print(
        f"{environment()}\n\n"
        f"| engine | generation {EARLY}, MB | generation {LATE}, MB | ratio | bound |\n"
        "| --- | ---: | ---: | ---: | ---: |"
    )
    x, y = data()
    for engine in ("stacked", "mapped", gdopt.RayEngine(2)):
        memory = _Memory()
        gadam = gdopt.Gadam(compiled(mlp, gdopt.Adam()), 16, seed=0, engine=engine)
        gadam.fit(
            x, y, generations=LATE, steps_per_epoch=10, batch_size=BATCH,
            callbacks=[memory], verbose=0,
        )  # fmt: skip
        name = engine if isinstance(engine, str) else "2 workers of Ray, the driver"
        for label, values in ((name, memory.here), ("2 workers of Ray", memory.workers)):
            if values:
                early, late = (values[at - 1] / 1e6 for at in (EARLY, LATE))
                mark = "1.02" + ("" if late / early <= 1.02 else " missed")
                print(
                    f"| {label} | {early:.0f} | {late:.0f} | {late / early:.3f} | {mark} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
