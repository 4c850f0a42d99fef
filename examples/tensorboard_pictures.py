"""Makes the README's pictures of TensorBoard, as a browser renders it.

    python examples/tensorboard_pictures.py

Runs the main job and a population, starts TensorBoard on what they wrote, and takes screenshots
of the parts that the README shows, as small PNG files. Needs Playwright and Chromium:
`pip install playwright`, and on Debian `apt install chromium`.
"""

import argparse
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = Path(__file__).parent
POPULATION = "Gadam, evolving"
FEW = ("Adam", "Momentum", "RMSprop")
SECONDS_TO_DRAW = 20


class Picture(NamedTuple):
    """A part of a TensorBoard page."""

    runs: str
    """The folder of runs that the page shows, as a pattern."""
    page: str
    """The end of its address."""
    window: tuple[int, int]
    part: tuple[int, int, int, int]
    """Left, upper, right and lower edges, in pixels of the window."""


PICTURES = {
    "optimizers": Picture(
        "few",
        "?tagFilter=epoch_loss|optimizer/grad_norm|update_ratio_log10&smoothing=0.6#timeseries",
        (1700, 640),
        (345, 155, 1445, 600),
    ),
    "hparams": Picture("optimizers", "#hparams", (1700, 640), (342, 64, 1700, 560)),
    "population": Picture("population/*", "#custom_scalars", (1500, 1200), (358, 70, 1500, 1070)),
    "family_tree": Picture("population/*", "#images", (1300, 900), (333, 122, 720, 482)),
}


def train(folder: Path, epochs: int, generations: int) -> None:
    """Runs the examples, which write below `folder`."""
    jobs: list[list[Any]] = [
        ["compare_optimizers.py", "--epochs", epochs, "--logdir", folder / "optimizers"],
        [
            "population_study.py", "--data", "mnist", "--seeds", 1, "--generations", generations,
            "--contenders", POPULATION, "--logdir", folder / "population",
            "--output", folder / "study.png",
        ],
    ]  # fmt: skip
    for script, *arguments in jobs:
        command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
        subprocess.run(command, check=True, cwd=folder)
    for name in FEW:
        (run,) = folder.glob(f"optimizers/*/{name}")
        shutil.copytree(run, folder / "few" / name)


def take(picture: Picture, folder: Path, browser: str, path: Path) -> None:
    """Starts TensorBoard, renders a page in the browser, and keeps a part of it."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (log_dir,) = folder.glob(picture.runs)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    left, upper, right, lower = picture.part
    try:
        _wait_for(f"http://127.0.0.1:{port}/data/runs")
        with sync_playwright() as playwright:
            # The Time Series tab draws its lines with WebGL.
            arguments = ["--no-sandbox", "--enable-unsafe-swiftshader"]
            chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
            width, height = picture.window
            page = chromium.new_page(viewport={"width": width, "height": height})
            page.goto(f"http://127.0.0.1:{port}/{picture.page}")
            page.wait_for_timeout(1000 * SECONDS_TO_DRAW)
            width, height = right - left, lower - upper
            clip: Any = {"x": left, "y": upper, "width": width, "height": height}
            page.screenshot(path=path, clip=clip)
            chromium.close()
    finally:
        server.terminate()
        server.wait()
    with Image.open(path) as screenshot:
        screenshot.convert("RGB").quantize(128).save(path, optimize=True)


def _wait_for(address: str, seconds: float = 60) -> None:
    """Waits until TensorBoard has found runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address) as answer:
                if len(answer.read()) > 4:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"TensorBoard shows no runs after {seconds} s: {address}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=EXAMPLES / "pictures", help="a folder")
    parser.add_argument("--epochs", type=int, default=20, help="of the main job")
    parser.add_argument("--generations", type=int, default=20, help="of the population")
    parser.add_argument("--keep", type=Path, help="where to keep the runs, or find them again")
    args = parser.parse_args(argv)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("tensorboard_pictures: error: no chromium found; on Debian: apt install chromium")
    if importlib.util.find_spec("playwright") is None:
        sys.exit("tensorboard_pictures: error: no playwright found: pip install playwright")
    args.output.mkdir(parents=True, exist_ok=True)
    folder = args.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        train(folder.resolve(), args.epochs, args.generations)
    for name, picture in PICTURES.items():
        path = args.output / f"{name}.png"
        take(picture, folder, browser, path.resolve())
        print(f"{path}: {os.path.getsize(path) // 1024} kB")


if __name__ == "__main__":
    main()
