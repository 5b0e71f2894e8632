"""EWC-LoRA: a full-space Fisher penalty on the current task's low-rank update.

F_cum is the diagonal Fisher of the dense W, accumulated over finished tasks; the current update
starts at zero on the merged weights, so no anchor copy is kept:
R = lambda/2 sum_ij F_cum,ij (s B A)_ij^2.

Cost: rank k of N owns the rows I_k of every F (1/N of the memory) and adds only their part of
dR/dA and dR/dB to its own gradient, multiplied by N, in gradient hooks; the reduction that happens
anyway averages over ranks and so sums the parts. No traffic is added to a training step.

The paper's ablations and a memory fallback are settings; `fisher_memory.py` has what they keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.errors import MethodError
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.methods.fisher_memory import (
    DenseFisher,
    FactorFisher,
    FisherMemory,
    Rank1Fisher,
)
from accrete.pipeline.methods.gradient_hooks import GradientHooks
from accrete.pipeline.statistics import input_names

if TYPE_CHECKING:
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class EwcLoraConfig(MethodConfig):
    """Settings of EWC-LoRA."""

    kind: str = "ewc_lora"
    lambda_: Annotated[float, Field(ge=0)] = 30.0
    """Weight of the penalty: search it on dev rows, on a grid of powers of ten. It belongs to the
    estimator and the loss (here per sequence, and a mean over label tokens): the reference's 1e7
    was for squared means of 128 images."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """F_cum <- gamma F_cum + F_t."""
    penalty: Literal["full_space", "separate", "none"] = "full_space"
    """`full_space`: on the change of W, the method. `separate`: on A and B apart, each with the
    Fisher of its own gradient (ablation). `none`: no Fisher, no penalty (ablation; IncLoRA)."""
    fisher: Literal["per_sequence", "per_batch", "rank1"] = "per_sequence"
    """`per_sequence`: E[g^2], independent of batch and ranks. `per_batch`: squares of batch means
    over `train.global_batch_size` rows, as in the reference code; about 1/batch of the former.
    `rank1`: the outer product of F's row and column sums, d_out + d_in numbers a layer, where F
    itself does not fit into memory."""
    fisher_at: Literal["each_task", "pretrained"] = "each_task"
    """`each_task`: at every task's end, accumulated. `pretrained`: once, at the untrained weights
    on the first task's training rows, held fixed and in force from the second task (ablation)."""
    fisher_tokens: Literal["sum", "mean"] = "sum"
    """A row's loss is summed over its label tokens (its log-likelihood) or averaged."""
    fisher_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a task that its Fisher is estimated on, evenly spread over the first epoch's order;
    default: all training rows."""
    merge: Literal["exact", "factor_sum"] = "exact"
    """`factor_sum` adds up A and B apart, as the reference code does; it is not what the paper
    says and changes the model at every merge."""

    def __post_init__(self) -> None:
        if self.penalty != "separate":
            return
        if self.fisher != "per_sequence":
            raise ValueError(
                f"penalty: separate needs fisher: per_sequence (given: {self.fisher}); the other "
                "estimators are of the dense W"
            )
        if self.fisher_at != "each_task":
            raise ValueError(
                f"penalty: separate needs fisher_at: each_task (given: {self.fisher_at}); before "
                "any training B is zero and A has no gradient"
            )


class EwcLora(Method):
    """Penalty from a row-sharded, full-space, per-sequence Fisher."""

    Config: ClassVar[type[MethodConfig]] = EwcLoraConfig
    summary: ClassVar[str] = "full-space Fisher penalty on the LoRA update, exact merge (EWC-LoRA)"
    source: ClassVar[str] = (
        "Zheng et al. 2026, Revisiting Weight Regularization for Low-Rank Continual Learning"
    )
    kept: ClassVar[str] = (
        "one diagonal Fisher, 1/N per rank, constant in the number of tasks. F of every adapted "
        "W, fp32, split by rows. `rank1`: d_out/N + d_in numbers a layer. `separate`: as large as "
        "the factors, 1/N per rank"
    )
    cost: ClassVar[str] = (
        "one pass over F a step, one over the rows at a task's end. A step: 6 r d_out d_in / N "
        "operations a layer, once, in gradient hooks; no added collective in any variant. A "
        "task's end: forward and backward over its rows (or `fisher_rows`), one squared dense "
        "gradient per sequence, one reduction by rows (`per_batch`: one per batch). `pretrained`: "
        "once, before the first task"
    )
    guarantee: ClassVar[str] = (
        "none hard; the penalty is exact. On quadratics with exact F and lambda = gamma = 1 the "
        "sequential optimum is the joint one after every task (1e-10), two-task forgetting "
        "follows the closed formula (1e-8). R and its gradient are exact for the F that is kept, "
        "at every shard. lambda = 0 and `penalty: none` are `inc_lora` to the bit. `per_sequence` "
        "F does not depend on batch, order or ranks"
    )
    deviations: ClassVar[str] = (
        "F per sequence, exact merge, scores after the merge. The reference squares batch means "
        "(`fisher: per_batch`) and adds A and B apart (`merge: factor_sum`). It scores a stage "
        "before that merge, accrete after it: an exact merge changes no score but for rounding, "
        "`factor_sum` changes the model, so it does not reproduce the reference's figures. True "
        "labels, as in the reference's code. `separate`: `A*` is the task's own fresh A, `B*` = 0 "
        "(no code exists). `pretrained`: on the first task's rows, in force from the second task "
        "(neither is published). `rank1`: the outer product of F's own row and column sums, so "
        "F's mass and lambda's meaning stay, instead of E[g^2] E[x^2]^T, which loses products of "
        "different tokens"
    )
    peeks: ClassVar[bool] = True

    def __init__(self, config: EwcLoraConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.memory: FisherMemory | None = None
        """None if there is nothing to remember (`penalty: none`)."""
        self.hooks = GradientHooks()
        self._value: torch.Tensor | None = None

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Choose the memory, and the rows of it that are this rank's."""
        if self.settings.penalty == "none":
            return
        kind: type[FisherMemory] = DenseFisher
        if self.settings.penalty == "separate":
            kind = FactorFisher
        elif self.settings.fisher == "rank1":
            kind = Rank1Fisher
        self.memory = kind(self.settings, rank, world, device)

    @property
    def merge(self) -> Literal["exact", "factor_sum"]:
        """As the recipe says."""
        return self.settings.merge

    # -- the penalty --------------------------------------------------------------------------

    def on_sequence_start(self, stage: Stage) -> None:
        """See before any training that a pass can tell rows apart. Collective: at ZeRO 3."""
        if self.memory is not None:
            input_names(stage)

    def on_task_start(self, stage: Stage) -> None:
        """Hook the factors' gradients, from the second task on. Collective: yes."""
        self.hooks.detach()
        if self.memory is None:
            return
        if self.settings.fisher_at == "pretrained":
            self._measure_untrained(stage, self.memory)
        self.memory.begin(stage)
        if stage.index == 0 or not self.memory or self.settings.lambda_ == 0:
            return
        layers = stage.adapted.layers.values()
        self.hooks.attach(stage.engine, [n for layer in layers for n in (layer.a, layer.b)])

    @staticmethod
    def _measure_untrained(stage: Stage, memory: FisherMemory) -> None:
        """The model of stage 0 before its first step, resumed or not, is the untrained one."""
        if stage.index == 0:
            memory.kept.clear()
            memory.measure(stage)
        elif not memory:
            raise MethodError(
                f"ewc_lora: method.fisher_at=pretrained, but the run's stage {stage.index} starts "
                "without a Fisher of the untrained model. Start a new run with this setting."
            )

    def before_step(self, stage: Stage) -> None:
        """Forget the last step's pieces."""
        self.hooks.forget()
        self._value = None

    def before_backward(self, stage: Stage, last: bool) -> None:
        """Once a step: this rank's rows of the penalty and of its gradient, without traffic."""
        if not (last and self.hooks.attached and self.memory is not None):
            return
        engine = stage.engine
        value = torch.zeros((), device=engine.device)
        for layer in stage.adapted.layers.values():
            part, grad_a, grad_b = self.memory.pull(
                layer, engine.peek(layer.a), engine.peek(layer.b)
            )
            value += part
            self.hooks.added[layer.a] = grad_a.mul_(engine.world)
            self.hooks.added[layer.b] = grad_b.mul_(engine.world)
        self._value = value

    def step_sums(self) -> dict[str, torch.Tensor]:
        """This rank's part of R, and the norms of what the penalty and the task added here."""
        if self._value is None:
            return {}
        return {"penalty": self._value, **self.hooks.norms()}

    # -- the Fisher ---------------------------------------------------------------------------

    def on_task_end(self, stage: Stage) -> None:
        """Estimate this task's Fisher at its final weights and add it. Collective: yes."""
        self.hooks.detach()
        if self.memory is None:
            return
        if self.settings.fisher_at == "each_task":
            self.memory.measure(stage)
        stage.notes["fisher_bytes"] = float(self.state_bytes())

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The Fisher of every layer, whole, on rank 0. Collective: yes."""
        return {} if self.memory is None else self.memory.state_dict()

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep this rank's rows."""
        if self.memory is not None:
            self.memory.load_state_dict(tensors)

    def state_bytes(self) -> int:
        """Bytes of this rank's part."""
        return 0 if self.memory is None else self.memory.state_bytes()
