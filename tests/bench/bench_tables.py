"""The results as a table in the terminal and as Markdown, with the targets that were missed."""

from __future__ import annotations

from typing import Any

STEP_TARGETS = {
    "ewc_lora": 1.05,
    "keep_lora": 1.05,
    "keep_lora_pp": 1.05,
    "inf_lora": 1.05,
    "sr2_lora": 1.10,
    "lora_subtraction:triplet=0": 1.10,
    "o_lora": 1.10,
}
"""Step time, as a multiple of `sequential`."""

QUIET = ("ewc_lora", "keep_lora", "keep_lora_pp", "inf_lora", "sr2_lora", "o_lora")
"""No collective is added to a step."""

PASS_TARGETS = {"ewc_lora": 1.5}
"""The pass at a task's end, as a multiple of forward and backward over the same rows."""

CONSTANT = ("ewc_lora",)
"""State does not grow with the number of tasks."""

HEAD = (
    "method",
    "step s",
    "x sequential",
    "peak MiB",
    "more than sequential",
    "collectives a step",
    "MiB a step",
    "start s",
    "end s",
    "end / fwd+bwd",
    "state MiB a rank",
)


def rows_of(result: dict[str, Any], shape: str) -> list[list[str]]:
    """One line per method; every cell has the measured tasks side by side."""
    lines = []
    for row in result["rows"]:
        if row["shape"] != shape:
            continue
        tasks = list(row["tasks"].values())

        def cell(form: str, values: list[float | None]) -> str:
            said = ["-" if value is None else _plain(form.format(value)) for value in values]
            return said[0] if len(set(said)) == 1 else " / ".join(said)

        def mib(key: str, tasks: list[Any] = tasks) -> list[float | None]:
            return [t[key] / 2**20 if key in t else None for t in tasks]

        peaks = [max(t["step_peak"], t["end_peak"]) / 2**20 for t in tasks]
        more = [(t["step_peak"] - t["reference_step_peak"]) / 2**20 for t in tasks]
        lines.append(
            [
                f"`{row['method']}`",
                cell("{:.3g}", [t["step_seconds"] for t in tasks]),
                cell("{:.3f}", [t["step_ratio"] for t in tasks]),
                cell("{:.0f}", list(peaks)),
                cell("{:+.0f}", list(more)),
                cell("{:g}", [t.get("calls") for t in tasks]),
                cell("{:.3g}", mib("bytes")),
                cell("{:.2g}", [round(t["start_seconds"], 3) for t in tasks]),
                cell("{:.2g}", [round(t["end_seconds"], 3) for t in tasks]),
                cell("{:.2f}", [t["end_seconds"] / t["plain_pass_seconds"] for t in tasks]),
                cell(
                    "{:.3g}",
                    [t.get("rank_state_bytes", t["state_bytes"]) / 2**20 for t in tasks],
                ),
            ]
        )
    return lines


def _plain(number: str) -> str:
    """Rounded as it is, without an exponent."""
    return f"{float(number):.0f}" if "e+" in number else number


def shapes_of(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in result["rows"]))


def verdicts(result: dict[str, Any], shape: str) -> list[str]:
    """What to say below a table."""
    if shape.startswith("tiny"):
        return ["Tiny shapes show that the program runs, not what a method costs."]
    return [f"Missed: {text}." for text in missed(result, shape)] or ["No target missed."]


def missed(result: dict[str, Any], shape: str) -> list[str]:
    """Every target that a method on this shape does not meet, in words."""
    rows = {row["method"]: row["tasks"] for row in result["rows"] if row["shape"] == shape}
    plain = rows.get("sequential", {})
    found = []
    for method, tasks in rows.items():
        for task, values in tasks.items():
            at = f"`{method}` at task {task}"
            limit = STEP_TARGETS.get(method)
            if limit is not None and values["step_ratio"] > limit:
                found.append(f"{at}: a step takes {values['step_ratio']:.3f} x (at most {limit})")
            ratio = values["end_seconds"] / values["plain_pass_seconds"]
            if ratio > PASS_TARGETS.get(method, float("inf")):
                found.append(f"{at}: its pass takes {ratio:.2f} x (at most {PASS_TARGETS[method]})")
            calls, limit = values.get("calls"), plain.get(task, {}).get("calls")
            if method in QUIET and calls is not None and limit is not None and calls > limit:
                found.append(f"{at}: {calls:g} collectives a step ({limit:g} of `sequential`)")
        sizes = {values["state_bytes"] for values in tasks.values()}
        if method in CONSTANT and len(sizes) > 1:
            found.append(f"`{method}`: its state grows, {sorted(sizes)} bytes")
        for task, values in tasks.items():
            share = values.get("rank_state_bytes")
            if method in CONSTANT and share is not None and share > 0.55 * values["state_bytes"]:
                found.append(f"`{method}` at task {task}: a rank of two holds {share} bytes")
    return found


def print_rows(result: dict[str, Any]) -> None:
    """Aligned columns for the terminal."""
    for shape in shapes_of(result):
        lines = [list(HEAD), *rows_of(result, shape)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
        print(f"\n{shape}, tasks {' / '.join(map(str, result['settings']['tasks']))}")
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
        print("\n".join(verdicts(result, shape)))


def markdown(result: dict[str, Any]) -> str:
    """The tables for docs/performance.md, with the command and the machine."""
    about, settings = result["machine"], result["settings"]
    tasks = " / ".join(map(str, settings["tasks"]))
    parts = [
        f"Machine: {about['processor']}, {about['threads']} threads, Python {about['python']}, "
        f"torch {about['torch']}, commit {about['commit']}.\n\n"
        f"```sh\n{result['command']}\n```\n\n"
        f"Seconds: {settings['clock']} time. Adapted layers: {settings['targets']}; "
        f"{settings['rows']} rows a measured task, {settings['rounds']} pairs of "
        f"steps. Two numbers in a cell: task {tasks}. Traffic and "
        f"state: two processes, ZeRO {settings['zero']}.\n"
    ]
    for shape in shapes_of(result):
        lines = [f"### {shape}\n", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        lines += ["| " + " | ".join(line) + " |" for line in rows_of(result, shape)]
        lines += ["", *(f"{text}\n" for text in verdicts(result, shape))]
        parts.append("\n".join(lines))
    return "\n".join(parts)
