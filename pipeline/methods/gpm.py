"""Gradient Projection Memory: the linear layers are trained, but not on inputs of earlier tasks.

For every distinct input of the linear layers an orthonormal basis M [d_in, m] of earlier tasks'
inputs is kept. After each optimizer step the update is projected, dW <- dW (I - M M^T), so that
dW x = 0 for every x in the span of M, whatever the optimizer did (Adam, momentum, weight decay).
Embeddings, norms, biases and the output head stay as they came: then a row whose inputs lie in the
spans goes through the whole network unchanged.

Cost: no snapshot of the weights is needed. M is fixed during a task, so "every update is projected"
is the same as "W M stays what it was": after a step W <- W - (W M - K) M^T with K = W M from the
task's start, which also keeps rounding from adding up. That is 4 d_out d_in m operations per layer
and step and, at ZeRO 3 alone, one gathering of each layer's weights. M and K are kept whole by
every rank. A task's end adds one forward pass over its rows and one decomposition per input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.distributed.comm import broadcast_any, owners_of
from accrete.pipeline.errors import MethodError, ModelError
from accrete.pipeline.math.subspace import grow_basis, residual
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.models.full import full_layers
from accrete.pipeline.statistics import covariances, input_names

if TYPE_CHECKING:
    from accrete.pipeline.models.full import FullLayer
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class GpmConfig(MethodConfig):
    """Settings of GPM."""

    kind: str = "gpm"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the squared length of a task's inputs that the memory holds when the task ends.
    More protects more and leaves less room for later tasks."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a task that its inputs are measured on, evenly spread over the first epoch's order;
    default: all training rows."""
    project: Literal["update", "gradient"] = "update"
    """`update`: after the optimizer, which holds the guarantee. `gradient`: before it, as the
    reference code does; right for plain SGD without weight decay only, as Adam's division leads
    the update back into the protected space."""
    others: Literal["frozen", "trained"] = "frozen"
    """Embeddings, norms, biases and the output head. `trained` gives room to learn and leaves the
    guarantee to each layer alone: the inputs themselves then drift."""


class Gpm(Method):
    """Full weights of the linear layers, updates orthogonal to earlier inputs."""

    Config: ClassVar[type[MethodConfig]] = GpmConfig
    summary: ClassVar[str] = "linear layers trained orthogonally to earlier tasks' inputs (GPM)"
    source: ClassVar[str] = "Saha et al., Gradient Projection Memory (ICLR 2021)"
    kept: ClassVar[str] = (
        "one orthonormal basis per distinct input, whole on every rank. M [d_in, m] of earlier "
        "inputs (layers that read one tensor share it); it grows to d_in at most"
    )
    cost: ClassVar[str] = (
        "one projection per layer a step, one forward over the rows at a task's end. A step: 4 "
        "d_out d_in m operations per layer after it. No collective at ZeRO 0 to 2; at ZeRO 3 one "
        "gathering of every weight. Within a task K = W M [d_out, m] per layer; no snapshot of "
        "the weights. A task's start: K. Its end: the forward over the rows (or `rows` of them), "
        "a covariance [d_in, d_in] per distinct input on every rank, one decomposition each, "
        "shared out over ranks"
    )
    guarantee: ClassVar[str] = (
        "delta W M = 0 for the whole task, after AdamW and weight decay. To 1e-5 of delta W, "
        "1e-10 on a linear regression in fp64. With `others: frozen` (default) rows whose inputs "
        "lie in the spans are answered as before (1e-5). In general only the share 1 - "
        "`threshold` of their inputs' squared length is exposed"
    )
    deviations: ClassVar[str] = (
        "the update is projected instead of the gradient; embeddings, norms and head are frozen. "
        "It is projected after the optimizer: the paper's SGD makes no difference between them, "
        "Adam does. The basis is found from the covariance of all real tokens, whose eigenvectors "
        "are the singular vectors of the representation matrix. One constant threshold for all "
        "layers and tasks. `others: trained` lets embeddings, norms, biases and the head go"
    )
    trains: ClassVar[Literal["factors", "weights"]] = "weights"
    fresh_adapter: ClassVar[bool] = False

    def __init__(self, config: GpmConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.memory: dict[str, torch.Tensor] = {}
        """Name of an input -> M [d_in, m], the same on every rank."""
        self._inputs: dict[str, str] = {}
        """Layer -> name of its input."""
        self._kept: dict[str, torch.Tensor] = {}
        """Layer -> K = W M [d_out, m] of the task's start."""
        self._handles: list[Any] = []
        self._device = torch.device("cpu")

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Remember the device."""
        self._device = device

    @property
    def weights(self) -> Literal["all", "linear"]:
        """As `others` says."""
        return "linear" if self.settings.others == "frozen" else "all"

    # -- a task -------------------------------------------------------------------------------

    def on_task_start(self, stage: Stage) -> None:
        """Find out who reads what, and what W M is to stay.

        Raises:
            ModelError: There are no linear layers, whose inputs could be protected.
            MethodError: Two of them share a weight, or see inputs that `input_names` does not know.

        Collective: at ZeRO 3.
        """
        self._forget_task()
        layers = full_layers(stage.adapted)
        if not layers:  # with `others: trained` there is something to train all the same
            raise ModelError(
                f"{type(stage.adapted.base).__name__} has no nn.Linear layers besides its output "
                "head; gpm protects the inputs of those alone. Choose another method."
            )
        if len({layer.parameter for layer in layers}) < len(layers):
            raise MethodError(
                "gpm: some linear layers of this model share one weight; accrete keeps one input "
                "space per weight. Choose another method."
            )
        self._inputs = input_names(stage)
        for layer in layers:
            basis = self._basis(layer)
            if basis is None:
                continue
            if self.settings.project == "gradient":
                parameter = stage.engine.parameters[layer.parameter]
                handle = parameter.register_hook(_projection(basis))  # type: ignore[no-untyped-call]
                self._handles.append(handle)
            else:
                self._kept[layer.name] = stage.engine.value(layer.parameter) @ basis
        self._warn_of_full_spaces(stage)

    def _warn_of_full_spaces(self, stage: Stage) -> None:
        """Say it before the training when there is nothing that an update could move."""
        bases = [self.memory[name] for name in set(self._inputs.values()) if name in self.memory]
        full = sum(basis.shape[0] == basis.shape[1] for basis in bases)
        if full and not stage.restored:
            stage.warnings.append(
                f"the memory holds all directions of {full} of {len(bases)} layer inputs, so the "
                "linear layers that read them stay as they are. Lower method.threshold to leave "
                "more room."
            )

    def after_step(self, stage: Stage) -> None:
        """Take out of the update what earlier inputs would see. Collective: at ZeRO 3."""
        for layer in full_layers(stage.adapted):
            basis = self._basis(layer)
            if basis is None or layer.name not in self._kept:
                continue
            weight = stage.engine.value(layer.parameter)
            stage.engine.write(layer.parameter, hold(weight, basis, self._kept[layer.name]))

    def _basis(self, layer: FullLayer) -> torch.Tensor | None:
        return self.memory.get(self._inputs.get(layer.name, ""))

    def on_task_end(self, stage: Stage) -> None:
        """Grow the memory until it holds the task's inputs. Collective: yes."""
        self._forget_task()
        sizes = {
            self._inputs[layer.name]: layer.module.in_features
            for layer in full_layers(stage.adapted)
            if layer.name in self._inputs
        }
        world = stage.engine.world
        owners = owners_of(dict(sorted(sizes.items())), world)
        seen = covariances(stage, sizes, owners, max_rows=self.settings.rows)
        # First all decompositions, each on its rank, then all sending: the ranks work side by side.
        grown = {
            name: grow_basis(self.memory.get(name), seen.pop(name), self.settings.threshold)
            for name in list(seen)
        }
        for name, owner in owners.items():
            self.memory[name] = broadcast_any(grown.pop(name, None), owner, world)
        directions = sum(basis.shape[1] for basis in self.memory.values())
        stage.notes["memory_share"] = directions / sum(sizes.values())

    def _forget_task(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """M of every input. Collective: no."""
        return {f"basis/{name}": basis.cpu() for name, basis in self.memory.items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Every rank keeps all of it."""
        for key, basis in tensors.items():
            self.memory[key.removeprefix("basis/")] = basis.to(self._device, copy=True)

    def state_bytes(self) -> int:
        """Bytes of the bases."""
        return sum(basis.numel() * basis.element_size() for basis in self.memory.values())


def hold(weight: torch.Tensor, basis: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The nearest matrix to W [d_out, d_in] whose product with M [d_in, m] is K [d_out, m].

    With K = W_old M this is W_old + (W - W_old)(I - M M^T). Changes W in place and returns it.
    """
    return weight.addmm_(weight @ basis - kept, basis.T, alpha=-1.0)


def _projection(basis: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    # Linear, so each rank may project its own gradient before they are averaged.
    return lambda gradient: residual(gradient, basis)
