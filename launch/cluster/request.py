"""One call of `accrete launch`: what is to run, where, and the folder that is made ready for it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.launch.api import RESUMABLE
from accrete.launch.cluster.caches import look_into, require_weights, with_own_caches
from accrete.launch.cluster.settings import ClusterConfig, time_in_seconds
from accrete.pipeline.errors import ConfigError, RunFolderError
from accrete.pipeline.run_dir import RunDir, read_json, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from accrete.pipeline.config.load import LoadedRecipe

REQUEST_FILE = "request.json"
RECIPE_FILE = "recipe.yaml"
NODE_MODULE = "accrete.launch.cluster.node"
VERDICT_MODULE = "accrete.launch.cluster.verdict"


class OtherRunError(ConfigError):
    """The folder holds a run of another recipe."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """The run begins where another one stands after a finished stage."""

    parent: Path
    """Run folder of the other."""
    stage: int
    """Last stage that is shared, from 0."""


def scheduler_name(folder: Path) -> str:
    """A folder's name for schedulers: lower case letters, digits and hyphens, at most 40."""
    text = f"accrete-{folder.name}".lower()
    safe = "".join(c if c.isascii() and c.isalnum() else "-" for c in text)
    return safe[:40].strip("-")


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """What is to run, and where. Everything a launcher's `render` needs."""

    recipe: LoadedRecipe
    """The checked recipe, with the cluster's `engine.*` settings in it."""
    run_dir: Path
    """Absolute path of the run folder, the same on all nodes."""
    cluster: ClusterConfig
    """With `--nodes`, `--procs-per-node` and `--time` in it."""
    branch: Branch | None = None
    """Where the run branches off, if it does."""

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.cluster.nodes

    @property
    def procs_per_node(self) -> int:
        """Processes on each machine."""
        return self.cluster.procs_per_node

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.nodes * self.procs_per_node

    @property
    def time_s(self) -> int | None:
        """Seconds until a job's time limit."""
        return None if self.cluster.time is None else time_in_seconds(self.cluster.time)

    @cached_property
    def folder(self) -> RunDir:
        """The run folder."""
        return RunDir(self.run_dir)

    @property
    def launch_dir(self) -> Path:
        """Where rendered files, markers and the launcher's logs stand: `RUN/launch`."""
        return self.folder.launch

    @property
    def job_name(self) -> str:
        """The run's name for schedulers."""
        return scheduler_name(self.run_dir)

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        return self.cluster.python or sys.executable

    @property
    def shutdown_s(self) -> int:
        """Seconds that workers have to save before torchrun kills them: the grace period, less
        what the launcher itself needs to decide what follows.
        """
        return max(5, self.cluster.grace_s - 10)

    def node_command(self, run_dir: Path | str | None = None) -> list[str]:
        """What runs once on each node, after the contract's variables have been set."""
        return [self.python, "-m", NODE_MODULE, "--run-dir", str(run_dir or self.run_dir)]

    def verdict_command(self, run_dir: Path | str | None = None) -> list[str]:
        """What tells, from the markers on disk, how an attempt has ended (see `verdict`)."""
        return [self.python, "-m", VERDICT_MODULE, "--run-dir", str(run_dir or self.run_dir)]

    def to_json(self) -> dict[str, Any]:
        """The content of request.json, which `node` reads; the recipe stands beside it."""
        branch = self.branch
        return {
            "recipe": self.recipe.name,
            "recipe_file": str(self.recipe.file),
            "overrides": list(self.recipe.overrides),
            "changes": [
                text for text in self.recipe.overrides if text.partition(".")[0] in RESUMABLE
            ],
            "run_dir": str(self.run_dir),
            "world": self.world,
            "branch": branch and {"parent": str(branch.parent), "stage": branch.stage},
            "cluster": dataclasses.asdict(self.cluster),
        }


@dataclass(frozen=True, kw_only=True)
class KeptRequest:
    """What a node knows of the request: request.json and the recipe beside it."""

    cluster: ClusterConfig
    world: int
    recipe: Path
    changes: list[str]
    """`a.b=v` for a run that is there already: what a later start may change."""
    branch: Branch | None


def read_request(folder: Path) -> KeptRequest:
    """The request in a folder (`RUN/launch`, or wherever a launcher puts it).

    Raises:
        RunFolderError: There is none, or it is damaged.
        ConfigError: It was written by another version.
    """
    from accrete.pipeline.config.problems import ProblemList
    from accrete.pipeline.config.read import read_file
    from accrete.pipeline.config.typed import build_as

    file = folder / REQUEST_FILE
    content = read_json(file)
    problems = ProblemList()
    tree = read_file(file, str(file), problems)  # JSON is YAML, and so mistakes have their line
    node = None if tree is None else tree.get("cluster")
    cluster = None if node is None else build_as(ClusterConfig, node, problems, "cluster settings")
    problems.raise_if_any(str(file), "launch request")
    if cluster is None:
        raise RunFolderError(f"{file}: it says nothing of a cluster; it was edited or damaged.")
    branch = content["branch"]
    return KeptRequest(
        cluster=cluster,
        world=content["world"],
        recipe=folder / RECIPE_FILE,
        changes=list(content["changes"]),
        branch=branch and Branch(parent=Path(branch["parent"]), stage=branch["stage"]),
    )


def make_request(
    recipe: str | Path,
    overrides: Sequence[str],
    run_dir: Path,
    cluster: ClusterConfig,
    branch: Branch | None = None,
    *,
    own_caches: bool = True,
) -> LaunchRequest:
    """Load the recipe for this cluster.

    Args:
        recipe: Name or file.
        overrides: `a.b=v`.
        run_dir: `--run-dir`.
        cluster: With `--nodes`, `--procs-per-node` and `--time` in it.
        branch: Where the run branches off, if it does.
        own_caches: The nodes use this machine's caches where the cluster names none.

    Raises:
        ConfigError: The recipe or an override is wrong, or does not fit the cluster.
    """
    from accrete.pipeline.config.load import load_recipe

    if own_caches:
        cluster = with_own_caches(cluster)
    loaded = load_recipe(recipe, (*engine_overrides(cluster), *overrides))
    engine = loaded.config.engine
    world = cluster.nodes * cluster.procs_per_node
    if engine.kind == "plain" and world > 1:
        raise ConfigError(
            f"engine.kind plain is one process, and {cluster.nodes} nodes with "
            f"{cluster.procs_per_node} processes each are asked for. Use engine.kind=deepspeed, "
            "or --nodes 1 --procs-per-node 1."
        )
    return LaunchRequest(
        recipe=loaded, run_dir=run_dir.expanduser().absolute(), cluster=cluster, branch=branch
    )


def engine_overrides(cluster: ClusterConfig) -> list[str]:
    """What the cluster says about the recipe's `engine`; overrides of the user come later."""
    found = [f"engine.procs={cluster.procs_per_node}"]
    if cluster.device != "auto":
        found.append(f"engine.device={cluster.device}")
    if cluster.network.timeout_s is not None:
        found.append(f"engine.timeout_s={cluster.network.timeout_s}")
    return found


def write_files(request: LaunchRequest, rendered: Mapping[str, str]) -> None:
    """Keep the request, the resolved recipe and what a launcher rendered in `RUN/launch`.

    Args:
        request: The request.
        rendered: Name in that folder -> content; scripts (`.sh`, `.sbatch`) become executable.
    """
    folder = request.launch_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST_FILE, request.to_json())
    request.recipe.dump_yaml(folder / RECIPE_FILE)
    write_scripts(folder, rendered)


def write_scripts(folder: Path, rendered: Mapping[str, str]) -> None:
    """Write rendered files; scripts (`.sh`, `.sbatch`) become executable."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in rendered.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
        if path.suffix in (".sh", ".sbatch"):
            path.chmod(0o755)


def require_launchable(request: LaunchRequest) -> None:
    """Make sure that the folder is free, or holds the same run, to be gone on with.

    Raises:
        RunFolderError: It holds something else.
        OtherRunError: It holds a run of another recipe.
    """
    folder = request.folder
    if not folder.is_run():
        folder.check_free()
        return
    require_same_recipe(folder, request.recipe)


def require_same_recipe(folder: RunDir, recipe: LoadedRecipe) -> None:
    """Make sure that the run in a folder is the one that is asked for.

    Raises:
        OtherRunError: It is a run of another recipe.
    """
    from accrete.pipeline.config.load import load_recipe

    before, now = load_recipe(folder.recipe).resolved(), recipe.resolved()
    skipped = {*RESUMABLE, "name", "description"}
    changed = [key for key in now if key not in skipped and plain(before[key]) != plain(now[key])]
    if changed:
        raise OtherRunError(
            f"{folder.path}: this folder holds a run of {before['name']} with other settings of "
            f"{', '.join(changed)}. Give another --run-dir, or the settings of that run "
            f"({folder.recipe})."
        )


def plain(value: Any) -> Any:
    """A value as JSON would give it back."""
    return json.loads(json.dumps(value))


def prepare_run(request: LaunchRequest, say: Callable[[str], None]) -> bool:
    """Make the folder of a new run ready: model, checked and tokenised rows, recipe, run.json.

    Nothing is left behind if the recipe, the model or the rows are wrong.

    Args:
        request: The request; its folder was found launchable.
        say: Called with lines about the preparation.

    Returns:
        Whether the folder was made just now.

    Raises:
        InputError: Bad input.
    """
    from accrete.launch.folder import write_start
    from accrete.launch.prepare import prepare

    folder = request.folder
    if folder.is_run():
        return False
    look_into(request.cluster)
    prepared = prepare(request.recipe.config, say, elsewhere=True)
    require_weights(request.cluster, request.recipe.config.model)
    if request.branch is not None:
        return False  # the stages to start from may not be there yet: the first node copies them
    folder.create()
    try:
        write_start(folder, request.recipe, prepared)
    except BaseException:
        folder.discard()
        raise
    return True


def shell_line(words: Sequence[str]) -> str:
    """A command for a shell script; `$NAME` words stay variables, in double quotes."""
    return " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in words)
