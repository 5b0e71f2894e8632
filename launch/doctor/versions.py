"""Versions of Python and the libraries beside those that accrete is tested with.

The tested ones are the pins of constraints.txt, which lies inside the package (`launch/` holds a
link to the file at the top of the sources, so that there is one).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata, resources

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from accrete.launch.doctor.checks import Check, failure, ok, warning


def tested_versions() -> dict[str, str]:
    """Library -> the version of constraints.txt."""
    text = resources.files("accrete.launch").joinpath("constraints.txt").read_text("utf-8")
    pairs = (line.strip().split("==") for line in text.splitlines() if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs if name[0] != "#"}


def required_python() -> str:
    """The Python versions that accrete allows, such as `>=3.11`."""
    try:
        return metadata.metadata("accrete")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return ">=3.11"


def judge_versions(
    found: Mapping[str, str], tested: Mapping[str, str], needed: str, where: str = ""
) -> list[Check]:
    """Compare a machine's versions with the tested ones.

    A library that is missing, or of another major version, fails; any other difference is worth a
    warning. Build suffixes (`+cpu`, `+cu130`) do not count.

    Args:
        found: `python` and library -> version, as `environment.versions` gives it.
        tested: Library -> version.
        needed: Python versions that are allowed, such as `>=3.11`.
        where: Added to the checks' names, such as ` on node 1`.
    """
    checks = [_judge_python(found["python"], needed, where)]
    good, other = [], []
    for name, pin in tested.items():
        if name not in found:
            continue
        kind = _compare(found[name], pin)
        if kind == "same":
            good.append(f"{name} {found[name]}")
        elif kind == "close":
            other.append((name, f"{found[name]} (tested: {pin})"))
        else:
            checks.append(
                failure(
                    f"{name}{where}",
                    found[name],
                    f"{Version(pin).major}.x; tested: {pin}",
                    f"pip install '{name}=={pin}'",
                )
            )
    if other:
        checks.append(
            warning(
                f"libraries{where}",
                "; ".join(f"{name} {text}" for name, text in other),
                "accrete is tested with the versions of constraints.txt",
                "if something goes wrong, install them: pip install "
                + " ".join(f"{name}=={tested[name]}" for name, _ in other),
            )
        )
    if good:
        checks.append(ok(f"libraries{where}", f"{', '.join(good)}: as tested"))
    return checks


def missing_libraries(
    found: Mapping[str, str], tested: Mapping[str, str], expected: tuple[str, ...], where: str = ""
) -> list[Check]:
    """A failure for each library that is not installed."""
    return [
        failure(
            f"{name}{where}",
            "not installed",
            f"{name}=={tested[name]}",
            f"pip install '{name}=={tested[name]}'",
        )
        for name in expected
        if name in tested and name not in found
    ]


def _judge_python(found: str, needed: str, where: str) -> Check:
    if SpecifierSet(needed).contains(found, prereleases=True):
        return ok(f"python{where}", found)
    return failure(
        f"python{where}", found, needed, "make a new environment: make PYTHON=python3.12 install"
    )


def _compare(found: str, pin: str) -> str:
    """`same`, `close` (same major version) or `far`."""
    try:
        ours, tested = Version(found), Version(pin)
    except InvalidVersion:
        return "far"
    if ours.public == tested.public:
        return "same"
    return "close" if ours.major == tested.major else "far"
