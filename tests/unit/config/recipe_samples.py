"""A small recipe, and what writes one."""

from collections.abc import Callable
from pathlib import Path

Write = Callable[..., Path]

BASE = """\
description: a test
tasks: [t1, {name: t2, max_steps: 3}]
model: {path: some/model}
method: {kind: sequential}
"""
