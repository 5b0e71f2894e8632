"""SR2-LoRA: keep the spectra of the relations between blocks as the previous model has them.

For every row of the current task, the pooled outputs of the L blocks (models/features.py) give a
relation matrix R = Phi Phi^T / d. Its singular values under the live model are held close to those
under the previous one by a SmoothL1 term. Text is not augmented and the previous model is fixed,
so its spectra are constants: one pass at the start of a task replaces a second forward per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.distributed.comm import sum_over_ranks
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.math.relations import spectral_losses, spectrum
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.methods.previous import previous_model
from accrete.pipeline.models.features import BlockFeatures
from accrete.pipeline.statistics import evaluating

if TYPE_CHECKING:
    from accrete.pipeline.data.collate import Batch
    from accrete.pipeline.data.encode import EncodedRow
    from accrete.pipeline.stage import Stage

CACHE_BYTES = 1 << 28
"""`cache: auto` keeps at most so many bytes of spectra per rank."""


@dataclass(frozen=True, kw_only=True)
class Sr2LoraConfig(MethodConfig):
    """Settings of SR2-LoRA."""

    kind: str = "sr2_lora"
    mu: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the relation loss: search it on dev rows. Where the loss is linear its gradient
    does not fall as the spectra come close, so large values hold the model still."""
    faithful: bool = False
    """True: the reference's loss, R = Phi Phi^T without division by d, and a weight of 1 (`mu` must
    be 1). Its implicit weight grows with the width of the model."""
    cache: Literal["auto", "always", "never"] = "auto"
    """The previous model's spectra: computed once per task and kept on every rank (4 bytes per row
    and block), or by a second forward in every step. Both are the same; auto keeps them up to
    256 MiB."""


class Sr2Lora(Method):
    """Aligned spectra of inter-block relations."""

    Config: ClassVar[type[MethodConfig]] = Sr2LoraConfig
    summary: ClassVar[str] = "spectra of inter-layer relations held to the previous model (SR2)"
    source: ClassVar[str] = "SR2-LoRA (reference code: FqWan24/SR-2-LoRA)"
    kept: ClassVar[str] = (
        "nothing beside the finished factors. Within a task: the previous model's spectra, 4 "
        "bytes per row and block on every rank (5,000 rows of T5-large: 1 MB), plus 16 bytes per "
        "row to find them; dropped at the task's end"
    )
    cost: ClassVar[str] = (
        "an L x L eigenvalue problem per row, one forward over a task's rows at its start. A "
        "step: features of every block (one token per row and block; in an encoder the mean over "
        "tokens), one problem per row and stack; no added collective. `cache: never` adds a "
        "forward per micro-batch instead. A task's start: that forward, over the rows that the "
        "task will see, and one sum over ranks of the spectra. Its end: nothing"
    )
    guarantee: ClassVar[str] = (
        "none for features; the loss is exact. L_rel and its gradient are 0 at the start of a "
        "task. The loss is a mean over the rows of a step, whatever the ranks and micro-batches. "
        "Cached and recomputed spectra agree to 1e-5. The first task and `mu: 0` are `inc_lora` "
        "to the bit. It holds spectra, not features: any orthogonal mixing of blocks or rotation "
        "of features costs nothing"
    )
    deviations: ClassVar[str] = (
        "other tokens for vision's CLS token, R divided by d, no classifier alignment. The last "
        "prompt token (decoder), the mean over source tokens (encoder) and the start token (its "
        "decoder), after the stack's final norm. Encoder and decoder losses are averaged. R is "
        "divided by d and weighted by `mu` (`faithful` does neither). Dropout is off in the old "
        "pass only (the reference has none at all). Classifier alignment has no analogue in text"
    )

    def __init__(self, config: Sr2LoraConfig) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ConfigError: `faithful` with a weight of one's own.
        """
        super().__init__(config)
        self.settings = config
        if config.faithful and config.mu != 1.0:
            raise ConfigError(
                f"method.mu={config.mu:g} with method.faithful=true: the reference has no weight. "
                "Leave method.mu at 1, or set method.faithful=false."
            )
        self.cache: SpectraCache | None = None
        self._features: BlockFeatures | None = None
        self._queue: list[EncodedRow] = []
        self._factor = 0.0
        self._value: torch.Tensor | None = None

    # -- a task -------------------------------------------------------------------------------

    def on_task_start(self, stage: Stage) -> None:
        """From the second task on: watch the blocks, and look at every row with the model as it is.

        The live B is zero here, on resume too, so the model is the previous one without any detour.
        Collective: yes.
        """
        self._close()
        if not stage.past.stages or self.settings.mu == 0:
            return
        self._features = BlockFeatures(stage)
        steps = min(stage.steps, stage.rows.steps_per_epoch)
        rows = min(stage.rows.num_rows, steps * stage.config.train.global_batch_size)
        size = 4 * rows * sum(self._features.sizes)
        how = self.settings.cache
        if how == "always" or (how == "auto" and size <= CACHE_BYTES):
            self.cache = self._look(stage, steps)
            stage.notes["cache_bytes"] = float(self.cache.bytes)

    def on_task_end(self, stage: Stage) -> None:
        """Let go of the blocks and of the spectra: nothing is carried to the next task."""
        self._close()

    def _close(self) -> None:
        if self._features is not None:
            self._features.close()
        self._features, self.cache, self._value = None, None, None

    def _look(self, stage: Stage, steps: int) -> SpectraCache:
        """Spectra of all rows of the first `steps` steps, on every rank. Collective: yes."""
        engine = stage.engine
        indices: list[int] = []
        blocks: list[torch.Tensor] = []
        with evaluating(stage.engine.module), torch.no_grad():
            for step in range(steps):
                rows = stage.global_batch(step)
                mine: list[torch.Tensor] = []
                for batch in stage.micro_batches(rows):
                    stage.logits(batch, through_engine=False)
                    mine.append(self._spectra(batch))
                found = torch.cat(mine)
                block = found.new_zeros(len(rows), found.shape[1])
                block[engine.rank :: engine.world] = found
                blocks.append(block)
                indices.extend(row.index for row in rows)
        # Ranks deal the rows anew in every epoch, so each gets all; the others' places are zero.
        return SpectraCache(indices, sum_over_ranks(torch.cat(blocks), engine.world))

    def _spectra(self, batch: Batch) -> torch.Tensor:
        """[real rows, blocks of all stacks] of the last forward, padding rows left out."""
        assert self._features is not None
        parts = []
        for features in self._features.pooled(batch):
            divisor = 1.0 if self.settings.faithful else float(features.shape[2])
            parts.append(spectrum(features[: batch.real_rows], divisor))
        return torch.cat(parts, dim=1)

    # -- a step -------------------------------------------------------------------------------

    def before_step(self, stage: Stage) -> None:
        """Which rows this rank will see, and what each of them counts."""
        if self._features is None:
            return
        engine = stage.engine
        rows = stage.global_batch(stage.step)
        self._queue = rows[engine.rank :: engine.world]
        self._factor = engine.world * engine.accumulation / len(rows)
        self._value = torch.zeros((), device=engine.device)

    def loss_terms(
        self, stage: Stage, batch: Batch, logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Relation loss of this micro-batch, so that a step's is mu times the mean over its rows.

        Collective: no with a cache; without one at ZeRO 3, as the forward it makes.
        """
        if self._features is None or self._value is None:
            return {}
        new = self._spectra(batch)
        rows = self._queue[: batch.real_rows]
        self._queue = self._queue[batch.real_rows :]
        old = self._again(stage, batch) if self.cache is None else self.cache.of(rows)
        sizes = self._features.sizes
        stacks = zip(torch.split(new, sizes, dim=1), torch.split(old, sizes, dim=1), strict=True)
        per_stack = [spectral_losses(live, before).sum() for live, before in stacks]
        loss = torch.stack(per_stack).mean() * self.settings.mu * self._factor
        self._value += loss.detach() / (stage.engine.world * stage.engine.accumulation)
        return {"relations": loss}

    def _again(self, stage: Stage, batch: Batch) -> torch.Tensor:
        """The previous model's spectra by a forward of their own; every rank makes one."""
        with previous_model(stage):
            stage.logits(batch, through_engine=False)
            return self._spectra(batch)

    def step_sums(self) -> dict[str, torch.Tensor]:
        """This rank's part of mu L_rel."""
        return {} if self._value is None else {"penalty": self._value}


class SpectraCache:
    """The previous model's spectra of a task's rows; the same on every rank."""

    def __init__(self, indices: list[int], values: torch.Tensor) -> None:
        """Keep `values` [N, blocks], the spectra of the rows numbered `indices`."""
        self._values = values
        self._numbers, self._places = torch.tensor(indices).sort()

    @property
    def bytes(self) -> int:
        """Bytes of the spectra and of the numbers that find them."""
        kept = (self._values, self._numbers, self._places)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def of(self, rows: list[EncodedRow]) -> torch.Tensor:
        """[len(rows), blocks] in the order of `rows`."""
        wanted = torch.tensor([row.index for row in rows], dtype=torch.long)
        places = self._places[torch.searchsorted(self._numbers, wanted)]
        return self._values[places.to(self._values.device)]
