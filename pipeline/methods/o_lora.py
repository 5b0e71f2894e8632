"""O-LoRA: a new task's A is pulled away from the row spaces of all earlier tasks' A.

R = lambda_1 sum_j sum |A_j A^T| + lambda_2 (||A||_F + ||B||_F), summed over layers: absolute values
of all entries, norms not squared, as the reference code has it. It is a pull, not a guarantee.

Cost: the earlier A's of all layers of one shape lie in one tensor [L, R, d_in], so a step makes two
batched products per shape, however many tasks and layers there are. Rank k of N holds the rows I_k
of the R earlier ones (1/N of memory and arithmetic), adds only their part of dR/dA, multiplied by
N, in gradient hooks; the reduction that happens anyway sums the parts. No traffic is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from accrete.pipeline.distributed.comm import row_block
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.methods.gradient_hooks import GradientHooks

if TYPE_CHECKING:
    from accrete.pipeline.distributed.engine import Engine
    from accrete.pipeline.stage import Stage

Strength = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class OLoraConfig(MethodConfig):
    """Settings of O-LoRA."""

    kind: str = "o_lora"
    lambda_1: Strength | list[Strength] = 0.5
    """Weight of the overlap with earlier tasks' A; a list gives one number per task. Published for
    T5-large: 0.5, and 5 for tasks 10 to 15 of the long sequence. The overlap is a sum over layers,
    so a model with more of them needs less."""
    lambda_2: Strength | list[Strength] = 0.0
    """Weight of the Frobenius norms of A and B; a list gives one number per task. Published: 0, and
    0 to 0.3, set by hand per task, in the long sequence."""

    per_task: ClassVar[tuple[str, ...]] = ("lambda_1", "lambda_2")


@dataclass(frozen=True)
class SameShape:
    """Layers whose factors have one shape, so that one product serves all of them."""

    names: list[str]
    """Parameters of the live factors."""
    old: torch.Tensor | None
    """[L, rows, d_in] fp32: this rank's rows of the earlier tasks' A; None if not needed."""


class OLora(Method):
    """L1 penalty on the overlap of row spaces."""

    Config: ClassVar[type[MethodConfig]] = OLoraConfig
    summary: ClassVar[str] = "new adapters pulled orthogonal to earlier ones (O-LoRA)"
    source: ClassVar[str] = "Wang et al., Orthogonal Subspace Learning (EMNLP Findings 2023)"
    kept: ClassVar[str] = (
        "nothing beside the finished factors. On the device 1/N of the earlier tasks' A per rank, "
        "4 r d_in bytes per layer and task (T5-large, q and v, rank 8, 15 tasks: 66 MB over all "
        "ranks together); nothing in checkpoints"
    )
    cost: ClassVar[str] = (
        "two batched products of A's a step. 4 R r d_in FLOPs per layer with R = r x finished "
        "tasks, shared out over the ranks, in two products per shape of A; no added collective. "
        "It grows with R as the arithmetic demands, the number of launches does not grow with the "
        "tasks. A task's end: a copy of the A's to the device"
    )
    guarantee: ClassVar[str] = (
        "none: a pull, not a projection; the penalty is exact. It and its gradient equal a loop "
        "under autograd (1e-10 in fp64) and are 0 for orthogonal rows. Parts over ranks add up to "
        "the whole. Both strengths 0 is `inc_lora` to the bit. The same run at every ZeRO stage"
    )
    deviations: ClassVar[str] = (
        "none in the rule. Absolute values summed over all entries, Frobenius norms of every A "
        "and B not squared, each layer and task counted in full, weight 1 per optimizer step. It "
        "binds peft's A, the input side (the paper's letters are swapped). New rows can also meet "
        "it by becoming short, which it does not prevent. `max_grad_norm` counts the penalty's "
        "gradient too. `penalty_share` in the step events says how much of the gradient it is"
    )
    peeks: ClassVar[bool] = True

    def __init__(self, config: OLoraConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.hooks = GradientHooks()
        self._groups: list[SameShape] = []
        self._strengths = (0.0, 0.0)
        self._value: torch.Tensor | None = None

    # -- the penalty --------------------------------------------------------------------------

    def on_task_start(self, stage: Stage) -> None:
        """Stack the earlier tasks' A and hook the factors' gradients, if there is a penalty."""
        self._strengths = (
            strength_at(self.settings.lambda_1, stage),
            strength_at(self.settings.lambda_2, stage),
        )
        lambda_1, lambda_2 = self._strengths
        if lambda_2 > 0 or (lambda_1 > 0 and stage.past.stages):
            self._stack(stage)
            layers = stage.adapted.layers.values()
            self.hooks.attach(stage.engine, [n for layer in layers for n in (layer.a, layer.b)])
        else:
            self._groups.clear()
            self.hooks.detach()

    def _stack(self, stage: Stage) -> None:
        """Sort the factors by shape, with this rank's rows of all finished tasks' A."""
        engine = stage.engine
        past = stage.past.stages if self._strengths[0] > 0 else []
        names: dict[tuple[str, int], list[str]] = {}
        old: dict[str, torch.Tensor] = {}
        for layer in stage.adapted.layers.values():
            linear = layer.module.base_layer
            names.setdefault(("A", linear.in_features), []).append(layer.a)
            names.setdefault(("B", linear.out_features), []).append(layer.b)
            if past:
                rows = torch.cat([factors[layer.name][0] for factors in past])
                old[layer.a] = rows[row_block(len(rows), engine.rank, engine.world)]
        self._groups = [
            SameShape(
                members,
                torch.stack([old[name] for name in members]).to(engine.device)
                if past and which == "A"
                else None,
            )
            for (which, _size), members in names.items()
        ]

    def before_step(self, stage: Stage) -> None:
        """Forget the last step's pieces."""
        self.hooks.forget()
        self._value = None

    def before_backward(self, stage: Stage, last: bool) -> None:
        """Once a step: this rank's part of the penalty and of its gradient, without traffic."""
        if not (last and self.hooks.attached):
            return
        self._value = torch.zeros((), device=stage.engine.device)
        for group in self._groups:
            if group.old is not None or self._strengths[1] > 0:
                self._add(stage.engine, group, self._value)

    def _add(self, engine: Engine, group: SameShape, total: torch.Tensor) -> None:
        """The terms of one shape: parts of the overlap times world, all of the norms."""
        lambda_1, lambda_2 = self._strengths
        live = torch.stack([engine.peek(name) for name in group.names])
        gradient = torch.zeros_like(live)
        if lambda_1 > 0 and group.old is not None:
            value, slope = overlap(group.old, live)
            total.add_(value, alpha=lambda_1)
            gradient.add_(slope, alpha=lambda_1 * engine.world)
        if lambda_2 > 0:
            value, slope = norms(live)
            total.add_(value, alpha=lambda_2 / engine.world)
            gradient.add_(slope, alpha=lambda_2)
        self.hooks.added.update(zip(group.names, gradient.unbind(), strict=True))

    def step_sums(self) -> dict[str, torch.Tensor]:
        """This rank's part of R, and the norms of what the penalty and the task added here."""
        return {} if self._value is None else {"penalty": self._value, **self.hooks.norms()}

    # -- state --------------------------------------------------------------------------------

    def on_task_end(self, stage: Stage) -> None:
        """No more gradients to edit."""
        self.hooks.detach()
        self._value = None

    def after_consolidation(self, stage: Stage) -> None:
        """Take this task's A along. Nothing of it is saved: the past holds it already."""
        self._stack(stage)

    def state_bytes(self) -> int:
        """Bytes of this rank's rows of the earlier tasks' A."""
        tensors = [group.old for group in self._groups if group.old is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def overlap(old: torch.Tensor, live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The overlap sum |A_old A^T| over all layers and entries, and its gradient for A.

    Args:
        old: [L, R, d_in], rows of earlier tasks' A; a sum over blocks of rows is the whole.
        live: [L, r, d_in].

    Returns:
        The value (scalar) and sign(A_old A^T)^T A_old [L, r, d_in].
    """
    products = torch.bmm(old, live.transpose(1, 2))
    return products.abs().sum(), torch.bmm(products.sign().transpose(1, 2), old)


def norms(live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of L matrices' Frobenius norms, and its gradient (zero at zero).

    Args:
        live: [L, m, n].

    Returns:
        The value (scalar) and the gradient [L, m, n].
    """
    lengths = live.flatten(1).norm(dim=1)
    scales = torch.where(lengths > 0, lengths.reciprocal(), 0.0)
    return lengths.sum(), live * scales[:, None, None]


def strength_at(setting: float | list[float], stage: Stage) -> float:
    """A strength at this stage."""
    return setting[stage.index] if isinstance(setting, list) else setting
