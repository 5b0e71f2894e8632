"""Which cases each world size runs."""

from __future__ import annotations

import os
import re

from harness import Case
from method_settings import FOUR, QUIET, SETTINGS

from accrete.pipeline.methods.registry import METHODS as METHOD_KINDS

MODELS = ("t5", "llama")
STAGES = (0, 1, 2, 3)
STRENGTH = 3.0e2
METHODS = {
    "sequential": {"method": "sequential"},
    "ewc_lora": {"method": "ewc_lora", "settings": {"lambda_": STRENGTH}},
}
BATCH = 8


def micro(world: int, accumulation: int) -> int:
    return BATCH // world // accumulation


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
        for how in ("hook", "gap", "nothing", "grad_attribute")
        for zero in STAGES
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
            {
                "model": "t5_short",
                "zero": zero,
                "micro": 2,
                **METHODS[method],
            },
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
CUT = 2


def interruptions() -> list[Case]:
    """The same run whole and cut, at every stage of ZeRO."""
    return [
        case
        for zero in STAGES
        for case in (
            Case(f"whole-zero{zero}", "sequence", {**RESUMED, "zero": zero, "micro": 4}),
            Case(
                f"cut-zero{zero}", "interrupted", {**RESUMED, "zero": zero, "micro": 4, "cut": CUT}
            ),
        )
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
HALF = {"model": "llama", "dtype": "bf16", "past": "branch", **METHODS["ewc_lora"]}


def precisions() -> list[Case]:
    """Clipping, and a frozen base in bf16 with fp32 factors, at every stage of ZeRO."""
    return [
        Case(f"{name}-zero{zero}", "sequence", {**params, "zero": zero, "micro": 4})
        for name, params in (("clipped", CLIPPED), ("half", HALF))
        for zero in STAGES
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


def consolidations(zeros: tuple[int | None, ...]) -> list[Case]:
    return [
        Case(
            f"consolidation-{past}-zero{zero}-{merge}",
            "consolidation",
            {
                "model": "t5",
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


def shards(kind: str, world: int) -> list[tuple[str, int | None]]:
    """The (model, ZeRO stage) that a kind runs with: all for a method, two for its variants."""
    if world == 1:
        return [(model, None) for model in MODELS]
    if world == 2 and kind in METHOD_KINDS:
        return [(model, zero) for model in MODELS for zero in STAGES]
    if world == 2 and kind in PARTITIONED:
        return [("llama", 2), ("t5", 3)]
    return [("t5", 2), ("llama", 3)]


def methods(world: int) -> list[Case]:
    """Every method over three tasks; `method_settings.py` has what each of them is tested with."""
    return [
        Case(
            f"method-{kind}-{model}-zero{zero}",
            "sequence",
            {
                "model": model,
                "zero": zero,
                "micro": BATCH // world,
                "tasks": 3,
                **(in_pieces(kind, model, zero) if world == 2 else {}),
                **SETTINGS[kind],
            },
        )
        for kind in (SETTINGS if world < 4 else FOUR)
        for model, zero in shards(kind, world)
    ]


WHOLE_WEIGHTS = ("full", "ewc", "gpm")
"""Methods that train all weights: also with every weight in pieces."""
PARTITIONED = (
    *WHOLE_WEIGHTS,
    "lora_subtraction_triplet",
    "sr2_lora",
    "sr2_lora_uncached",
    "inf_lora",
    "o_lora",
    "keep_lora",
)
"""Methods that train all weights, read other weights than the factors, write frozen factors or
look at trained ones in a step: on the T5 at ZeRO 3 with every parameter in pieces, where by default
small ones stay whole, as they do on the LLaMA."""
FROZEN = ("inf_lora", "keep_lora", "keep_lora_pp")
"""Methods that write A and train B alone."""


def method_traffics() -> list[Case]:
    """What a method sends in a step, beside `traffics`."""
    return [
        Case(
            f"traffic-{kind}-zero{zero}",
            "traffic",
            {"model": "t5_short", "zero": zero, "micro": 2, **SETTINGS[kind]},
        )
        for kind in (*QUIET, "lora_subtraction_triplet", *WHOLE_WEIGHTS)
        for zero in STAGES
    ]


def pooled(world: int, zero: int | None) -> list[Case]:
    """Two micro-batches a step, of the same rows over all ranks."""
    kind = "lora_subtraction_triplet"
    params = {"zero": zero, "micro": micro(world, 2), "tasks": 2, **SETTINGS[kind]}
    return [Case(f"methodpooled-{kind}", "sequence", {"model": "t5", **params})]


def in_pieces(kind: str, model: str, zero: int | None) -> dict[str, int]:
    """The setting that has DeepSpeed partition every parameter, where it is wanted."""
    wanted = zero == 3 and model == "t5" and kind in PARTITIONED
    return {"whole_below": 0} if wanted else {}


FROZEN_STAGES = (2, 3)


def frozens() -> list[Case]:
    """What each rank holds of a frozen A, before and after training."""
    return [
        Case(
            f"frozen-{kind}-{model}-zero{zero}",
            "frozen",
            {"model": model, "zero": zero, "micro": 4, **SETTINGS[kind]},
        )
        for kind in FROZEN
        for model in MODELS
        for zero in FROZEN_STAGES
    ]


def method_resumes() -> list[Case]:
    """Every method cut in the middle of its second task, and resumed."""
    return [
        Case(f"{name}-{kind}", how, {**params, **more})
        for kind, settings in SETTINGS.items()
        for params in [
            {"model": "llama", "zero": 2, "micro": 4, "tasks": 3, "every_steps": 1, **settings}
        ]
        for name, how, more in (
            ("methodcut", "interrupted", {"cut": CUT}),
            ("methodresumed", "resumed", {"source": f"methodcut-{kind}"}),
        )
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
        Case("clipped-plain", "sequence", {**CLIPPED, "zero": None, "micro": 8}),
        Case("half-plain", "sequence", {**HALF, "zero": None, "micro": 8}),
        *scorings((None,)),
        *consolidations((None,)),
        Case("rows-5", "rows", {"count": 5}),
        *methods(1),
        *pooled(1, None),
    ],
    2: [
        *hook_reality(),
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
        *[Case(f"rows-{n}", "rows", {"count": n}) for n in (1, 2, 5)],
        *methods(2),
        *method_resumes(),
        *method_traffics(),
        *frozens(),
        *pooled(2, 2),
    ],
    4: [
        *equivalence(4),
        *fishers(4),
        *resumes(4, [(2, 2), (2, 3)]),
        *[Case(f"rows-{n}", "rows", {"count": n}) for n in (3, 7, 8)],
        *methods(4),
    ],
}
if ONLY := os.environ.get("ACCRETE_TEST_CASES"):  # while working on one of them
    for cases in WORLDS.values():
        cases[:] = [case for case in cases if re.search(ONLY, case.name)]
