"""What is decoded, what that costs, and what of it is bound by memory or left open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from forecast_case import HEADS, INNER, VOCAB, WIDTH, model_plan, task

from accrete.eval.evaluator import SequenceEvaluator
from accrete.launch.forecast import metrics
from accrete.launch.forecast.methods import EIGEN_OPERATIONS
from accrete.launch.forecast.place import Place
from accrete.launch.forecast.rows import TaskRows, assume_rows
from accrete.launch.forecast.run import Forecaster
from accrete.launch.forecast.scoring import decoding_notes
from accrete.launch.forecast.speed import (
    GPUS,
    AssumedSpeed,
    CalibratedSpeed,
    MeasuredPoint,
    OneToken,
    Timing,
    quick_cpu,
)
from accrete.launch.forecast.traffic import gathered_bytes
from accrete.pipeline.config.run import EvalConfig, RunConfig
from accrete.pipeline.data.config import DataConfig, Metric, TaskConfig
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.handle import SplitStats, TaskHandle, TaskStats
from accrete.pipeline.data.sources import describe_task

COMPACT = Path(__file__).resolve().parents[4] / "shared" / "data" / "compact"
METRICS: tuple[Metric, ...] = get_args(Metric)


def config(**changes: Any) -> RunConfig:
    return replace(model_plan("llama").config, **changes)


def handle(metric: Metric) -> TaskHandle:
    split = SplitStats(
        rows=3,
        truncated_pct=0.0,
        mean_prompt_tokens=8,
        max_prompt_tokens=10,
        mean_answer_tokens=3,
        max_answer_tokens=4,
    )
    return TaskHandle(
        name="a",
        metric=metric,
        labels=None,
        train_dir="",
        eval_dir="",
        num_train=3,
        num_eval=3,
        streamed=False,
        stats=TaskStats(train=split, eval=split),
        fingerprint="",
    )


class Rows:
    """Prompts of 10, 2 and 10 tokens, answers of 1, 3 and 9."""

    lengths = (11, 5, 19)

    def __iter__(self) -> Any:
        answers = zip((10, 2, 10), (1, 3, 9), strict=True)
        return iter(EncodedRow(str(p), [5] * p, [5] * a, 0) for p, a in answers)

    def __len__(self) -> int:
        return 3

    def take(self, indices: Any) -> list[EncodedRow]:
        rows = list(self)
        return [rows[i] for i in indices]

    def references(self, index: int) -> tuple[str, ...]:
        return ("x",)


# -- what is decoded ----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mode", ["auto", "generate"])
@pytest.mark.parametrize("most", [2, 50])
def test_the_evaluator_decides_the_same(metric: Metric, mode: Any, most: int) -> None:
    run = config(eval=EvalConfig(mode=mode), data=DataConfig(max_target_tokens=most))
    rows: Any = Rows()
    evaluator = SequenceEvaluator(
        run.eval, Any, Any, run.data.max_target_tokens, open_rows=lambda _: rows
    )
    opened = evaluator._tasks.open(handle(metric))
    jobs = evaluator._decode_jobs([opened], {})
    assert metrics.is_decoded(run, metric) is bool(jobs)
    if jobs:
        assert [metrics.token_budget(run, metric)] == list(jobs)


def test_a_batch_goes_on_until_its_longest_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accrete.pipeline.data.store.open_eval", lambda _: Rows())
    wide, narrow = EvalConfig(batch_tokens=8192), EvalConfig(batch_tokens=64)
    assert metrics.decoded_tokens(config(eval=wide), handle("rouge_l")) == 9
    # Rows of 55, 61 and 69 tokens with the budget: one a batch.
    assert metrics.decoded_tokens(config(eval=narrow), handle("rouge_l")) == (1 + 3 + 9) / 3
    assert metrics.decoded_tokens(config(eval=wide), handle("first_letter")) == 4


@pytest.mark.parametrize(
    ("named", "data", "expected"),
    [
        ({"name": "a"}, {}, ("exact_match", 0)),
        ({"name": "a", "labels": ["x", "y"]}, {}, ("exact_match", 2)),
        ({"name": "a", "metric": "sari"}, {"format": "trace"}, ("sari", 0)),
        ({"name": "a", "label_names": ["x"]}, {"format": "hub"}, ("exact_match", 1)),
        ({"name": "task363"}, {"benchmark": "superni"}, ("rouge_l", 0)),
        ({"name": "task363"}, {"format": "natural_instructions"}, ("rouge_l", 0)),
        ({"name": "mood"}, {"format": "generated"}, ("exact_match", 2)),
        ({"name": "turn"}, {"format": "generated"}, ("exact_match", 0)),
    ],
)
def test_tasks_without_rows(named: Any, data: Any, expected: Any) -> None:
    assert metrics.task_facts(TaskConfig(**named), DataConfig(**data)) == expected


@pytest.mark.skipif(not COMPACT.is_dir(), reason="no real rows")
@pytest.mark.parametrize(("benchmark", "name"), [("superni", "task363"), ("standard", "yahoo")])
def test_a_folder_at_hand_is_asked(benchmark: str, name: str) -> None:
    data = DataConfig(root=str(COMPACT), benchmark=benchmark)
    info = describe_task(TaskConfig(name=name), data)
    found = metrics.task_facts(TaskConfig(name=name), data)
    assert found == (info.metric, len(info.labels or ()))


# -- what it costs ------------------------------------------------------------------------------


def decoded(new: float = 4, most: int = 20, scored: int = 7) -> TaskRows:
    return replace(
        task(scored=scored), metric="rouge_l", decoded=True, new_tokens=new, most_new_tokens=most
    )


def forecaster(*tasks: TaskRows, kind: str = "llama", world: int = 1, **changes: Any) -> Forecaster:
    return Forecaster(model_plan(kind, **changes), list(tasks), world)


def test_decoding_by_hand() -> None:
    own = forecaster(decoded(scored=700), train={"global_batch_size": 8, "micro_batch_size": 8})
    speed = AssumedSpeed("a test", 1e9, memory=1e6)
    found = own.scoring.of(own.tasks[0], own.typical(own.tasks[0]), speed)
    rows = 8192 // (8 + 3 + 20)
    rounds = -(-700 // rows)
    key = WIDTH // HEADS * 2
    block = 2 * WIDTH * WIDTH + 2 * WIDTH * key + 3 * WIDTH * INNER
    factors = 2 * 5 * (WIDTH + WIDTH + WIDTH + key)
    weights = 4 * (2 * block + VOCAB * WIDTH + factors + 5 * WIDTH)  # norms as well; tied head
    cache = 2 * 2 * key * 4
    token = (weights + rows * (8 + 4 / 2) * cache) / 1e6
    per_token = 2 * 2 * block + 2 * factors
    per_prompt = per_token * 8 + 2 * VOCAB * WIDTH + 2 * 2 * 2 * 8**2 * WIDTH
    prompts = rows * per_prompt / 1e9
    assert found.seconds == pytest.approx(rounds * (prompts + 3 * token), rel=0.02)
    assert found.most_seconds > 5 * found.seconds
    # With a fast memory the arithmetic counts: about two operations for each weight and row.
    fast = own.scoring.of(own.tasks[0], own.typical(own.tasks[0]), replace(speed, memory=1e15))
    look_back = 2 * 2 * 2 * (12**2 - 11**2) * WIDTH  # 8 + 4 tokens, as if without a mask
    flops = rows * (per_token + 2 * VOCAB * WIDTH + look_back)
    assert fast.seconds == pytest.approx(rounds * (prompts + 3 * flops / 1e9), rel=0.05)


def test_only_the_decoder_goes_on() -> None:
    own = forecaster(decoded(), kind="t5", train={"global_batch_size": 8, "micro_batch_size": 8})
    module = own.plan.adapted.module
    later = sum(
        p.numel() * p.element_size() for n, p in module.named_parameters() if "encoder.block" in n
    )
    every = sum(p.numel() * p.element_size() for p in module.parameters())
    # The table of embeddings is the head as well; norms and tables of positions are small.
    assert own.scoring._weights == pytest.approx(every - later, rel=0.01)
    shape = own.typical(own.tasks[0])
    flops, kernels = own.scoring._one_token(shape)
    trace = own.tracer.trace(shape)
    assert 0 < flops < trace.forward_flops / shape.answer
    assert 0.5 < kernels / trace.forward_kernels < 0.9


def test_ranks_share_the_batches_and_gather_at_zero_3() -> None:
    speed = AssumedSpeed("a test", 1e9, memory=1e9, link=1e9)
    run = {"train": {"global_batch_size": 8}, "engine": {"zero_stage": 3}}
    seconds = []
    for world in (1, 2):
        own = forecaster(decoded(scored=2000), world=world, **run)
        seconds.append(own.scoring.of(own.tasks[0], own.typical(own.tasks[0]), speed).seconds)
    assert seconds[1] < 0.7 * seconds[0]
    plan = model_plan("llama", **run)
    assert gathered_bytes(plan, 2, 2) == gathered_bytes(plan, 3, 1) == 0
    token = OneToken(flops=1.0, kernels=0.0, read_bytes=0.0, gathered_bytes=5e8)
    assert speed.token_seconds(token) == pytest.approx(0.5)


def test_what_a_whole_run_says() -> None:
    own = forecaster(task("a"), decoded(), world=2)
    found = own.forecast(AssumedSpeed("a test", 1e9, memory=1e8))
    first, second = found.stages
    assert [score.decoded for score in found.scoring] == [False, True]
    assert first.scoring_seconds == first.scoring_most_seconds == found.scoring[0].seconds
    assert second.scoring_seconds == sum(score.seconds for score in found.scoring)
    content = found.to_json()
    more = second.scoring_most_seconds - second.scoring_seconds
    assert content["most_seconds"] - content["seconds"] == pytest.approx(more)
    assert content["stages"][1]["most_seconds"] > content["stages"][1]["seconds"]
    assert any("4 new tokens" in note and "up to 20" in note for note in found.notes)
    unknown = own.forecast(None)
    assert unknown.scoring == []
    assert unknown.stages[0].scoring_most_seconds is unknown.most_seconds is None


def test_misses_that_are_decoded_are_in_the_bound_alone() -> None:
    own = forecaster(replace(task(), most_new_tokens=20))
    speed = AssumedSpeed("a test", 1e9, memory=1e8)
    shape = own.typical(own.tasks[0])
    plain = own.scoring.of(own.tasks[0], shape, speed)
    assert plain.seconds == plain.most_seconds
    changed = replace(own.config, eval=EvalConfig(decode_misses=True))
    again = Forecaster(replace(own.plan, config=changed), own.tasks, 1)
    found = again.scoring.of(own.tasks[0], shape, speed)
    assert found.seconds == plain.seconds
    assert found.most_seconds > 2 * plain.seconds
    assert "decode_misses" in decoding_notes(own.tasks, True)[0]


def test_assumed_answers_and_limits() -> None:
    tasks = [TaskConfig(name="a", metric="first_letter"), TaskConfig(name="b", metric="rouge_l")]
    rows = assume_rows(config(tasks=[*tasks, TaskConfig(name="c")]), 10, 5, 8)
    assert [(r.decoded, r.new_tokens, r.most_new_tokens) for r in rows] == [
        (True, 4, 4),
        (True, 8, 50),
        (False, 8, 50),
    ]


# -- speeds and places --------------------------------------------------------------------------


def test_a_calibration_leaves_decoding_and_decompositions_to_an_assumption() -> None:
    point = MeasuredPoint(100.0, Timing(0.1, 0.3, 0.4, 0.01))
    beside = AssumedSpeed("beside", 1e9, memory=1e3, eigen=10.0)
    speed = CalibratedSpeed("measured", (point,), beside)
    token = OneToken(flops=1.0, kernels=0.0, read_bytes=500.0)
    assert speed.token_seconds(token) == pytest.approx(0.5)
    assert speed.eigen_seconds(20.0) == 2.0
    notes = forecaster(decoded()).forecast(speed).notes
    assert any("calibration measures no decoding" in note for note in notes)


def test_a_gpu_reads_faster_than_its_links_carry() -> None:
    assert all(gpu.link < gpu.memory < gpu.bf16 for gpu in GPUS.values())
    here = quick_cpu(1)
    assert here.memory is not None
    assert 0 < here.eigen < here.rate


def test_an_unknown_network_is_said() -> None:
    place = Place(device="cuda", nodes=2, procs=8, here=False, gpu=GPUS["h100"])
    assert "450 GB/s" in place.notes()[0]
    assert "--network" in place.notes()[0]
    assert "free" in replace(place, gpu=None).notes()[0]
    assert replace(place, network=1e9).notes() == replace(place, nodes=1).notes() == []


@pytest.mark.parametrize(
    ("method", "times"), [("gpm", 1), ("inf_lora", 2), ("keep_lora", 1), ("ewc_lora", 0)]
)
def test_decompositions_by_hand(method: str, times: int) -> None:
    own = forecaster(task(), task("b"), method=method)
    # q and v read one input in each of two blocks; gpm looks at all of WIDTH and at INNER.
    sizes = 2 * [WIDTH, WIDTH, WIDTH, INNER] if method == "gpm" else 2 * [WIDTH]
    expected = times * sum(EIGEN_OPERATIONS * size**3 for size in sizes)
    if method == "keep_lora":
        # The inputs, and the gradients of q and v.
        expected += 2 * EIGEN_OPERATIONS * (WIDTH**3 + (WIDTH // 2) ** 3)
    assert own.cost(1).eigen_flops == expected


def test_seconds_of_decompositions_are_counted_and_said() -> None:
    own = forecaster(task(), task("b"), method="inf_lora")
    found = own.forecast(AssumedSpeed("a test", 1e18, eigen=1e6))
    assert found.stages[1].method_seconds == pytest.approx(own.costs[1].eigen_flops / 1e6)
    assert any("decompositions of method inf_lora" in note for note in found.notes)
