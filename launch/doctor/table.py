"""The doctor's table: one line for each check, and under what is wrong what to do about it."""

from __future__ import annotations

from accrete.launch.doctor.checks import Check, Diagnosis, Status

STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "bold red"}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print every check; on other nodes than the first only what is wrong, for all share a log."""
    from rich.console import Console

    # A log file has no width: lines are left whole there.
    console = Console(highlight=False, soft_wrap=True)
    first = diagnosis.node_rank == 0
    shown = [c for c in diagnosis.checks if first or c.status is not Status.OK]
    width = max((len(check.name) for check in shown), default=0)
    prefix = f"node {diagnosis.node_rank}: " if not first else ""
    for check in shown:
        _print_check(console, check, width, prefix)
    counts = ", ".join(
        f"{diagnosis.count(status)} {status}" + ("s" if diagnosis.count(status) != 1 else "")
        for status in (Status.WARNING, Status.FAILURE)
    )
    where = "" if first else " (the whole table stands where node 0 prints)"
    console.print(f"{prefix}{diagnosis.count(Status.OK)} ok, {counts}{where}", markup=False)


def _print_check(console: object, check: Check, width: int, prefix: str) -> None:
    from rich.console import Console
    from rich.text import Text

    assert isinstance(console, Console)
    line = Text(prefix)
    line.append(f"{check.status:<8}", style=STYLES[check.status])
    line.append(f" {check.name:<{width}}  {check.found}")
    console.print(line)
    for title, text in (("allowed", check.allowed), ("to do", check.action)):
        if text:
            console.print(Text(f"{prefix}{'':8} {'':{width}}    {title}: {text}", style="dim"))
