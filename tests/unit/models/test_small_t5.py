"""small_t5 on a handful of rows, and the word vectors against a dense oracle."""

import gzip
import json

import numpy as np
import torch

from accrete.pipeline.models.small_t5 import SmallSettings, build_small_t5, outside_tasks
from accrete.pipeline.models.word_vectors import _counts, _ppmi, ppmi_svd

TEXTS = [[0, 1, 2, 1, 3], [2, 2, 0], [4, 1], [5]]


def oracle_ppmi(texts, size, window):
    counts = np.zeros((size, size))
    for text in texts:
        for i, a in enumerate(text):
            for j, b in enumerate(text):
                if i != j and abs(i - j) <= window:
                    counts[a, b] += 1
    row = counts.sum(1)
    context = row**0.75 / (row**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = counts / row[:, None] / context
    ppmi = np.log(np.maximum(np.nan_to_num(ratio, nan=0.0, posinf=0.0), 1.0))
    return counts, (ppmi + ppmi.T) / 2


def test_counts_and_ppmi_equal_the_definition():
    counts, expected = oracle_ppmi(TEXTS, 6, 2)
    ours = _counts(TEXTS, 6, 2)
    assert np.array_equal(ours.numpy(), counts)
    np.testing.assert_allclose(_ppmi(ours).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_vectors_have_the_wanted_size_and_follow_from_the_seed():
    first = ppmi_svd(TEXTS, 6, 3, 2, seed=0)
    assert torch.equal(first, ppmi_svd(TEXTS, 6, 3, 2, seed=0))
    assert first.shape == (6, 3)
    assert torch.isfinite(first).all()
    torch.testing.assert_close(first[:5].norm(dim=1), torch.full((5,), 3**0.5))


def write_collection(root):
    """Two tasks outside the standard sequence, one inside."""
    words = [
        "river",
        "stone",
        "cloud",
        "market",
        "paper",
        "garden",
        "window",
        "letter",
        "ice",
        "oak",
    ]
    tasks = [("long", "sst2"), ("long", "agnews"), ("superni", "task073")]
    described = []
    for collection, task in tasks:
        folder = root / collection / task
        folder.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            lines = [
                json.dumps(
                    {
                        "id": f"{task}-{split}-{n}",
                        "input": " ".join(words[(n * 3 + k) % 10] for k in range(8)),
                        "output": ("Good", "Bad")[n % 2],
                        "src": "x:y:0",
                    }
                )
                for n in range(30)
            ]
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        described.append(
            {"benchmark": collection, "task": task, "family": "SC", "labels": ["Good", "Bad"]}
            | {
                "instruction": "Which is it?",
                "metric": "exact match",
                "splits": {split: {} for split in ("train", "dev", "test")},
            }
        )
    (root / "MANIFEST.json").write_text(json.dumps({"tasks": described}))


def test_learns_from_tasks_outside_the_standard_sequence_only(tmp_path):
    write_collection(tmp_path / "rows")
    assert outside_tasks(tmp_path / "rows") == [("long", "sst2"), ("superni", "task073")]
    settings = SmallSettings(width=24, heads=4, inner=32, vocab_size=200, steps=2, batch_size=4)
    said: list[str] = []
    built = [
        build_small_t5(str(tmp_path / "rows"), tmp_path / str(k), said.append, settings)
        for k in range(2)
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in built]
    assert weights[0] == weights[1]
    assert built[0].name == built[1].name
    assert said
