"""Cluster files: names, defaults, options that win, and every mistake with its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from accrete.launch import prepare
from accrete.launch.cluster import slurm
from accrete.launch.cluster.caches import look_into, require_weights, with_own_caches
from accrete.launch.cluster.request import engine_overrides, make_request, prepare_run
from accrete.launch.cluster.settings import (
    ClusterConfig,
    K8sConfig,
    StorageConfig,
    load_cluster,
    nodes_in_file,
    time_in_seconds,
)
from accrete.pipeline.errors import ConfigError, ModelError
from accrete.pipeline.models.config import ModelConfig


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("30:05", 1805),
        ("12:00:00", 43200),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("0-00:01:30", 90),
    ],
)
def test_times_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert time_in_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "12h", "1:2:3:4", "-1", "1-", "12:0"])
def test_other_times(text: str) -> None:
    with pytest.raises(ValueError):
        time_in_seconds(text)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("nodes: 4\nprocs_per_node: 8\ntime: 12:00:00\nslurm: {partition: long}\n")
    config = load_cluster(str(file), nodes=2)
    assert (config.nodes, config.procs_per_node, config.time) == (2, 8, "12:00:00")
    assert config.slurm.partition == "long"
    assert nodes_in_file(file) == 4
    file.write_text("")
    assert nodes_in_file(str(file)) is nodes_in_file(None) is None


def test_all_mistakes_of_a_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("nodes: 0\nslurm:\n  partitions: long\ngrace_s: soon\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(file)
    text = str(caught.value)
    assert text.startswith(f"cluster {file}: 3 problems")
    assert "mine.yaml:1: nodes\n      given: 0 (an integer); allowed: an integer >= 1" in text
    assert "mine.yaml:3: slurm.partitions" in text
    assert "did you mean `partition`?" in text
    assert "mine.yaml:4: grace_s" in text


def test_a_limit_that_leaves_no_time_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="told to save before it has begun"):
        load_cluster(None, time="5")
    file = tmp_path / "mine.yaml"
    file.write_text("nodes: 2\n\ntime: '2'\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:3: time"):
        load_cluster(file)
    with pytest.raises(ConfigError, match="option --time"):
        load_cluster(file, time="soon")


def test_an_unknown_cluster_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean `two_nodes_8`") as caught:
        load_cluster("two_node_8")
    assert "one_gpu" in str(caught.value)


@pytest.mark.parametrize("name", ["one_gpu", "one_node_8", "two_nodes_8", "cpu"])
def test_shipped_clusters(name: str) -> None:
    config = load_cluster(name)
    assert config.description
    assert config.device == ("cpu" if name == "cpu" else "cuda")
    # Slurm gives a node one core otherwise, for all of its processes.
    request = make_request("quickstart", [], Path("/shared/runs/one"), config)
    cores = config.procs_per_node * (1 if name == "cpu" else 4)
    assert f"#SBATCH --cpus-per-task={cores}\n" in slurm.render(request)["job.sbatch"]


def test_what_the_cluster_says_of_the_engine_gives_way_to_the_user(tmp_path: Path) -> None:
    cluster = ClusterConfig(nodes=2, procs_per_node=4, device="cuda")
    assert engine_overrides(cluster) == ["engine.procs=4", "engine.device=cuda"]
    request = make_request("quickstart", ["engine.device=cpu"], tmp_path, cluster)
    engine = request.recipe.config.engine
    assert (engine.procs, engine.device, request.world) == (4, "cpu", 8)


def test_nodes_get_the_caches_of_the_machine_that_submits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCRETE_CACHE", "cache")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def storage(cluster: ClusterConfig, **options: bool) -> tuple[str | None, str | None]:
        found = make_request("quickstart", [], tmp_path / "run", cluster, **options).cluster.storage
        return found.cache, found.hf_home

    assert storage(ClusterConfig()) == (str(tmp_path / "cache"), "/shared/hf")
    said = ClusterConfig(storage=StorageConfig(cache="/a", hf_home="/b"))
    assert storage(said) == ("/a", "/b")
    nodes = ClusterConfig(env={"ACCRETE_CACHE": "/c"}, setup=["export HF_HOME=/d"])
    assert storage(nodes) == (None, None)
    assert storage(ClusterConfig(), own_caches=False) == (None, None)  # pods
    monkeypatch.delenv("HF_HOME")
    assert storage(ClusterConfig()) == (str(tmp_path / "cache"), None)
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert storage(ClusterConfig())[1] == "/shared/huggingface"
    assert storage(ClusterConfig(setup=["export XDG_CACHE_HOME=/e"]))[1] is None


def test_nodes_get_the_parts_of_the_hub_cache_that_were_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "/scratch/models")
    monkeypatch.setenv("HF_DATASETS_CACHE", "/scratch/rows")
    monkeypatch.setenv("HF_HOME", "/shared/hf")

    def environment(**settings: Any) -> dict[str, str]:
        return with_own_caches(ClusterConfig(**settings)).env

    both = {"HF_HUB_CACHE": "/scratch/models", "HF_DATASETS_CACHE": "/scratch/rows"}
    assert environment(env={"A": "b"}) == {"A": "b", **both}
    # Nodes that ask the hub keep the rows on a disk of their own.
    online = StorageConfig(offline=False)
    assert environment(storage=online) == {"HF_HUB_CACHE": "/scratch/models"}
    # What the cluster says holds.
    assert environment(storage=StorageConfig(hf_home="/b")) == {}
    assert environment(setup=["export HF_HOME=/d"]) == {}
    assert environment(env={"HF_HUB_CACHE": "/c"}) == {**both, "HF_HUB_CACHE": "/c"}


def test_the_old_name_of_the_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads it where HF_HUB_CACHE is not set."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", "/scratch/old")

    def environment(**settings: Any) -> dict[str, str]:
        return with_own_caches(ClusterConfig(**settings)).env

    assert environment() == {"HF_HUB_CACHE": "/scratch/old"}
    assert environment(setup=["export HUGGINGFACE_HUB_CACHE=/d"]) == {}
    monkeypatch.setenv("HF_HUB_CACHE", "/scratch/new")
    assert environment() == {"HF_HUB_CACHE": "/scratch/new"}


def test_the_submitting_machine_looks_into_the_cache_of_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"HF_HOME": "/mine"})
    look_into(ClusterConfig(storage=StorageConfig(hf_home=str(tmp_path / "on nodes alone"))))
    assert os.environ == {"HF_HOME": "/mine"}
    look_into(ClusterConfig(storage=StorageConfig(cache="/shared", hf_home=str(tmp_path))))
    assert os.environ == {"ACCRETE_CACHE": "/shared", "HF_HOME": str(tmp_path)}


def test_weights_that_offline_nodes_would_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows need a model's configuration and tokenizer alone, so nothing else has looked."""
    hub = tmp_path / "hub"
    snapshot = hub / "models--someone--mini" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    model = ModelConfig(path="someone/mini")
    with pytest.raises(ModelError, match=r"lacks model\.safetensors .*`accrete fetch`"):
        require_weights(ClusterConfig(), model)
    with pytest.raises(ModelError, match="lacks this model"):
        require_weights(ClusterConfig(), ModelConfig(path="someone/other"))
    words = ["model.builder=null", "model.path=someone/mini"]
    request = make_request("quickstart", words, tmp_path / "run", ClusterConfig(), own_caches=False)
    monkeypatch.setattr(prepare, "prepare", lambda *arguments, **options: None)
    with pytest.raises(ModelError, match="someone/mini: nodes do not ask the hub"):
        prepare_run(request, print)
    assert not request.run_dir.exists()
    # Nodes that ask the hub, or look somewhere else.
    require_weights(ClusterConfig(storage=StorageConfig(offline=False)), model)
    require_weights(ClusterConfig(storage=StorageConfig(hf_home="/nodes")), model)
    require_weights(ClusterConfig(setup=["export HF_HOME=/nodes"]), model)
    require_weights(ClusterConfig(env={"XDG_CACHE_HOME": "/nodes"}), model)
    require_weights(ClusterConfig(env={"HUGGINGFACE_HUB_CACHE": "/nodes"}), model)
    require_weights(ClusterConfig(k8s=K8sConfig(claim="runs")), model)
    require_weights(ClusterConfig(), ModelConfig(builder="tiny_llama"))
    with pytest.raises(ModelError):
        require_weights(ClusterConfig(storage=StorageConfig(hf_home=str(tmp_path))), model)
    (snapshot / "model.safetensors").touch()
    require_weights(ClusterConfig(), model)


def test_one_process_cannot_be_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kind plain is one process"):
        make_request("quickstart", ["engine.kind=plain"], tmp_path, ClusterConfig(nodes=2))
