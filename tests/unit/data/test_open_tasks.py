"""Prepared rows opened for scoring: ids and references come without the prompts."""

from __future__ import annotations

from typing import Any

import pytest
from data_samples import Prepare, task

from accrete.eval.open_tasks import OpenTasks
from accrete.pipeline.data import store


def test_opening_a_task_decodes_no_prompt(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    (handle,) = prepare(task())
    rows = store.open_eval(handle)
    ids, references = [row.id for row in rows], [rows.references(i) for i in range(len(rows))]

    def refuse(*_: Any) -> Any:
        raise AssertionError("a row was read")

    monkeypatch.setattr(store.EvalRows, "take", refuse)
    monkeypatch.setattr(store.EvalRows, "references", refuse)
    opened = OpenTasks().open(handle)
    assert (opened.ids, opened.references) == (ids, references)
    assert opened.ids[0] == "r100"
    assert opened.references[1] == ("bad",)
