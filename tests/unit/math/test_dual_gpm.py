"""DualGPM against NumPy: the paper's form on input matrices, the reference's on covariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accrete.pipeline.math import subspace
from accrete.pipeline.math.dual_gpm import DualMemory, free_basis, grow, open_directions, powered

SIZE = 24


def inputs(task, tokens=400, rank=None, size=SIZE):
    """[d, n] inputs of a task: a spectrum of its own, fp64."""
    rng = np.random.default_rng(task)
    turn, _ = np.linalg.qr(rng.normal(size=(size, size)))
    place = np.arange(size)
    strength = 0.75 ** (place * SIZE / size) * (place < (size if rank is None else rank))
    return turn @ (strength[:, None] * rng.normal(size=(size, tokens)))


def covariance(x):
    return torch.from_numpy(x @ x.T)


def protected(memory):
    """The projector on the protected space, whichever basis is stored."""
    basis = memory.basis.double()
    projector = basis @ basis.T
    return torch.eye(len(basis), dtype=torch.float64) - projector if memory.free else projector


def assert_same_space(memory, projector, tolerance=1e-5):
    difference = protected(memory) - torch.from_numpy(projector)
    assert float(difference.norm()) <= tolerance * max(1.0, np.linalg.norm(projector))


def gpm(projector, x, share):
    """GPM on the input matrix itself: append left singular vectors of what lies outside."""
    total = (x**2).sum()
    outside = x - projector @ x
    u, s, _ = np.linalg.svd(outside, full_matrices=False)
    held, count = total - (outside**2).sum(), 0
    while held < share * total * (1 - 1e-9):
        held, count = held + s[count] ** 2, count + 1
    return projector + u[:, :count] @ u[:, :count].T


class Reference:
    """DualGPM by singular vectors of the (projected) covariance; both of its states."""

    def __init__(self):
        self.basis, self.free = None, False

    def update(self, c, threshold):
        total = (np.linalg.svd(c, compute_uv=False) ** 2).sum()
        if self.basis is None:
            u, s, _ = np.linalg.svd(c)
            count = int((np.cumsum(s**2) / total < threshold).sum())
            self.basis = u[:, : max(count, 1)]
        elif not self.free:
            outside = c - self.basis @ self.basis.T @ c
            u, s, _ = np.linalg.svd(outside)
            held, count = 1 - (s**2).sum() / total, 0
            while held < threshold:
                held, count = held + s[count] ** 2 / total, count + 1
            self.basis = np.hstack([self.basis, u[:, :count]])
        else:
            inside = self.basis @ self.basis.T @ c
            u, s, _ = np.linalg.svd(inside)
            missing, count = (s**2).sum() / total, 0
            while missing >= 1 - threshold:
                missing, count = missing - s[count] ** 2 / total, count + 1
            taken = u[:, :count]
            kept = self.basis.shape[1] - count
            self.basis = np.linalg.svd(self.basis - taken @ taken.T @ self.basis)[0][:, :kept]
        if not self.free and self.basis.shape[1] > len(c) / 2:
            u = np.linalg.svd(self.basis)[0]
            self.basis, self.free = u[:, self.basis.shape[1] :], True

    def projector(self):
        inside = self.basis @ self.basis.T
        return np.eye(len(inside)) - inside if self.free else inside

    def a(self, c, rank):
        if self.basis is None:
            return np.linalg.svd(c)[0][:, :rank].T
        inside = self.basis @ self.basis.T @ c
        return np.linalg.svd(inside if self.free else c - inside)[0][:, :rank].T


def test_it_is_gpm_on_the_inputs():
    memory, projector = None, np.zeros((SIZE, SIZE))
    states = []
    for task, share in enumerate((0.6, 0.8, 0.95, 0.99)):
        x = inputs(task)
        memory, projector = grow(memory, covariance(x), share), gpm(projector, x, share)
        assert_same_space(memory, projector)
        assert memory.protected == round(np.trace(projector))
        states.append(memory.free)
    assert states[0] is False
    assert states[-1] is True


def test_it_is_the_reference_on_squared_covariances():
    memory, reference = None, Reference()
    states = []
    for task, share in enumerate((0.9, 0.95, 0.98, 0.99, 0.995)):
        c = covariance(inputs(task)) / 400
        got = open_directions(memory, powered(c, 2), 4).double().numpy()
        expected = reference.a(c.numpy(), 4)
        np.testing.assert_allclose(abs((got * expected).sum(1)), 1, atol=1e-5)
        memory = grow(memory, powered(c, 2), share, one_fewer=True)
        reference.update(c.numpy(), share)
        assert (memory.free, memory.protected) == (
            reference.free,
            round(np.trace(reference.projector())),
        )
        assert_same_space(memory, reference.projector())
        states.append(memory.free)
    assert states[0] is False
    assert states[-1] is True
    # Control: the two ways of counting are not the same memory.
    assert grow(None, powered(c, 1), 0.9).protected > grow(None, powered(c, 2), 0.9).protected


def test_one_fewer_is_for_the_first_fill_alone():
    c = covariance(inputs(0))
    assert grow(None, c, 0.6, one_fewer=True).protected == grow(None, c, 0.6).protected - 1
    memory = grow(None, c, 0.6)
    more = covariance(inputs(1))
    assert grow(memory, more, 0.7, one_fewer=True).protected == grow(memory, more, 0.7).protected
    assert grow(None, c, 1e-6, one_fewer=True).protected == 1


@pytest.mark.parametrize(
    ("double_below", "tolerance", "size"), [(2048, 1e-6, 24), (0, 1e-5, 24), (0, 1e-5, 256)]
)
@pytest.mark.parametrize("power", [1, 2])
def test_invariants_of_the_memory(monkeypatch, power, size, double_below, tolerance):
    """Also where decompositions are made in fp32, as they are of large layers."""
    monkeypatch.setattr(subspace, "_DOUBLE_BELOW", double_below)
    memory, before = None, torch.zeros(size, size, dtype=torch.float64)
    tasks = [powered(covariance(inputs(task, size=size)), power) for task in range(9)]
    for task, c in enumerate(tasks[:8]):
        share = 0.5 + 0.5 * task / 8
        assert c.dtype == (torch.float64 if double_below else torch.float32)
        memory = grow(memory, c, share)
        assert memory.basis.dtype == torch.float32
        assert memory.basis.shape[1] <= size / 2
        gram = memory.basis.T @ memory.basis
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
        now = protected(memory)
        held = float((now @ c.double() @ now).trace() / c.double().trace())
        assert held >= share - tolerance
        # Nothing that was protected is given up.
        assert float((before - now @ before).norm()) <= 1e-5 * max(1.0, float(before.norm()))
        # And what is opened leaves it alone.
        rows = open_directions(memory, tasks[task + 1], 5)
        assert float((rows.double() @ now).abs().max()) < 1e-5
        before = now
    assert memory.protected <= size


def test_nothing_new_changes_nothing():
    c = covariance(inputs(0))
    memory = grow(None, c, 0.7)
    assert grow(memory, c, 0.6) is memory


def test_everything_can_be_protected():
    memory = grow(None, covariance(inputs(0)), 1.0)
    assert memory.protected == SIZE
    assert memory.basis.shape == (SIZE, 0)
    assert grow(memory, covariance(inputs(1)), 1.0) is memory
    assert open_directions(memory, covariance(inputs(1)), 3).shape == (0, SIZE)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("rank_of_inputs", [2, SIZE])
def test_open_directions_avoid_the_protected_space(share, rank_of_inputs):
    """Also where the new inputs have fewer directions than are asked for."""
    memory = grow(None, covariance(inputs(0)), share)
    rows = open_directions(memory, covariance(inputs(1, rank=rank_of_inputs)), 5)
    assert len(rows) == min(5, SIZE - memory.protected)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
    assert float((rows.double() @ protected(memory)).abs().max()) < 1e-5
    # Control: without the memory they would run into it; of rank 2, only two say where they go.
    free = open_directions(None, covariance(inputs(1, rank=rank_of_inputs)), 5)[:rank_of_inputs]
    met = float(torch.linalg.matrix_norm(free.double() @ protected(memory), 2))
    assert met > 0.1


def test_open_directions_hold_the_most_of_the_new_inputs():
    """||A x||^2 over the inputs is the sum of the projected inputs' largest eigenvalues."""
    memory = grow(None, covariance(inputs(0)), 0.7)
    x = inputs(1)
    rows = open_directions(memory, covariance(x), 5).double().numpy()
    outside = x - protected(memory).numpy() @ x
    best = (np.linalg.svd(outside, compute_uv=False)[:5] ** 2).sum()
    assert ((rows @ x) ** 2).sum() == pytest.approx(best, rel=1e-6)


def test_answers_depend_on_the_space_alone():
    """Another basis of the same free space gives the same A, signs included."""
    memory = grow(None, covariance(inputs(0)), 0.9995)
    assert memory.free
    c = covariance(inputs(1))
    rng = np.random.default_rng(5)
    for _ in range(6):
        noise = rng.normal(size=(memory.basis.shape[1],) * 2)
        turned = DualMemory(memory.basis @ torch.from_numpy(np.linalg.qr(noise)[0]).float(), True)
        torch.testing.assert_close(
            open_directions(turned, c, 5), open_directions(memory, c, 5), rtol=0, atol=1e-5
        )
    # Where the first entry of every direction is zero, a QR decomposition alone fixes no sign.
    memory = DualMemory(torch.eye(SIZE)[:, 1:11].contiguous(), True)
    for _ in range(6):
        noise = rng.normal(size=(10, 10))
        turned = DualMemory(memory.basis @ torch.from_numpy(np.linalg.qr(noise)[0]).float(), True)
        torch.testing.assert_close(
            open_directions(turned, c, 5), open_directions(memory, c, 5), rtol=0, atol=1e-5
        )
    # A protected basis and the free one it stands for say the same.
    small = grow(None, covariance(inputs(0)), 0.5)
    assert not small.free
    other = DualMemory(free_basis(small, SIZE).float(), True)
    torch.testing.assert_close(
        open_directions(small, c, 3), open_directions(other, c, 3), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_energy_bound(share):
    """E ||dW x||^2 <= ||dW||_2^2 (1 - share) tr C for old inputs, with shares of the trace."""
    x = inputs(0)
    memory = grow(None, covariance(x), share)
    a = open_directions(memory, covariance(inputs(1)), 4).double().numpy()
    update = np.random.default_rng(3).normal(size=(10, 4)) @ a
    moved = ((update @ x) ** 2).sum()
    assert moved <= np.linalg.norm(update, 2) ** 2 * (1 - share) * (x**2).sum()
    # Control: shares of the squared spectrum promise no such thing.
    loose = grow(None, powered(covariance(x), 2), share)
    left = x - protected(loose).numpy() @ x
    assert (left**2).sum() > (1 - share) * (x**2).sum()
