"""`accrete plan RECIPE [a.b=v ...]`: what a run would do, and what it would need."""

from __future__ import annotations

from typing import Annotated

import typer

from accrete.launch.completion import complete_recipe

GB = 1e9


def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name or file of a recipe.", autocompletion=complete_recipe, show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="a.b=v", help="Values that differ.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="Plan for a cluster: name (two_nodes_8) or file."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Plan for so many machines.")
    ] = None,
    procs_per_node: Annotated[
        int | None, typer.Option("--procs-per-node", min=1, help="Processes on each.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for this GPU, such as h100 or a100-80.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            "--mfu", min=0.01, max=1, help="Share of the GPU's peak that is reached (0.3)."
        ),
    ] = None,
    network: Annotated[
        float | None, typer.Option("--network", min=0.01, help="GB/s between machines.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Price of a GPU-hour.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure steps of a short model on this machine first."),
    ] = False,
    assume: Annotated[
        str | None,
        typer.Option(
            "--assume",
            metavar="TRAIN[/SCORED[/ANSWER]]",
            help="Read no rows: so many for each task, and tokens of an answer.",
        ),
    ] = None,
) -> None:
    """Show values with their origin, stages and steps, and forecast time, memory, traffic and disk.

    Checks and tokenises every row of every task, exactly as `accrete run` does first; no weights
    are loaded. With --assume no rows are read either.

    Example: accrete plan quickstart adapter.rank=16 --calibrate
    """
    from accrete.launch.api import load_recipe
    from accrete.launch.forecast.place import choose_place
    from accrete.launch.forecast.recipe import (
        Assumed,
        assumed_tasks,
        forecast_recipe,
        without_rows,
    )
    from accrete.launch.plan import plan_json, plan_view
    from accrete.launch.prepare import prepare

    def say(line: str) -> None:
        typer.echo(line, err=True)

    loaded = load_recipe(recipe, *(overrides or ()))
    config = loaded.config
    place = choose_place(
        config,
        cluster=cluster,
        nodes=nodes,
        procs_per_node=procs_per_node,
        gpu=gpu,
        mfu=mfu,
        network=None if network is None else network * GB,
    )
    tasks = None
    if assume is not None:
        tasks = assumed_tasks(config, Assumed.parse(assume))
        prepared = without_rows(config, tasks, place)
    else:
        prepared = prepare(config, say, elsewhere=not place.here)
    found = forecast_recipe(config, prepared, place, say, tasks=tasks, measure=calibrate)
    content = plan_json(config, loaded.resolved(), loaded.origins, prepared, found.to_json(price))
    content["procs"], content["device"] = place.world, place.device
    if as_json:
        import json

        typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    Console().print(plan_view(content, place.gib))
