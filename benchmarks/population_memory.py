"""Whether a population's memory stays flat: resident memory over 200 generations.

python -m benchmarks.population_memory
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import keras_gdopt as gdopt
from benchmarks.population import BATCH, data, mlp
from benchmarks.side_by_side import environment, resident

EARLY, LATE = 20, 200


class _Memory(keras.callbacks.Callback):
    """Resident memory at the end of each generation, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.of_generation: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.of_generation.append(resident())


def main() -> None:
    """Measures both engines, and prints one table."""
    lines = [
        f"| engine | generation {EARLY}, MB | generation {LATE}, MB | ratio | bound |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    x, y = data()
    for engine in ("stacked", "unrolled"):
        model = mlp()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(gdopt.Adam(), loss)
        memory = _Memory()
        gadam = gdopt.Gadam(model, 16, seed=0, engine=engine)
        gadam.fit(
            x, y, generations=LATE, steps_per_epoch=10, batch_size=BATCH,
            callbacks=[memory], verbose=0,
        )  # fmt: skip
        early, late = (memory.of_generation[at - 1] / 1e6 for at in (EARLY, LATE))
        mark = "1.02" + ("" if late / early <= 1.02 else " missed")
        lines.append(f"| {engine} | {early:.0f} | {late:.0f} | {late / early:.3f} | {mark} |")
    print(f"{environment()}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
