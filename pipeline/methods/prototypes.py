"""Class prototypes of finished tasks: mean pooled features of the model as it left each task.

A class is a task with one of its answers (as token ids), so that "true" of one task is not "true"
of another. Prototypes are kept as they were: nothing refreshes them when the model moves on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from accrete.pipeline.data.collate import IGNORED, Batch
from accrete.pipeline.distributed.comm import sum_over_ranks
from accrete.pipeline.math.triplet import unit

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

        Args:
            stage: The stage, still with its live factors.
            features: Watches the last block.
            score: Also tell how many percent of these rows lie nearest to their own class's
                prototype, among the prototypes of all tasks so far.

        Returns:
            That percentage, or None.

        Collective: yes.
        """
        pooled, classes, answers = _visit(stage, features)
        device = stage.engine.device
        sums = torch.zeros(len(answers), pooled.shape[1] + 1, device=device)
        sums.index_add_(0, classes, _with_ones(pooled))
        sum_over_ranks(sums, stage.engine.world)
        self.means[stage.name] = sums[:, :-1] / sums[:, -1:]
        width = max(len(answer) for answer in answers)
        filled = [[*answer, *[IGNORED] * (width - len(answer))] for answer in answers]
        self.answers[stage.name] = torch.tensor(filled, dtype=torch.long)
        if not score:
            return None
        everyone = self.directions()
        assert everyone is not None
        first = everyone.shape[0] - len(answers)
        # At unit length the nearest is the one with the largest product.
        nearest = (unit(pooled) @ everyone.T).argmax(1) - first
        counts = torch.tensor(
            [float((nearest == classes).sum()), float(len(classes))], device=device
        )
        sum_over_ranks(counts, stage.engine.world)
        return 100.0 * float(counts[0]) / float(counts[1])

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


def _visit(
    stage: Stage, features: BlockFeatures
) -> tuple[torch.Tensor, torch.Tensor, list[Answer]]:
    """This rank's features [n, d], their classes [n], and the answer of every class of the task."""
    numbers: dict[Answer, int] = {}
    pooled: list[torch.Tensor] = []
    mine: list[int] = []
    module = stage.engine.module
    was_training = module.training
    module.eval()
    seen, step = 0, 0
    with torch.no_grad():
        while seen < stage.rows.num_rows:
            rows = stage.global_batch(step)[: stage.rows.num_rows - seen]
            for row in rows:  # every rank reads all rows, so all number the classes alike
                numbers.setdefault(tuple(row.answer), len(numbers))
            for batch in stage.micro_batches(rows):
                stage.logits(batch, through_engine=False)
                pooled.append(last_features(features, batch))
                for labels in batch.labels[: batch.real_rows].tolist():
                    mine.append(numbers[tuple(t for t in labels if t != IGNORED)])
            seen, step = seen + len(rows), step + 1
    module.train(was_training)
    device = stage.engine.device
    return torch.cat(pooled), torch.tensor(mine, device=device, dtype=torch.long), list(numbers)
