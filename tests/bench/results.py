"""`make results`: every method on standard order 1, on a real model and real rows.

Goes through a fixed list of runs, one after another, each an ordinary `accrete run` in a folder of
its own; what is finished is passed over and what was cut off is resumed, so it may be stopped and
started again at any time. After every run its figures go into docs/results.json and the table in
docs/results.md is written anew, with a sentence for every method that does not beat its baseline.
Runs in docs/results.json are not made again, on no machine; take one out to repeat it.
`--jobs N` makes N runs at once, on a GPU that a small model does not fill or on a core each;
`--set` adds overrides to every run:

    make results RESULTS='--jobs 8 --set engine.procs=1 train.micro_batch_size=8'

The model computes in bf16, on a CPU too: what a GPU takes by itself, and faster.

The rule of the search is the same for all methods: `TRIALS` runs over the first two tasks, seed 0,
scored on dev rows; the settings with the highest average performance are taken (for `per_task` the
highest plasticity: its stages know nothing of each other); the earlier trial where two are equal.
Methods with a strength try two strengths at two learning rates, the others four learning rates.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from results_figures import BASELINE, HEAD, Figures, Record, measured, row, shortfall

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "results.json"
TRIALS = 4
RATES = ("5e-4", "1e-3")
MORE_RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3")
STRENGTHS: dict[str, tuple[str, tuple[str, str]]] = {
    "ewc_lora": ("method.lambda", ("1e3", "1e4")),
    # From 1e3 to 1e4 the penalty of whole weights still grew tenfold with its strength, to some
    # hundredths of the loss, and nothing else changed.
    "ewc": ("method.lambda", ("1e4", "1e5")),
    # The same from 0.1 to 1.0, to half a hundredth.
    "sr2_lora": ("method.mu", ("1.0", "10")),
    "o_lora": ("method.lambda_1", ("0.1", "0.5")),
    "lwf": ("method.weight", ("1.0", "3.0")),
    "lora_subtraction": ("method.energy", ("0.9", "0.99")),
    "keep_lora": ("method.eps_f", ("0.9", "0.99")),
    "keep_lora_pp": ("method.eps_f", ("0.9", "0.99")),
    "inf_lora": ("method.eps", ("0.9", "0.98")),
    "gpm": ("method.threshold", ("0.9", "0.99")),
    "replay": ("method.rows", ("16", "64")),
}
"""Kind -> the setting that says how much is protected, and the two values tried."""
THREE_SEEDS = (
    "sequential",
    "ewc_lora",
    "sr2_lora",
    "lora_subtraction",
    "keep_lora",
    "keep_lora_pp",
    "o_lora",
    "replay",
)
WEIGHTS = ("full", "ewc", "gpm")
"""Methods that train all weights take a tenth of the learning rate."""
BOUNDS = ("joint", "per_task")
ORDER = (*THREE_SEEDS, "inc_lora", "inf_lora", *BOUNDS, "lwf", *WEIGHTS)
MODELS = {"smollm2_135m": "standard_cl/order1_smollm2", "small_t5": "standard_cl/order1_small_t5"}


@dataclass(frozen=True)
class Run:
    """One run of the list."""

    folder: Path
    recipe: str
    settings: tuple[str, ...]
    """What tells it from the other runs of its method."""
    overrides: tuple[str, ...]
    """All of its overrides, `settings` among them."""

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return ["run", self.recipe, *self.overrides, "--run-dir", str(self.folder)]


class Plan:
    """The runs of one model, in the order in which they are made."""

    def __init__(
        self, out: Path, data: Path, model: str, figures: Path, more: tuple[str, ...] = ()
    ) -> None:
        self.figures = Figures(figures, model)
        self.out = out / model
        self.data = data
        self.more = more
        self.recipe = MODELS[model]
        self.model = model

    def record(self, run: Run) -> Record | None:
        """A run's figures, which are kept once they are seen; None while it is not finished."""
        kind, name = run.folder.parent.name, run.folder.name
        kept = self.figures.get(kind, name)
        if kept is not None and tuple(kept["settings"]) == run.settings:
            return kept
        found = measured(run.folder, run.settings)
        if found is not None:
            self.figures.put(kind, name, found)
        return found

    def _run(self, name: str, kind: str, settings: tuple[str, ...], scored: tuple[str, ...]) -> Run:
        fixed = (f"data.root={self.data}", f"method={kind}", "eval.forward_transfer=false")
        overrides = (*fixed, "model.dtype=bf16", *scored, *settings, *self.more)
        return Run(self.out / kind / name, self.recipe, settings, overrides)

    def settings(self, kind: str) -> list[tuple[str, ...]]:
        """The settings of each trial of a method."""
        tenth = kind in WEIGHTS
        if kind not in STRENGTHS:
            return [(f"train.learning_rate={_rate(rate, tenth)}",) for rate in MORE_RATES]
        key, values = STRENGTHS[kind]
        return [
            (f"train.learning_rate={_rate(rate, tenth)}", f"{key}={value}")
            for rate, value in product(RATES, values)
        ]

    def trials(self, kind: str) -> list[Run]:
        """The search of a method."""
        search = ("tasks=[dbpedia, amazon]", "data.eval_split=dev", "data.max_eval_examples=100")
        return [
            self._run(f"trial-{number}", kind, settings, search)
            for number, settings in enumerate(self.settings(kind))
        ]

    def chosen(self, kind: str) -> tuple[str, ...] | None:
        """The settings that the search took; None while it is not finished."""
        key = "plasticity" if kind == "per_task" else "average_performance"
        scores = []
        for run in self.trials(kind):
            record = self.record(run)
            if record is None:
                return None
            scores.append(float(record["metrics"][key]))
        return self.settings(kind)[scores.index(max(scores))]

    def main(self, kind: str, seed: int) -> Run | None:
        """A run over the whole sequence with the chosen settings."""
        chosen = self.chosen(kind)
        if chosen is None:
            return None
        scored = ("data.max_eval_examples=200",)
        return self._run(f"seed-{seed}", kind, (*chosen, f"seed={seed}"), scored)

    def seeds(self, kind: str) -> range:
        """The seeds of a method."""
        return range(3 if kind in THREE_SEEDS and self.model == "smollm2_135m" else 1)

    def runs(self, kind: str) -> list[Run]:
        """All runs of a method whose settings are known."""
        found = (*self.trials(kind), *(self.main(kind, seed) for seed in self.seeds(kind)))
        return [run for run in found if run is not None]

    def finished(self, kind: str) -> dict[int, Record]:
        """Seed -> figures of a method's run over the whole sequence."""
        runs = {seed: self.main(kind, seed) for seed in self.seeds(kind)}
        records = {seed: self.record(run) for seed, run in runs.items() if run is not None}
        return {seed: record for seed, record in records.items() if record is not None}


def _rate(rate: str, tenth: bool) -> str:
    return f"{float(rate) / 10:g}" if tenth else rate


def perform(run: Run, jobs: int = 1) -> None:
    """Make a run, or what is left of it, beside `jobs` - 1 others."""
    begun = (run.folder / "run.json").is_file()
    command = ["resume", str(run.folder)] if begun else run.command
    print("+ accrete", shlex.join(command), flush=True)
    log = run.folder.parent / f"{run.folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Threads of two runs that wait, spinning, for the same cores made both 15 times as slow.
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = os.environ if jobs == 1 else {"OMP_NUM_THREADS": threads, **os.environ}
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, "-m", "accrete.launch.cli", *command],
            stdout=file,
            stderr=file,
            env=environment,
        )
    if done.returncode != 0:
        print(f"  exit status {done.returncode}, see {log}; going on with the next", flush=True)


def table(plan: Plan, kinds: list[str]) -> str:
    """The Markdown table of what is finished."""
    lines = list(HEAD)
    for kind in kinds:
        runs, chosen = plan.finished(kind), plan.chosen(kind)
        if runs and chosen is not None:
            lines.append(row(kind, runs, chosen))
            continue
        trials = sum(plan.record(run) is not None for run in plan.trials(kind))
        lines.append(f"| `{kind}` | not run yet ({trials} of {TRIALS} trials) | | | | | | |")
    return "\n".join(lines)


def shortfalls(plan: Plan, kinds: list[str]) -> list[str]:
    """A sentence for every method that does not beat its baseline, seed by seed."""
    said = [
        shortfall(kind, plan.finished(kind), plan.finished(BASELINE.get(kind, "sequential")))
        for kind in kinds
        if kind not in ("sequential", "full", *BOUNDS)
    ]
    return [sentence for sentence in said if sentence]


def write_page(plan: Plan, kinds: list[str]) -> None:
    """Put the table between its two marks in docs/results.md."""
    begin, end = f"<!-- begin {plan.model} -->", f"<!-- end {plan.model} -->"
    text = PAGE.read_text()
    if begin not in text:
        raise SystemExit(f"{PAGE}: the mark {begin} is missing.")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    parts = (table(plan, kinds), " ".join(shortfalls(plan, kinds)))
    content = "\n\n".join(part for part in parts if part)
    PAGE.write_text(f"{before}{begin}\n{content}\n{end}{after}")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="make results")
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data" / "compact")
    add("--out", type=Path, default=ROOT / "runs" / "results")
    add("--model", choices=list(MODELS), default="smollm2_135m")
    add("--methods", nargs="+", choices=ORDER, default=list(ORDER))
    add("--jobs", type=int, default=1, help="runs at the same time")
    add("--set", nargs="+", default=[], metavar="a.b=v", help="for every run")
    add("--list", action="store_true", help="print the runs and stop")
    add("--table", action="store_true", help="write the table and stop")
    return parser.parse_args(arguments)


def main() -> None:
    """Go through the list."""
    arguments = options()
    if not arguments.data.is_dir():
        raise SystemExit(f"--data {arguments.data}: no such folder; it holds the benchmark rows.")
    more = tuple(arguments.set)
    plan = Plan(arguments.out, arguments.data, arguments.model, FIGURES, more)
    kinds = list(arguments.methods)
    if not (arguments.list or arguments.table):
        work(plan, kinds, arguments.jobs)
    if arguments.list:
        for kind in kinds:
            for run in plan.runs(kind):
                state = "done" if plan.record(run) else "open"
                print(state, "accrete", shlex.join(run.command))
        return
    write_page(plan, list(ORDER))


def possible(plan: Plan, kinds: list[str]) -> list[Run]:
    """Unfinished runs whose settings are known: search and first seed by method, then the rest."""
    firsts = [[*plan.trials(kind), plan.main(kind, 0)] for kind in kinds]
    others = [[plan.main(kind, seed) for seed in plan.seeds(kind)[1:]] for kind in kinds]
    runs = (run for group in (*firsts, *others) for run in group)
    return [run for run in runs if run is not None and plan.record(run) is None]


def work(plan: Plan, kinds: list[str], jobs: int = 1) -> None:
    """Make what is missing, `jobs` runs at a time; one that fails is left for the next call."""
    started: set[Path] = set()
    running: set[Future[None]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for run in possible(plan, kinds):
                if len(running) < jobs and run.folder not in started:
                    started.add(run.folder)
                    running.add(pool.submit(perform, run, jobs))
            if not running:
                return
            _, running = wait(running, return_when=FIRST_COMPLETED)
            write_page(plan, list(ORDER))


if __name__ == "__main__":
    main()
