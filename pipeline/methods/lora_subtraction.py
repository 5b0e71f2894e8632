"""LoRA- and its drift-resistant space: train only where the unlearned model sees the new task.

Before a task, the earlier tasks' updates V are subtracted from the pretrained weights, W_0 - V; the
features of the new task under that model span, up to a share of their energy, a subspace with the
projector P. Updates of A stay in it: A_0 <- A_0 P, and after every optimizer step A <- A P, so that
delta W P = delta W holds exactly, whatever Adam and weight decay do. (A gradient projected before
Adam would leave the subspace.) Since A_old P = A_old, that is A_old + (A_new - A_old) P.

An augmented triplet loss keeps the classes of a task apart, from each other and from the
prototypes of earlier tasks; it is off for tasks without a closed set of answers.

Traffic: the projection adds none to a step, except at ZeRO 3 for factors above 1e5 elements (one
gather each). The triplet loss adds one gather of [rows, d] a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from accrete.pipeline.distributed.comm import broadcast, gather_equal, owners_of
from accrete.pipeline.errors import MethodError
from accrete.pipeline.math.projector import Projector
from accrete.pipeline.math.triplet import triplet_losses, unit
from accrete.pipeline.methods.base import Method, MethodConfig
from accrete.pipeline.methods.prototypes import Prototypes, last_features
from accrete.pipeline.models.features import BlockFeatures
from accrete.pipeline.stage import accumulation, batch_share
from accrete.pipeline.statistics import covariances, input_names

if TYPE_CHECKING:
    from accrete.pipeline.data.collate import Batch
    from accrete.pipeline.data.encode import EncodedRow
    from accrete.pipeline.models.lora import AdaptedLayer
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class LoraSubtractionConfig(MethodConfig):
    """Settings of LoRA-."""

    kind: str = "lora_subtraction"
    mode: Literal["projected", "reference"] = "projected"
    """`projected`: A starts and stays in the space, so delta W P = delta W. `reference`: as in the
    reference code, A starts anywhere and only its updates are projected."""
    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the features' squared length (the trace of their covariance) that the space holds;
    1 is no restriction."""
    feature_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a task that its space is found from, evenly spread over the first epoch's order;
    default: all training rows."""
    b_mode: Literal["none", "output_cov", "reference"] | None = None
    """Which updates of B are kept: all; those in the principal space of the layer's own outputs
    under W_0 - V; or, as the reference code does, those in the space of its *inputs* (square layers
    only). Default: `none`, in reference mode `reference`."""
    scale_mode: Literal["none", "inv_sqrt_k"] | None = None
    """`inv_sqrt_k` divides every kept update by the root of the space's dimension, as the reference
    code does. Default: `none`, in reference mode `inv_sqrt_k`."""
    triplet: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the triplet loss; 0 is off. Off by itself for tasks with open answers."""
    margin: Annotated[float, Field(ge=0)] = 1.0
    """Wanted difference between the distances to another and to the own class, of at most 2."""
    ncm: bool = False
    """Note after every task how many percent of its training rows lie nearest to their own class's
    prototype among those of all tasks (`ncm_accuracy`); a pass more, nothing generated."""


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Factors whose updates share one projector."""

    projector: Projector
    names: list[str]
    transposed: bool
    """The factors are B [d_out, r]: P works on their columns."""
    scale: float
    """Kept updates are multiplied by it."""
    stays: bool
    """The factors lie in the space already, so the value may be projected for the update."""


class LoraSubtraction(Method):
    """Updates inside the drift-resistant space, and a triplet loss with prototypes."""

    Config: ClassVar[type[MethodConfig]] = LoraSubtractionConfig
    summary: ClassVar[str] = "updates inside the space of the unlearned model's features (LoRA-)"
    source: ClassVar[str] = "Liu and Chang 2025, LoRA Subtraction for Drift-Resistant Space"
    kept: ClassVar[str] = (
        "the finished factors; for closed labels one mean feature [d] per class. The means with "
        "the triplet loss or `ncm` only. The space itself is found anew before every task and "
        "thrown away"
    )
    cost: ClassVar[str] = (
        "one projection of all A a step, up to three forward passes a task. A step: 4 r d min(k, "
        "d-k) per distinct input: 1 ms of 2.9 s (0.03 %) at 2,048 tokens on four LLaMA-like "
        "layers of width 768, one CPU core. No added collective at ZeRO 0 to 2; nor at ZeRO 3, "
        "but that a factor above 1e5 elements (DeepSpeed's threshold) is gathered once a step. "
        "The triplet loss adds one gather of [rows of a micro-batch, d] and [b, n + prototypes] "
        "distances. A task's start: one forward pass over its rows (or `feature_rows`) and one "
        "eigendecomposition per distinct input, shared out over the ranks; all covariances [d, d] "
        "lie in memory at once for that time. Its end: with the triplet loss or `ncm`, one "
        "forward pass; with `ncm` a second. Features are added up by class, not kept"
    )
    guarantee: ClassVar[str] = (
        "delta W P = delta W after every step, whatever Adam and weight decay do. To 1e-5, fp32, "
        "in `mode: projected`; a gradient projected before Adam leaks more than 5 %. Without "
        "earlier tasks: plain LoRA to the bit, but for the triplet loss. W_0 - V is used without "
        "touching a weight. The triplet loss does not depend on the number of ranks, as long as "
        "`global_batch_size` is a multiple of `micro_batch_size` x ranks, or no more than that"
    )
    deviations: ClassVar[str] = (
        "A starts in the space, P is idempotent, B is free; answers are generated. The reference "
        "starts A anywhere, divides by the root of k and projects B on the space of the inputs "
        "(`mode: reference`). Padding is left out of the covariance. Classes are (task, answer). "
        "Candidates of the triplet loss carry no gradient. They are the rows of the anchor's "
        "block of the global batch, of as many rows as a micro-batch has in one process: the loss "
        "depends on `micro_batch_size`. Where a micro-batch over all ranks ends within a block "
        "(never where the guarantee holds), they are the block's rows in that micro-batch. Nearest "
        "class means are only a diagnostic: `ncm` looks at training rows of the finished task "
        "alone, among the classes of all tasks so far, and says nothing about older tasks. B "
        "starts at zero also in reference mode (there: sparse noise of 0.01)"
    )

    def __init__(self, config: LoraSubtractionConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.prototypes = Prototypes()
        self.rules: list[_Rule] = []
        """What holds in the task being trained; empty without earlier tasks."""
        self._old: dict[str, torch.Tensor] = {}
        self._features: BlockFeatures | None = None
        self._directions: torch.Tensor | None = None
        self._micro = 0
        self._value: torch.Tensor | None = None
        self._device = torch.device("cpu")

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Remember the device."""
        self._device = device

    @property
    def b_mode(self) -> Literal["none", "output_cov", "reference"]:
        """The rule for B in force."""
        default = self.settings.mode == "reference"
        return self.settings.b_mode or ("reference" if default else "none")

    @property
    def scaled(self) -> bool:
        """Whether updates are divided by the root of k."""
        chosen = self.settings.scale_mode
        return self.settings.mode == "reference" if chosen is None else chosen == "inv_sqrt_k"

    # -- the space ----------------------------------------------------------------------------

    def on_sequence_start(self, stage: Stage) -> None:
        """See before any training that a pass can tell rows apart. Collective: at ZeRO 3."""
        input_names(stage)

    def on_task_start(self, stage: Stage) -> None:
        """Find this task's space, move A into it, watch the last block. Collective: yes."""
        self._close()
        if self.b_mode == "reference":
            _require_square(stage)
        self.rules = self._find_rules(stage) if stage.past.stages else []
        for rule in self.rules:
            if rule.stays and not rule.transposed:
                self._move(stage, rule, [stage.read(name) for name in rule.names], first=True)
        if self.settings.triplet > 0 and stage.task.labels is not None:
            self._features = BlockFeatures(stage, last_only=True)
            self._directions = self.prototypes.directions()

    def _find_rules(self, stage: Stage) -> list[_Rule]:
        """One rule per distinct input, and per layer where B is projected. Collective: yes."""
        readers: dict[str, list[AdaptedLayer]] = {}
        for layer_name, name in input_names(stage).items():  # of layers that run
            readers.setdefault(name, []).append(stage.adapted.layers[layer_name])
        sizes = {name: layers[0].module.base_layer.in_features for name, layers in readers.items()}
        owners = owners_of(sizes, stage.engine.world)
        with stage.past.subtracted():
            seen = covariances(stage, sizes, owners, max_rows=self.settings.feature_rows)
        # First all decompositions, each on its rank, then all sending: the ranks work side by side.
        energy = self.settings.energy
        found = {name: Projector.of(covariance, energy) for name, covariance in seen.items()}
        outer = self._output_spaces(stage, readers, seen) if self.b_mode == "output_cov" else {}
        seen.clear()
        rules: list[_Rule] = []
        shares: list[float] = []
        for name, layers in readers.items():
            projector = _send(stage, found.pop(name, None), sizes[name], owners[name])
            shares.append(projector.size / sizes[name])
            rules.append(self._rule(projector, [layer.a for layer in layers], a=True))
            if self.b_mode == "reference":
                rules.append(self._rule(projector, [layer.b for layer in layers], a=False))
            elif self.b_mode == "output_cov":
                for layer in layers:
                    size = layer.module.base_layer.out_features
                    sent = _send(stage, outer.pop(layer.name, None), size, owners[name])
                    rules.append(self._rule(sent, [layer.b], a=False))
        stage.notes["space_share"] = sum(shares) / len(shares)
        return rules

    def _output_spaces(
        self, stage: Stage, readers: dict[str, list[AdaptedLayer]], seen: dict[str, torch.Tensor]
    ) -> dict[str, Projector]:
        """Layer -> projector of its outputs, where `seen` has its input. Collective: at ZeRO 3."""
        found: dict[str, Projector] = {}
        for name, layers in readers.items():
            for layer in layers:
                # y = W x, so C_y = W C_x W^T: no pass of its own, and no bias.
                weight = stage.past.subtracted_weight(layer)
                if name in seen:
                    outputs = weight @ seen[name] @ weight.T
                    found[layer.name] = Projector.of(outputs, self.settings.energy)
        return found

    def _rule(self, projector: Projector, names: list[str], *, a: bool) -> _Rule:
        return _Rule(
            projector=projector,
            names=names,
            transposed=not a,
            scale=projector.size**-0.5 if self.scaled else 1.0,
            # B starts at zero, in every space.
            stays=not a or self.settings.mode == "projected",
        )

    def before_step(self, stage: Stage) -> None:
        """Note the factors whose updates, not values, will be projected."""
        self._micro, self._value = 0, None
        for rule in self.rules:
            if not (rule.stays and rule.scale == 1.0):
                for name in rule.names:
                    if name not in self._old:
                        self._old[name] = stage.engine.value(name)

    def after_step(self, stage: Stage) -> None:
        """Bring the step back into the space, weight decay and all."""
        for rule in self.rules:
            self._move(stage, rule, [stage.engine.value(name) for name in rule.names])

    def _move(
        self, stage: Stage, rule: _Rule, values: list[torch.Tensor], *, first: bool = False
    ) -> None:
        """Project factors, or their updates; those that share an input in one product."""
        if rule.projector.whole and rule.scale == 1.0:
            return
        whole = first or (rule.stays and rule.scale == 1.0)
        rows = [value.T if rule.transposed else value for value in values]
        stacked = torch.cat(rows)
        if whole:
            moved = rule.projector.rows(stacked)
        else:
            old = [self._old[name] for name in rule.names]
            start = torch.cat([value.T if rule.transposed else value for value in old])
            moved = start + rule.projector.rows(stacked - start).mul_(rule.scale)
        parts = torch.split(moved, [part.shape[0] for part in rows])
        for name, part in zip(rule.names, parts, strict=True):
            value = (part.T if rule.transposed else part).contiguous()
            stage.engine.write(name, value)
            if not whole:
                self._old[name] = value

    # -- the triplet loss ---------------------------------------------------------------------

    def loss_terms(
        self, stage: Stage, batch: Batch, logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The mean over the step's rows of the triplet loss. Collective: yes.

        Candidates are the rows of the anchor's own block (see `block_rows`) that any rank holds in
        this micro-batch.
        """
        if self._features is None:
            return {}
        anchors = unit(last_features(self._features, batch))
        rows, engine = stage.global_batch(stage.step), stage.engine
        classes, blocks = (part.to(engine.device) for part in _places(stage, rows, self._micro))
        self._micro += 1
        sent = anchors.new_zeros(classes.shape[1], anchors.shape[1])
        sent[: batch.real_rows] = anchors.detach()
        losses = triplet_losses(
            anchors,
            classes[engine.rank, : batch.real_rows],
            torch.cat(gather_equal(sent, engine.world)),
            classes.flatten(),
            self._directions,
            self.settings.margin,
            (blocks[engine.rank, : batch.real_rows], blocks.flatten()),
        )
        mean = losses.sum() / len(rows)
        before = 0.0 if self._value is None else self._value
        self._value = mean.detach() + before
        return {"triplet": mean * (self.settings.triplet * engine.world * engine.accumulation)}

    def step_sums(self) -> dict[str, torch.Tensor]:
        """The step's mean triplet loss, before its weight."""
        return {} if self._value is None else {"triplet": self._value}

    # -- the end of a task --------------------------------------------------------------------

    def on_task_end(self, stage: Stage) -> None:
        """Keep the prototypes of this task's classes. Collective: yes."""
        self._close()
        wanted = self.settings.triplet > 0 or self.settings.ncm
        if not wanted or stage.task.labels is None:
            return
        features = BlockFeatures(stage, last_only=True)
        accuracy = self.prototypes.add(stage, features, score=self.settings.ncm)
        features.close()
        if accuracy is not None:
            stage.notes["ncm_accuracy"] = accuracy

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The prototypes; the spaces are found anew before every task."""
        return self.prototypes.state_dict()

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.prototypes.load_state_dict(tensors, self._device)

    def state_bytes(self) -> int:
        """Bytes of the prototypes."""
        return self.prototypes.state_bytes()

    def _close(self) -> None:
        if self._features is not None:
            self._features.close()
        self._features = self._directions = self._value = None
        self._old.clear()
        self.rules = []


def block_rows(batch: int, micro_batch: int) -> int:
    """Rows of a micro-batch if one rank had the whole global batch.

    The blocks of so many rows that a global batch divides into are the same for any number of
    ranks. A micro-batch over all ranks is a run of rows, too. It is a whole number of blocks for
    one rank, and wherever `batch` is a multiple of `micro_batch` x ranks or no more than that;
    otherwise it can end within a block.

    Args:
        batch: train.global_batch_size.
        micro_batch: train.micro_batch_size.
    """
    return -(-batch_share(batch, 1) // accumulation(batch, micro_batch, 1))


def _places(stage: Stage, rows: list[EncodedRow], micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class (-1: no row) and block of every rank's places in a micro-batch, both [world, size]."""
    train, world = stage.config.train, stage.engine.world
    size = -(-batch_share(train.global_batch_size, world) // stage.engine.accumulation)
    # Rank r has every world-th row of the global batch, from row r on.
    own = torch.arange(micro * size, (micro + 1) * size)
    positions = own * world + torch.arange(world)[:, None]
    numbers: dict[tuple[int, ...], int] = {}
    classes = [numbers.setdefault(tuple(row.answer), len(numbers)) for row in rows]
    present = torch.tensor([*classes, -1])[positions.clamp(max=len(rows))]
    return present, positions // block_rows(train.global_batch_size, train.micro_batch_size)


def _send(stage: Stage, found: Projector | None, dimension: int, owner: int) -> Projector:
    """`owner`'s projector on every rank; the others pass None. Collective: yes."""
    engine = stage.engine
    size = torch.tensor([0 if found is None else found.size], device=engine.device)
    count, keeps = Projector.layout(dimension, int(broadcast(size, owner, engine.world)))
    basis = torch.empty(dimension, count, device=engine.device) if found is None else found.basis
    broadcast(basis, owner, engine.world)
    return Projector(int(size), basis, keeps)


def _require_square(stage: Stage) -> None:
    for layer in stage.adapted.layers.values():
        linear = layer.module.base_layer
        if linear.in_features != linear.out_features:
            raise MethodError(
                f"lora_subtraction with b_mode=reference projects B on the space of the layer's "
                f"inputs, which only a square layer has room for; {layer.name} maps "
                f"{linear.in_features} to {linear.out_features}. Set method.b_mode=none or "
                "output_cov, or choose square layers with adapter.targets."
            )
