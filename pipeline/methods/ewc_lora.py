"""EWC-LoRA: a full-space Fisher penalty on the current task's low-rank update.

F_cum is the diagonal Fisher of the dense W, accumulated over finished tasks; the current update
starts at zero on the merged weights, so no anchor copy is kept:
R = lambda/2 sum_ij F_cum,ij (s B A)_ij^2.

Cost: rank k of N owns the rows I_k of every F (1/N of the memory) and adds only their part of
dR/dA and dR/dB to its own gradient, multiplied by N, in gradient hooks; the reduction that happens
anyway averages over ranks and so sums the parts. No traffic is added to a training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.distributed.comm import gather_rows, reduce_rows, row_block
from accrete.pipeline.math.fisher import add_gradients, add_squared_gradients, penalty
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.statistics import visit_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from accrete.pipeline.models.lora import AdaptedLayer
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class EwcLoraConfig(MethodConfig):
    """Settings of EWC-LoRA."""

    kind: str = "ewc_lora"
    lambda_: Annotated[float, Field(ge=0)] = 100.0
    """Weight of the penalty: search it on dev rows, on a grid of powers of ten. It belongs to the
    estimator and the loss (here per sequence, and a mean over label tokens): the reference's 1e7
    was for squared means of 128 images."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """F_cum <- gamma F_cum + F_t."""
    fisher: Literal["per_sequence", "per_batch"] = "per_sequence"
    """`per_sequence`: E[g^2], independent of batch and ranks. `per_batch`: squares of batch means
    over `train.global_batch_size` rows, as in the reference code; about 1/batch of the former."""
    fisher_tokens: Literal["sum", "mean"] = "sum"
    """A row's loss is summed over its label tokens (its log-likelihood) or averaged."""
    fisher_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a task that its Fisher is estimated on; default: all training rows."""
    merge: Literal["exact", "factor_sum"] = "exact"
    """`factor_sum` adds up A and B apart, as the reference code does; it is not what the paper
    says and changes the model at every merge."""


class EwcLora(Method):
    """Penalty from a row-sharded, full-space, per-sequence Fisher."""

    Config: ClassVar[type[MethodConfig]] = EwcLoraConfig
    summary: ClassVar[str] = "full-space Fisher penalty on the LoRA update, exact merge (EWC-LoRA)"
    source: ClassVar[str] = "Yao et al., EWC-LoRA (low-rank continual learning)"
    peeks: ClassVar[bool] = True

    def __init__(self, config: EwcLoraConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.fisher: dict[str, torch.Tensor] = {}
        """Layer -> this rank's rows of F_cum, fp32."""
        self._rows: dict[str, int] = {}
        self._added: dict[str, torch.Tensor] = {}
        self._task: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._value: torch.Tensor | None = None
        self._place = (0, 1)
        self._device = torch.device("cpu")

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Remember which rows are this rank's."""
        self._place = (rank, world)
        self._device = device

    @property
    def merge(self) -> Literal["exact", "factor_sum"]:
        """As the recipe says."""
        return self.settings.merge

    # -- the penalty --------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether there is anything to remember yet."""
        return bool(self.fisher) and self.settings.lambda_ > 0

    def on_task_start(self, stage: Stage) -> None:
        """Hook the factors' gradients, from the second task on."""
        self._unhook()
        if not self.active:
            return
        for layer in stage.adapted.layers.values():
            for name in (layer.a, layer.b):
                parameter = stage.engine.parameters[name]
                handle = parameter.register_hook(self._edit(name))  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def _edit(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            before = self._task.get(name)
            self._task[name] = gradient.detach() if before is None else before + gradient
            added = self._added.get(name)
            return gradient if added is None else gradient + added

        return hook

    def before_step(self, stage: Stage) -> None:
        """Forget the last step's pieces."""
        self._added.clear()
        self._task.clear()
        self._value = None

    def before_backward(self, stage: Stage, last: bool) -> None:
        """Once a step: this rank's rows of the penalty and of its gradient, without traffic."""
        if not (last and self.active):
            return
        engine = stage.engine
        value = torch.zeros((), device=engine.device)
        for layer in stage.adapted.layers.values():
            a, b = engine.peek(layer.a), engine.peek(layer.b)
            block = row_block(b.shape[0], engine.rank, engine.world)
            part, grad_a, grad_b = penalty(
                self.fisher[layer.name], a, b[block], layer.scale, self.settings.lambda_
            )
            value += part
            whole_b = torch.zeros_like(b)
            whole_b[block] = grad_b
            self._added[layer.a] = grad_a.mul_(engine.world)
            self._added[layer.b] = whole_b.mul_(engine.world)
        self._value = value

    def step_sums(self) -> dict[str, torch.Tensor]:
        """This rank's part of R, and the norms of what the penalty and the task added here."""
        if self._value is None:
            return {}
        penalty_norm = torch.stack(torch._foreach_norm(list(self._added.values()))).norm()
        task_norm = torch.stack(torch._foreach_norm(list(self._task.values()))).norm()
        return {"penalty": self._value, "penalty_norm": penalty_norm, "task_norm": task_norm}

    # -- the Fisher ---------------------------------------------------------------------------

    def on_task_end(self, stage: Stage) -> None:
        """Estimate this task's Fisher at its final weights and add it. Collective: yes."""
        self._unhook()
        self._added.clear()
        self._task.clear()
        fresh = (
            self._per_batch(stage) if self.settings.fisher == "per_batch" else self._rows_of(stage)
        )
        for name, block in fresh.items():
            old = self.fisher.get(name)
            self.fisher[name] = block if old is None else old.mul_(self.settings.gamma).add_(block)
        stage.notes["fisher_bytes"] = float(self.state_bytes())

    def _new_totals(self, stage: Stage) -> dict[str, torch.Tensor]:
        device = stage.engine.device
        totals: dict[str, torch.Tensor] = {}
        for layer in stage.adapted.layers.values():
            linear = layer.module.base_layer
            self._rows[layer.name] = linear.out_features
            totals[layer.name] = torch.zeros(linear.out_features, linear.in_features, device=device)
        return totals

    def _rows_of(self, stage: Stage) -> dict[str, torch.Tensor]:
        """Mean over rows of the squared per-sequence gradient: square first, then reduce."""
        totals = self._new_totals(stage)

        def visit(layer: AdaptedLayer, x: torch.Tensor, g: torch.Tensor) -> None:
            add_squared_gradients(totals[layer.name], x, g)

        count = visit_gradients(
            stage,
            visit,
            token_mean=self.settings.fisher_tokens == "mean",
            max_rows=self.settings.fisher_rows,
        )
        rank, world = self._place
        blocks: dict[str, torch.Tensor] = {}
        for name in list(totals):
            blocks[name] = reduce_rows(totals.pop(name), rank, world).div_(count)
        return blocks

    def _per_batch(self, stage: Stage) -> dict[str, torch.Tensor]:
        """The reference's estimator: (1/N) sum_b |b| (mean gradient of batch b)^2."""
        totals = self._new_totals(stage)
        rank, world = self._place
        blocks = {
            name: torch.zeros_like(total[row_block(total.shape[0], rank, world)])
            for name, total in totals.items()
        }

        def visit(layer: AdaptedLayer, x: torch.Tensor, g: torch.Tensor) -> None:
            add_gradients(totals[layer.name], x, g)

        def square(rows: int) -> None:
            for name, total in totals.items():
                blocks[name].add_(reduce_rows(total, rank, world).div_(rows).square_(), alpha=rows)
                total.zero_()

        count = visit_gradients(
            stage,
            visit,
            token_mean=self.settings.fisher_tokens == "mean",
            max_rows=self.settings.fisher_rows,
            after_batch=square,
        )
        return {name: block.div_(count) for name, block in blocks.items()}

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """F_cum of every layer, whole, on rank 0. Collective: yes."""
        tensors: dict[str, torch.Tensor] = {}
        for name, block in self.fisher.items():
            whole = gather_rows(block, self._rows[name], *self._place)
            if whole is not None:
                tensors[f"fisher/{name}"] = whole.cpu()
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep this rank's rows."""
        for key, whole in tensors.items():
            name = key.removeprefix("fisher/")
            self._rows[name] = whole.shape[0]
            self.fisher[name] = whole[row_block(whole.shape[0], *self._place)].to(
                self._device, copy=True
            )

    def state_bytes(self) -> int:
        """Bytes of this rank's rows of F_cum."""
        return sum(block.numel() * block.element_size() for block in self.fisher.values())

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
