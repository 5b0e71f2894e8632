"""Which cases run for every method; `method_settings.py` has what each of them is tested with."""

from __future__ import annotations

from harness import Case
from method_settings import FOUR, QUIET, SETTINGS
from plan_base import BATCH, MODELS, STAGES, counted, micro

from accrete.pipeline.methods.registry import METHODS as METHOD_KINDS

TASKS = {"tasks": 3, "rows": 15}
"""Two steps a task, the second of them not full and divided unequally over two and four ranks."""
TOYS = {"t5": "t5_uneven", "llama": "llama"}
MOST_LIVE = 16_000
"""Elements of gathered parameters that a rank keeps at ZeRO 3: half of the toy T5's."""
STEPS, CUT = 2, 1
"""Steps of a task; step of the second task after which a run is cut."""


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
                "micro": BATCH // world,
                **TASKS,
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
    "lora_subtraction_outputs",
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
    """What a method sends in a step, beside `traffics`; what each rank holds of a frozen A."""
    return [
        Case(
            f"traffic-{kind}-zero{zero}",
            "traffic",
            {**counted(zero), **SETTINGS[kind]},
        )
        for kind in (*QUIET, "lora_subtraction_triplet", *WHOLE_WEIGHTS)
        for zero in STAGES
    ]


def pooled(world: int, zero: int | None) -> list[Case]:
    """Two micro-batches a step, of the same rows over all ranks."""
    kind = "lora_subtraction_triplet"
    params = {"zero": zero, "micro": micro(world, 2), **TASKS, **SETTINGS[kind]}
    return [Case(f"methodpooled-{kind}", "sequence", {"model": TOYS["t5"], **params})]


def in_pieces(kind: str, model: str, zero: int | None) -> dict[str, int]:
    """The settings that have DeepSpeed partition every parameter and keep few of them gathered, as
    with models of more than 1e9, where they are wanted."""
    wanted = zero == 3 and model == "t5" and kind in PARTITIONED
    return {"whole_below": 0, "most_live": MOST_LIVE} if wanted else {}


def resumed_model(kind: str) -> str:
    """The model on which a kind is cut and resumed: one that also runs whole at ZeRO 2."""
    return "llama" if ("llama", 2) in shards(kind, 2) else "t5"


def method_resumes() -> list[Case]:
    """Every method cut in the middle of its second task, and resumed."""
    return [
        Case(f"{name}-{kind}", how, {**params, **more})
        for kind, settings in SETTINGS.items()
        for params in [
            {
                "model": TOYS[resumed_model(kind)],
                "zero": 2,
                "micro": 4,
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
