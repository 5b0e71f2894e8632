"""Everything that can be found wrong with a recipe before a run folder exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.launch.environment import choose_device, choose_procs
from accrete.pipeline.config.checks import require_data_root
from accrete.pipeline.run_dir import RunDir, read_json
from accrete.pipeline.sinks import check_tensorboard

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.handle import TaskHandle

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A recipe that is ready to run on this machine."""

    device: str
    """`cpu` or `cuda`; `auto` if only the nodes of a cluster can tell."""
    procs: int
    """Processes to start on each machine."""
    model_path: str
    """Folder (or hub id) of the base model."""
    tokenizer_path: str
    """Folder (or hub id) of its tokenizer."""
    seq2seq: bool
    """Encoder-decoder; else decoder only."""
    tasks: list[TaskHandle]
    """Checked and tokenised tasks, in order."""

    def to_json(self) -> dict[str, Any]:
        """The content of prepared.json."""
        return {
            "model_path": self.model_path,
            "tokenizer_path": self.tokenizer_path,
            "seq2seq": self.seq2seq,
            "tasks": [task.to_json() for task in self.tasks],
        }


def prepare(config: RunConfig, say: Say, *, elsewhere: bool = False) -> Prepared:
    """Choose the processes, make or find the model, check and tokenise every row of every task.

    Args:
        config: The recipe.
        say: Called with a line of text now and then.
        elsewhere: The processes will run on other machines: this one's GPUs say nothing.

    Raises:
        InputError: Anything about the recipe, the model or the rows that would stop the run.
    """
    require_data_root(config)
    if config.log.tensorboard:
        check_tensorboard()
    device: str
    if elsewhere:
        device, procs = config.engine.device, config.engine.procs or 1
    else:
        device = choose_device(config.engine)
        procs = choose_procs(config.engine, device)

    from accrete.eval.evaluator import require_scorable
    from accrete.pipeline.data.prepare import prepare_sequence
    from accrete.pipeline.models.cache import cache_root
    from accrete.pipeline.models.tiny import materialize

    cache = cache_root()
    model = config.model
    if model.builder == "small_t5" and model.builder_data is None:
        model = replace(model, builder_data=config.data.root)
    model_path = str(materialize(model, cache, say))
    tokenizer_path = config.model.tokenizer or model_path
    seq2seq = is_seq2seq(model_path, config.model.revision)
    tasks = prepare_sequence(
        config.tasks,
        config.data,
        tokenizer_path,
        seq2seq,
        cache / "tasks",
        config.seed,
        say,
        tokenizer_options(config),
    )
    require_scorable(config.eval, tasks)
    return Prepared(
        device=device,
        procs=procs,
        model_path=model_path,
        tokenizer_path=tokenizer_path,
        seq2seq=seq2seq,
        tasks=tasks,
    )


def is_seq2seq(model_path: str, revision: str | None) -> bool:
    """Whether a model folder or hub id holds an encoder-decoder.

    Raises:
        ModelError: Its configuration cannot be read.
    """
    from accrete.pipeline.models.load import read_config

    return bool(read_config(model_path, revision).is_encoder_decoder)


def tokenizer_options(config: RunConfig) -> dict[str, str] | None:
    """The hub revision, where the tokenizer comes from the model's own hub repository."""
    revision = hub_revision(config)
    return None if revision is None or config.model.tokenizer else {"revision": revision}


def open_tokenizer(run: RunDir, config: RunConfig) -> Any:
    """The tokenizer that a prepared run's rows were encoded with.

    Raises:
        ModelError: It cannot be loaded any more.
    """
    from accrete.pipeline.data.encode import load_tokenizer

    prepared = read_json(run.prepared)
    source = prepared.get("tokenizer_path") or prepared["model_path"]
    return load_tokenizer(source, tokenizer_options(config))


def hub_revision(config: RunConfig) -> str | None:
    """The model's revision, where it comes from the hub and the recipe names one."""
    path = config.model.path
    return None if path is None or Path(path).expanduser().exists() else config.model.revision
