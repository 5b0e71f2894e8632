"""Real benchmark rows through whole runs, and a real pretrained model where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from inprocess import PLAIN

from accrete.pipeline.models.cache import cache_root

COMPACT = Path(__file__).parents[3] / "shared" / "data" / "compact"
SMOLLM2 = cache_root() / "models" / "smollm2-135m-instruct"

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

needs_rows = pytest.mark.skipif(not COMPACT.is_dir(), reason=f"no real rows: {COMPACT} is absent")


@needs_rows
def test_a_benchmark_recipe_runs_on_real_rows(accrete_here, llama, tmp_path):
    """Two steps of every task by the command line; the toy model cannot learn from them.

    tests/recipes does the same with every benchmark, inside the test's own process.
    """
    folder = tmp_path / "run"
    accrete_here(
        "run",
        "standard_cl/order3",
        f"data.root={COMPACT}",
        f"model.path={llama}",
        "method=ewc_lora",
        "method.fisher_rows=4",
        *PLAIN,
        "data.max_train_examples=16",
        "data.max_eval_examples=4",
        "data.max_source_tokens=160",
        "train.global_batch_size=8",
        "train.max_steps=2",
        "eval.forward_transfer=false",
        "--run-dir",
        folder,
    )
    content = json.loads((folder / "matrix.json").read_text())
    assert [len(row) for row in content["matrix"]] == [1, 2, 3, 4]
    # Options and answer cue survive the cut; the rows are the collection's.
    prepared = json.loads((folder / "prepared.json").read_text())
    assert all(task["num_train"] == 16 for task in prepared["tasks"])


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no SmolLM2: fetch it with `make smollm2`")
def test_a_real_model_answers_and_scores_itself_alike():
    """Greedy decoding of a real model: one forward over what it says agrees with what it says."""
    from transformers import AutoTokenizer

    from accrete.pipeline.data.collate import Collator
    from accrete.pipeline.data.encode import EncodedRow
    from accrete.pipeline.models.config import ModelConfig
    from accrete.pipeline.models.load import load_base, read_facts, unknown_inputs
    from accrete.pipeline.stage import aligned_logits

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    facts = read_facts(SMOLLM2, tokenizer)
    model = load_base(SMOLLM2, ModelConfig(path=str(SMOLLM2)), torch.device("cpu"))
    collator = Collator(facts.seq2seq, facts.pad_id, facts.decoder_start_id, facts.eos_id)
    prompts = ["The capital of France is", "Water boils at a temperature of"]
    rows = [
        EncodedRow(text, [tokenizer.bos_token_id, *tokenizer(text).input_ids], [], number)
        for number, text in enumerate(prompts)
    ]
    with torch.no_grad():
        inputs = collator.prompts(rows).inputs
        said = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        said = said[:, inputs["input_ids"].shape[1] :].tolist()
        golds = [EncodedRow(r.id, r.prompt, s, r.index) for r, s in zip(rows, said, strict=True)]
        batch = collator.train(golds)
        logits = aligned_logits(model, batch, False, unknown_inputs(model))
    assert "Paris" in tokenizer.decode(said[0])
    assert logits.argmax(-1).tolist() == said
