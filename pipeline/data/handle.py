"""What a prepared task is to the rest of the program: numbers, and folders of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from accrete.pipeline.data.config import Metric


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """Numbers of one prepared split."""

    rows: int
    truncated_pct: float
    """Percent of the rows whose text was cut."""
    mean_prompt_tokens: float
    max_prompt_tokens: int
    mean_answer_tokens: float
    max_answer_tokens: int
    cut_answers_pct: float = 0.0
    """Percent of the rows whose answer was cut (only where a metric allows parts of an answer)."""
    label_counts: dict[str, int] = field(default_factory=dict)
    """Rows per label, 0 included; empty for open answers."""


@dataclass(frozen=True, kw_only=True)
class TaskStats:
    """What the pre-flight counted."""

    train: SplitStats
    eval: SplitStats
    warnings: tuple[str, ...] = ()
    """What a user should know before training: labels never seen, blank answers, ..."""


@dataclass(frozen=True, kw_only=True)
class TaskHandle:
    """One prepared task."""

    name: str
    metric: Metric
    labels: tuple[str, ...] | None
    """The closed set of answers; None: open."""
    train_dir: str
    eval_dir: str
    num_train: int
    num_eval: int
    streamed: bool
    """Training rows are read as a stream, block by block."""
    stats: TaskStats
    fingerprint: str
    """SHA-256 of everything the token ids depend on."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TaskHandle:
        """Inverse of `to_json`, also after a trip through JSON text."""
        stats = value["stats"]
        labels = value["labels"]
        return cls(
            **{
                **value,
                "labels": None if labels is None else tuple(labels),
                "stats": TaskStats(
                    train=SplitStats(**stats["train"]),
                    eval=SplitStats(**stats["eval"]),
                    warnings=tuple(stats["warnings"]),
                ),
            }
        )
