"""Prints the lowest version of each package that the project needs, as pip takes them."""

import tomllib
from pathlib import Path

project = Path(__file__).parents[1] / "pyproject.toml"
needed = tomllib.loads(project.read_text())["project"]["dependencies"]
print(*[one.replace(">=", "==") for one in needed if ">=" in one])
