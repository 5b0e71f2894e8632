"""LwF: the new model must answer the new task's rows as the old model does, as far as it can.

R = weight T^2 KL(softmax(old / T) || softmax(new / T)), averaged over the step's label tokens. The
old model is the new one without its live adapter, so no copy of it is kept: it costs one forward
without gradients for every micro-batch, and no state at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import kl_div, log_softmax

from accrete.pipeline.data.collate import IGNORED
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.methods.previous import previous_model

if TYPE_CHECKING:
    from accrete.pipeline.data.collate import Batch
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class LwfConfig(MethodConfig):
    """Settings of LwF."""

    kind: str = "lwf"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distillation beside the task loss."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T: both models' logits are divided by it."""
    divergence: Literal["old_new", "new_old"] = "old_new"
    """`old_new`: KL(old || new), the paper's cross-entropy up to a constant. `new_old`: the
    reversed KL that TreeLoRA's code computes for LwF."""


class Lwf(Method):
    """A new adapter per task, distilled from the model without it on the new task's rows."""

    Config: ClassVar[type[MethodConfig]] = LwfConfig
    summary: ClassVar[str] = "distillation from the model before the task, on the task's rows (LwF)"
    source: ClassVar[str] = "Li & Hoiem 2016, Learning without Forgetting"
    kept: ClassVar[str] = (
        "nothing beside the finished factors. The old model is the new one without its live adapter"
    )
    cost: ClassVar[str] = (
        "one more forward a step. Without gradients, for every micro-batch from the second task "
        "on, and one more vector of logits per label token. At ZeRO 3 that forward gathers the "
        "weights once more; otherwise no added collective. A task's ends: none"
    )
    guarantee: ClassVar[str] = (
        "none against forgetting; the loss is exact. T^2 KL(softmax(old / T), softmax(new / T)), "
        "a mean over the step's label tokens whatever the ranks and micro-batches. The gradient "
        "goes to the new model alone. 0, with gradient 0, when a task starts. The old model runs "
        "without dropout and is the past exactly (fold and branch). The first task and `weight: "
        "0` are `inc_lora` to the bit"
    )
    deviations: ClassVar[str] = (
        "one output head, and a KL for the paper's cross-entropy. The old model's distribution "
        "over the whole vocabulary stands for the old tasks' heads. The KL has the same gradients "
        "and is 0 where the models agree. The teacher's logits are not cached: whole they are too "
        "large, a few of the largest would not be exact. TreeLoRA's code computes the reversed "
        "KL: `divergence: new_old`"
    )

    def __init__(self, config: LwfConfig) -> None:
        super().__init__(config)
        self.settings = config
        self._tokens = 1
        self._value: torch.Tensor | None = None

    def active(self, stage: Stage) -> bool:
        """Whether there is an old model that knows any task."""
        return bool(stage.past.stages) and self.settings.weight > 0

    def before_step(self, stage: Stage) -> None:
        """Count the step's label tokens over all ranks."""
        self._value = None
        if self.active(stage):
            rows = stage.global_batch(stage.step)
            self._tokens = max(1, sum(len(row.answer) for row in rows))
            self._value = torch.zeros((), device=stage.engine.device)

    def loss_terms(
        self, stage: Stage, batch: Batch, logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's part of R. Collective: at ZeRO 3 (a second forward on every rank)."""
        if self._value is None:
            return {}
        counts = batch.labels != IGNORED
        old = old_logits(stage, batch)[counts]
        settings = self.settings
        each = distillation(logits[counts], old, settings.temperature, settings.divergence)
        part = each.sum() * (settings.weight / self._tokens)
        self._value += part.detach()
        # Terms are averaged over ranks and micro-batches, R is a sum over both.
        return {"distillation": part * (stage.engine.world * stage.engine.accumulation)}

    def step_sums(self) -> dict[str, torch.Tensor]:
        """This rank's part of R."""
        return {} if self._value is None else {"penalty": self._value}


def distillation(
    new: torch.Tensor,
    old: torch.Tensor,
    temperature: float,
    divergence: Literal["old_new", "new_old"] = "old_new",
) -> torch.Tensor:
    """T^2 KL of softened predictions, token by token.

    Args:
        new: [n, V] logits; differentiated through.
        old: [n, V] logits of the old model; constants.
        temperature: T.
        divergence: `old_new` is sum_v old log(old / new), `new_old` sum_v new log(new / old).

    Returns:
        [n]; never negative but for rounding.
    """
    log_new = log_softmax(new / temperature, dim=-1)
    log_old = log_softmax(old.detach() / temperature, dim=-1)
    # kl_div(input, target) is KL(target || input).
    pair = (log_new, log_old) if divergence == "old_new" else (log_old, log_new)
    return kl_div(*pair, reduction="none", log_target=True).sum(-1) * temperature**2


def old_logits(stage: Stage, batch: Batch) -> torch.Tensor:
    """Logits [b, K, V] of the model without its live adapter, without dropout.

    Collective: at ZeRO 3.
    """
    with previous_model(stage):
        return stage.logits(batch, through_engine=False)
