"""What EWC-LoRA keeps of a Fisher: dense and sharded by rows, of the factors, or one outer product.

All of them are sums over tasks, pull on the factors by parts that add up over ranks, and know how
to be saved whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch

from accrete.pipeline.distributed.comm import gather_rows, reduce_rows, row_block, sum_over_ranks
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.math.fisher import add_gradients, add_squared_gradients, penalty
from accrete.pipeline.math.fisher_variants import (
    add_factor_squares,
    add_squared_margins,
    diagonal_penalty,
    rank1_penalty,
)
from accrete.pipeline.statistics import require_finite, visit_gradients

if TYPE_CHECKING:
    from accrete.pipeline.methods.ewc_lora import EwcLoraConfig
    from accrete.pipeline.models.lora import AdaptedLayer
    from accrete.pipeline.stage import Stage

Pull = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""This rank's part of R (scalar), dR/dA [r, d_in] and dR/dB [d_out, r], whole shapes."""


class FisherMemory(ABC):
    """Named tensors "kind/layer" that add up over tasks, split by rows over the ranks."""

    kinds: ClassVar[tuple[str, ...]]
    whole: ClassVar[tuple[str, ...]] = ()
    """Kinds that every rank keeps whole."""

    def __init__(
        self, settings: EwcLoraConfig, rank: int, world: int, device: torch.device
    ) -> None:
        self.settings = settings
        self.kept: dict[str, torch.Tensor] = {}
        """Name, as "kind/layer" -> this rank's rows, fp32."""
        self._rows: dict[str, int] = {}
        self._rank, self._world, self._device = rank, world, device
        self._mark = _mark(settings)

    def __bool__(self) -> bool:
        return bool(self.kept)

    def begin(self, stage: Stage) -> None:  # noqa: B027 - most have nothing to do here
        """A task starts; the factors hold what it starts from. Collective: see `Stage.read`."""

    def measure(self, stage: Stage) -> None:
        """Add the Fisher of the stage's rows at the present weights.

        Raises:
            MethodError: See `require_finite`.

        Collective: yes.
        """
        found = self._estimate(stage)
        require_finite(stage, found.values(), "gradients")
        for name, fresh in found.items():
            old = self.kept.get(name)
            self.kept[name] = fresh if old is None else old.mul_(self.settings.gamma).add_(fresh)

    @abstractmethod
    def _estimate(self, stage: Stage) -> dict[str, torch.Tensor]:
        """This rank's rows of one task's Fisher. Collective: yes."""

    @abstractmethod
    def pull(self, layer: AdaptedLayer, a: torch.Tensor, b: torch.Tensor) -> Pull:
        """The penalty of this rank's rows at A [r, d_in], B [d_out, r]. Collective: no."""

    def _visit(
        self,
        stage: Stage,
        visit: Callable[[AdaptedLayer, torch.Tensor, torch.Tensor], None],
        after_batch: Callable[[int], None] | None = None,
    ) -> int:
        return visit_gradients(
            stage,
            visit,
            token_mean=self.settings.fisher_tokens == "mean",
            max_rows=self.settings.fisher_rows,
            after_batch=after_batch,
        )

    def _block(self, rows: int) -> slice:
        return row_block(rows, self._rank, self._world)

    def _own_rows(self, name: str, total: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; this rank's rows of it. Collective: yes."""
        self._rows[name] = total.shape[0]
        return reduce_rows(total, self._rank, self._world)

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything, whole, on rank 0. Collective: yes."""
        tensors: dict[str, torch.Tensor] = {}
        for name, block in self.kept.items():
            if name.partition("/")[0] in self.whole:
                tensors[f"{self._mark}{name}"] = block.clone().cpu()
                continue
            everything = gather_rows(block, self._rows[name], self._rank, self._world)
            if everything is not None:
                tensors[f"{self._mark}{name}"] = everything.cpu()
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep this rank's rows.

        Raises:
            ConfigError: They were saved with other settings.
        """
        wanted = {f"{self._mark}{kind}" for kind in self.kinds}
        other = {name.partition("/")[0] for name in tensors} - wanted
        if other:
            raise ConfigError(
                f"ewc_lora: the checkpoint keeps {', '.join(sorted(other))}, but these settings go "
                f"on from {', '.join(sorted(wanted))}. method.penalty, method.fisher, "
                "method.fisher_at and method.fisher_tokens belong to a whole sequence: keep them, "
                "or start a new run."
            )
        for key, everything in tensors.items():
            name, value = key.removeprefix(self._mark), everything
            if name.partition("/")[0] not in self.whole:
                self._rows[name] = everything.shape[0]
                value = everything[self._block(everything.shape[0])]
            self.kept[name] = value.to(self._device, copy=True)

    def state_bytes(self) -> int:
        """Bytes on this rank."""
        return sum(block.numel() * block.element_size() for block in self.kept.values())


def _mark(settings: EwcLoraConfig) -> str:
    """What a saved name begins with, so that no Fisher is added to one of another scale."""
    marks = {
        "pretrained_": settings.fisher_at == "pretrained",
        "batch_": settings.fisher == "per_batch",
        "mean_": settings.fisher_tokens == "mean",
    }
    return "".join(mark for mark, holds in marks.items() if holds)


class DenseFisher(FisherMemory):
    """F [d_out, d_in] of every W: R = lambda/2 sum F (s B A)^2."""

    kinds = ("fisher",)

    def pull(self, layer: AdaptedLayer, a: torch.Tensor, b: torch.Tensor) -> Pull:
        """See `FisherMemory.pull`."""
        block = self._block(b.shape[0])
        value, grad_a, part = penalty(
            self.kept[f"fisher/{layer.name}"], a, b[block], layer.scale, self.settings.lambda_
        )
        grad_b = torch.zeros_like(b)
        grad_b[block] = part
        return value, grad_a, grad_b

    def _estimate(self, stage: Stage) -> dict[str, torch.Tensor]:
        totals = {}
        for layer in stage.adapted.layers.values():
            linear = layer.module.base_layer
            shape = (linear.out_features, linear.in_features)
            totals[f"fisher/{layer.name}"] = torch.zeros(shape, device=self._device)
        if self.settings.fisher == "per_batch":
            return self._per_batch(stage, totals)
        return self._per_sequence(stage, totals)

    def _per_sequence(
        self, stage: Stage, totals: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Mean over rows of the squared per-sequence gradient: square first, then reduce."""

        def visit(layer: AdaptedLayer, x: torch.Tensor, g: torch.Tensor) -> None:
            add_squared_gradients(totals[f"fisher/{layer.name}"], x, g)

        count = self._visit(stage, visit)
        return {name: self._own_rows(name, totals.pop(name)).div_(count) for name in list(totals)}

    def _per_batch(self, stage: Stage, totals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reference's estimator: (1/N) sum_b |b| (mean gradient of batch b)^2."""
        blocks = {
            name: torch.zeros_like(total[self._block(total.shape[0])])
            for name, total in totals.items()
        }

        def visit(layer: AdaptedLayer, x: torch.Tensor, g: torch.Tensor) -> None:
            add_gradients(totals[f"fisher/{layer.name}"], x, g)

        def square(rows: int) -> None:
            for name, total in totals.items():
                mean = self._own_rows(name, total).div_(rows)
                blocks[name].add_(mean.square_(), alpha=rows)
                total.zero_()

        count = self._visit(stage, visit, square)
        return {name: block.div_(count) for name, block in blocks.items()}


class FactorFisher(FisherMemory):
    """F_A and F_B of the factors: R = lambda/2 [sum F_A (A - A*)^2 + sum F_B (B - B*)^2].

    Source: the ablation "A and B separately" of EWC-LoRA; there is no code for it. A* and B* = 0
    are what the task started from. F_A and F_B belong to the factors of earlier tasks, not to
    these: that mismatch is the ablation's point.
    """

    kinds = ("fisher_a", "fisher_b")
    _start: dict[str, torch.Tensor]

    def begin(self, stage: Stage) -> None:
        """Keep this rank's rows of the factors that the task starts from."""
        self._start = {}
        if not self:
            return
        for layer in stage.adapted.layers.values():
            for name in (layer.a, layer.b):
                value = stage.read(name)
                self._start[name] = value[self._block(value.shape[0])].clone()

    def pull(self, layer: AdaptedLayer, a: torch.Tensor, b: torch.Tensor) -> Pull:
        """See `FisherMemory.pull`."""
        value = torch.zeros((), device=a.device)
        gradients = []
        for kind, name, factor in (("fisher_a", layer.a, a), ("fisher_b", layer.b, b)):
            block = self._block(factor.shape[0])
            part, gradient = diagonal_penalty(
                self.kept[f"{kind}/{layer.name}"],
                factor[block] - self._start[name],
                self.settings.lambda_,
            )
            value += part
            gradients.append(torch.zeros_like(factor))
            gradients[-1][block] = gradient
        return value, gradients[0], gradients[1]

    def _estimate(self, stage: Stage) -> dict[str, torch.Tensor]:
        factors = stage.factors()
        totals = {}
        for name, (a, b) in factors.items():
            totals[f"fisher_a/{name}"] = torch.zeros_like(a)
            totals[f"fisher_b/{name}"] = torch.zeros_like(b)

        def visit(layer: AdaptedLayer, x: torch.Tensor, g: torch.Tensor) -> None:
            total_a, total_b = totals[f"fisher_a/{layer.name}"], totals[f"fisher_b/{layer.name}"]
            add_factor_squares(total_a, total_b, x, g, *factors[layer.name], layer.scale)

        count = self._visit(stage, visit)
        return {name: self._own_rows(name, total).div_(count) for name, total in totals.items()}


class Rank1Fisher(FisherMemory):
    """F ~ u v^T / sum u, where u [d_out] and v [d_in] are the row and column sums of F itself.

    Source: factored Fisher u v^T with R = lambda s^2 / 2 tr[(B^T D_u B)(A D_v A^T)]. Instead of
    E[g^2] and E[x^2], which lose the products of different tokens, u and v are the margins of the
    per-sequence F: they add up over tasks as F does, its mass (and so lambda's meaning) is kept,
    and of all matrices of rank one with these margins theirs is the nearest (as in Adafactor).
    """

    kinds = ("fisher_rows", "fisher_columns")
    whole = ("fisher_columns",)

    def pull(self, layer: AdaptedLayer, a: torch.Tensor, b: torch.Tensor) -> Pull:
        """See `FisherMemory.pull`."""
        block = self._block(b.shape[0])
        columns = self.kept[f"fisher_columns/{layer.name}"]
        value, grad_a, part = rank1_penalty(
            self.kept[f"fisher_rows/{layer.name}"],
            columns / columns.sum().clamp(min=torch.finfo(columns.dtype).tiny),
            a,
            b[block],
            layer.scale,
            self.settings.lambda_,
        )
        grad_b = torch.zeros_like(b)
        grad_b[block] = part
        return value, grad_a, grad_b

    def _estimate(self, stage: Stage) -> dict[str, torch.Tensor]:
        totals = {}
        for layer in stage.adapted.layers.values():
            linear = layer.module.base_layer
            for kind, size in zip(
                self.kinds, (linear.out_features, linear.in_features), strict=True
            ):
                totals[f"{kind}/{layer.name}"] = torch.zeros(size, device=self._device)

        def visit(layer: AdaptedLayer, x: torch.Tensor, g: torch.Tensor) -> None:
            rows, columns = (totals[f"{kind}/{layer.name}"] for kind in self.kinds)
            add_squared_margins(rows, columns, x, g)

        count = self._visit(stage, visit)
        found = {}
        for name, total in totals.items():
            if name.startswith(self.whole):
                sum_over_ranks(total, self._world)
            else:
                total = self._own_rows(name, total)
            found[name] = total.div_(count)
        return found
