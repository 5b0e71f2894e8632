"""Which cases each world size runs."""

from __future__ import annotations

import os
import re

from harness import Case
from method_settings import SETTINGS
from plan_base import BATCH, CUT, METHODS, MODELS, STAGES, counted, micro
from plan_methods import (
    IN_PIECES,
    TASKS,
    TOYS,
    dropouts,
    low_products,
    method_resumes,
    method_traffics,
    methods,
    pooled,
)


def equivalence(world: int) -> list[Case]:
    return [
        Case(
            f"{method}-{model}-zero{zero}-acc{accumulation}",
            "sequence",
            {
                "model": model,
                "zero": zero,
                "micro": micro(world, accumulation),
                **METHODS[method],
            },
        )
        for method in METHODS
        for model in MODELS
        for zero in STAGES
        for accumulation in (1, 2)
    ]


def plain(name: str, kind: str = "sequence", **params: object) -> list[Case]:
    return [
        Case(f"{name}-{model}-plain", kind, {"model": model, "zero": None, "micro": 8, **params})
        for model in MODELS
    ]


def hook_reality() -> list[Case]:
    return [
        Case(
            f"zero-{how}-zero{zero}",
            "zero_in_gap",
            {
                "how": how,
                "model": "t5",
                "zero": zero,
                "micro": 2,
            },
        )
        for how in ("hook", "gap", "nothing", "grad_attribute", "nan")
        for zero in STAGES
    ]


def edits() -> list[Case]:
    """Factors overwritten through the engine, and in the parameter alone."""
    kept: list[tuple[str, int, dict[str, object]]] = [("edited", zero, {}) for zero in STAGES]
    pieces = ("edited-pieces", 3, {"whole_below": 0})
    copies = [("edited-copy", zero, {"copy_alone": True}) for zero in (1, 2)]
    return [
        Case(
            f"{name}-zero{zero}",
            "edited",
            {"model": "llama_short", "zero": zero, "micro": 4, **more},
        )
        for name, zero, more in (*kept, pieces, *copies)
    ]


USED = [[True, True], [False, False], [False, True], [True, True], [True, False]]
"""Step by step, whether each of its two micro-batches uses a layer."""


def unused(zeros: tuple[int | None, ...], size: int) -> list[Case]:
    """A layer that some steps, or micro-batches, do without; `used` without gaps as a control."""
    given = {"model": "llama_short", "micro": size, "rows": 40}
    patterns = {"unused": USED, "used": [[True, True] for _ in USED]}
    return [
        Case(f"{name}-zero{zero}", "unused", {**given, "zero": zero, "used": used})
        for name, used in patterns.items()
        for zero in zeros
    ]


def gatherings() -> list[Case]:
    """Methods that ask the previous model within a step, and one that does not."""
    given = {"model": "llama", "zero": 3, "micro": 8, "rows": 16, "whole_below": 0}
    asking = {"sequential": {}, "lwf": {}, "sr2_lora": {"cache": "never"}}
    return [
        Case(f"gathered-{name}", "gathered", {**given, "method": name, "settings": settings})
        for name, settings in asking.items()
    ]


def idles(zero: int | None, size: int) -> list[Case]:
    """Methods that look at factors within a step, on a model with layers that do not run."""
    kinds = {"ewc_lora": {}, "o_lora": {"lambda_2": 0.1}}
    given = {"model": "llama_idle", "zero": zero, "micro": size}
    return [
        Case(f"idle-{kind}-zero{zero}", "sequence", {**given, "method": kind, "settings": settings})
        for kind, settings in kinds.items()
    ]


def fishers(world: int) -> list[Case]:
    sizes = {1: (8, 1), 2: (4, 1), 4: (2,)}[world]
    return [
        Case(
            f"fisher-{model}-zero{zero}-micro{size}",
            "fisher",
            {
                "model": model,
                "zero": zero,
                "micro": size,
            },
        )
        for model in MODELS
        for zero, size in [(0, sizes[0]), (2, sizes[-1]), (3, sizes[0])]
    ]


def traffics() -> list[Case]:
    return [
        Case(
            f"traffic-{method}-zero{zero}",
            "traffic",
            {**counted(zero), **METHODS[method]},
        )
        for method in METHODS
        for zero in STAGES
    ]


def strengths(zeros: tuple[int | None, ...], size: int) -> list[Case]:
    """lambda = 0 and inc_lora, which must be the same to the bit."""
    return [
        Case(
            f"{name}-zero{zero}",
            "sequence",
            {
                "model": "llama",
                "zero": zero,
                "micro": size,
                "method": method,
                "settings": settings,
            },
        )
        for zero in zeros
        for name, method, settings in (
            ("off", "ewc_lora", {"lambda_": 0.0}),
            ("inc", "inc_lora", {}),
        )
    ]


def resets() -> list[Case]:
    return [
        Case(
            f"reset-zero{zero}",
            "reset",
            {
                "model": "llama",
                "zero": zero,
                "micro": 4,
                "method": "inc_lora",
            },
        )
        for zero in STAGES
    ]


RESUMED = {"model": "llama", "every_steps": 1, **METHODS["ewc_lora"]}


def interruptions() -> list[Case]:
    """A run cut at every stage of ZeRO; `equivalence` has it whole, without checkpoints."""
    return [
        Case(f"cut-zero{zero}", "interrupted", {**RESUMED, "zero": zero, "micro": 4, "cut": CUT})
        for zero in STAGES
    ]


def resumes(world: int, pairs: list[tuple[int, int]]) -> list[Case]:
    """Go on from a 2-rank checkpoint of ZeRO stage `old` at ZeRO stage `new`."""
    return [
        Case(
            f"resumed-{old}-to-{new}",
            "resumed",
            {
                **RESUMED,
                "source": f"../world2/cut-zero{old}",
                "zero": new,
                "micro": BATCH // world,
            },
        )
        for old, new in pairs
    ]


CLIPPED = {"model": "llama", "train": {"max_grad_norm": 0.05}, **METHODS["ewc_lora"]}
HALF = {"dtype": "bf16", "past": "branch", **METHODS["ewc_lora"]}


def precisions() -> list[Case]:
    """Clipping, and a frozen base in bf16 with fp32 factors, at every stage of ZeRO."""
    llama = {**HALF, "model": "llama"}
    shards = [(name, zero) for name in ("clipped", "half-llama") for zero in STAGES]
    given = {"clipped": CLIPPED, "half-llama": llama, "half-t5": {**HALF, "model": "t5"}}
    return [
        Case(f"{name}-zero{zero}", "sequence", {**given[name], "zero": zero, "micro": 4})
        for name, zero in [*shards, ("half-t5", 2), ("half-t5", 3)]
    ]


def checkpointed() -> list[Case]:
    """Gradient checkpointing in steps and in passes: by batches, and row by row in pieces."""
    given = {"micro": 4, "checkpointing": True}
    fisher = {**given, **METHODS["ewc_lora"]}
    rows = {**given, **TASKS, **SETTINGS["ewc"]}
    return [
        Case("checkpointed-llama-zero2", "sequence", {"model": "llama", "zero": 2, **fisher}),
        Case("checkpointed-t5-zero3", "sequence", {"model": "t5", "zero": 3, **fisher}),
        *[
            Case(
                f"fisher-{model}-checkpointed-zero3", "fisher", {"model": model, "zero": 3, **given}
            )
            for model in MODELS
        ],
        Case(
            "checkpointed-ewc-zero3",
            "sequence",
            {"model": TOYS["t5"], "zero": 3, **IN_PIECES, **rows},
        ),
    ]


def scorings(zeros: tuple[int | None, ...]) -> list[Case]:
    return [
        Case(
            f"scoring-{model}-zero{zero}",
            "scoring",
            {
                "model": model,
                "zero": zero,
                "micro": 4,
            },
        )
        for model in MODELS
        for zero in zeros
    ]


def consolidations(zeros: tuple[int | None, ...], model: str = "t5") -> list[Case]:
    return [
        Case(
            f"consolidation-{model}-{past}-zero{zero}-{merge}",
            "consolidation",
            {
                "model": model,
                "zero": zero,
                "micro": 4,
                "past": past,
                "method": "ewc_lora",
                "settings": {"merge": merge},
            },
        )
        for past in ("fold", "branch")
        for zero in zeros
        for merge in ("exact", "factor_sum")
    ]


WORLDS: dict[int, list[Case]] = {
    1: [
        *plain("sequential", **METHODS["sequential"]),
        *plain("ewc_lora", **METHODS["ewc_lora"]),
        *plain("inc", method="inc_lora"),
        *plain("branch", past="branch", **METHODS["ewc_lora"]),
        *plain("per_batch", method="ewc_lora", settings={"fisher": "per_batch", "lambda_": 3e3}),
        *plain("checkpointed", checkpointing=True, **METHODS["ewc_lora"]),
        *equivalence(1),
        *fishers(1),
        *[
            Case(
                f"fisher-{m}-checkpointed",
                "fisher",
                {"model": m, "zero": None, "micro": 4, "checkpointing": True},
            )
            for m in MODELS
        ],
        *strengths((None,), 4),
        *unused((None,), 4),
        *gatherings(),
        *idles(None, 8),
        Case("clipped-plain", "sequence", {**CLIPPED, "zero": None, "micro": 8}),
        *[
            Case(
                f"half-{model}-plain",
                "sequence",
                {**HALF, "model": model, "zero": None, "micro": 8},
            )
            for model in MODELS
        ],
        *scorings((None,)),
        *consolidations((None,)),
        *consolidations((None,), "llama_short"),
        Case("rows-5", "rows", {"count": 5}),
        *methods(1),
        *low_products(1),
        *pooled(None),
    ],
    2: [
        *hook_reality(),
        *edits(),
        *unused(STAGES, 2),
        *idles(3, 4),
        *equivalence(2),
        *fishers(2),
        *traffics(),
        *strengths((2, 3), 4),
        *resets(),
        *interruptions(),
        *resumes(2, [(0, 0), (1, 1), (2, 2), (3, 3), (2, 3), (3, 0)]),
        *precisions(),
        *scorings((2, 3)),
        *consolidations((2, 3)),
        Case(
            "per_batch-llama-zero2",
            "sequence",
            {
                "model": "llama",
                "zero": 2,
                "micro": 4,
                "method": "ewc_lora",
                "settings": {"fisher": "per_batch", "lambda_": 3e3},
            },
        ),
        Case(
            "branch-t5-zero3",
            "sequence",
            {"model": "t5", "zero": 3, "micro": 4, "past": "branch", **METHODS["ewc_lora"]},
        ),
        *checkpointed(),
        *[Case(f"rows-{n}", "rows", {"count": n}) for n in (1, 2, 5)],
        *methods(2),
        *low_products(2),
        *method_resumes(2),
        *dropouts(),
        *method_traffics(),
        *pooled(2),
    ],
    4: [
        *equivalence(4),
        *fishers(4),
        *resumes(4, [(2, 2), (2, 3)]),
        *[Case(f"rows-{n}", "rows", {"count": n}) for n in (3, 7, 8)],
        *methods(4),
        *pooled(2),
    ],
}
if ONLY := os.environ.get("ACCRETE_TEST_CASES"):  # while working on one of them
    for cases in WORLDS.values():
        cases[:] = [case for case in cases if re.search(ONLY, case.name)]
