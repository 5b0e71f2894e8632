"""Every shipped recipe loads, says what it must say, and finds its rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from accrete.pipeline.config.library import all_names, group_names, recipe_names, recipes_folder
from accrete.pipeline.config.load import load_recipe

COMPACT = Path(__file__).resolve().parents[3] / "shared" / "data" / "compact"
needs_rows = pytest.mark.skipif(
    not COMPACT.is_dir(), reason="the compact benchmark rows are not beside the repository"
)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((COMPACT / "MANIFEST.json").read_text())
    return loaded


@pytest.mark.parametrize("name", recipe_names())
def test_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.config.description
    assert "default" not in {recipe.origins["method.kind"], recipe.origins["tasks.0.name"]}


@pytest.mark.parametrize("model", group_names("model"))
@pytest.mark.parametrize("method", group_names("method"))
def test_every_group_fits_a_recipe(model: str, method: str) -> None:
    config = load_recipe("standard_cl/order1", [f"model={model}", f"method={method}"]).config
    assert config.method.kind == method
    assert (config.model.path is None) == (config.model.builder is not None)
    if config.model.builder is not None:
        assert config.model.builder == model


@pytest.mark.parametrize("name", all_names())
def test_first_comment_and_portability(name: str) -> None:
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# ")
    if name in recipe_names():
        assert f"accrete run {name}" in comment
        for said in ("Expected:", "Hours:", "Hardware:"):
            assert f"# {said}" in comment
    # A copy must work anywhere, so shipped files extend names, never files.
    for line in re.findall(r"^extends:.*$", text, flags=re.M):
        assert ".yaml" not in line
    assert "/home/" not in text
    assert max(map(len, text.splitlines())) <= 100


@needs_rows
@pytest.mark.parametrize(
    ("benchmark", "folder"),
    [
        ("standard", "standard_cl"),
        ("long", "long_sequence"),
        ("long", "long_sequence_sapt"),
        ("superni", "superni"),
    ],
)
def test_orders_are_the_published_ones(
    benchmark: str, folder: str, manifest: dict[str, Any]
) -> None:
    for order, tasks in manifest["orders"][benchmark].items():
        config = load_recipe(f"{folder}/{order.removeprefix('sapt_')}").config
        assert [task.name for task in config.tasks] == tasks
        assert config.data.benchmark == benchmark


@needs_rows
@pytest.mark.parametrize(
    "name",
    [n for n in recipe_names() if n.startswith(("standard_cl/", "long_sequence", "superni/"))],
)
def test_rows_are_found(name: str, manifest: dict[str, Any]) -> None:
    from accrete.pipeline.data.layouts import locate

    config = load_recipe(name, [f"data.root={COMPACT}"]).config
    known = {(entry["benchmark"], entry["task"]): entry for entry in manifest["tasks"]}
    for task in config.tasks:
        located = locate(task, config.data)
        assert located.format == "compact"
        assert set(located.splits) >= {"train", config.data.eval_split}
        for split in ("train", config.data.eval_split):
            files = located.splits[split]
            assert files
            assert all(
                f.is_file() and f.parent.parts[-2:] == (config.data.benchmark, task.name)
                for f in files
            )
        assert (config.data.benchmark, task.name) in known


CONTRACT = (
    *(f"standard_cl/order{n}" for n in (1, 2, 3)),
    *(
        f"{folder}/order{n}"
        for folder in ("long_sequence", "long_sequence_sapt")
        for n in (4, 5, 6)
    ),
    *("superni/order1", "superni/order2", "trace/full", "trace/small", "citb/instrdialog"),
)


def test_promised_names() -> None:
    assert set(CONTRACT) <= set(recipe_names())
    assert {"t5_large", "t5_base", "llama32_1b_instruct", "llama32_3b_instruct"} <= set(
        group_names("model")
    )


SETTINGS = {
    # rank, learning rate, epochs, rows a step, template, source and target tokens, model
    "standard_cl": (8, 1e-3, 1.0, 64, "olora", 512, 50, "google-t5/t5-large"),
    "long_sequence": (8, 1e-3, 1.0, 64, "olora", 512, 50, "google-t5/t5-large"),
    "long_sequence_sapt": (8, 3e-4, 10.0, 32, "sapt", 512, 50, "google-t5/t5-large"),
    "superni": (4, 3e-4, 100.0, 32, "superni", 512, 50, "google-t5/t5-large"),
    "trace": (8, 1e-4, None, 32, "raw", 1024, 512, "meta-llama/Llama-3.2-1B-Instruct"),
    "citb": (None, 1e-5, 15.0, 8, "superni", 1024, 128, "google-t5/t5-base"),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_published_settings(name: str) -> None:
    rank, rate, epochs, rows, template, source, target, model = SETTINGS[name.split("/")[0]]
    config = load_recipe(name).config
    train, adapter, data = config.train, config.adapter, config.data
    assert (train.learning_rate, train.schedule) == (rate, "constant")
    assert epochs is None or train.epochs == epochs
    assert train.global_batch_size == rows
    if rank is not None:
        assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == (
            *(rank, 32.0, 0.1, "qv"),
        )
    assert (data.max_source_tokens, data.max_target_tokens) == (source, target)
    assert data.template == template
    assert config.model.path == model


def test_epochs_and_rows_of_trace() -> None:
    full, small = (load_recipe(f"trace/{size}").config for size in ("full", "small"))
    assert [task.epochs for task in full.tasks] == [5, 3, 7, 5, 3, 5, 5, 7]
    assert [task.epochs for task in small.tasks] == [2, 1, 3, 2, 1, 2, 2, 3]
    assert (full.data.max_train_examples, small.data.max_train_examples) == (None, 500)
    assert [task.metric for task in full.tasks] == [task.metric for task in small.tasks]


@pytest.mark.parametrize(
    ("name", "nodes", "procs", "device"),
    [
        ("one_gpu", 1, 1, "cuda"),
        ("one_node_8", 1, 8, "cuda"),
        ("two_nodes_8", 2, 8, "cuda"),
        ("cpu", 1, 2, "cpu"),
    ],
)
def test_clusters(name: str, nodes: int, procs: int, device: str) -> None:
    from accrete.launch.cluster.settings import load_cluster

    cluster = load_cluster(name)
    assert (cluster.nodes, cluster.procs_per_node, cluster.device) == (nodes, procs, device)
    assert cluster.description


RENDERED = {
    # the files of a launcher: what stands in one of them
    "slurm": {"job.sbatch": "#SBATCH --nodes=2"},
    "hosts": {"hostfile": "node2 slots=8", "hosts.sh": "nodes=2", "node.sh": "NPROC_PER_NODE=8"},
    "k8s": {"k8s.yaml": "completions: 2"},
}


def dry_run(launcher: str, name: str, folder: Path, *words: str) -> Any:
    from typer.testing import CliRunner

    from accrete.launch.cli import app

    command = ["launch", launcher, name, *words, "--nodes", "2", "--procs-per-node", "8"]
    options = ["--run-dir", str(folder / "run"), "--dry-run"]
    done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for file, part in RENDERED[launcher].items():
        assert part in (folder / "run" / "launch" / file).read_text()
        assert part in done.stdout
    return done


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("launcher", RENDERED)
def test_dry_run(launcher: str, name: str, tmp_path: Path) -> None:
    """What would be started, without rows, model, cluster or the cluster's settings."""
    dry_run(launcher, name, tmp_path, f"data.root={tmp_path}", "--time", "12:00:00")


@pytest.mark.parametrize(
    ("launcher", "said"),
    [("slurm", ""), ("hosts", "--hostfile"), ("k8s", "k8s.image and k8s.claim not set")],
)
def test_a_dry_run_names_what_a_start_needs(launcher: str, said: str, tmp_path: Path) -> None:
    complaint = dry_run(launcher, "quickstart", tmp_path).stderr
    assert said in complaint
    assert bool(said) == complaint.startswith("warning: ")


@pytest.mark.parametrize("launcher", ["hosts", "k8s"])
def test_a_start_refuses_placeholders(launcher: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from accrete.launch.cli import app
    from accrete.pipeline.errors import ConfigError

    command = ["launch", launcher, "quickstart", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=f"accrete launch {launcher} needs"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "run").exists()
