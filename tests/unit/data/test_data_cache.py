"""The cache of prepared tasks: never stale, never half written, read instead of made again."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from data_samples import Prepare, WriteRows, rows_of, task

from accrete.pipeline.data import preflight
from accrete.pipeline.data import prepare as module
from accrete.pipeline.data.config import DataConfig
from accrete.pipeline.data.encode import Encoder
from accrete.pipeline.data.examples import RowParser
from accrete.pipeline.data.handle import TaskHandle
from accrete.pipeline.data.prepare import prepare_sequence
from accrete.pipeline.data.shards import RowWriter
from accrete.pipeline.data.store import open_eval, open_train
from accrete.pipeline.errors import DataError


def test_second_call_reads_no_row(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(task("a"), task("b"))

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a row was read again")

    monkeypatch.setattr("accrete.pipeline.data.sources.iter_records", never)
    monkeypatch.setattr(Encoder, "encode", never)
    assert prepare(task("a"), task("b")) == first


def test_files_are_not_hashed_again_unless_they_changed(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(task())
    old = time.time() - 100
    for split in ("train", "test"):
        os.utime(tmp_path / "t" / f"{split}.jsonl", (old, old))
    assert prepare(task()) == first  # learns the hashes: the files are old enough now
    monkeypatch.setattr("hashlib.file_digest", None)
    assert prepare(task()) == first
    monkeypatch.undo()
    path = tmp_path / "t" / "train.jsonl"
    text = path.read_text()
    path.write_text(text.replace("text 1 ", "TEXT 1 "))
    assert prepare(task())[0].fingerprint != first[0].fingerprint
    path.write_text(text)
    assert prepare(task()) == first


def test_a_change_within_the_clock_s_grain_is_seen(prepare: Prepare, tmp_path: Path) -> None:
    """Same size, same time stamp, other content: a file that fresh is always hashed."""
    first = prepare(task())
    path = tmp_path / "t" / "train.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace("text 1 ", "TEXT 1 "))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert prepare(task())[0].fingerprint != first[0].fingerprint


def test_rows_are_written_while_the_source_streams(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "t" / "train.jsonl", rows_of(500))
    monkeypatch.setattr(preflight, "CHUNK", 50)
    read, lead = [0], []
    parse, add = RowParser.parse, RowWriter.add

    def count(self: RowParser, *args: Any) -> Any:
        read[0] += 1
        return parse(self, *args)

    def note(self: RowWriter, rows: Any, references: Any = None) -> None:
        if references is None:
            lead.append(read[0])
        add(self, rows, references)

    monkeypatch.setattr(RowParser, "parse", count)
    monkeypatch.setattr(RowWriter, "add", note)
    prepare(task(), streaming=True)
    assert lead == list(range(50, 501, 50))


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "template": ({}, {"template": "sapt"}),
    "instruction": ({"instruction": "Choose."}, {}),
    "labels": ({"labels": ["bad", "good"]}, {}),
    "metric": ({"metric": "rouge_l"}, {}),
    "source cap": ({}, {"max_source_tokens": 64}),
    "target cap": ({}, {"max_target_tokens": 30}),
    "train rows": ({}, {"max_train_examples": 10}),
    "eval rows": ({}, {"max_eval_examples": 4}),
    "streaming": ({}, {"streaming": True}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_ids_changes_the_key(
    prepare: Prepare, count_encoded: list[int], change: str
) -> None:
    (before,) = prepare(task())
    assert count_encoded == [20, 8]
    fields, data = CHANGES[change]
    (after,) = prepare(task(**fields), **data)
    assert after.fingerprint != before.fingerprint
    assert len(count_encoded) == 4


def test_what_does_not_change_the_ids_keeps_the_key(
    prepare: Prepare, count_encoded: list[int]
) -> None:
    before = prepare(task())
    assert prepare(task(max_steps=7), window_batches=3, seed=5) == before
    assert count_encoded == [20, 8]


def test_good_tasks_of_a_bad_sequence_are_kept(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows, count_encoded: list[int]
) -> None:
    write_rows(tmp_path / "b" / "train.jsonl", [{"id": "1", "input": "x", "output": "?"}])
    with pytest.raises(DataError, match="1 problem"):
        prepare(task("a"), task("b"))
    count_encoded.clear()
    prepare(task("a"))
    assert count_encoded == []


def test_damaged_entries_are_made_again(prepare: Prepare, count_encoded: list[int]) -> None:
    (handle,) = prepare(task())
    (Path(handle.train_dir) / "rows.arrow").write_bytes(b"")
    assert prepare(task()) == [handle]
    assert len(open_train(handle, 0, 0, 4, 1).rows(0, 0, 1)) == 4
    (Path(handle.eval_dir).parent / "handle.json").write_text("{")
    assert prepare(task()) == [handle]
    assert count_encoded == [20, 8] * 3
    assert prepare(task()) == [handle]
    assert count_encoded == [20, 8] * 3


def test_decoder_and_encoder_decoder_do_not_share_entries(
    tmp_path: Path, write_rows: WriteRows, t5_folder: str, llama_folder: str
) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / "t" / f"{split}.jsonl", rows_of(4))
    data = DataConfig(root=str(tmp_path))
    keys = {
        prepare_sequence([task()], data, folder, seq2seq, tmp_path / "c", 0)[0].fingerprint
        for folder, seq2seq in ((t5_folder, True), (t5_folder, False), (llama_folder, False))
    }
    assert len(keys) == 3


def _prepare_together(root: str, tokenizer: str, barrier: Any, results: Any, number: int) -> None:
    data = DataConfig(root=root)
    tasks = [task(name) for name in ("a", "b")]
    # Everything slow is loaded before the start, so that the processes really meet.
    from accrete.pipeline.data.encode import load_tokenizer

    load_tokenizer(tokenizer)
    barrier.wait(60)
    try:
        handles = prepare_sequence(tasks, data, tokenizer, True, Path(root) / "cache", 0)
        results.put((number, [handle.to_json() for handle in handles]))
    except BaseException as error:
        results.put((number, repr(error)))
        raise


def test_preparers_that_finish_together_agree(
    prepare: Prepare, tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three preparers have all written their own copy before the first one renames it."""
    for split in ("train", "test"):
        write_rows(tmp_path / "t" / f"{split}.jsonl", rows_of(8))
    barrier, publish = threading.Barrier(3), module._publish

    def meet(*args: Any) -> None:
        barrier.wait(60)
        publish(*args)

    monkeypatch.setattr(module, "_publish", meet)
    with ThreadPoolExecutor(3) as pool:
        found = [f.result(60) for f in [pool.submit(prepare, task()) for _ in range(3)]]
    assert found[0] == found[1] == found[2]
    assert len(open_eval(found[0][0])) == 8


def test_concurrent_preparations_agree(
    tmp_path: Path, write_rows: WriteRows, t5_folder: str
) -> None:
    for name in ("a", "b"):
        for split in ("train", "test"):
            write_rows(tmp_path / name / f"{split}.jsonl", rows_of(300))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(
            target=_prepare_together, args=(str(tmp_path), t5_folder, barrier, results, n)
        )
        for n in range(2)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert found[0] == found[1]
    handle = TaskHandle.from_json(found[0][0])
    rows = open_train(handle, 0, 0, 300, 1)
    assert sorted(r.id for r in rows.rows(0, 0, 1)) == sorted(f"r{i}" for i in range(300))
    assert not list((tmp_path / "cache").glob(".*-*"))
