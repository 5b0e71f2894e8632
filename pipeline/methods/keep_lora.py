"""KeepLoRA: updates that leave the pretrained and the learned input directions alone.

For every layer, M spans the principal input directions U_w of its pretrained weight and what its
inputs filled in earlier tasks. A is frozen, its rows the leading right singular vectors of the
task's dense gradient outside M; B starts at zero and is trained. A M = 0, so s B A changes nothing
on span(M), whatever the optimizer does to B.

Cost: nothing in a training step (A has no gradient). At the ends of a task one pass forward and
backward over its rows, one forward, and the decompositions, which the ranks share: a layer's basis
lies with one rank alone, which sends out A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.distributed import comm
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.math.fisher import add_gradients
from accrete.pipeline.math.row_space import join_bases, residual_rows, row_basis
from accrete.pipeline.math.subspace import grow_basis
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.statistics import (
    covariances,
    input_names,
    require_finite,
    visit_gradients,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accrete.pipeline.models.lora import AdaptedLayer
    from accrete.pipeline.stage import Stage

AT_ONCE = 4
"""Weights per rank that are looked at together: bounds the memory, lets ranks work side by side."""


@dataclass(frozen=True, kw_only=True)
class KeepLoraConfig(MethodConfig):
    """Settings of KeepLoRA."""

    kind: str = "keep_lora"
    eps_w: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Share of the squared singular values of a pretrained weight whose input directions are kept;
    0: none. The reference takes 0.6 for a language model, 0.2 and 0.85 for CLIP's towers."""
    eps_f: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of a finished task's energy at a layer's input that is kept from later ones; 0: none.
    """
    memory: Literal["features", "gradients"] = "features"
    """What a finished task leaves: its `features`, one basis per distinct input, as the paper says;
    or its `gradients`, one per layer, as the reference's code for language models does. Gradients
    span less and protect less."""
    gradient_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a task that its gradients are averaged over, evenly spread over the first epoch's
    order; default: all. (The reference: 10 to 20 % of them.)"""
    gradient_tokens: Literal["sum", "mean"] = "sum"
    """A row's loss is summed over its label tokens, as in training, or averaged."""
    feature_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a task that its features are taken from, evenly spread over the first epoch's order;
    default: all."""


class KeepLora(Method):
    """Frozen A in the residual space, trained B, exact merge."""

    Config: ClassVar[type[MethodConfig]] = KeepLoraConfig
    summary: ClassVar[str] = "updates outside the principal and the learned input space (KeepLoRA)"
    source: ClassVar[str] = (
        "Luo et al. 2026, KeepLoRA: continual learning with residual gradient adaptation"
    )
    kept: ClassVar[str] = (
        "one orthonormal basis per distinct layer input, 1/N per rank. [d_in, k] in fp32 on the "
        "CPU of one rank, k grows to d_in at most. Query, key and value share one, so do all "
        "cross-attentions of a T5; with `memory: gradients` there is one per layer. The principal "
        "directions U_w of W_0 lie there too, but are not in checkpoints: they follow from W_0 "
        "and are decomposed again when a run is resumed. Finished factors join the past exactly"
    )
    cost: ClassVar[str] = (
        "none in a step (B alone is trained); passes and decompositions at a task's ends. A step: "
        "A has no gradient and no moments, no added collective or arithmetic. A task's start: one "
        "forward and backward over its rows (`gradient_rows`), one dense G [d_out, d_in] per "
        "layer in fp32 on every rank, one reduction of it to the layer's owner, one fp64 "
        "decomposition of the shorter side per layer (shared out over ranks), one broadcast of A. "
        "Its end: one forward over the rows (`feature_rows`), one covariance [d_in, d_in] per "
        "distinct input, its reduction and decomposition. Once: one decomposition per W_0"
    )
    guarantee: ClassVar[str] = (
        "A M = 0, so delta W x = 0 for every x in the span of M = U_w + memory. After any "
        "optimizer, weight decay and clipping (1e-5, fp32; tested after AdamW with weight decay). "
        "It holds for the weights; `adapter.dropout` perturbs the training forward alone"
    )
    deviations: ClassVar[str] = (
        "U_w on the input side, memory from all real tokens, exact bases, B from zero. The CLIP "
        "code decomposes W untransposed, which only fits square weights, and averages inputs "
        "position by position, which finds the mean activation alone. Bases are the smallest that "
        "reach the share (its codes keep one fewer in places), fp32, orthonormal to 1e-5 (its "
        "LLaVA code keeps fp16). G is a mean over rows in fp32 (batch means in fp16 there); its "
        "SVD is exact (randomised without oversampling there). The memory holds eps_f of a task's "
        "inputs by itself, shared by the layers that read them, and M joins it with U_w; the "
        "reference counts what U_w holds towards eps_f, layer by layer: this protects at least as "
        "much and takes more room. B starts at zero, as in the LLaVA code and version 2; the "
        "first CLIP code's start from the gradient's SVD with W - s B A as base is not offered"
    )

    def __init__(self, config: KeepLoraConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.memory: dict[str, torch.Tensor] = {}
        """Input (or layer, for gradients) -> basis [d_in, k] on the CPU; this rank's alone, once a
        task has started."""
        self.principal: dict[str, torch.Tensor] = {}
        """Layer -> U_w [d_in, p] on the CPU; this rank's alone."""
        self._inputs: dict[str, str] = {}
        self._running: set[str] = set()
        """Layers that have inputs."""
        self._owners: dict[str, int] = {}
        self._decomposed = False
        self._place = (0, 1)
        self._device = torch.device("cpu")

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Remember which rank this is."""
        self._place = (rank, world)
        self._device = device

    def trainable(self, factor: str) -> bool:
        """B alone; A holds the directions that are free."""
        return factor == "B"

    # -- who does what ------------------------------------------------------------------------

    def _plan(self, stage: Stage) -> None:
        """Layers to inputs, inputs to ranks. Collective: yes, at its first call."""
        if self._inputs:
            return
        # A layer that does not run, such as one of a part for pictures, has no gradient: A is zero.
        running = input_names(stage)
        self._running = set(running)
        self._inputs = {name: name for name in stage.adapted.layers} | running
        shapes = {
            name: (linear.out_features, linear.in_features)
            for name, layer in stage.adapted.layers.items()
            for linear in [layer.module.base_layer]
        }
        self._owners = layer_owners(self._inputs, shapes, self._place[1])
        # What was loaded is whole on every rank.
        self.memory = {key: basis for key, basis in self.memory.items() if self._mine(key)}

    def _mine(self, layer: str) -> bool:
        """Whether this rank decomposes for a layer (an input has the name of a layer)."""
        return self._owners[layer] == self._place[0]

    def _key(self, layer: str) -> str:
        """Name of the memory that a layer reads."""
        return self._inputs[layer] if self.settings.memory == "features" else layer

    # -- the start of a task ------------------------------------------------------------------

    def on_sequence_start(self, stage: Stage) -> None:
        """Principal input directions of every W_0, on the rank that needs them."""
        self._decompose_weights(stage)

    def _decompose_weights(self, stage: Stage) -> None:
        """Collective: yes (at ZeRO 3 one weight at a time is whole)."""
        self._plan(stage)
        if self.settings.eps_w == 0 or self._decomposed:
            return
        self._decomposed = True
        layers = list(stage.adapted.layers.values())
        size = AT_ONCE * self._place[1]
        for start in range(0, len(layers), size):
            held: dict[str, torch.Tensor] = {}
            for layer in layers[start : start + size]:
                weight = stage.past.original(layer)
                if self._mine(layer.name):
                    held[layer.name] = weight
            for name, weight in held.items():
                self.principal[name] = row_basis(weight, self.settings.eps_w).cpu()

    def on_task_start(self, stage: Stage) -> None:
        """Write A: the gradient's main directions outside M. On resume the checkpoint has A."""
        self._decompose_weights(stage)
        if stage.restored:
            return
        rank = stage.config.adapter.rank
        gradients = self._gradients(stage)
        found: dict[str, torch.Tensor] = {}
        for name in list(gradients):
            found[name], _ = residual_rows(gradients.pop(name), self._basis(name), rank)
        for layer in stage.adapted.layers.values():
            columns = layer.module.base_layer.in_features
            mine = found.get(layer.name)
            a = torch.empty(rank, columns, device=self._device) if mine is None else mine
            comm.broadcast(a, self._owners[layer.name], self._place[1])
            stage.write(layer.a, a)
        self._warn_of_empty_rows(stage)

    def _basis(self, layer: str) -> torch.Tensor | None:
        """M of one of this rank's layers, fp64."""
        parts = (self.memory.get(self._key(layer)), self.principal.get(layer))
        memory, principal = (None if p is None else p.to(self._device) for p in parts)
        return join_bases(memory, principal)

    def _gradients(self, stage: Stage) -> dict[str, torch.Tensor]:
        """G [d_out, d_in] of this rank's layers: mean over rows, fp32. Collective: yes."""
        totals: dict[str, torch.Tensor] = {}
        for layer in stage.adapted.layers.values():
            linear = layer.module.base_layer
            size = (linear.out_features, linear.in_features)
            totals[layer.name] = torch.zeros(size, device=self._device)

        def visit(layer: AdaptedLayer, x: torch.Tensor, g: torch.Tensor) -> None:
            add_gradients(totals[layer.name], x, g)

        count = visit_gradients(
            stage,
            visit,
            token_mean=self.settings.gradient_tokens == "mean",
            max_rows=self.settings.gradient_rows,
        )
        require_finite(stage, totals.values(), "gradients")
        comm.sum_to_owners(totals, self._owners, *self._place)
        return {name: total.div_(count) for name, total in totals.items()}

    # -- the end of a task --------------------------------------------------------------------

    def on_task_end(self, stage: Stage) -> None:
        """Grow the memory by what this task filled, at its final weights. Collective: yes."""
        self._plan(stage)
        stage.notes["empty_rows"] = float(self._empty_rows(stage)[0])
        if self.settings.eps_f > 0:
            features = self.settings.memory == "features"
            seen = self._features(stage) if features else self._gradients(stage)
            for name in list(seen):
                gram = seen.pop(name)
                if not features:
                    gram = gram.double()
                    gram = gram.T @ gram
                old = self.memory.get(name)
                old = None if old is None else old.to(self._device)
                self.memory[name] = grow_basis(old, gram, self.settings.eps_f).cpu()
        largest = max((b.shape[1] / b.shape[0] for b in self.memory.values()), default=0.0)
        stage.notes["memory_share"] = max(comm.gather(largest, self._place[1]))

    def _features(self, stage: Stage) -> dict[str, torch.Tensor]:
        """Sum of x x^T [d_in, d_in] over tokens, of this rank's inputs. Collective: yes."""
        sizes = {
            name: stage.adapted.layers[layer].module.base_layer.in_features
            for layer, name in self._inputs.items()
            if layer == name
        }
        return covariances(stage, sizes, self._owners, max_rows=self.settings.feature_rows)

    def _empty_rows(self, stage: Stage) -> tuple[int, int]:
        """Zero rows of A, and all rows, of the layers that run. Collective: at ZeRO 3."""
        empty = total = 0
        for name in sorted(self._running):
            a = stage.read(stage.adapted.layers[name].a)
            empty, total = empty + int((a == 0).all(1).sum()), total + len(a)
        return empty, total

    def _warn_of_empty_rows(self, stage: Stage) -> None:
        """Say it before the training when A found no free direction. Collective: at ZeRO 3."""
        empty, total = self._empty_rows(stage)
        if empty:
            effect = "nothing can be learned of this task" if empty == total else "less is learned"
            stage.warnings.append(
                f"{empty} of {total} rows of A are zero, so {effect}: fewer directions than the "
                "rank are left outside the protected space, or have any gradient. Lower "
                "method.eps_w or method.eps_f to leave more room."
            )

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The memory, whole, on rank 0. U_w follows from W_0 and is not in it. Collective: yes."""
        rank, world = self._place
        tensors: dict[str, torch.Tensor] = {}
        seen: set[str] = set()
        for owner, names in enumerate(comm.gather(list(self.memory), world)):
            for name in names:
                if name in seen:
                    continue
                seen.add(name)
                own = self.memory[name].to(self._device) if rank == owner else None
                basis = comm.broadcast_any(own, owner, world)
                if rank == 0:
                    tensors[f"basis/{self.settings.memory}/{name}"] = basis.cpu()
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the whole memory; what is other ranks' goes when a task starts.

        Raises:
            ConfigError: It was made with another `method.memory`.
        """
        self.memory.clear()
        for key, basis in tensors.items():
            _, made, name = key.split("/", 2)
            if made != self.settings.memory:
                raise ConfigError(
                    f"method.memory: given: {self.settings.memory}; this run's checkpoints were "
                    f"made with {made}. Branch with that, or start a new run."
                )
            if not self._owners or self._mine(name):
                self.memory[name] = basis.cpu()

    def state_bytes(self) -> int:
        """Bytes of the bases that this rank keeps."""
        held = [*self.memory.values(), *self.principal.values()]
        return sum(basis.numel() * basis.element_size() for basis in held)


def layer_owners(
    inputs: dict[str, str], shapes: Mapping[str, tuple[int, int]], world: int
) -> dict[str, int]:
    """Which rank decomposes for which layer: those that read one input are one rank's.

    Args:
        inputs: Layer -> name of its input.
        shapes: Layer -> (d_out, d_in) of its weight.
        world: Ranks in all.

    Returns:
        Layer -> rank; the dearest inputs go first, each to the rank with the least to do so far,
        as the cubes of what is decomposed count it: the wide inputs of down-projections must not
        all fall to every second rank.
    """
    readers: dict[str, list[str]] = {}
    for layer, name in inputs.items():
        readers.setdefault(name, []).append(layer)
    costs = {
        name: shapes[name][1] ** 3 + sum(min(shapes[layer]) ** 3 for layer in layers)
        for name, layers in readers.items()
    }
    owners = comm.share_out(costs, world)
    return {layer: owners[name] for layer, name in inputs.items()}
