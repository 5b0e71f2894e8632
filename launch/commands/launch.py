"""`accrete launch slurm|hosts|k8s RECIPE [a.b=v ...]`: the same run on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accrete.launch.cluster import attempts
from accrete.launch.completion import complete_recipe
from accrete.pipeline.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from accrete.launch.cluster.request import LaunchRequest
    from accrete.launch.cluster.settings import ClusterConfig

app = typer.Typer(
    no_args_is_help=True,
    help="Run a recipe on a cluster: Slurm, machines reached by ssh, Kubernetes.",
)

Recipe = Annotated[
    str,
    typer.Argument(
        help="Name (`accrete recipes ls`) or file of a recipe.",
        autocompletion=complete_recipe,
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="a.b=v", help="Values that differ.", show_default=False),
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Machines; default: what the cluster says.")
]
Procs = Annotated[
    int | None,
    typer.Option("--procs-per-node", min=1, help="Processes on each machine, one per GPU."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Run folder, shared by all nodes; default: runs/NAME-TIME."),
]
Time = Annotated[
    str | None,
    typer.Option("--time", help="Time limit of one job: minutes, HH:MM:SS or D-HH:MM:SS."),
]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", help="Name (such as two_nodes_8) or file of a cluster's settings."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Write and print what would be used; start nothing.")
]


@app.command()
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    run_dir: Folder = None,
    time: Time = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=V,V",
            help="Many runs, such as seed=0,1,2; again for every further key: method=..., "
            "recipe=...",
        ),
    ] = None,
) -> None:
    """Submit a job that saves before its time limit, queues itself again, and resumes.

    Example: accrete launch slurm standard_cl/order1 --cluster two_nodes_8 --time 12:00:00

    With --sweep a run for every combination, in folders below --run-dir. Runs that learn the same
    first tasks with the same settings learn them once.
    """
    from accrete.launch.cluster import slurm as launcher

    if sweep:
        _sweep(recipe, overrides, nodes, procs_per_node, run_dir, time, cluster, dry_run, sweep)
        return
    request = _request(recipe, overrides, nodes, procs_per_node, run_dir, time, cluster)
    _launch(request, launcher, dry_run)


@app.command()
def hosts(
    recipe: Recipe,
    overrides: Overrides = None,
    hosts: Annotated[
        str | None,
        typer.Option("--hosts", help="Machines: node1,node2; those beyond --nodes are spares."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", help="Lines of `node1 slots=8`, as DeepSpeed reads them."),
    ] = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    run_dir: Folder = None,
    time: Time = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
) -> None:
    """Run on machines reached by ssh, and start again from the last checkpoint if one is lost.

    Example: accrete launch hosts standard_cl/order1 --hosts node1,node2 --procs-per-node 8
    """
    from accrete.launch.cluster import hosts as launcher
    from accrete.launch.cluster.settings import nodes_in_file

    def add_hosts(settings: ClusterConfig) -> ClusterConfig:
        wanted = nodes or nodes_in_file(cluster)
        settings = launcher.with_hosts(
            settings, hosts, hostfile, nodes=wanted, procs_per_node=procs_per_node
        )
        return _fill_in(launcher, settings) if dry_run else settings

    request = _request(recipe, overrides, nodes, procs_per_node, run_dir, time, cluster, add_hosts)
    _launch(request, launcher, dry_run)


@app.command()
def k8s(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    run_dir: Folder = None,
    time: Time = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
) -> None:
    """Apply an Indexed Job with a headless Service: one pod for each machine.

    Example: accrete launch k8s standard_cl/order1 --cluster my_k8s.yaml --dry-run
    """
    from accrete.launch.cluster import k8s as launcher
    from accrete.launch.commands.run import default_folder

    folder = run_dir or default_folder(recipe)

    def adapt(settings: ClusterConfig) -> ClusterConfig:
        settings = launcher.on_cluster(settings, folder)
        return _fill_in(launcher, settings) if dry_run else settings

    options = (recipe, overrides, nodes, procs_per_node, folder, time, cluster, adapt)
    request = _request(*options, own_caches=False)
    _launch(request, launcher, dry_run)


def _request(
    recipe: str,
    overrides: list[str] | None,
    nodes: int | None,
    procs_per_node: int | None,
    run_dir: Path | None,
    time: str | None,
    cluster: str | None,
    adapt: Callable[[ClusterConfig], ClusterConfig] | None = None,
    *,
    own_caches: bool = True,
) -> LaunchRequest:
    """Everything checked that can be checked without a look at the rows."""
    from accrete.launch.cluster.request import make_request, require_launchable
    from accrete.launch.cluster.settings import load_cluster
    from accrete.launch.commands.run import default_folder

    settings = load_cluster(cluster, nodes=nodes, procs_per_node=procs_per_node, time=time)
    if adapt is not None:
        settings = adapt(settings)
    folder = run_dir or default_folder(recipe)
    request = make_request(recipe, overrides or (), folder, settings, own_caches=own_caches)
    require_launchable(request)
    return request


def _fill_in(launcher: ModuleType, settings: ClusterConfig) -> ClusterConfig:
    """For --dry-run: placeholders for what only a start needs, and a word about them."""
    filled: ClusterConfig
    filled, missing = launcher.with_placeholders(settings)
    if missing is not None:
        typer.echo(f"warning: {missing}", err=True)
    return filled


def _launch(request: LaunchRequest, launcher: ModuleType, dry_run: bool) -> None:
    """Make the folder ready, keep what `launcher` renders, start; or only show it."""
    from accrete.launch.cluster.request import prepare_run, write_files

    rendered: dict[str, str] = launcher.render(request)
    if dry_run:
        if _are_idle([request]):
            write_files(request, rendered)
        _show(request.launch_dir, rendered)
        return
    if attempts.has_finished(request.folder):
        typer.echo(f"{request.run_dir}: this run is finished; see {request.folder.report}")
        return
    _require_idle(request)
    made = False
    if request.cluster.prepare == "submit":
        made = prepare_run(request, lambda line: typer.echo(line, err=True))
    write_files(request, rendered)
    attempts.note_submitted(request.folder)
    try:
        status = launcher.start(request)
    except InputError:
        if made:
            request.folder.discard()
        raise
    if status:
        raise typer.Exit(status)


def _require_idle(request: LaunchRequest) -> None:
    """Refuse where processes of this run may still read its files, whoever has launched them.

    Pods do not: they have their own copy.
    """
    from accrete.launch.cluster import hosts, slurm

    slurm.require_idle(request)
    hosts.require_idle(request)


def _are_idle(requests: Sequence[LaunchRequest]) -> bool:
    """For --dry-run: whether nothing reads the runs' files; if something may, a word about it."""
    for request in requests:
        try:
            _require_idle(request)
        except InputError as error:
            typer.echo(f"warning: {error}\n  Nothing is written; a start would use:", err=True)
            return False
    return True


def _sweep(
    recipe: str,
    overrides: list[str] | None,
    nodes: int | None,
    procs_per_node: int | None,
    run_dir: Path | None,
    time: str | None,
    cluster: str | None,
    dry_run: bool,
    sweep: list[str],
) -> None:
    """All runs checked, and their folders made ready, before the first one is queued."""
    from accrete.launch.cluster import slurm, slurm_sweep
    from accrete.launch.cluster import sweep as sweeps
    from accrete.launch.cluster.request import (
        prepare_run,
        require_launchable,
        write_files,
        write_scripts,
    )
    from accrete.launch.cluster.settings import load_cluster
    from accrete.launch.commands.run import default_folder

    settings = load_cluster(cluster, nodes=nodes, procs_per_node=procs_per_node, time=time)
    folder = (run_dir or default_folder(f"sweep-{recipe}")).expanduser().absolute()
    axes = sweeps.parse_axes(sweep)
    requests = sweeps.make_requests(recipe, overrides or (), axes, folder, settings)
    for request in requests:
        require_launchable(request)
    rendered = slurm_sweep.render(requests, folder)

    def write() -> None:
        for request in requests:
            write_files(request, slurm.render(request))
        write_scripts(folder / "launch", rendered)

    if dry_run:
        if _are_idle(requests):
            write()
        _show(folder / "launch", rendered)
        _show(requests[0].launch_dir, slurm.render(requests[0]))
        return
    for request in requests:
        _require_idle(request)
    made = []
    try:
        for request in requests:
            if settings.prepare == "submit" and prepare_run(
                request, lambda line: typer.echo(line, err=True)
            ):
                made.append(request)
        write()
        for request in requests:
            attempts.note_submitted(request.folder)
        slurm_sweep.start(requests, folder)
    except InputError:
        for request in made:
            request.folder.discard()
        raise


def _show(folder: Path, rendered: dict[str, str]) -> None:
    for name, content in rendered.items():
        typer.echo(f"# {folder / name}")
        typer.echo(content)
