"""What the shell offers after TAB."""

from __future__ import annotations

from pathlib import Path


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes and YAML files that begin with what was typed."""
    from accrete.pipeline.config.library import recipe_names

    names = [name for name in recipe_names() if name.startswith(incomplete)]
    return names + [path for path in _paths(incomplete) if path.endswith((".yaml", ".yml", "/"))]


def complete_method(incomplete: str) -> list[str]:
    """Names of methods and Python files that begin with what was typed."""
    from accrete.pipeline.methods.registry import method_kinds

    names = [name for name in method_kinds() if name.startswith(incomplete)]
    return names + [path for path in _paths(incomplete) if path.endswith((".py", "/"))]


def complete_run(incomplete: str) -> list[str]:
    """Run folders, and folders on the way to one."""
    return [path for path in _paths(incomplete) if path.endswith("/")] + [
        path.rstrip("/") for path in _paths(incomplete) if (Path(path) / "run.json").is_file()
    ]


def _paths(incomplete: str) -> list[str]:
    folder, _, name = incomplete.rpartition("/")
    base = Path(f"{folder}/" if incomplete.startswith("/") else folder or ".")
    prefix = f"{folder}/" if "/" in incomplete else ""
    try:
        entries = sorted(base.iterdir())
    except OSError:
        return []
    return [
        f"{prefix}{entry.name}" + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith("."))
    ]
