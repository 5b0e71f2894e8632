"""What a recipe says about its tasks and their rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

Format = Literal[
    "auto",
    "compact",
    "olora",
    "sapt",
    "superni",
    "natural_instructions",
    "trace",
    "tasl",
    "files",
    "hub",
    "generated",
]
Template = Literal["plain", "olora", "sapt", "superni", "raw"]
Metric = Literal["exact_match", "raw_match", "first_letter", "rouge_l", "sari", "edit_similarity"]
WHOLE_ANSWER: frozenset[Metric] = frozenset({"exact_match", "raw_match"})
"""Metrics that only a whole answer meets: one forward pass decides them, and an answer too long to
decode could never be right."""


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Names of the columns of a `files` or `hub` task."""

    input: str | list[str] = "input"
    """Column with the text; several columns are joined, each as `name: value` on its own line."""
    output: str = "output"
    """Column with the answer: text, a list of references, or a label number (see `label_names`)."""
    id: str | None = None
    """Column with a unique id; without one, rows are named `<task>-<split>-<number>`."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task of the sequence. A plain name in `tasks:` is short for `{name: ...}`."""

    name: str
    """Unique name of the task inside the sequence."""
    dataset: str | None = None
    """Its folder (folder formats), hub id (`hub`) or generator (`generated`); default: `name`."""
    config: str | None = None
    """Hub configuration name."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); default: the newest."""
    files: dict[str, str | list[str]] | None = None
    """`files` format: split -> file(s), JSONL or JSON array (plain, .gz, .zst) or Parquet, relative
    to `data.root`; globs allowed."""
    splits: dict[str, str] = field(default_factory=dict)
    """`hub` format: our split (`train`, `test`) -> the hub's split name."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Column names (`files`, `hub`)."""
    label_names: list[str] | None = None
    """Words for label numbers 0, 1, 2, ... of the output column."""
    labels: list[str] | None = None
    """The closed set of answers; default: what the format's own files say, or open."""
    per_label: dict[str, Annotated[int, Field(ge=1)]] = field(default_factory=dict)
    """Split -> use only the first so many rows of each label, for large sets sorted by label. A
    lower `data.max_train_examples` or `data.max_eval_examples` is shared evenly by the labels."""
    instruction: str | None = None
    """Instruction text; default: what the format's own files say."""
    family: str | None = None
    """Task family (prompt prefix of the O-LoRA style, folder of its format)."""
    metric: Metric | None = None
    """Default: `rouge_l` for SuperNI tasks with open answers, else `exact_match`; docs/metrics.md
    describes each."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Training steps of this task; overrides `train.max_steps`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs of this task; overrides `train.epochs`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become tokens."""

    root: str | None = None
    """Folder that holds the tasks (folder formats and relative `files`)."""
    format: Format = "auto"
    """Layout of `root`; auto recognises it by its files."""
    benchmark: str | None = None
    """Sub-collection of `root` (compact: `standard`, `long`, `superni`; SAPT: `Long_Sequence`, for
    which `long` stands as well, `SuperNI`). O-LoRA's folder has none and needs none."""
    template: Template = "plain"
    """Prompt style; see docs/recipes.md."""
    examples: Annotated[int, Field(ge=0)] = 0
    """Worked examples in every prompt (template `superni` alone): the first so many of the task's
    own `Positive Examples`, of which there must be as many."""
    instructions: str | None = None
    """JSON file of published instructions per family (O-LoRA's `instruction_config.json`)."""
    eval_split: str = "test"
    """Split that is scored: `test`, or `dev` for a search."""
    max_train_examples: Annotated[int, Field(ge=1)] | None = None
    """Use only the first so many training rows of each task; with `per_label`, so many rows with
    an equal share of each label."""
    max_eval_examples: Annotated[int, Field(ge=1)] | None = None
    """Score only the first so many rows of each task; with `per_label`, so many rows with an equal
    share of each label."""
    max_source_tokens: Annotated[int, Field(ge=8)] = 512
    """Prompt length; only the input text is cut, never the options or the answer cue."""
    cut: Literal["end", "start"] = "end"
    """The side on which a text that is too long loses words; `start` where what is to be continued
    stands last, as in code."""
    max_target_tokens: Annotated[int, Field(ge=1)] = 50
    """Answer length including the end token; longer answers are an error at pre-flight for
    `exact_match` and `raw_match` tasks and are cut in training for the others."""
    streaming: bool = False
    """Read every task as a stream, block by block, whatever its size."""
    stream_above_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """A training split with more rows than this is streamed."""
    window_batches: Annotated[int, Field(ge=1)] = 50
    """Rows are sorted by length inside windows of so many global batches (1: no sorting)."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.examples and self.template != "superni":
            raise ValueError(
                f"`examples` is {self.examples}, but template `{self.template}` shows no worked "
                "examples; allowed: 0. Set `examples: 0`, or take `template: superni`"
            )
