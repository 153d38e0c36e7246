"""Make constraints.txt again: what pip resolves for `.[export,test]` on every Python given, as exact versions.

Usage, from the repository's root, with one interpreter for each supported Python:

    python .ci/lock.py python3.11 python3.12 python3.13

Nothing is installed. A package whose version differs between Pythons gets one line for each, with a marker.
"""

import argparse
import json
import os
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints.txt"
HEADER = """\
# What CI installs, exactly. Made by `.ci/lock.py`; change the ranges in pyproject.toml and make it again.
"""


def resolve(python: str) -> tuple[str, dict[str, str]]:
    """Resolve everything that CI installs with one interpreter.

    Args:
        python: An interpreter, by name or path.

    Returns:
        Its version as "3.11", and the version of each distribution by normalised name.

    Raises:
        subprocess.CalledProcessError: pip found no solution, or the interpreter does not run.
    """
    build_backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        subprocess.run([python, "-m", "venv", environment], check=True)
        report = Path(folder, "report.json")
        command = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--dry-run", "--report", report]
        subprocess.run([*command, f"{ROOT}[export,test]", *build_backend], check=True)
        found = json.loads(report.read_text())
    versions = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in found["install"]
        if item["metadata"]["name"] != "caption-rt"
    }
    return ".".join(found["environment"]["python_version"].split(".")[:2]), versions


def merge(resolved: dict[str, dict[str, str]]) -> list[str]:
    """Write one line for each package, or one for each Python where their versions differ.

    Args:
        resolved: For each Python version ("3.11") the versions by name.

    Returns:
        The lines, sorted by name.
    """
    lines = []
    for name in sorted(set().union(*resolved.values())):
        pins = {python: versions[name] for python, versions in resolved.items() if name in versions}
        if len(set(pins.values())) == 1:
            lines.append(f"{name}=={next(iter(pins.values()))}")
        else:
            lines += [f'{name}=={version}; python_version == "{python}"' for python, version in pins.items()]
    return lines


def main() -> None:
    """Resolve with every interpreter, then replace constraints.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="+", help="an interpreter for each supported Python")
    resolved = dict(resolve(python) for python in parser.parse_args().python)
    temporary = TARGET.with_suffix(".tmp")
    temporary.write_text(HEADER + "".join(f"{line}\n" for line in merge(resolved)))
    os.replace(temporary, TARGET)


if __name__ == "__main__":
    main()
