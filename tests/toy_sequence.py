"""A tokenizer of whole words and three tasks whose labels collide, for recipes over local files."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [f"w{i}" for i in range(30)]
LABELS = {"one": ("red", "blue"), "two": ("blue", "red"), "three": ("up", "down")}


def write_tokenizer(folder: Path) -> int:
    """Whole words as tokens; <pad> 0, </s> 1, <unk> 2, <s> 3. Returns how many there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({*WORDS, *(w for pair in LABELS.values() for w in pair)})
    words += ["Option", "Answer", ":", ",", "Say", "which", "task", *LABELS]
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
    ).save_pretrained(folder)
    return len(vocab)


def write_rows(folder: Path) -> list[dict[str, object]]:
    """Three tasks of 40 rows, as a recipe lists them."""
    pick = random.Random(0)
    tasks = []
    for name, labels in LABELS.items():
        for split, count in (("train", 40), ("test", 12)):
            rows = []
            for number in range(count):
                words = [pick.choice(WORDS) for _ in range(pick.randrange(3, 9))]
                label = labels[int(words[0][1:]) % 2]
                rows.append({"id": f"{split}-{number}", "input": " ".join(words), "output": label})
            path = folder / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append(
            {
                "name": name,
                "files": {s: str(folder / f"{name}-{s}.jsonl") for s in ("train", "test")},
                "instruction": f"Say which task {name}",
                "labels": list(labels),
            }
        )
    return tasks
