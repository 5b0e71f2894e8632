"""What every method is tested with on the toy models: arguments of `toys.make_parts`.

Strengths are chosen so that the method visibly changes the run (a test compares it with
`inc_lora` or `sequential`), learning rates as everywhere.
"""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "inc_lora": {"method": "inc_lora"},
}
"""Method kind -> arguments."""

PLAIN_RELATIVE: dict[str, str] = {}
"""Method kind -> the kind that it is without its own mechanism, and must differ from."""

FOUR: tuple[str, ...] = ()
"""One method of each kind of mechanism, also run on four processes."""
