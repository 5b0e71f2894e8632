"""The launchers' templates: small jinja2 files that render to scripts and manifests."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "templates"


def render_template(name: str, **values: Any) -> str:
    """The text of `templates/NAME.jinja` with `values`; a missing one is an error.

    Inside templates `{{ x | sh }}` quotes a value for the shell.
    """
    text: str = _environment().get_template(f"{name}.jinja").render(**values)
    return text


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        # jinja's own `{#` stands in every `${#array[@]}` of the shell.
        comment_start_string="{%#",
        comment_end_string="#%}",
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment
