"""`accrete doctor [RECIPE [a.b=v ...]]`: would a run work here?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.completion import complete_recipe


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name or file of a recipe; without one, only the machine is looked at.",
            autocompletion=complete_recipe,
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="a.b=v", help="Values that differ.", show_default=False),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Where the run would be; its parent is tried."),
    ] = None,
    procs: Annotated[
        int | None,
        typer.Option("--procs", min=1, help="Processes on each node; default: as a run would."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="Name or file of a cluster: what its runs would find."),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds to wait for other processes.")
    ] = 60,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="There will be no network: what is not cached fails."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try what a run needs: versions, devices, all-reduce, shared folders, caches.

    Loads no model, and exits with 0 if nothing failed, 1 otherwise. On several nodes: the same
    command on each, such as `srun --ntasks-per-node=1 accrete doctor ...`.

    Example: accrete doctor standard_cl/order1 data.root=../data --offline
    """
    from accrete.launch import api
    from accrete.launch.cluster.request import engine_overrides
    from accrete.launch.cluster.settings import load_cluster
    from accrete.launch.commands.run import default_folder
    from accrete.launch.doctor.examine import Question, examine, use_storage
    from accrete.launch.doctor.offline import go_offline
    from accrete.launch.doctor.table import print_diagnosis

    settings = load_cluster(cluster)
    use_storage(settings)
    already = go_offline()
    # As `accrete launch` loads it: what the user says wins over the cluster.
    words = [*(engine_overrides(settings) if cluster else ()), *(overrides or ())]
    loaded = None if recipe is None else api.load_recipe(recipe, *words)
    question = Question(
        recipe=loaded,
        words=" ".join([recipe or "RECIPE", *(overrides or ())]),
        run_dir=Path(os.path.expanduser(run_dir or default_folder("doctor"))).absolute(),
        offline=offline or already or (cluster is not None and settings.storage.offline),
        procs=procs,
        limit=timeout,
        cluster=settings,
        for_cluster=cluster is not None,
    )
    diagnosis = examine(question, lambda line: typer.echo(line, err=True))
    if as_json:
        import json

        typer.echo(json.dumps(diagnosis.to_json(), ensure_ascii=False, indent=2))
    else:
        print_diagnosis(diagnosis)
    raise typer.Exit(1 if diagnosis.failed else 0)
