"""`accrete fetch` from a hub on this machine, then everything without network.

The clients are the real ones (huggingface_hub, datasets, transformers); only the server is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_hub import fake_hub

ACCRETE = Path(sys.executable).with_name("accrete")
MODEL, ROWS = "someone/mini", "someone/colours"
RECIPE = """
name: mini
model: {path: someone/mini, revision: v1}
data: {format: hub, max_source_tokens: 32}
tasks:
  - name: colours
    dataset: someone/colours
    labels: [red, blue]
    columns: {input: text, output: colour}
method: {kind: sequential}
engine: {kind: plain, device: cpu}
train: {max_steps: 2, global_batch_size: 2, micro_batch_size: 2}
"""

LOOK = """
import json, shutil, sys
from pathlib import Path
from accrete.launch.doctor.offline import CacheCheck, examine_cache, go_offline
go_offline()
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.models.cache import cache_root
home = Path(sys.argv[1])

def look(overrides=(), offline=True, cache=None):
    check = CacheCheck(config=load_recipe("mini.yaml", overrides).config,
                       cache=cache or cache_root(), recipe="mini.yaml", offline=offline)
    found, folder = examine_cache(check)
    return {check.name: [check.status, check.found, check.action] for check in found}

def without(path):
    aside = home.parent / "aside"
    path.rename(aside)
    try:
        return look()
    finally:
        aside.rename(path)

[snapshot] = (home / "hub" / "models--someone--mini" / "snapshots").iterdir()
[rows] = (home / "datasets").glob("someone___colours")
print(json.dumps({
    "whole": look(),
    "another revision": look(["model.revision=v2"]),
    "online": look(["model.revision=v2"], offline=False),
    "no weights": without(snapshot / "model.safetensors"),
    "no tokenizer": without(snapshot / "tokenizer.json"),
    "no rows": without(rows),
    "no tokens": look(cache=home.parent / "empty"),
    "other rows": look(["tasks.colours.revision=" + "a" * 40]),
}))
"""


@dataclass(frozen=True)
class Site:
    """A machine with its caches, after `accrete fetch`, and the hub as it was asked."""

    folder: Path
    variables: dict[str, str]
    output: str
    asked: list[str]

    def call(self, *command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command at this site; the hub is gone."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **self.variables, **more},
            capture_output=True,
            text=True,
            timeout=250,
        )


def write_model(folder: Path) -> None:
    """A LLaMA of a few hundred numbers, with a tokenizer of ten words, beside files of no use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "red", "blue", "apple", "sky", "Answer", ":"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    (folder / "flax_model.msgpack").write_bytes(b"no use")
    (folder / "pytorch_model.bin").write_bytes(b"no use beside safetensors")


def write_rows(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", 8), ("test", 4)):
        rows = [{"text": ["apple", "sky"][i % 2], "colour": ["red", "blue"][i % 2]}
                for i in range(count)]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    root = tmp_path_factory.mktemp("hub")
    write_model(root / "models" / MODEL)
    write_rows(root / "datasets" / ROWS)
    (folder / "mini.yaml").write_text(RECIPE)
    with fake_hub(root) as hub:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "ACCRETE_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [ACCRETE, "fetch", "mini.yaml"],
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=250,
        )
        asked = list(hub.asked)
    assert done.returncode == 0, done.stderr
    return Site(folder, variables, done.stdout + done.stderr, asked)


def test_only_what_is_read_is_downloaded(site: Site) -> None:
    fetched = {line.rpartition("/")[2] for line in site.asked if line.startswith("GET /someone")}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted <= fetched
    assert not fetched & {"flax_model.msgpack", "pytorch_model.bin"}
    assert any("/revision/v1" in line for line in site.asked)
    assert "colours, train: 8 rows" in site.output
    assert "accrete doctor mini.yaml --offline" in site.output


def test_the_recipe_runs_without_network(site: Site) -> None:
    done = site.call(ACCRETE, "run", "mini.yaml", "--run-dir", "run", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "colours: prepared before" in done.stderr
    matrix = json.loads((site.folder / "run" / "matrix.json").read_text())
    assert len(matrix["matrix"]) == 1


def test_what_is_missing_is_named(site: Site) -> None:
    done = site.call(sys.executable, "-c", LOOK, str(site.folder / "home"))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])

    def failures(case: str) -> dict[str, str]:
        found = {k: v for k, v in seen[case].items() if v[0] == "failure"}
        assert all("accrete fetch mini.yaml" in action for _, _, action in found.values())
        return {name: text for name, (_, text, _) in found.items()}

    assert {status for status, _, _ in seen["whole"].values()} == {"ok"}
    assert seen["whole"]["tasks"][1] == "1 of 1 tokenised"
    assert "someone/mini at v2: not in the hub's cache" in failures("another revision")["model"]
    assert seen["online"]["model"][0] == "warning"
    assert failures("no weights")["model"].endswith("lacks model.safetensors")
    assert list(failures("no tokenizer")) == ["tokenizer"]
    assert "'someone/colours' cannot be opened" in failures("no rows")["rows of colours"]
    assert failures("no tokens") == {}
    assert seen["no tokens"]["tokens"][:2] == [
        "warning",
        "rows are here, not tokenised yet: colours",
    ]
    assert "in the cache at revision" in failures("other rows")["rows of colours"]


def test_a_login_node_that_is_offline_cannot_fetch(site: Site) -> None:
    done = site.call(ACCRETE, "fetch", "mini.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_a_model_that_the_hub_does_not_have(site: Site, tmp_path: Path) -> None:
    with fake_hub(tmp_path) as hub:
        done = site.call(ACCRETE, "fetch", "mini.yaml", "model.path=no/such", HF_ENDPOINT=hub.url)
    assert done.returncode == 2
    assert "model.path no/such at v1 cannot be fetched: RepositoryNotFoundError" in done.stderr
    assert "Traceback" not in done.stderr
