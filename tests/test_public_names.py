"""The public names and their signatures, against those in `tests/public_names.txt`.

    python -m tests.test_public_names

writes that file anew.
"""

import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import keras_gdopt as gdopt
from keras_gdopt import closures, gadam

PUBLIC_BASES = (gdopt.GradientOptimizer, closures.ClosureOptimizer, gadam.PopulationCallback)
PINNED = Path(__file__).parent / "public_names.txt"


def interface() -> str:
    """A line for each public name, and below a class one for each method or property."""
    return "".join(f"{line}\n" for line in sorted(_lines_of(gdopt, "")))


def _lines_of(module: ModuleType, prefix: str) -> Iterator[str]:
    for name in _public_names(module):
        public = getattr(module, name)
        if inspect.isclass(public):
            yield from _lines_of_class(public, prefix + name)
        elif inspect.ismodule(public):
            yield from _lines_of(public, f"{prefix}{name}.")
        else:
            yield prefix + name
    if module is gdopt:
        # They have pages in the documentation, though `gdopt.__all__` names no such module.
        for room, names in ((closures, closures.__all__), (gadam, gadam.__all__)):
            for name in set(names) - set(module.__all__):
                prefix = room.__name__.removeprefix("keras_gdopt.")
                yield from _lines_of_class(getattr(room, name), f"{prefix}.{name}")


def _public_names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]


def _lines_of_class(cls: type, name: str) -> Iterator[str]:
    yield f"{name}{_signature(cls)}"
    for member, value in _members(cls).items():
        if inspect.isfunction(value):
            yield f"{name}.{member}{_signature(value)}"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{name}.{member}{_signature(value.__func__)}"
        else:
            yield f"{name}.{member}"


def _members(cls: type) -> dict[str, Any]:
    """What the class adds to Keras's and to the other public classes that it is made of."""
    bases = [b for b in cls.__mro__[1:] if b in PUBLIC_BASES or not _is_ours(b)]
    members: dict[str, Any] = {}
    for part in reversed([b for b in cls.__mro__ if _is_ours(b) and b not in bases]):
        members |= {n: v for n, v in vars(part).items() if n[0] != "_"}
    return {n: v for n, v in members.items() if not any(hasattr(b, n) for b in bases)}


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("keras_gdopt")


def _signature(of: Any) -> str:
    signature = inspect.signature(of)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature([p for p in parameters if p.name not in ("self", "cls")]))


def test_public_names_and_signatures():
    pinned, found = PINNED.read_text().splitlines(), interface().splitlines()
    changes = "\n".join(difflib.unified_diff(pinned, found, "pinned", "found", n=0, lineterm=""))
    assert not changes, (
        "The public interface has changed. If that is meant, write it down with\n"
        "    python -m tests.test_public_names\n"
        f"and name the change in CHANGELOG.md.\n{changes}"
    )


if __name__ == "__main__":
    PINNED.write_text(interface())
