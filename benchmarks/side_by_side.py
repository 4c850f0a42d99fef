"""Times contenders in turn and prints a table of each work."""

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_PAGE = 4096
_PROCESSES = 4

# Prefixes of the names of contenders from other packages.
_PEERS = ("keras.", "Keras", "torch", "optax", "JAX")


@dataclass
class Contender:
    """Something whose steps are timed.

    Args:
        name: The name in the table.
        make: Called once; returns a function that makes steps and returns when they are done.
        steps: The number of steps in one call of that function.
        process: The id of the process that it runs in, whose memory is measured.
    """

    name: str
    make: Callable[[], Callable[[], object]]
    steps: int = 1
    process: int | str = "self"
    compile_seconds: float = field(default=0.0, init=False)
    memory: float = field(default=0.0, init=False)
    seconds: list[float] = field(default_factory=list, init=False)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


@dataclass
class Work:
    """Contenders that do the same work; the others are compared with the first."""

    name: str
    contenders: Sequence[Contender]
    calls: int = 1
    """Calls per reading of the clock."""
    bounds: dict[str, float] = field(default_factory=dict)
    """Ratios to the first contender that must not be exceeded, by name."""
    bound_before: float = 1.05
    """The bound for each contender of ours relative to the version before; see `--before`."""
    clock: Callable[[], float] = time.perf_counter
    """`time.process_time` for contenders that differ by less than what time passes by chance."""


def measure(work: Work, repetitions: int) -> None:
    """Warms each contender up, then times them in turn.

    Args:
        work: What to measure; its contenders hold the results.
        repetitions: How often each contender is timed.
    """
    steps = []
    for contender in work.contenders:
        gc.collect()
        with _PeakMemory(contender.process) as peak:
            started = time.perf_counter()
            step = contender.make()
            step()
            step()  # TensorFlow traces a step that makes variables twice
            contender.compile_seconds = time.perf_counter() - started
            for _ in range(5):
                step()
        contender.memory = peak.growth
        steps.append(step)
    for repetition in range(repetitions):
        # In turns, reversed every other time, so that no contender gains from its place.
        order = list(zip(work.contenders, steps, strict=True))
        for contender, step in order if repetition % 2 else reversed(order):
            started = work.clock()
            for _ in range(work.calls):
                step()
            passed = work.clock() - started
            contender.seconds.append(passed / (work.calls * contender.steps))


def beside_before(
    before: str,
    now: str,
    module: str,
    name: str,
    makers: Mapping[str, Callable[[], Sequence[Work]]],
    repetitions: int,
) -> Iterator[Work]:
    """Times each contender of ours beside itself in another version of the package.

    Each side runs in a fresh process, four times, and the two sides take turns at starting first. A
    process that has run other contenders is slower, and the layout of memory makes some processes
    faster than others.

    Args:
        before: The directory in which the other version is installed.
        now: That of this version, from which the benchmarks come in both cases.
        module: The benchmark module that `makers` belong to.
        name: The name of one of the makers.
        makers: Makers of works.
        repetitions: How often each contender is timed in total.
    """
    for place, work in enumerate(makers[name]()):
        for contender in work.contenders:
            if contender.name.startswith(_PEERS):
                continue
            both = [(before, f"{contender.name}, before"), (now, contender.name)]
            rounds = []
            for turn in range(_PROCESSES):
                with contextlib.ExitStack() as processes:
                    sides = [
                        processes.enter_context(
                            _in_a_process(version, module, name, place, contender.name, label)
                        )
                        for version, label in (both if turn % 2 else reversed(both))
                    ]
                    sides = sides if turn % 2 else sides[::-1]
                    measure(Work(work.name, sides, work.calls), -(-repetitions // _PROCESSES))
                    rounds.append(sides)
            sides = [_merge(same) for same in zip(*rounds, strict=True)]
            yield Work(work.name, sides, work.calls, {contender.name: work.bound_before})


def _merge(same: Sequence[Contender]) -> Contender:
    """Merges the timings of one contender in several processes."""
    merged = Contender(same[0].name, same[0].make, same[0].steps)
    merged.compile_seconds = statistics.median(one.compile_seconds for one in same)
    merged.memory = statistics.median(one.memory for one in same)
    merged.seconds = [seconds for one in same for seconds in one.seconds]
    return merged


@contextlib.contextmanager
def _in_a_process(
    installed: str, module: str, name: str, place: int, contender: str, label: str
) -> Iterator[Contender]:
    """A contender in a process of its own, with the package that is installed in a directory."""
    script = f"""
import sys
sys.path.insert(0, {installed!r})
import keras_gdopt
assert keras_gdopt.callbacks.__file__.startswith({installed!r}), keras_gdopt.callbacks.__file__
sys.path.insert(0, {str(_ROOT)!r})
from {module} import WORKS
contenders = WORKS[{name!r}]()[{place}].contenders
(contender,) = [each for each in contenders if each.name == {contender!r}]
print("ready", flush=True)
step = None
for _ in sys.stdin:
    if step is None:
        step = contender.make()
    else:
        step()
    print(contender.steps, flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = child.stdin, child.stdout
    assert stdin and stdout
    while stdout.readline() not in ("ready\n", ""):  # wait for the imports
        continue

    def call() -> None:
        print(file=stdin, flush=True)
        made.steps = int(stdout.readline())

    def make() -> Callable[[], object]:
        call()
        return call

    made = Contender(label, make, process=child.pid)
    try:
        yield made
    finally:
        child.kill()
        child.wait()


HEADER = """\
| work | contender | ms a step | ratio | bound | to the first step, s | memory, MB |
| --- | --- | ---: | ---: | ---: | ---: | ---: |"""


def rows(work: Work) -> str:
    """The results as rows of a Markdown table under `HEADER`.

    The ratio is the median, over the repetitions, of a contender's time divided by that of the
    first contender in the same repetition.
    """
    lines = []
    first = work.contenders[0]
    for contender in work.contenders:
        pairs = zip(contender.seconds, first.seconds, strict=True)
        ratio = statistics.median(own / its for own, its in pairs)
        bound = work.bounds.get(contender.name)
        mark = "" if bound is None else f"{bound:g}" + ("" if ratio <= bound else " missed")
        lines.append(
            f"| {work.name} | {contender.name} | {contender.median * 1e3:.3f} | {ratio:.3f} | "
            f"{mark} | {contender.compile_seconds:.1f} | {contender.memory / 1e6:.0f} |"
        )
    return "\n".join(lines)


class _PeakMemory:
    """Measures the largest growth of a process's resident memory."""

    def __init__(self, process: int | str) -> None:
        self._process = process

    def __enter__(self) -> "_PeakMemory":
        self._before = self._most = resident(self._process)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._most = max(self._most, resident(self._process))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> float:
        """The growth in bytes; 0 where the system has no `/proc`."""
        return self._most - self._before


def resident(process: int | str = "self") -> float:
    """Resident memory of a process in bytes; 0 where the system has no `/proc`."""
    statm = Path(f"/proc/{process}/statm")
    return int(statm.read_text().split()[1]) * _PAGE if statm.exists() else 0


def environment() -> str:
    """One line about the machine and the versions of the packages."""
    found = []
    for package in ("tensorflow", "keras", "torch", "jax", "optax", "ray"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, " + ", ".join(found)


def run(description: str, works: Mapping[str, Callable[[], Sequence[Work]]]) -> None:
    """Measures what the command line names and prints the table row by row.

    Args:
        description: The text of `--help`.
        works: Makers of works, by their names on the command line.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("work", nargs="*", help=f"any of {', '.join(works)}; default: all")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument(
        "--before", metavar="DIRECTORY", help="a checkout of another version, to stand beside ours"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.work) - set(works)
    if unknown:
        parser.error(f"no work named {sorted(unknown)}; expected any of {list(works)}")
    print(f"{environment()}\n\n{HEADER}", flush=True)
    if arguments.before:
        module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
        with _installed(arguments.before) as before, _installed(str(_ROOT)) as now:
            for name in arguments.work or works:
                for work in beside_before(before, now, module, name, works, arguments.repetitions):
                    print(rows(work), flush=True)  # at once, as some works take an hour
        return
    for name in arguments.work or works:
        for work in works[name]():
            measure(work, arguments.repetitions)
            print(rows(work), flush=True)


@contextlib.contextmanager
def _installed(checkout: str) -> Iterator[str]:
    """A directory with the package of a checkout.

    A checkout alone would not do: `callbacks/` stands beside the package, so
    `keras_gdopt.callbacks` would be that of the version that is installed for the benchmarks.
    """
    with tempfile.TemporaryDirectory() as directory:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        path = str(Path(checkout).resolve())  # pip would look up a bare name in the package index
        subprocess.run([*install, "--target", directory, path], check=True)
        yield directory
