"""Every recipe can be planned on the folders that the authors of its benchmark distribute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import author_folders as made
import pytest

from accrete.launch.plan import plan_stages
from accrete.launch.prepare import Prepared, prepare
from accrete.pipeline.config.library import recipe_names
from accrete.pipeline.config.load import LoadedRecipe, load_recipe
from accrete.pipeline.data.config import WHOLE_ANSWER
from accrete.pipeline.data.sources import describe_task, read_examples

BENCHMARKS = ("standard_cl", "long_sequence", "long_sequence_sapt", "superni", "trace", "citb")
RECIPES = [n for n in recipe_names() if n.split("/")[0] in BENCHMARKS]
SAMPLES = ["standard_cl/order1_small_t5", "standard_cl/order1_smollm2"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("authors")
    citb = [task.name for task in load_recipe("citb/instrdialog").config.tasks]
    olora, sapt = made.make_olora(base / "O-LoRA"), made.make_sapt(base / "SAPT")
    return {
        "standard_cl": olora,
        "long_sequence": olora,
        "long_sequence_sapt": sapt / "CL_Benchmark",
        "superni": sapt / "CL_Benchmark",
        "trace": made.make_trace(base / "TRACE"),
        "citb": made.make_natural_instructions(base / "CITB", citb),
    }


def planned(recipe: LoadedRecipe) -> tuple[Prepared, Sequence[Any]]:
    prepared = prepare(recipe.config, lambda _: None)
    return prepared, plan_stages(recipe.config, prepared)


def load(name: str, folders: dict[str, Path], model: Path, *more: str) -> LoadedRecipe:
    root = folders[name.split("/")[0]]
    return load_recipe(name, [f"data.root={root}", f"model.path={model}", *more])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_planned(name: str, folders: dict[str, Path], tiny_t5: Path) -> None:
    more = ["model.builder=null", "data.benchmark=null"] if name in SAMPLES else []
    recipe = load(name, folders, tiny_t5, *more)
    prepared, stages = planned(recipe)
    assert [stage.task for stage in stages] == [task.name for task in recipe.config.tasks]
    for stage, task in zip(stages, recipe.config.tasks, strict=True):
        assert stage.rows_train == 20
        assert stage.rows_eval == (50 if name.startswith("citb/") else 6)
        if recipe.config.train.max_steps is None:
            epochs = task.epochs or recipe.config.train.epochs
            assert stage.epochs == pytest.approx(epochs)
    closed = [task for task in prepared.tasks if task.metric in WHOLE_ANSWER]
    wanted = {"superni": 0, "citb": 0, "trace": 4}.get(name.split("/")[0], len(stages))
    assert len(closed) == wanted


def test_metrics_of_trace(folders: dict[str, Path], tiny_t5: Path) -> None:
    prepared, _ = planned(load("trace/full", folders, tiny_t5))
    assert [task.metric for task in prepared.tasks] == [
        "raw_match",
        "raw_match",
        "rouge_l",
        "edit_similarity",
        "first_letter",
        "raw_match",
        "raw_match",
        "sari",
    ]


def test_two_prompt_sets_of_the_long_sequence(folders: dict[str, Path]) -> None:
    """The same task, asked in O-LoRA's and in SAPT's way, each from its own folder."""
    from accrete.pipeline.data.prompts import frame_for

    asked = {}
    for name in ("long_sequence/order4", "long_sequence_sapt/order4"):
        config = load_recipe(name, [f"data.root={folders[name.split('/')[0]]}"]).config
        for task in (task for task in config.tasks if task.name in ("qqp", "copa")):
            info = describe_task(task, config.data)
            (row, *_) = read_examples(task, config.data, "test")
            prompt = str(frame_for(config.data.template, info).render(row.input))
            asked[name.split("/")[0], task.name] = prompt, info.labels
    prompt, labels = asked["long_sequence", "qqp"]
    assert prompt.startswith("Task:QQP\nDataset:QQP\n")
    assert "Option: False, True" in prompt
    assert prompt.endswith("\nAnswer:")
    assert labels == ("False", "True")
    prompt, labels = asked["long_sequence_sapt", "qqp"]
    assert prompt == "Do qqp.\ntest 0\nOutput:"
    assert labels == ("no", "yes")  # what its rows say, whatever its labels.json lists
    assert asked["long_sequence_sapt", "copa"][0] == "test 0\nOutput:"


def test_prompts_of_superni_and_citb(folders: dict[str, Path]) -> None:
    from accrete.pipeline.data.prompts import frame_for

    asked = {}
    for name in ("superni/order1", "citb/instrdialog"):
        config = load_recipe(name, [f"data.root={folders[name.split('/')[0]]}"]).config
        info = describe_task(config.tasks[0], config.data)
        asked[name] = str(frame_for(config.data.template, info).render("the row"))
    tail = "Now complete the following example -\nInput: the row\nOutput:"
    assert asked["superni/order1"] == f"Definition: Do samsum_summary.\n\n{tail}"
    shown = "".join(
        f"Positive Example {i + 1} -\nInput: shown {i}\nOutput: said {i}\n\n" for i in range(2)
    )
    assert asked["citb/instrdialog"] == f"Definition: Do task848.\n\n{shown}{tail}"


def test_citb_divides_a_task_as_its_authors_do(folders: dict[str, Path]) -> None:
    config = load_recipe("citb/instrdialog", [f"data.root={folders['citb']}"]).config
    rows = {
        split: [row.input for row in read_examples(config.tasks[0], config.data, split)]
        for split in ("test", "dev", "train")
    }
    assert rows["test"] == [f"row {i}" for i in range(50)]
    assert rows["dev"] == [f"row {i}" for i in range(50, 100)]
    assert rows["train"] == [f"row {i}" for i in range(100, 120)]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmark_model_and_method_compose(benchmark: str) -> None:
    name = next(n for n in RECIPES if n.startswith(f"{benchmark}/"))
    for model in ("t5_base", "t5_large", "llama32_1b_instruct", "llama32_3b_instruct"):
        recipe = load_recipe(name, [f"model={model}", "method=o_lora"])
        assert recipe.config.method.kind == "o_lora"
        assert f"models/{model}.yaml" in recipe.origins["model.path"]
        if model.startswith("llama"):
            assert recipe.config.train.learning_rate == 1e-4
