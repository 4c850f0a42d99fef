"""Keeps what is made when the site is built until what it depends on changes."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def kept(folder: str, file: str, sources: Iterable[Path], make: Callable[[], bytes]) -> bytes:
    """The bytes of a file, made again only where a source has changed.

    Args:
        folder: A folder in `build`.
        file: The file's name.
        sources: The files that it depends on.
        make: Makes it.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    name = Path(file)
    path = ROOT / "build" / folder / f"{name.stem}-{digest.hexdigest()[:16]}{name.suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for outdated in path.parent.glob(f"{name.stem}-*"):
            outdated.unlink()
        path.write_bytes(make())
    return path.read_bytes()
