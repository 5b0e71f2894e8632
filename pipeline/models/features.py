"""One vector per row and block: what a model's blocks say at the place where the answer begins.

Decoder: the last prompt token, which predicts the first answer token. Encoder-decoder: the mean
over source tokens in the encoder, the start token in the decoder. Every block's output goes
through its stack's final norm, so that blocks are comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accrete.pipeline.data.collate import IGNORED
from accrete.pipeline.errors import ModelError

if TYPE_CHECKING:
    from accrete.pipeline.data.collate import Batch
    from accrete.pipeline.stage import Stage

NORMS = ("norm", "final_layer_norm", "ln_f", "layer_norm")


class BlockFeatures:
    """Watches the blocks of a model; `pooled` reads what the last forward left."""

    def __init__(self, stage: Stage, last_only: bool = False) -> None:
        """Hook the model's blocks. Collective: at ZeRO 3.

        Args:
            stage: Gives model and engine.
            last_only: Keep the last block of every stack alone.

        Raises:
            ModelError: The model has no list of blocks with a final norm that accrete knows.
        """
        self._seen: dict[tuple[int, int], torch.Tensor] = {}
        self._handles: list[Any] = []
        self._norms: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self._kept: list[list[int]] = []
        base = stage.adapted.base
        stacks = (
            [base.get_encoder(), base.get_decoder()]  # type: ignore[operator]
            if stage.facts.seq2seq
            else [base.get_decoder()]  # type: ignore[operator]
        )
        for number, stack in enumerate(stacks):
            blocks, norm = _parts(stack)
            kept = [len(blocks) - 1] if last_only else list(range(len(blocks)))
            self._kept.append(kept)
            with stage.engine.gathered(list(norm.parameters())):
                self._norms.append(_copy_norm(norm))
            for place in kept:
                handle = blocks[place].register_forward_hook(self._remember(number, place))
                self._handles.append(handle)

    def _remember(self, stack: int, place: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            self._seen[stack, place] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    def pooled(self, batch: Batch) -> list[torch.Tensor]:
        """Features [b, blocks, d] in fp32 of the last forward, one tensor per stack.

        Args:
            batch: The batch of that forward (its masks say where rows begin and end).

        An encoder-decoder gives [encoder, decoder], a decoder one tensor. Differentiable.
        Collective: no.
        """
        result = []
        for number, kept in enumerate(self._kept):
            states = [self._seen.pop((number, place)) for place in kept]
            normed = [self._norms[number](state.float()) for state in states]
            pool = self._pool(number, batch)
            result.append(torch.stack([pool(state) for state in normed], dim=1))
        self._seen.clear()
        return result

    def _pool(self, stack: int, batch: Batch) -> Callable[[torch.Tensor], torch.Tensor]:
        mask = batch.inputs["attention_mask"]
        if len(self._kept) == 2:
            if stack == 1:
                return lambda state: state[:, 0]
            weight = (mask / mask.sum(1, keepdim=True).clamp(min=1)).float()
            return lambda state: torch.einsum("bt,btd->bd", weight, state)
        # Logits and labels are aligned at the end: the first label's column is the last prompt
        # token's own.
        width, count = mask.shape[1], batch.labels.shape[1]
        has_label = batch.labels != IGNORED
        first = torch.where(has_label.any(1), has_label.int().argmax(1), count - 1)
        place = width - count + first
        rows = torch.arange(len(place), device=place.device)
        return lambda state: state[rows, place]

    def forget(self) -> None:
        """Drop what the last forward left."""
        self._seen.clear()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()


def _parts(stack: Any) -> tuple[nn.ModuleList, nn.Module]:
    """A stack's blocks and its final norm."""
    lists = [child for child in stack.children() if isinstance(child, nn.ModuleList)]
    norms = [getattr(stack, name) for name in NORMS if hasattr(stack, name)]
    if not lists or not norms:
        raise ModelError(
            f"{type(stack).__name__}: accrete finds no list of blocks with a final norm "
            f"({', '.join(NORMS)}) in it; this method needs both. Choose another method."
        )
    return max(lists, key=len), norms[0]


def _copy_norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A frozen norm as a function of its own copy of the weights, free of sharding and hooks."""
    weight = norm.weight.detach().float().clone()
    if isinstance(norm, nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.detach().float().clone()
        shape, layer_eps = norm.normalized_shape, norm.eps
        return lambda x: nn.functional.layer_norm(x, shape, weight, bias, layer_eps)
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))

    def root_mean_square(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    probe = torch.linspace(-1.0, 1.0, weight.numel(), device=weight.device)
    # Its own forward, past any hooks: some families add 1 to the weight or subtract the mean.
    own = type(norm).forward(norm, probe.to(norm.weight.dtype)).float()
    if not torch.allclose(own, root_mean_square(probe), rtol=2e-2, atol=2e-2):
        raise ModelError(
            f"{type(norm).__name__}: accrete does not know this kind of final norm (only RMSNorm "
            "and LayerNorm). Choose a method that needs no block features."
        )
    return root_mean_square
