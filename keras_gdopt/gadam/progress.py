"""What `fit` prints during a generation, and its calls of the callbacks for batches."""

import math
import time
from typing import Any

import keras
import numpy as np


class Progress:
    """Shows the steps of a generation in Keras's progress bar, and reports them to callbacks.

    Args:
        verbose: 0, 1 or 2, as in `Gadam.fit`.
        generation: The number of the generation, counted from 0.
        generations: The number of generations at the end of the run.
        steps: The number of steps in the generation.
        callbacks: Keras's `CallbackList`.
        first_waits_for: What is done before the first step, if it takes long; it is printed.
    """

    def __init__(
        self,
        verbose: int,
        generation: int,
        generations: int,
        steps: int,
        callbacks: Any,
        first_waits_for: str | None = None,
    ) -> None:
        self._verbose = verbose
        self._heading = f"Generation {generation + 1}/{generations}"
        self.steps, self._made = steps, 0
        self._callbacks = callbacks
        self._started = time.perf_counter()
        self._bar = None
        self._waiting = bool(verbose and first_waits_for)
        self._usual_stride = steps
        if self._waiting:
            print(first_waits_for, flush=True)
        if verbose == 1:
            if not self._waiting:
                print(self._heading)
            self._bar = keras.utils.Progbar(steps, stateful_metrics=["loss"])
            self._usual_stride = max(1, math.ceil(steps / 20))

    @property
    def stride(self) -> int:
        """The largest number of steps to make between two calls of `add`."""
        return 1 if self._waiting else self._usual_stride

    def add(self, steps: int, losses: np.ndarray) -> None:
        """Shows that steps were made, with the best member's loss, and reports them as a batch."""
        if self._waiting:
            print(f"First losses after {time.perf_counter() - self._started:.1f} s.")
            self._waiting = False
            if self._bar is not None:
                print(self._heading)
        best = float(np.nanmin(losses)) if np.any(np.isfinite(losses)) else math.nan
        self._callbacks.on_train_batch_begin(self._made)
        self._made += steps
        self._callbacks.on_train_batch_end(self._made - 1, {"loss": best})
        if self._bar is not None:
            self._bar.update(self._made, [("loss", best)], finalize=False)

    def end(self, logs: dict[str, Any]) -> None:
        """Shows those of the generation's logs that are single numbers."""
        shown = {name: value for name, value in logs.items() if np.ndim(value) == 0}
        if self._bar is not None:
            self._bar.stateful_metrics = set(shown)
            self._bar.update(self.steps, list(shown.items()), finalize=True)
        elif self._verbose == 2:
            seconds = time.perf_counter() - self._started
            figures = " - ".join(f"{name}: {value:.4g}" for name, value in shown.items())
            print(f"{self._heading} - {seconds:.1f}s - {figures}")
