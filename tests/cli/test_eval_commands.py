from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from accrete.launch.commands.compare import compare
from accrete.launch.commands.report import report
from accrete.pipeline.errors import RunFolderError

app = typer.Typer()
app.command()(report)
app.command()(compare)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    matrix = {"tasks": ["a", "b"], "matrix": [[90.0], [40.0, 70.0]], "metrics": {}}
    (run / "matrix.json").write_text(json.dumps(matrix))
    return run


def test_report_prints_the_path(run_dir: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run_dir)])
    assert result.exit_code == 0
    assert result.output.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").is_file()


@pytest.mark.parametrize("format", ["text", "markdown", "csv", "json"])
def test_compare_prints_or_writes(run_dir: Path, tmp_path: Path, format: str) -> None:
    printed = CliRunner().invoke(app, ["compare", str(run_dir), "--format", format])
    assert printed.exit_code == 0
    assert "55.0" in printed.output
    out = tmp_path / "table"
    written = CliRunner().invoke(
        app, ["compare", str(run_dir), "--format", format, "--out", str(out)]
    )
    assert written.output.strip() == str(out)
    assert "55.0" in out.read_text()


def test_a_folder_without_a_run_is_the_users_error(tmp_path: Path) -> None:
    for command in ("report", "compare"):
        result = CliRunner().invoke(app, [command, str(tmp_path)])
        assert isinstance(result.exception, RunFolderError)
        assert result.exception.exit_code == 2


def test_an_unknown_format_is_refused(run_dir: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(run_dir), "--format", "latex"])
    assert result.exit_code == 2


def test_the_commands_import_nothing_heavy() -> None:
    code = (
        "import sys, accrete.launch.commands.report, accrete.launch.commands.compare;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'peft', 'numpy',"
        " 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
