"""DeepSpeed ZeRO 0 to 3, through Accelerate, driven directly so that the gap stays open.

Measured behaviour this file relies on (versions in constraints.txt; tests/distributed proves it):
`param.grad` is None in the gap at ZeRO >= 1; ZeRO 1 to 3 hold a master partition and the parameter
itself even in fp32, and both must be written; the full-tensor setters fail on the last rank at
ZeRO 3 when padding is needed, so the local ones are used there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.distributed.deepspeed_engine import deepspeed_config, prepare
from accrete.pipeline.distributed.engine import MOMENTS, OptimizerSettings, gradient_norm
from accrete.pipeline.errors import DistributedError


class ZeroEngine:
    """The `Engine` protocol on a DeepSpeed engine."""

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        *,
        ranks: Ranks,
        stage: int,
        accumulation: int,
        micro_batch: int,
        bucket_elements: int = 50_000_000,
        whole_below: int | None = None,
        most_live: int | None = None,
    ) -> None:
        """Let DeepSpeed take a model over.

        Args:
            module: The model.
            parameters: The trained parameters by name; the others are frozen.
            settings: The optimizer's.
            ranks: Who this process is.
            stage: ZeRO stage.
            accumulation: Micro-batches per step.
            micro_batch: Rows of a micro-batch.
            bucket_elements: Size of the reduction buckets.
            whole_below: At ZeRO 3, parameters with fewer elements are not partitioned; default:
                DeepSpeed's (1e5).
            most_live: At ZeRO 3, elements of gathered parameters that a rank keeps for their next
                use; default: DeepSpeed's (1e9). A larger model is gathered anew for the backward.
        """
        self.rank, self.world, self.device = ranks.rank, ranks.world, ranks.device
        self.accumulation = accumulation
        self.stage = stage
        self.parameters = parameters
        # DeepSpeed hangs its own attributes on parameters (ds_tensor, ds_shape, ds_numel).
        self._sharded: dict[str, Any] = dict(parameters)
        self._has_moments = settings.optimizer == "adamw"
        self._seen: dict[str, torch.Tensor] = {}
        config = deepspeed_config(
            stage,
            ranks.world,
            accumulation,
            micro_batch,
            bucket_elements,
            settings.max_grad_norm,
            whole_below,
            most_live,
        )
        self._optimizer = settings.build(list(parameters.values()))
        self._engine = prepare(module, self._optimizer, config)
        self.module: nn.Module = self._engine.module

    # -- the step ---------------------------------------------------------------------------

    def forward(self, **inputs: Any) -> Any:
        """Run the model. Collective: at ZeRO 3."""
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Backward of one micro-batch. Collective: yes."""
        self._engine.backward(loss)
        if not last:
            self._engine.step()
        elif not self._engine.is_gradient_accumulation_boundary():
            raise DistributedError("DeepSpeed and accrete disagree on where a step ends.")

    def step(self, learning_rate: float) -> float:
        """Clip, move the weights, drop the gradients. Collective: yes.

        At ZeRO 1 to 3 DeepSpeed leaves a step out whose gradients are not finite; at ZeRO 0 it
        would take it, so accrete looks first: there every rank holds the whole, reduced gradients.
        """
        whole = gradient_norm(self.parameters.values()) if self.stage == 0 else 0.0
        if not math.isfinite(whole):
            return whole
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if self.stage == 3:
            # DeepSpeed overwrites what a backward reaches. A parameter that the next step does not
            # use, or not in its first micro-batch, would have this step's gradient again.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        self._seen.clear()
        norm = self._engine.get_global_grad_norm()
        return whole if norm is None else float(norm)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """See `Engine.aside`.

        ZeRO 3 counts a module's inputs that wait for their gradients, and lets its weights go when
        none is left. Every forward begins that count anew: all weights would stay gathered.
        """
        waiting = {
            part: part.ds_grads_remaining
            for part in self.module.modules()
            if hasattr(part, "ds_grads_remaining")
        }
        try:
            yield
        finally:
            for part, count in waiting.items():
                part.ds_grads_remaining = count

    # -- values -----------------------------------------------------------------------------

    def watch(self) -> None:
        """At ZeRO 3, keep what each forward gathers, so that `peek` costs no traffic.

        DeepSpeed's own pre-forward hook, registered earlier, has gathered the parameter by the time
        this one runs.
        """
        if self.stage < 3:
            return
        owners: dict[nn.Module, list[str]] = {}
        by_id = {id(p): name for name, p in self.parameters.items()}
        for owner in self.module.modules():
            for parameter in owner.parameters(recurse=False):
                if id(parameter) in by_id:
                    owners.setdefault(owner, []).append(by_id[id(parameter)])
        for owner, names in owners.items():
            owner.register_forward_pre_hook(self._remember(names))

    def _remember(self, names: list[str]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            for name in names:
                self._seen[name] = self.parameters[name].detach().clone()

        return hook

    def peek(self, name: str) -> torch.Tensor:
        """A parameter as the last forward used it. Collective: no."""
        if self.stage < 3:
            return self.parameters[name].detach()
        if not self._seen:
            raise DistributedError(f"{name}: no forward since `watch` or the last step.")
        if name in self._seen:
            return self._seen[name]
        # A part of the model may not run, such as one for pictures. It gets no gradient either.
        return torch.zeros(self._shape(self.parameters[name]), device=self.device)

    def value(self, name: str) -> torch.Tensor:
        """The master value, whole. Collective: yes (at ZeRO 3)."""
        parameter = self._sharded[name]
        # Factors are fp32, so a copy that is whole equals the master. At ZeRO 3 DeepSpeed keeps
        # small parameters (1e5 elements) whole and gathers them anew in every step.
        if self.stage < 3 or parameter.numel() == parameter.ds_numel:
            whole: torch.Tensor = parameter.detach().clone()
            return whole
        from deepspeed.utils import safe_get_local_fp32_param

        return self._whole(parameter, safe_get_local_fp32_param(parameter))

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set master and copy. Collective: no."""
        parameter = self._sharded[name]
        if self.stage == 3:
            from deepspeed.utils import safe_set_local_fp32_param

            chunk = self._chunk(parameter, value)
            safe_set_local_fp32_param(parameter, chunk)
            parameter.ds_tensor.data.copy_(chunk)
            if parameter.numel() == parameter.ds_numel:  # small parameters stay gathered
                parameter.data.copy_(value.view(parameter.ds_shape))
            return
        if self.stage in (1, 2):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)

    # -- gradients in the gap ---------------------------------------------------------------

    def gradient(self, name: str) -> torch.Tensor:
        """The reduced gradient, whole. Collective: yes."""
        from deepspeed.utils import safe_get_full_grad

        parameter = self.parameters[name]
        gradient = safe_get_full_grad(parameter)
        if gradient is None:
            raise DistributedError(f"{name} has no gradient; read it between backward and step.")
        return torch.as_tensor(gradient).clone().view(self._shape(parameter))

    def write_gradient(self, name: str, value: torch.Tensor) -> None:
        """Replace the reduced gradient. Collective: no."""
        parameter = self.parameters[name]
        if self.stage == 3:
            from deepspeed.utils import safe_set_local_grad

            safe_set_local_grad(parameter, self._chunk(parameter, value))
            return
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(parameter, value)

    # -- optimizer state --------------------------------------------------------------------

    def moment(self, name: str, key: str) -> torch.Tensor:
        """One moment, whole; zeros before the first step. Collective: yes (at ZeRO >= 1)."""
        parameter = self.parameters[name]
        if not self._has_moments or not self._inner_states():
            return torch.zeros(self._shape(parameter), device=self.device)
        if self.stage == 0:
            state: dict[str, torch.Tensor] = self._optimizer.state[parameter]
            return state[key].clone()
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_optimizer_state

            return self._whole(parameter, safe_get_local_optimizer_state(parameter, key))
        from deepspeed.utils import safe_get_full_optimizer_state

        return torch.as_tensor(safe_get_full_optimizer_state(parameter, key)).clone()

    def write_moment(self, name: str, key: str, value: torch.Tensor) -> None:
        """Set one moment. Collective: no."""
        if not self._has_moments:
            return
        self._ensure_moments()
        parameter = self.parameters[name]
        if self.stage == 0:
            self._optimizer.state[parameter][key].copy_(value)
        elif self.stage == 3:
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(parameter, self._chunk(parameter, value), key)
        else:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value, key)

    @property
    def optimizer_step(self) -> int:
        """Steps counted since the last reset."""
        return max((int(s["step"]) for s in self._inner_states() if "step" in s), default=0)

    def write_optimizer_step(self, step: int) -> None:
        """Set the step count."""
        if self._has_moments:
            self._ensure_moments()
            for state in self._inner_states():
                state["step"].fill_(step)

    def reset_optimizer(self) -> None:
        """Zero all state in place: the tensors stay bound to DeepSpeed's partitions."""
        for state in self._inner_states():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def _inner_states(self) -> list[dict[str, Any]]:
        return [state for state in self._optimizer.state.values() if state]

    def _ensure_moments(self) -> None:
        """Create AdamW's state, which does not exist before the first step."""
        if self._inner_states():
            return
        if self.stage == 3:
            tensors = list(self._engine.optimizer.fp32_partitioned_groups_flat)
        else:
            tensors = [p for group in self._optimizer.param_groups for p in group["params"]]
        for tensor in tensors:
            state = self._optimizer.state[tensor]
            state["step"] = torch.tensor(0.0)
            state.update({key: torch.zeros_like(tensor) for key in MOMENTS})
        if self.stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    # -- shards -----------------------------------------------------------------------------

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
        """Frozen parameters whole inside the context. Collective: yes (at ZeRO 3)."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        wanted = list(parameters)
        self._call_back(wanted)
        with deepspeed.zero.GatheredParameters(wanted, modifier_rank=0 if write else None):
            yield

    def _call_back(self, parameters: list[Any]) -> None:
        """Drop what DeepSpeed fetches ahead, if any of these parameters is among it.

        A model of more elements than ZeRO 3 keeps gathered (1e9) is fetched anew for its backward,
        ahead of use. A forward that no backward follows ends with weights on their way, and
        `GatheredParameters` takes such a weight as it is: empty.
        """
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if any(parameter.ds_status is ZeroParamStatus.INFLIGHT for parameter in parameters):
            offload = self._engine.optimizer.parameter_offload
            offload.get_param_coordinator()._clean_inflight_param_registry()

    def _shape(self, parameter: Any) -> torch.Size:
        shape: torch.Size = parameter.ds_shape if self.stage == 3 else parameter.shape
        return shape

    def _chunk(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, zero-padded as DeepSpeed partitions it."""
        size = int(parameter.ds_tensor.numel())
        flat = value.new_zeros(size * self.world)
        flat[: value.numel()] = value.flatten()
        return flat[self.rank * size : (self.rank + 1) * size].to(self.device)

    def _whole(self, parameter: Any, chunk: torch.Tensor) -> torch.Tensor:
        """The inverse of `_chunk`. Collective: yes."""
        local = chunk.detach().contiguous().view(-1)
        parts = [torch.empty_like(local) for _ in range(self.world)]
        if self.world > 1:
            dist.all_gather(parts, local)
        else:
            parts = [local]
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape).clone()

    def close(self) -> None:
        """Free the engine (at ZeRO 3 DeepSpeed keeps a reference to the model)."""
        self._engine.destroy()
