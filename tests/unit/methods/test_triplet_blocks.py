"""LoRA-'s triplet loss on emulated ranks: whose candidates are whose, against loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from accrete.pipeline.math.triplet import unit
from accrete.pipeline.methods import lora_subtraction
from accrete.pipeline.methods.lora_subtraction import (
    LoraSubtraction,
    LoraSubtractionConfig,
    block_rows,
)
from accrete.pipeline.stage import accumulation, batch_share

MARGIN, WEIGHT = 1.8, 0.3
ALONE = 1


class Team:
    """All ranks of a step, one after another, on rows whose features are given."""

    def __init__(self, monkeypatch, batch, micro, world, features, answers, old):
        self.batch, self.world = batch, world
        self.count = accumulation(batch, micro, world)
        self.size = -(-batch_share(batch, world) // self.count)
        self.features, self.old = features.clone().requires_grad_(), old
        self.train = SimpleNamespace(global_batch_size=batch, micro_batch_size=micro)
        self.rows = [SimpleNamespace(answer=answer) for answer in answers]
        monkeypatch.setattr(lora_subtraction, "last_features", lambda _, batch: batch.features)
        monkeypatch.setattr(lora_subtraction, "gather_equal", self.gather)
        self.now = (0, 0)

    def own(self, rank, number):
        """Places in the global batch of a rank's rows in a micro-batch, as `Stage` deals them."""
        mine = range(len(self.rows))[rank :: self.world]
        return list(mine[number * self.size : (number + 1) * self.size])

    def gather(self, sent, world):
        rank, number = self.now
        parts = []
        for other in range(world):
            places = self.own(other, number)
            part = torch.zeros_like(sent)
            part[: len(places)] = unit(self.features.detach()[places])
            parts.append(part)
        assert world == self.world
        assert torch.equal(sent, parts[rank])
        return parts

    def step(self):
        """What the engine makes of the terms, its gradient, and the loss that is noted down."""
        total, noted = torch.zeros(()), torch.zeros(())
        for rank in range(self.world):
            method = LoraSubtraction(LoraSubtractionConfig(triplet=WEIGHT, margin=MARGIN))
            method._features, method._directions = object(), self.old
            engine = SimpleNamespace(
                rank=rank, world=self.world, accumulation=self.count, device=torch.device("cpu")
            )
            stage = SimpleNamespace(
                step=0,
                global_batch=lambda step: self.rows,
                engine=engine,
                config=SimpleNamespace(train=self.train),
            )
            for number in range(self.count):
                self.now = (rank, number)
                places = self.own(rank, number)
                batch = SimpleNamespace(real_rows=len(places), features=self.features[places])
                total = total + method.loss_terms(stage, batch, None)["triplet"]
            noted = noted + method.step_sums()["triplet"]
        total = total / (self.world * self.count)
        (gradient,) = torch.autograd.grad(total, self.features)
        return total.detach(), gradient, noted


def by_loops(team, block):
    """The step's mean loss by the words of the card."""
    f, old = unit(team.features.detach()), [] if team.old is None else team.old.tolist()
    answers, total = [row.answer for row in team.rows], 0.0
    for i, answer in enumerate(answers):
        beside = [
            j
            for j in range(len(answers))
            if j // block == i // block
            and j // (team.size * team.world) == i // (team.size * team.world)
        ]
        distance = {j: math.dist(f[i].tolist(), f[j].tolist()) for j in beside}
        negative = [distance[j] for j in beside if answers[j] != answer]
        negative += [math.dist(f[i].tolist(), p) for p in old]
        if negative:
            positive = max(distance[j] for j in beside if answers[j] == answer)
            total += max(0.0, positive - min(negative) + MARGIN)
    return total / len(answers)


def data(seed, count, with_old):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    answers = [[int(n)] for n in torch.randint(0, 3, (count,), generator=generator)]
    old = unit(torch.randn(4, 5, generator=generator, dtype=torch.float64)) if with_old else None
    return features, answers, old


WHOLE = [(32, 8, 2), (32, 8, 4), (32, 4, 4), (8, 4, 2), (8, 2, 4), (7, 3, 3), (10, 4, 4)]
"""(global batch, micro-batch, ranks): accumulation differs from one rank's, no block is cut."""
CUT = [(32, 8, 3), (20, 6, 3), (10, 4, 2), (14, 4, 3)]
"""Here a micro-batch over all ranks ends within a block."""


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("short", [0, 3])
@pytest.mark.parametrize("sizes", [*WHOLE, *CUT])
def test_candidates_are_those_of_the_block(monkeypatch, sizes, short, with_old):
    batch, micro, _ = sizes
    team = Team(monkeypatch, *sizes, *data(4, batch - short, with_old))
    loss, _, noted = team.step()
    expected = by_loops(team, block_rows(batch, micro))
    assert float(loss) == pytest.approx(WEIGHT * expected, rel=1e-12)
    assert float(noted) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.05


@pytest.mark.parametrize("short", [0, 3])
@pytest.mark.parametrize("sizes", WHOLE)
def test_ranks_that_cut_no_block_come_to_what_one_comes_to(monkeypatch, sizes, short):
    batch, micro, _ = sizes
    given = data(11, batch - short, True)
    several = Team(monkeypatch, *sizes, *given)
    got = several.step()
    one = Team(monkeypatch, batch, micro, ALONE, *given)
    expected = one.step()
    assert several.count < one.count
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)
    # Control: all rows of a micro-batch over all ranks as one pool, which grows with the ranks.
    monkeypatch.setattr(lora_subtraction, "block_rows", lambda batch, micro: batch)
    pooled, *_ = Team(monkeypatch, *sizes, *given).step()
    assert abs(float(pooled - expected[0])) > 1e-2 * float(expected[0])


@pytest.mark.parametrize(("batch", "micro"), [(32, 8), (8, 8), (10, 4), (13, 3)])
def test_one_rank_has_one_block_a_micro_batch(monkeypatch, batch, micro):
    """So that groups change nothing there, to the bit."""
    given = data(5, batch, True)
    grouped = Team(monkeypatch, batch, micro, ALONE, *given).step()
    real = lora_subtraction.triplet_losses
    monkeypatch.setattr(lora_subtraction, "triplet_losses", lambda *a: real(*a[:6]))
    for mine, theirs in zip(
        grouped, Team(monkeypatch, batch, micro, ALONE, *given).step(), strict=True
    ):
        assert torch.equal(mine, theirs)


def cuts(batch, micro, world):
    """Whether a micro-batch over all ranks that is not the step's last ends within a block."""
    count = accumulation(batch, micro, world)
    together = -(-batch_share(batch, world) // count) * world
    return any(j * together % block_rows(batch, micro) for j in range(1, count))


def test_no_block_is_cut_where_the_card_says_so():
    sizes = [(g, m, w) for g in range(1, 41) for m in range(1, 13) for w in range(1, 6)]
    promised = [s for s in sizes if s[2] == 1 or s[0] % (s[1] * s[2]) == 0 or s[0] <= s[1] * s[2]]
    assert len(promised) > 1000
    assert not any(cuts(*s) for s in promised)
    assert not any(cuts(*s) for s in WHOLE)
    assert all(cuts(*s) for s in CUT)


def test_blocks_by_hand():
    sizes = {(32, 8): 8, (8, 8): 8, (5, 8): 5, (10, 4): 4, (13, 3): 3, (20, 6): 5, (9, 8): 5}
    assert {given: block_rows(*given) for given in sizes} == sizes
