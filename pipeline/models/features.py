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

Pool = Callable[[torch.Tensor], torch.Tensor]
"""A block's output [b, T, d] to one normed vector per row, [b, d] in fp32."""


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
        self._norms: list[_Norm] = []
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
                self._norms.append(_Norm(norm))
            for place in kept:
                handle = blocks[place].register_forward_hook(self._remember(number, place))
                self._handles.append(handle)

    def _remember(self, stack: int, place: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            self._seen[stack, place] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    @property
    def sizes(self) -> list[int]:
        """Watched blocks of every stack, in the order of `pooled`."""
        return [len(kept) for kept in self._kept]

    def pooled(self, batch: Batch) -> list[torch.Tensor]:
        """Features [b, blocks, d] in fp32 of the last forward, one tensor per stack.

        Args:
            batch: The batch of that forward (its masks say where rows begin and end).

        An encoder-decoder gives [encoder, decoder], a decoder one tensor. Differentiable.
        Collective: no.
        """
        result = []
        for number, kept in enumerate(self._kept):
            pool = self._pool(number, batch)
            states = [self._seen.pop((number, place)) for place in kept]
            result.append(torch.stack([pool(state) for state in states], dim=1))
        self._seen.clear()
        return result

    def _pool(self, stack: int, batch: Batch) -> Pool:
        norm = self._norms[stack]
        mask = batch.inputs["attention_mask"]
        if len(self._kept) == 1:
            place = _last_prompt_token(mask, batch.labels)
            return lambda state: norm(_token(state, place))
        if stack == 1:
            return lambda state: norm(state[:, 0].float())
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return lambda state: norm.mean(state.float(), share)

    def forget(self) -> None:
        """Drop what the last forward left."""
        self._seen.clear()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()


def _last_prompt_token(mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[b] columns of a decoder's sequence [b, T], whatever the side of the padding.

    Logits and labels [b, K] are aligned at the end, so the first label's column is the last prompt
    token's own; a row without labels ends with its prompt, or is padding.
    """
    width, count = mask.shape[1], labels.shape[1]
    last = (mask * torch.arange(1, width + 1, device=mask.device)).argmax(1)
    if count == 0:
        return last
    has_label = labels != IGNORED
    return torch.where(has_label.any(1), width - count + has_label.int().argmax(1), last)


def _token(state: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """One token of every row: [b, T, d] and [b] to [b, d], in fp32."""
    # The gradient of `gather` is one scatter; that of state[rows, place] sorts its indices first.
    index = place.view(-1, 1, 1).expand(-1, 1, state.shape[2])
    return state.gather(1, index).squeeze(1).float()


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


class _Norm:
    """A frozen norm with its own fp32 copy of the weights, free of sharding and hooks."""

    def __init__(self, norm: Any) -> None:
        """Copy a LayerNorm or an RMSNorm whose parameters are whole.

        Raises:
            ModelError: It is neither.
        """
        weight = getattr(norm, "weight", None)
        if weight is None:
            raise _unknown(norm)
        self._weight: torch.Tensor = weight.detach().float().clone()
        self._bias: torch.Tensor | None = None
        self._centred = isinstance(norm, nn.LayerNorm)
        if isinstance(norm, nn.LayerNorm):
            self._eps = norm.eps
            if norm.bias is not None:
                self._bias = norm.bias.detach().float().clone()
            return
        self._eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
        # Its own forward, past any hooks, on a vector whose mean is not zero: some families add 1
        # to the weight or subtract the mean.
        probe = torch.linspace(-1.0, 2.0, self._weight.numel(), device=self._weight.device)
        own = type(norm).forward(norm, probe.to(weight.dtype)).float()
        if not torch.allclose(own, self(probe), rtol=2e-2, atol=2e-2):
            raise _unknown(norm)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of [..., d] in fp32."""
        if self._centred:
            size = self._weight.shape
            return nn.functional.layer_norm(x, size, self._weight, self._bias, self._eps)
        return x * self._inverse(x)[..., None] * self._weight

    def mean(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The weighted mean over tokens of the norm: [b, T, d] and [b, T] to [b, d].

        An RMSNorm scales each token by one number, so the mean is one product with the raw states
        instead of several passes over normed ones.
        """
        if self._centred:
            return torch.einsum("bt,btd->bd", share, self(x))
        return torch.einsum("bt,btd->bd", share * self._inverse(x), x) * self._weight

    def _inverse(self, x: torch.Tensor) -> torch.Tensor:
        """[...] one over the root mean square of [..., d]."""
        square = torch.linalg.vector_norm(x, dim=-1).square()
        return torch.rsqrt(square / x.shape[-1] + self._eps)


def _unknown(norm: nn.Module) -> ModelError:
    return ModelError(
        f"{type(norm).__name__}: accrete does not know this kind of final norm (only RMSNorm and "
        "LayerNorm with weights). Choose a method that needs no block features."
    )
