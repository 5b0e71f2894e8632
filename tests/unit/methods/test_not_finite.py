"""A row with numbers that are not finite: no method keeps what a pass over it adds up."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import MethodError
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
TOKEN = toys.VOCAB - 1


class LastRowApart(toys.ToyRows):
    """Only the last row has TOKEN, and the one step of a task does not come to it."""

    def __init__(self, *args):
        super().__init__(*args)
        plain = [
            replace(
                row,
                prompt=[min(t, TOKEN - 1) for t in row.prompt],
                answer=[min(t, TOKEN - 1) for t in row.answer],
            )
            for row in self.all
        ]
        self.all = [*plain[:-1], replace(plain[-1], prompt=[TOKEN, *plain[-1].prompt])]


@pytest.mark.parametrize(
    ("method", "settings", "what"),
    [
        ("gpm", {}, "inputs of the layers"),
        ("inf_lora", {}, "inputs of the layers"),
        ("keep_lora", {}, "gradients"),
        ("keep_lora", {"gradient_rows": 1}, "inputs of the layers"),
        ("lora_subtraction", {"triplet": 0.0}, "inputs of the layers"),
        ("lora_subtraction", {}, "last features"),
        ("ewc_lora", {}, "gradients"),
        ("ewc_lora", {"fisher": "rank1"}, "gradients"),
        ("ewc_lora", {"penalty": "separate"}, "gradients"),
        ("ewc", {}, "gradients"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else None,
)
def test_it_is_said_and_nothing_is_kept(tmp_path, monkeypatch, method, settings, what):
    base = toys.base_model("llama_short")
    base.get_input_embeddings().weight[TOKEN] = torch.nan
    monkeypatch.setattr(toys, "base_model", lambda kind: base)
    monkeypatch.setattr(toys, "ToyRows", LastRowApart)
    parts = toys.make_parts(
        ALONE,
        tmp_path,
        model="llama_short",
        zero=None,
        micro=8,
        method=method,
        settings=settings,
        closed=2,
        train={"max_steps": 1},
    )
    with pytest.raises(MethodError, match=rf"^The {what} in a pass .* \(stage [01]\) .* finite"):
        StageRunner(parts).run()
    parts.recorder.close()
    finished = 1 if what == "inputs of the layers" and method == "lora_subtraction" else 0
    assert len(list((tmp_path / "run").glob("checkpoints/stage-*"))) == finished
