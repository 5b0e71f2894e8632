"""Which caches the nodes use, and what of them the submitting machine sees."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.launch.cluster.settings import CACHES, HUB_PARTS, ClusterConfig
from accrete.pipeline.errors import ModelError

if TYPE_CHECKING:
    from accrete.pipeline.models.config import ModelConfig

OLD_NAMES = {"HF_HUB_CACHE": "HUGGINGFACE_HUB_CACHE"}
"""What huggingface_hub reads where the variable itself is not set."""


def with_own_caches(cluster: ClusterConfig) -> ClusterConfig:
    """The settings with the caches of this machine's environment where they name none.

    ssh takes no variables along, and Slurm only as long as no option forbids it. What a line of
    `env` or `setup` says for the nodes holds.
    """
    said = "\n".join([*cluster.env, *cluster.setup])
    here = _own_caches(said)
    storage: dict[str, Any] = {
        name: here[variable]
        for name, variable in CACHES.items()
        if variable in here and getattr(cluster.storage, name) is None and variable not in said
    }
    parts = {}
    if cluster.storage.hf_home is None and "HF_HOME" not in said:
        # Nodes that ask the hub keep the rows on a disk of their own.
        wanted = HUB_PARTS if cluster.storage.offline else HUB_PARTS[:1]
        parts = {
            name: here[name]
            for name in wanted
            if name in here and name not in said and OLD_NAMES.get(name, name) not in said
        }
    return dataclasses.replace(
        cluster,
        storage=dataclasses.replace(cluster.storage, **storage),
        env={**cluster.env, **parts},
    )


def _own_caches(said: str) -> dict[str, str]:
    """The caches that this machine's environment names, as absolute folders."""
    named = {name: os.environ.get(name) for name in (*CACHES.values(), *HUB_PARTS)}
    for name, old in OLD_NAMES.items():
        named[name] = named[name] or os.environ.get(old)
    home = os.environ.get("XDG_CACHE_HOME")
    if home and not named["HF_HOME"] and "XDG_CACHE_HOME" not in said:
        named["HF_HOME"] = os.path.join(home, "huggingface")
    return {
        name: str(Path(folder).expanduser().absolute()) for name, folder in named.items() if folder
    }


def look_into(cluster: ClusterConfig) -> None:
    """Take the nodes' caches for this process too, before the libraries are imported.

    A Hugging Face cache only where this machine sees it: it may have been filled on the nodes.
    """
    storage = cluster.storage
    if storage.cache is not None:
        os.environ["ACCRETE_CACHE"] = storage.cache
    if storage.hf_home is not None and Path(storage.hf_home).expanduser().is_dir():
        os.environ["HF_HOME"] = storage.hf_home


def require_weights(cluster: ClusterConfig, model: ModelConfig) -> None:
    """Make sure that nodes which do not ask the hub find the base model.

    Its configuration and tokenizer, which the rows need, tell nothing of the weights. A cache that
    is not this machine's is not looked into.

    Raises:
        ModelError: They are not in the cache.
    """
    from accrete.launch.doctor import model_files
    from accrete.pipeline.models.cache import cache_root

    if not cluster.storage.offline or model.path is None or model.gguf_file is not None:
        return
    repo = model_files.hub_id(model.path, cache_root())
    if repo is None or not _is_ours(cluster):
        return
    folder = model_files.snapshot_folder(repo, model.revision)
    missing = ["this model"] if folder is None else model_files.missing_files(folder)
    if missing:
        raise ModelError(
            f"model.path {model.path}: nodes do not ask the hub (storage.offline), and its cache "
            f"lacks {', '.join(missing[:8])} ({folder or 'no snapshot'}). Run `accrete fetch` with "
            "the same recipe and --cluster first, set `storage: {offline: false}`, or, if the "
            "nodes have a cache of their own, `prepare: node`."
        )


def _is_ours(cluster: ClusterConfig) -> bool:
    """Whether the nodes' cache of models is the one that this process looks into."""
    from huggingface_hub import constants

    if cluster.storage.hf_home is None and cluster.k8s.claim is not None:
        return False  # pods have a folder of the claim
    indirect = {"XDG_CACHE_HOME", *OLD_NAMES.values()}
    names = ("HF_HOME", *HUB_PARTS, *indirect)
    in_setup = any(name in line for line in cluster.setup for name in names)
    if in_setup or not indirect.isdisjoint(cluster.env):
        return False  # only the nodes can tell
    named = {**cluster.storage.cache_variables(), **cluster.env}
    theirs = named.get("HF_HUB_CACHE")
    if theirs is None and "HF_HOME" in named:
        theirs = os.path.join(named["HF_HOME"], "hub")
    ours = Path(constants.HF_HUB_CACHE).absolute()
    return theirs is None or Path(os.path.expandvars(theirs)).expanduser().absolute() == ours
