"""How a task will be scored: its metric and its answers, decided as preparation and evaluator do.

A plan without rows asks the layout if its folder is at hand, and else what the layout is known for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accrete.eval import measures
from accrete.pipeline.data.batches import score_batches
from accrete.pipeline.data.folders import is_superni
from accrete.pipeline.data.generated import describe
from accrete.pipeline.data.layouts import locate
from accrete.pipeline.data.names import canonical
from accrete.pipeline.errors import DataError

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.config import DataConfig, Metric, TaskConfig
    from accrete.pipeline.data.handle import TaskHandle


def is_decoded(config: RunConfig, metric: Metric) -> bool:
    """Whether every row of a task is decoded; else one forward pass decides it."""
    return not measures.by_forward(config.eval.mode, metric)


def token_budget(config: RunConfig, metric: Metric) -> int:
    """Most new tokens that the evaluator decodes for a row."""
    return measures.token_budget(metric, config.data.max_target_tokens)


def task_facts(task: TaskConfig, data: DataConfig) -> tuple[Metric, int]:
    """Metric and number of closed answers (0: open) of a task whose rows are not read."""
    labels: Sequence[str] = task.labels or task.label_names or ()
    metric: Metric | None = None
    if data.format == "generated":
        labels = labels or describe(task.dataset or task.name)["labels"] or ()
    elif task.files is None and data.format not in ("files", "hub"):
        metric, found = _by_folder(task, data)
        labels = labels or found
    return task.metric or metric or "exact_match", len(labels)


def _by_folder(task: TaskConfig, data: DataConfig) -> tuple[Metric | None, tuple[str, ...]]:
    """What the layout's files say; without them SuperNI and CITB tasks are scored by ROUGE-L."""
    try:
        located = locate(task, data)
    except DataError:
        open_answers = data.format == "natural_instructions" or (
            data.format in ("auto", "compact", "sapt", "superni")
            and (canonical(data.benchmark or "") == "superni" or is_superni(task.name))
        )
        return ("rouge_l" if open_answers else None), ()
    return located.metric, located.labels or ()


def decoded_tokens(config: RunConfig, handle: TaskHandle) -> float:
    """New tokens of a typical decoded batch, if every row ends where its own answer does.

    A batch goes on until its last row has ended, so its longest answer counts. The batches are the
    evaluator's.
    """
    from accrete.pipeline.data.store import open_eval

    budget = token_budget(config, handle.metric)
    rows = open_eval(handle)
    answers = [len(row.answer) for row in rows]
    lengths = [int(length) + budget for length in rows.lengths]
    batches = score_batches(lengths, config.eval.batch_tokens)
    longest = [min(budget, max(answers[row] for row in batch)) for batch in batches]
    return sum(longest) / max(1, len(longest))
