"""What `pip install` puts on a machine: every module, the recipes, the report's template."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "eval", "launch", "recipes")
SHIPPED = {".py", ".yaml", ".md", ".jinja", ".json", ".typed", ".txt"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [path] = out.glob("accrete-*.whl")
    return path


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    expected = {
        f"accrete/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SHIPPED or path.name == "py.typed"
    }
    assert {"accrete/launch/cli.py", "accrete/eval/templates/report.html.jinja"} < expected
    assert "accrete/recipes/standard_cl/order1.yaml" in expected
    assert "accrete/launch/constraints.txt" in expected  # a link to the one at the top
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == expected


def test_the_wheel_has_its_licence_and_its_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [licence] = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert "Apache License" in archive.read(licence).decode()
    [commands] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "accrete = accrete.launch.cli:main" in archive.read(commands).decode()
    [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()


def test_the_unpacked_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import json, accrete.launch.cli as cli\n"
        "from accrete.pipeline.config.library import recipe_names, recipes_folder\n"
        "from accrete.eval.report import _environment\n"
        "_environment().get_template('report.html.jinja')\n"
        "print(json.dumps([cli.__file__, str(recipes_folder()), recipe_names()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    module, folder, names = json.loads(done.stdout)
    assert Path(module).is_relative_to(tmp_path)
    assert Path(folder).is_relative_to(tmp_path)
    assert {"standard_cl/order1", "long_sequence/order6"} <= set(names)


def test_constraints_pin_every_dependency() -> None:
    pinned = dict(
        line.strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(name for group in extras.values() for name in group)]
    assert not [name for name in asked if name.lower() not in pinned]
    assert pinned["torch"] == "2.13.0"  # no build suffix: a CPU and a CUDA build both fit
