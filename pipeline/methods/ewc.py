"""EWC on all weights: what earlier tasks' Fisher holds important is pulled back to where it was.

R = lambda/2 sum F (w - w*)^2 over all weights w, with F the sum of the finished tasks' diagonal
empirical Fishers and w* an anchor.

Cost: F and w* take 8 bytes per weight, rank k of N keeps the rows I_k of both. While the backward
pass has a weight whole, as it must, each rank adds its own rows of lambda F (w - w*), multiplied by
N; the reduction that happens anyway averages over ranks. No traffic is added to a training step.
The Fisher pass at the end of a task goes row by row, so cap it with `fisher_rows`. Every rank then
holds the sum of squares, 4 bytes per weight, and one parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.distributed.comm import gather_rows, in_parts, reduce_rows, row_block
from accrete.pipeline.errors import ConfigError, DistributedError
from accrete.pipeline.math.fisher import BLOCK_ELEMENTS
from accrete.pipeline.math.fisher_variants import diagonal_penalty
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.statistics import require_finite, visit_row_gradients

if TYPE_CHECKING:
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class EwcConfig(MethodConfig):
    """Settings of EWC."""

    kind: str = "ewc"
    lambda_: Annotated[float, Field(ge=0)] = 100.0
    """Weight of the penalty: search it on dev rows, on a grid of powers of ten."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """F <- gamma F + F_t when a task ends."""
    anchor: Literal["latest", "every"] = "latest"
    """w*. `latest`: the weights after the last task, with which quadratic losses give the joint
    optimum. `every`: one penalty for each finished task around its own weights, as the paper writes
    it; they are kept as one, around the mean weighted by F, which differs by a constant."""
    fisher_tokens: Literal["sum", "mean"] = "sum"
    """A row's loss is summed over its label tokens (its log-likelihood) or averaged."""
    fisher_rows: Annotated[int, Field(ge=1)] | None = 256
    """Rows of a task that its Fisher is estimated on, evenly spread over the first epoch's order;
    null: all training rows. Each costs a backward pass of its own."""


class Ewc(Method):
    """Penalty from a row-sharded, per-sequence Fisher of every weight."""

    Config: ClassVar[type[MethodConfig]] = EwcConfig
    summary: ClassVar[str] = "all weights trained, pulled back where the Fisher is large (EWC)"
    source: ClassVar[str] = "Kirkpatrick et al., PNAS 2017; one running Fisher as in Huszar 2018"
    kept: ClassVar[str] = (
        "F and `w*` of every weight, 1/N per rank, constant in the number of tasks. 8 bytes per "
        "weight"
    )
    cost: ClassVar[str] = (
        "one pass over F and `w*` a step, a backward pass per row at a task's end. A step: 3 "
        "passes over this rank's rows, in gradient hooks while the backward pass has the weight "
        "whole (at ZeRO 3 as well: verified with every weight partitioned); no added collective. "
        "A task's end: one row at a time (exact for weights of any kind), at most `fisher_rows` "
        "rows; the sum of squares, 4 bytes per weight, and one parameter's gradient are held "
        "whole by every rank meanwhile; one reduction"
    )
    guarantee: ClassVar[str] = (
        "none hard; the penalty is exact. With `anchor: latest` R and its gradient are 0 when a "
        "task starts, and on quadratic losses with exact F and lambda = gamma = 1 the weights are "
        "the joint optimum after every task (1e-10); `every` has both no further than the second "
        "task. lambda = 0 is `full` to the bit. F does not depend on batch, order or ranks"
    )
    deviations: ClassVar[str] = (
        "F per sequence, one penalty around the latest weights. TreeLoRA's code sums squared "
        "training-time gradients of each rank; here F is taken at the end of the task. A penalty "
        "per task, as Kirkpatrick writes it, counts early tasks more than once from the third on: "
        "that is `anchor: every`, not the default. `max_grad_norm` would count the penalty's "
        "gradient"
    )
    trains: ClassVar[Literal["factors", "weights"]] = "weights"
    fresh_adapter: ClassVar[bool] = False

    def __init__(self, config: EwcConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.fisher: dict[str, torch.Tensor] = {}
        """Weight -> this rank's rows of F, fp32."""
        self.anchors: dict[str, torch.Tensor] = {}
        """Weight -> this rank's rows of w*, fp32."""
        self._shapes: dict[str, torch.Size] = {}
        self._handles: list[Any] = []
        self._last = False
        self._value: torch.Tensor | None = None
        self._place = (0, 1)
        self._device = torch.device("cpu")

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Remember which rows are this rank's."""
        self._place = (rank, world)
        self._device = device

    # -- the penalty --------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether there is anything to remember yet."""
        return bool(self.fisher) and self.settings.lambda_ > 0

    def on_task_start(self, stage: Stage) -> None:
        """Hook the weights' gradients, from the second task on."""
        self._unhook()
        if not self.active:
            return
        for name, parameter in stage.engine.parameters.items():
            if name in self.fisher:
                handle = parameter.register_hook(self._pull(name, parameter))  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def _pull(
        self, name: str, parameter: torch.nn.Parameter
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        rank, world = self._place

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            if not self._last:
                return gradient
            # The module's own backward needs the weight, so at ZeRO 3 too it is whole by now.
            weight = parameter.detach()
            if weight.shape != gradient.shape:
                raise DistributedError(
                    f"{name} is partitioned while its gradient is made; EWC needs it whole there. "
                    "Use engine.zero_stage=2."
                )
            assert self._value is not None
            block = row_block(_rows(weight).shape[0], rank, world)
            pulled = gradient.clone()
            # A few rows at a time: an embedding's own copies would be the highest moment of a step.
            rows = (_rows(weight)[block], self.anchors[name], self.fisher[name])
            parts = (in_parts(part, BLOCK_ELEMENTS) for part in (*rows, _rows(pulled)[block]))
            for now, anchor, fisher, target in zip(*parts, strict=True):
                value, pull = diagonal_penalty(fisher, now - anchor, self.settings.lambda_)
                self._value += value
                target += pull.mul_(world)
            return pulled

        return hook

    def before_step(self, stage: Stage) -> None:
        """A new step: nothing is pulled until its last backward."""
        self._last = False
        self._value = torch.zeros((), device=stage.engine.device) if self._handles else None

    def before_backward(self, stage: Stage, last: bool) -> None:
        """The penalty counts once a step."""
        self._last = last

    def step_sums(self) -> dict[str, torch.Tensor]:
        """This rank's part of R."""
        return {} if self._value is None else {"penalty": self._value}

    # -- the Fisher ---------------------------------------------------------------------------

    def on_task_end(self, stage: Stage) -> None:
        """Estimate this task's Fisher at its final weights and add it. Collective: yes."""
        self._unhook()
        rank, world = self._place
        totals = {}
        for name in stage.engine.parameters:
            weight = stage.engine.value(name)
            self._shapes[name] = weight.shape
            totals[name] = torch.zeros_like(_rows(weight))

        def visit(name: str, gradient: torch.Tensor) -> None:
            totals[name].addcmul_(_rows(gradient), _rows(gradient))

        count = visit_row_gradients(
            stage,
            visit,
            token_mean=self.settings.fisher_tokens == "mean",
            max_rows=self.settings.fisher_rows,
        )
        require_finite(stage, totals.values(), "gradients")
        for name in list(totals):
            fresh = reduce_rows(totals.pop(name), rank, world).div_(count)
            weight = _rows(stage.engine.value(name))
            self.remember(name, fresh, weight[row_block(weight.shape[0], rank, world)].clone())
        stage.notes["fisher_bytes"] = float(self.state_bytes())

    def remember(self, name: str, fresh: torch.Tensor, weight: torch.Tensor) -> None:
        """Take in one weight's Fisher of a finished task and its value, both this rank's rows."""
        if name not in self.fisher:
            self.fisher[name], self.anchors[name] = fresh, weight
            return
        total = self.fisher[name].mul_(self.settings.gamma).add_(fresh)
        if self.settings.anchor == "latest":
            self.anchors[name] = weight
            return
        # Where nothing is important yet, any anchor will do: it stays.
        share = torch.where(total > 0, fresh / total, torch.zeros_like(total))
        self.anchors[name].lerp_(weight, share)

    # -- state --------------------------------------------------------------------------------

    @property
    def _kinds(self) -> tuple[str, str]:
        """What F and w* are called in a checkpoint: nothing is added to what means another."""
        mean, every = self.settings.fisher_tokens == "mean", self.settings.anchor == "every"
        return "fisher_mean" if mean else "fisher", "anchor_every" if every else "anchor"

    def state_dict(self) -> dict[str, torch.Tensor]:
        """F and w* of every weight, whole, on rank 0. Collective: yes."""
        tensors: dict[str, torch.Tensor] = {}
        for kind, blocks in zip(self._kinds, (self.fisher, self.anchors), strict=True):
            for name, block in blocks.items():
                shape = self._shapes[name]
                whole = gather_rows(block, shape[0] if shape else 1, *self._place)
                if whole is not None:
                    tensors[f"{kind}/{name}"] = whole.view(shape).cpu()
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep this rank's rows.

        Raises:
            ConfigError: They were saved with other settings.
        """
        other = {key.partition("/")[0] for key in tensors} - set(self._kinds)
        if other:
            raise ConfigError(
                f"ewc: the checkpoint keeps {', '.join(sorted(other))}, but these settings go on "
                f"from {' and '.join(self._kinds)}. method.fisher_tokens and method.anchor belong "
                "to a whole sequence: keep them, or start a new run."
            )
        for key, whole in tensors.items():
            kind, _, name = key.partition("/")
            self._shapes[name] = whole.shape
            block = row_block(_rows(whole).shape[0], *self._place)
            kept = self.fisher if kind == self._kinds[0] else self.anchors
            kept[name] = _rows(whole)[block].to(self._device, copy=True)

    def state_bytes(self) -> int:
        """Bytes of this rank's rows of F and w*."""
        kept = [*self.fisher.values(), *self.anchors.values()]
        return sum(block.numel() * block.element_size() for block in kept)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view with a first dimension; a scalar is one row."""
    return tensor if tensor.dim() else tensor.view(1)
