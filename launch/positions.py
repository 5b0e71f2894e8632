"""Rows longer than a model's table of positions: told before training, not when one comes up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from accrete.pipeline.errors import ModelError

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.handle import TaskHandle


def position_limit(base: Any) -> int | None:
    """The most tokens that a model with a table of positions takes (GPT-2, OPT, BART, ...).

    None for one without a table, such as with rotary positions or relative ones. A table counts if
    it has as many rows as the configuration says that there are positions: those of a part for
    pictures have others.
    """
    text = base.config.get_text_config(decoder=True)
    said = getattr(text, "max_position_embeddings", None)
    limits = [
        # RoBERTa's first position is the one after its padding token's.
        said - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding)
        and ("pos" in (leaf := name.rpartition(".")[2]) or leaf == "wpe")
        and module.num_embeddings - getattr(module, "offset", 0) == said
    ]
    return min(limits, default=None)


def require_positions(base: Any, tasks: Sequence[TaskHandle], config: RunConfig) -> None:
    """Make sure that a model has positions for the rows of all tasks.

    Raises:
        ModelError: A task's longest prompt and longest answer are more than it has.
    """
    limit = position_limit(base)
    if limit is None:
        return
    for task in tasks:
        alone = base.config.is_encoder_decoder
        prompt, answer = _longest(task, config)
        answer -= not alone  # a decoder does not read the last token; another reads its start token
        if (max(prompt, answer) if alone else prompt + answer) > limit:
            raise ModelError(
                f"Task {task.name}: the model reads up to {prompt} tokens of a prompt and {answer} "
                f"of an answer, and has a table of {limit} positions for "
                f"{'each' if alone else 'both together'}. Set data.max_source_tokens to at most "
                f"{limit if alone else max(1, limit - answer)}, or lower data.max_target_tokens."
            )


def _longest(task: TaskHandle, config: RunConfig) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest answer or of what is decoded for one."""
    from accrete.launch.forecast.metrics import is_decoded, token_budget

    sides = (task.stats.train, task.stats.eval)
    answer = max(side.max_answer_tokens for side in sides)
    if is_decoded(config, task.metric):
        answer = max(answer, token_budget(config, task.metric))
    return max(side.max_prompt_tokens for side in sides), answer
