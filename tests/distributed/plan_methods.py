"""Which cases run for every method; `method_settings.py` has what each of them is tested with."""

from __future__ import annotations

from harness import Case
from method_settings import FOUR, QUIET, SETTINGS
from plan_base import BATCH, MODELS, STAGES, counted

from accrete.pipeline.methods.registry import METHODS as METHOD_KINDS

TASKS = {"tasks": 3, "rows": 15}
"""Two steps a task, the second of them not full and divided unequally over two and four ranks."""
TOYS = {"t5": "t5_uneven", "llama": "llama"}
IN_PIECES = {"whole_below": 0, "most_live": 16_000}
"""At ZeRO 3: no parameter stays whole, and half of the toy T5 stays gathered, as of a model of 2e9
elements; by default small parameters stay whole and toys are gathered once, as on the LLaMA."""
STEPS, CUT = 2, 1
"""Steps of a task; step of the second task after which a run is cut."""
TRIPLET = "lora_subtraction_triplet"
MICRO = {TRIPLET: 4}
"""Kinds that look at several rows together -> rows of a micro-batch, for any number of ranks: one
takes two in a step, two and four take one. The others take one whatever the number of ranks."""


def shards(kind: str, world: int) -> list[tuple[str, int | None]]:
    """The (model, ZeRO stage) that a kind runs with: all for a method, two for its variants,
    one or the other on four processes.

    `sequential` has all of them in `plan.equivalence`.
    """
    if world == 1:
        return [(model, None) for model in MODELS]
    if world == 2 and kind in METHOD_KINDS and kind != "sequential":
        return [(model, zero) for model in MODELS for zero in STAGES]
    if world == 2 and kind in PARTITIONED:
        return [("llama", 2), ("t5", 3)]
    if world == 4:
        return [("t5", 2) if FOUR.index(kind) % 2 else ("llama", 3)]
    return [("t5", 2), ("llama", 3)]


def methods(world: int) -> list[Case]:
    """Every method over three tasks; `method_settings.py` has what each of them is tested with."""
    return [
        Case(
            f"method-{kind}-{model}-zero{zero}",
            "sequence",
            {
                "model": TOYS[model],
                "zero": zero,
                "micro": MICRO.get(kind, BATCH // world),
                **TASKS,
                **(IN_PIECES if (world, model, zero) == (2, "t5", 3) else {}),
                **SETTINGS[kind],
            },
        )
        for kind in (SETTINGS if world < 4 else FOUR)
        for model, zero in shards(kind, world)
    ]


WHOLE_WEIGHTS = ("full", "ewc", "gpm")
PARTITIONED = ("lora_subtraction_outputs", TRIPLET, "sr2_lora_uncached")
"""Variants that run on the T5 at ZeRO 3 as well, as every method does: they read other weights than
the factors or look at trained ones in a step."""
FROZEN = ("inf_lora", "keep_lora", "keep_lora_pp")
"""Methods that write A and train B alone."""


LOW = [
    *[("full", "llama", zero) for zero in STAGES],
    ("full", "t5", 3),
    ("ewc", "t5", 3),
    ("gpm", "llama", 2),
]
"""Weights kept in fp32 and multiplied in bf16: kind, model, ZeRO stage of two processes."""


def low_products(world: int) -> list[Case]:
    """Those methods, and answers decoded with such weights."""
    runs = LOW if world == 2 else sorted({(kind, model, None) for kind, model, _ in LOW})
    scored = {"model": "t5", "micro": 4, "dtype": "bf16", **SETTINGS["full"]}
    return [
        *[
            Case(
                f"low-{kind}-{model}-zero{zero}",
                "sequence",
                {
                    "model": TOYS[model],
                    "zero": zero,
                    "micro": BATCH // world,
                    "dtype": "bf16",
                    **TASKS,
                    **(IN_PIECES if zero == 3 and model == "t5" else {}),
                    **SETTINGS[kind],
                },
            )
            for kind, model, zero in runs
        ],
        *[
            Case(f"scoring-low-zero{zero}", "scoring", {**scored, "zero": zero})
            for zero in ((2, 3) if world == 2 else ())
        ],
    ]


def method_traffics() -> list[Case]:
    """What a method sends in a step, beside `traffics`; what each rank holds of a frozen A."""
    return [
        Case(
            f"traffic-{kind}-zero{zero}",
            "traffic",
            {**counted(zero), **SETTINGS[kind]},
        )
        for kind in (*QUIET, TRIPLET, *WHOLE_WEIGHTS)
        for zero in STAGES
    ]


def dropouts() -> list[Case]:
    """A run with dropout, cut and resumed: which numbers it drops must not depend on the cut."""
    params = {
        "model": "llama",
        "zero": 2,
        "micro": 4,
        "every_steps": 1,
        "dropout": 0.3,
        **TASKS,
        "tasks": 2,
        **SETTINGS["lwf"],
    }
    return [
        Case("dropout-whole", "sequence", params),
        Case("dropout-cut", "interrupted", {**params, "cut": CUT}),
        Case("dropout-resumed", "resumed", {**params, "source": "dropout-cut"}),
    ]


def pooled(zero: int | None) -> list[Case]:
    """Blocks of two rows: one process takes four micro-batches a step, two take two, four one."""
    params = {"zero": zero, "micro": 2, **TASKS, **SETTINGS[TRIPLET]}
    return [Case(f"methodpooled-{TRIPLET}", "sequence", {"model": TOYS["t5"], **params})]


def resumed_model(kind: str) -> str:
    """The model on which a kind is cut and resumed: one that also runs whole at ZeRO 2."""
    return "llama" if ("llama", 2) in shards(kind, 2) else "t5"


def method_resumes(world: int) -> list[Case]:
    """Every method cut in the middle of its second task, and resumed: two ranks are at ZeRO 2."""
    return [
        Case(f"{name}-{kind}", how, {**params, **more})
        for kind, settings in SETTINGS.items()
        for params in [
            {
                "model": TOYS[resumed_model(kind)],
                "zero": None if world == 1 else 2,
                "micro": MICRO.get(kind, BATCH // world),
                "every_steps": 1,
                **TASKS,
                **settings,
            }
        ]
        for name, how, more in (
            ("methodcut", "interrupted", {"cut": CUT}),
            ("methodresumed", "resumed", {"source": f"methodcut-{kind}"}),
        )
    ]
