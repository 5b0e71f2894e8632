"""Class prototypes of finished tasks: mean pooled features of the model as it left each task.

A class is a task with one of its answers (as token ids), so that "true" of one task is not "true"
of another. Prototypes are kept as they were: nothing refreshes them when the model moves on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from accrete.pipeline.data.collate import IGNORED, Batch
from accrete.pipeline.distributed.comm import sum_over_ranks
from accrete.pipeline.math.triplet import unit
from accrete.pipeline.statistics import evaluating, global_batches, require_finite

if TYPE_CHECKING:
    from accrete.pipeline.models.features import BlockFeatures
    from accrete.pipeline.stage import Stage

Answer = tuple[int, ...]


def last_features(features: BlockFeatures, batch: Batch) -> torch.Tensor:
    """[real rows, d] of the last forward: the (decoder's) last block where the answer begins."""
    return features.pooled(batch)[-1][: batch.real_rows, -1]


class Prototypes:
    """Mean features of every class seen, task by task, whole on every rank."""

    def __init__(self) -> None:
        self.means: dict[str, torch.Tensor] = {}
        """Task -> [classes, d], fp32, not normalised."""
        self.answers: dict[str, torch.Tensor] = {}
        """Task -> [classes, K] int64, the answers' token ids, filled up with -100."""

    def directions(self) -> torch.Tensor | None:
        """[all classes, d] at unit length, in the order of the tasks; None before the first."""
        return unit(torch.cat(list(self.means.values()))) if self.means else None

    def add(self, stage: Stage, features: BlockFeatures, score: bool = False) -> float | None:
        """Learn the classes of a task from one pass over its training rows, in evaluation mode.

        Features are added up batch by batch: what is held does not grow with the rows.

        Args:
            stage: The stage, still with its live factors.
            features: Watches the last block.
            score: Also tell how many percent of these rows lie nearest to their own class's
                prototype, among the prototypes of all tasks so far; a second pass.

        Returns:
            That percentage, or None.

        Raises:
            MethodError: See `require_finite`.

        Collective: yes.
        """
        numbers: dict[Answer, int] = {}
        sums = torch.zeros(0, 0, device=stage.engine.device)

        def add_up(pooled: torch.Tensor, classes: torch.Tensor) -> None:
            nonlocal sums
            x = _with_ones(pooled)
            sums = _grown(sums, len(numbers), x.shape[1]).index_add_(0, classes, x)

        _visit(stage, features, numbers, add_up)
        sum_over_ranks(sums, stage.engine.world)
        require_finite(stage, [sums], "last features")
        self.means[stage.name] = sums[:, :-1] / sums[:, -1:]
        width = max(len(answer) for answer in numbers)
        filled = [[*answer, *[IGNORED] * (width - len(answer))] for answer in numbers]
        self.answers[stage.name] = torch.tensor(filled, dtype=torch.long)
        return self._score(stage, features, numbers) if score else None

    def _score(self, stage: Stage, features: BlockFeatures, numbers: dict[Answer, int]) -> float:
        """Percent of the rows whose nearest prototype is that of their class. Collective: yes."""
        everyone = self.directions()
        assert everyone is not None
        first = everyone.shape[0] - len(numbers)
        hits = torch.zeros(2, dtype=torch.float64, device=stage.engine.device)

        def count(pooled: torch.Tensor, classes: torch.Tensor) -> None:
            # At unit length the nearest is the one with the largest product.
            nearest = (unit(pooled) @ everyone.T).argmax(1) - first
            hits[0] += (nearest == classes).sum()
            hits[1] += len(classes)

        _visit(stage, features, numbers, count)
        sum_over_ranks(hits, stage.engine.world)
        return 100.0 * float(hits[0]) / float(hits[1])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """By name, in the order of the tasks."""
        tensors: dict[str, torch.Tensor] = {}
        for number, (task, means) in enumerate(self.means.items()):
            tensors[f"prototypes/{number:03}/{task}"] = means.cpu()
            tensors[f"answers/{number:03}/{task}"] = self.answers[task]
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Inverse of `state_dict`."""
        for key in sorted(tensors):
            kind, _, task = key.split("/", 2)
            if kind == "prototypes":
                self.means[task] = tensors[key].to(device)
            else:
                self.answers[task] = tensors[key]

    def state_bytes(self) -> int:
        """Bytes of all prototypes."""
        tensors = [*self.means.values(), *self.answers.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    """[n, d] with a column of ones behind, so that sums and counts travel together."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def _grown(sums: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns]: a smaller matrix with zeros below, or an empty one's successor."""
    if sums.shape == (rows, columns):
        return sums
    result = sums.new_zeros(rows, columns)
    result[: sums.shape[0], : sums.shape[1]] = sums
    return result


def _visit(
    stage: Stage,
    features: BlockFeatures,
    numbers: dict[Answer, int],
    see: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """One forward pass over the stage's rows, in evaluation mode.

    Args:
        stage: The stage.
        features: Watches the last block.
        numbers: Answer -> class; answers that are not in it yet are added, the same on every rank.
        see: Gets of each of this rank's batches the features [b, d] and the classes [b]; b may be
            0. By then `numbers` has all of them.

    Collective: at ZeRO 3.
    """
    with evaluating(stage.engine.module), torch.no_grad():
        for rows in global_batches(stage):
            for row in rows:  # every rank reads all rows, so all number the classes alike
                numbers.setdefault(tuple(row.answer), len(numbers))
            for batch in stage.micro_batches(rows):
                stage.logits(batch, through_engine=False)
                answers = batch.labels[: batch.real_rows].tolist()
                mine = [numbers[tuple(t for t in labels if t != IGNORED)] for labels in answers]
                classes = torch.tensor(mine, dtype=torch.long, device=stage.engine.device)
                see(last_features(features, batch), classes)
