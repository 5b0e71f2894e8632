"""InfLoRA: a new task trains B alone, on an A that earlier tasks' inputs cannot reach.

Before a task, A = the r leading principal directions of the task's inputs outside the protected
space M, divided by sqrt 3 and frozen. So A M = 0, and whatever the optimizer does to B, the update
s B A moves no output for an input in the span of M. After the task, M grows until it holds the
share eps + (1 - eps) t/T of that task's inputs (DualGPM).

Cost: a step is one of plain LoRA without A's gradient. A task adds two forward passes over its rows
(at its start, at its end) and a decomposition per distinct input, shared out among the ranks, each
of which keeps only the bases that it owns: 1/N of them, at most d/2 columns each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.distributed.comm import broadcast, broadcast_any, owners_of
from accrete.pipeline.math.dual_gpm import DualMemory, grow, open_directions, powered
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.statistics import covariances, input_names

if TYPE_CHECKING:
    from accrete.pipeline.models.lora import AdaptedLayer
    from accrete.pipeline.stage import Stage

PROTECTED, FREE = "basis/protected/", "basis/free/"


@dataclass(frozen=True, kw_only=True)
class InfLoraConfig(MethodConfig):
    """Settings of InfLoRA."""

    kind: str = "inf_lora"
    eps: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the first task's inputs that is protected; task t of T (from 0) has
    eps + (1 - eps) t/T. More protects more and leaves less room. Published for images: 0.95 and
    0.98, counted with `power: 2`."""
    power: Literal[1, 2] = 1
    """1 counts the inputs' squared length, as the paper writes it: then an update changes the old
    outputs' mean square by at most its squared norm times the share left out. 2 works with the
    squared covariance throughout, as the reference code does; it protects fewer directions for the
    same eps, and shares of the two are not comparable."""
    first_fill: Literal["reached", "one_fewer"] = "reached"
    """The first task's share is reached, or missed by one direction, as in the reference code."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a task that its inputs are measured on, evenly spread over the first epoch's order;
    default: all training rows."""


class InfLora(Method):
    """Frozen A outside the space of earlier inputs, trained B."""

    Config: ClassVar[type[MethodConfig]] = InfLoraConfig
    summary: ClassVar[str] = "frozen A orthogonal to earlier tasks' inputs, DualGPM (InfLoRA)"
    source: ClassVar[str] = "Liang and Li, InfLoRA (CVPR 2024)"
    kept: ClassVar[str] = (
        "one basis per distinct input, 1/N of them per rank. In fp32, of the protected space or "
        "of what is left, whichever is smaller: at most d^2/2 numbers. Query, key and value share "
        "one, so do all cross-attentions"
    )
    cost: ClassVar[str] = (
        "none in a step (B alone is trained); two forwards and eigenproblems a task. A step: "
        "plain LoRA without A's gradient: less arithmetic, less traffic, no added collective. A "
        "task: a forward over its rows at its start and another at its end, each with one sum "
        "over ranks of d x d covariances and one eigenproblem of the free space per input, shared "
        "out over the ranks. During a pass every rank holds all covariances (4 d^2 bytes per "
        "distinct input)"
    )
    guarantee: ClassVar[str] = (
        "A M = 0, so delta W x = 0 for every x in the protected space. To 1e-5, after AdamW with "
        "weight decay, in both states of the memory, whatever the rank of the new inputs. Frozen "
        "A is bit-identical on all ranks. M never shrinks and reaches its share. With `power: 1` "
        "the mean square change of the first task's outputs is at most its squared norm times (1 "
        "- eps) tr C. It holds for the inputs of each layer: what earlier layers change still "
        "drifts"
    )
    deviations: ClassVar[str] = (
        "energy in squared length, the first share reached, no vision head. The paper counts "
        "squared length too (`power: 1`); the code counts squared eigenvalues of the covariance "
        "and takes singular vectors of (I - M M^T) C: that is the same algorithm on C^2 (`power: "
        "2`). The code's first fill stops one direction short, and keeps the wrong space if it is "
        "more than half: the former is `first_fill: one_fewer`, the latter is not reproduced. If "
        "fewer than r directions are left, the other rows of A are zero and `inputs_without_room` "
        "says in how many inputs. Padding is left out; the task head, NCM clustering and seeds of "
        "the vision code have no analogue"
    )

    def __init__(self, config: InfLoraConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.memory: dict[str, DualMemory] = {}
        """Name of an input -> what is protected there; this rank's share of them."""
        self._sizes: dict[str, int] = {}
        """d_in of every input, by sorted names."""
        self._place = (0, 1)
        self._device = torch.device("cpu")

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Remember where this process stands."""
        self._place = (rank, world)
        self._device = device

    @property
    def _owners(self) -> dict[str, int]:
        """Input -> the rank that keeps its memory and decomposes for it."""
        return owners_of(self._sizes, self._place[1])

    def trainable(self, factor: str) -> bool:
        """B alone."""
        return factor == "B"

    # -- the frozen A -------------------------------------------------------------------------

    def on_task_start(self, stage: Stage) -> None:
        """Measure the new task's inputs and write A. Collective: yes."""
        readers, totals = self._measure(stage)
        world, rank = self._place[1], stage.config.adapter.rank
        # First all decompositions, each on its rank, then all sending: the ranks work side by side.
        found: dict[str, torch.Tensor] = {}
        for name in list(totals):
            inputs = powered(totals.pop(name), self.settings.power)
            found[name] = open_directions(self.memory.get(name), inputs, rank)
        narrow = closed = 0
        for name, owner in self._owners.items():
            layers = readers[name]
            a = torch.zeros(rank, self._sizes[name], device=self._device)
            if name in found:
                a[: len(found[name])] = found[name] / math.sqrt(3)
            broadcast(a, owner, world)
            hosted = int(a.any(1).sum())
            narrow, closed = narrow + (hosted < rank), closed + (hosted == 0)
            for layer in layers:
                stage.write(layer.a, a)
        if narrow:
            stage.notes["inputs_without_room"] = float(narrow)
            self._warn(stage, narrow, closed)

    def _warn(self, stage: Stage, narrow: int, closed: int) -> None:
        """Say it before the training when A found too few free directions."""
        if stage.restored:  # it was said
            return
        total = len(self._sizes)
        effect = "nothing can be learned of this task" if closed == total else "less is learned"
        stage.warnings.append(
            f"{narrow} of {total} layer inputs have fewer free directions left than "
            f"adapter.rank={stage.config.adapter.rank}, {closed} of them none, so {effect}. Lower "
            "method.eps to leave more room."
        )

    def _measure(
        self, stage: Stage
    ) -> tuple[dict[str, list[AdaptedLayer]], dict[str, torch.Tensor]]:
        """Input -> the layers that read it, which share A and M; the covariances of the inputs that
        this rank owns. Collective: yes.
        """
        readers: dict[str, list[AdaptedLayer]] = {}
        for layer, name in input_names(stage).items():
            readers.setdefault(name, []).append(stage.adapted.layers[layer])
        self._sizes = {
            name: readers[name][0].module.base_layer.in_features for name in sorted(readers)
        }
        return readers, covariances(stage, self._sizes, self._owners, max_rows=self.settings.rows)

    # -- the memory ---------------------------------------------------------------------------

    def on_task_end(self, stage: Stage) -> None:
        """Protect the finished task's inputs, as the trained model sees them. Collective: yes."""
        eps = self.settings.eps
        share = eps + (1 - eps) * stage.index / len(stage.config.tasks)
        _, totals = self._measure(stage)
        for name in list(totals):
            inputs = powered(totals.pop(name), self.settings.power)
            one_fewer = self.settings.first_fill == "one_fewer"
            self.memory[name] = grow(self.memory.get(name), inputs, share, one_fewer)
        stage.notes["protected_share"] = share

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every input's basis, of the protected or of the free space. Collective: yes."""
        rank, world = self._place
        tensors: dict[str, torch.Tensor] = {}
        for name, owner in self._owners.items():
            mine = self.memory.get(name)
            basis = broadcast_any(None if mine is None else mine.basis, owner, world)
            free = torch.tensor([0 if mine is None else int(mine.free)], device=self._device)
            broadcast(free, owner, world)
            if rank == 0:
                tensors[(FREE if free.item() else PROTECTED) + name] = basis.cpu()
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the inputs that this rank owns."""
        found: dict[str, DualMemory] = {}
        for key, basis in tensors.items():
            free = key.startswith(FREE)
            name = key.removeprefix(FREE if free else PROTECTED)
            found[name] = DualMemory(basis, free)
        self._sizes = {name: found[name].basis.shape[0] for name in sorted(found)}
        self.memory = {
            name: DualMemory(found[name].basis.to(self._device, copy=True), found[name].free)
            for name, owner in self._owners.items()
            if owner == self._place[0]
        }

    def state_bytes(self) -> int:
        """Bytes of this rank's bases."""
        return sum(m.basis.numel() * m.basis.element_size() for m in self.memory.values())
