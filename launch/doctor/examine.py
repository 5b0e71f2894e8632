"""`accrete doctor`: all checks in order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.launch.cluster.contract import Place, make_local_folders, node_environment
from accrete.launch.cluster.network import find_interface
from accrete.launch.cluster.settings import ClusterConfig
from accrete.launch.doctor import judge, versions
from accrete.launch.doctor.checks import Check, Diagnosis, failure, warning
from accrete.launch.doctor.judge_folders import judge_folder
from accrete.launch.doctor.machine import describe_machine
from accrete.launch.doctor.network import judge_network
from accrete.launch.doctor.offline import CacheCheck, examine_cache
from accrete.launch.doctor.place import find_place
from accrete.launch.doctor.space import bytes_needed
from accrete.launch.doctor.team import TeamResult, run_team
from accrete.launch.environment import PACKAGES, choose_device, choose_procs
from accrete.launch.local import worker_environment
from accrete.pipeline.distributed.config import EngineConfig
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.models.cache import cache_root

if TYPE_CHECKING:
    from accrete.pipeline.config.load import LoadedRecipe

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the doctor is asked."""

    recipe: LoadedRecipe | None
    words: str
    """How the user names the recipe, with its overrides."""
    run_dir: Path
    """Run folder, which need not exist."""
    offline: bool
    """The nodes have no network."""
    procs: int | None
    """Processes on each node; None: as a run would choose."""
    limit: float
    """Seconds for each step of the launch."""
    cluster: ClusterConfig
    for_cluster: bool = False
    """The cluster was named; the recipe, if there is one, was loaded for it."""

    @property
    def engine(self) -> EngineConfig:
        """The recipe's engine, or that of any recipe on the cluster, with `procs`."""
        if self.recipe is not None:
            engine = self.recipe.config.engine
        elif self.for_cluster:
            engine = EngineConfig(procs=self.cluster.procs_per_node, device=self.cluster.device)
        else:
            engine = EngineConfig()
        return engine if self.procs is None else replace(engine, procs=self.procs)


@dataclass(frozen=True, kw_only=True)
class _Stand:
    """This node in its launch."""

    place: Place
    device: str
    environment: dict[str, str]
    checks: list[Check]


def examine(question: Question, say: Say) -> Diagnosis:
    """Look at everything on this node, together with the other nodes of the launch.

    Raises:
        ConfigError: The launcher's variables are wrong.
    """
    stand = _take_stand(question)
    place = stand.place
    checks = [*stand.checks, *judge_network(place, stand.environment, _where(place))]
    say(f"Starting {place.procs_per_node} process(es) on {stand.device} ...")
    result = _launch(question, stand)
    checks = [*_machines(result, question, stand), *checks]
    checks += judge.judge_launch(result, place, question.limit)
    model = None
    cached: list[Check] = []
    if question.recipe is not None:
        say("Looking into the caches ...")
        cached, model = examine_cache(_cache_check(question, place), rows=place.is_first)
    if place.is_first:
        checks += _folders(result, question, place, model)
    return Diagnosis(
        checks=[*checks, *cached],
        nodes=place.nodes,
        node_rank=place.node_rank,
        procs_per_node=place.procs_per_node,
    )


def _take_stand(question: Question) -> _Stand:
    """Where this node stands, what it computes on, and what its processes will find."""
    # Asked first, because it refuses wrong variables before anything heavy is imported.
    chosen = _Choice(question.engine)
    given = find_place(os.environ, lambda: chosen.procs)
    if given is None and question.for_cluster:
        chosen.look_from_outside(one_process=question.procs is None)
    environment = worker_environment(
        chosen.procs if given is None else given.procs_per_node, chosen.device, os.environ
    )
    if given is None:
        place = Place(
            nodes=1,
            node_rank=0,
            procs_per_node=chosen.procs,
            master_addr=environment["MASTER_ADDR"],
            master_port=int(environment["MASTER_PORT"]),
        )
        return _Stand(
            place=place, device=chosen.device, environment=environment, checks=chosen.checks
        )
    interface = question.cluster.network.interface
    if interface is None and given.nodes > 1:
        interface = find_interface(given.master_addr)
    environment = node_environment(given, question.cluster, interface, environment)
    make_local_folders(question.cluster, environment, os.environ)
    return _Stand(place=given, device=chosen.device, environment=environment, checks=chosen.checks)


class _Choice:
    """Device and processes as a run would choose them; what it would refuse is a failed check."""

    def __init__(self, engine: EngineConfig) -> None:
        self._engine = engine
        self._outside = False
        self.checks: list[Check] = []

    def look_from_outside(self, *, one_process: bool) -> None:
        """This may be a login node: the GPUs that it lacks are no failure, the nodes have them.

        Args:
            one_process: Without them, start one process: as many as the nodes have GPUs would only
                be a load on this machine.
        """
        self._outside = True
        lacks = self._engine.device == "cuda" and self.device == "cpu"
        if lacks and one_process and self._engine.kind != "plain":
            self._engine = replace(self._engine, procs=1)

    def _note_lack(self, name: str, found: str, allowed: str, action: str) -> None:
        if self._outside:
            action = "nothing, if this is a login node; ask a node: the same command there"
        self.checks.append((warning if self._outside else failure)(name, found, allowed, action))

    @cached_property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        try:
            return choose_device(self._engine)
        except ConfigError as error:
            self._note_lack("device", str(error), "a CUDA GPU", "see the lines on devices")
        except ImportError:
            pass  # torch is missing, and the lines on versions say so
        return "cpu"

    @cached_property
    def procs(self) -> int:
        """Processes on this node."""
        try:
            return choose_procs(self._engine, self.device)
        except ConfigError as error:
            name, allowed, action = "processes", "a GPU for each process", "use fewer --procs"
            if self._engine.kind == "plain":
                self.checks.append(failure(name, str(error), "one process", action))
            else:
                self._note_lack(name, str(error), allowed, action)
            return 1


def use_storage(cluster: ClusterConfig) -> None:
    """Look into the caches that the nodes of a cluster use; before the libraries are imported."""
    os.environ.update({**cluster.storage.cache_variables(), **cluster.env})


def _where(place: Place) -> str:
    return f" on node {place.node_rank}" if place.nodes > 1 else ""


def _launch(question: Question, stand: _Stand) -> TeamResult:
    arguments = [
        *("--device", stand.device),
        *("--folder", f"run folder={question.run_dir.parent}"),
        *("--folder", f"cache={cache_root()}"),
    ]
    if question.engine.kind == "deepspeed":
        arguments.append("--deepspeed")
    with tempfile.TemporaryDirectory(prefix="accrete-doctor-") as folder:
        return run_team(stand.place, arguments, stand.environment, Path(folder), question.limit)


def _machines(result: TeamResult, question: Question, stand: _Stand) -> list[Check]:
    """Versions, devices and DeepSpeed of every node that reported; this one at least."""
    place = stand.place
    reports = {report["node"]: report for report in result.reports if "machine" in report}
    reports.setdefault(place.node_rank, {"machine": describe_machine()})
    tested = versions.tested_versions()
    checks = judge.judge_nodes({node: report["machine"] for node, report in reports.items()})
    for node, report in sorted(reports.items()):
        where = f" on node {node}" if place.nodes > 1 else ""
        found = report["machine"]["versions"]
        checks += versions.judge_versions(found, tested, versions.required_python(), where)
        checks += versions.missing_libraries(found, tested, PACKAGES, where)
        if "devices" in report:
            wants = question.recipe is not None and question.recipe.config.model.dtype != "fp32"
            checks += judge.judge_devices(report, stand.device, place.procs_per_node, wants, where)
            checks += judge.judge_deepspeed(report, stand.device, where)
    return checks


def _folders(
    result: TeamResult, question: Question, place: Place, model: Path | None
) -> list[Check]:
    """Run folder and cache, as rank 0 and its visitors found them."""
    chief: dict[str, Any] = next((r for r in result.reports if r["rank"] == 0), {})
    checks = []
    for name, found in chief.get("folders", {}).items():
        need = None
        if name == judge.RUN_FOLDER and question.recipe is not None:
            need = bytes_needed(question.recipe.config, model)
        checks += judge_folder(name, found, place, need)
    return checks


def _cache_check(question: Question, place: Place) -> CacheCheck:
    recipe = question.recipe
    assert recipe is not None
    return CacheCheck(
        config=recipe.config,
        cache=cache_root(),
        recipe=question.words,
        offline=question.offline,
        where=_where(place),
    )
