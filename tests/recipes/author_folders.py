"""Folders as the authors of the benchmarks distribute them, with a few made-up rows in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
OLORA: dict[str, tuple[str, ...]] = {
    "SC/amazon": FIVE,
    "SC/yelp": FIVE,
    "SC/IMDB": ("Good", "Bad"),
    "SC/SST-2": ("Good", "Bad"),
    "TC/agnews": ("World", "Sports", "Business", "Science or Technology"),
    "TC/dbpedia": ("Company", "Artist", "Village"),
    "TC/yahoo": ("Sports", "Health"),
    "NLI/CB": ("contradiction", "entailment", "neutral"),
    "NLI/MNLI": ("neutral", "entailment", "contradiction"),
    "NLI/RTE": ("contradiction", "entailment"),
    "QQP/QQP": ("False", "True"),
    "BoolQA/BoolQA": ("True", "False"),
    "MultiRC/MultiRC": ("False", "True"),
    "WiC/WiC": ("True", "False"),
    "COPA/COPA": ("A", "B"),
}
SUPERNI = {
    "002": "quoref_answer_generation",
    "073": "commonsenseqa_answer_generation",
    "1290": "xsum_summarization",
    "1510": "evalution_relation_extraction",
    "1572": "samsum_summary",
    "1590": "diplomacy_text_generation",
    "1687": "sentiment140_classification",
    "1729": "personachat_generate_next",
    "181": "outcome_extraction",
    "363": "sst2_polarity_classification",
    "511": "reddit_tifu_long_text_summarization",
    "591": "sciq_answer_generation",
    "639": "multi_woz_user_utterance_generation",
    "748": "glucose_reverse_cause_event_detection",
    "875": "emotion_classification",
}
TRACE: dict[str, tuple[str, ...]] = {
    "C-STANCE": ("A", "B", "C"),
    "FOMC": ("A", "B", "C"),
    "MeetingBank": ("The council adopts the order .", "A motion on zoning passes ."),
    "Py150": ("x = <NUM_LIT:2>", "return <STR_LIT>"),
    "ScienceQA": ("A\nBecause wax slides .", "B\nBecause ice melts ."),
    "NumGLUE-cm": ("12", "3.5"),
    "NumGLUE-ds": ("7", "140"),
    "20Minuten": ("Der Mann kommt frei .", "Das Haus bleibt ."),
}
SPLITS = {"train": 20, "dev": 6, "test": 6}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def make_olora(root: Path) -> Path:
    """`CL_Benchmark/<family>/<task>`; the dev split is a copy of the test split, as there."""
    for name, labels in OLORA.items():
        folder = root / "CL_Benchmark" / name
        for split, count in SPLITS.items():
            kind = "train" if split == "train" else "test"
            rows = [
                {"sentence": f"Text: {kind} {i}\n", "label": labels[i % len(labels)]}
                for i in range(count)
            ]
            put(folder / f"{split}.json", rows)
        put(folder / "labels.json", list(labels))
    return root


def instructions(definition: list[str], rows: list[tuple[str, Any]]) -> dict[str, Any]:
    """One file in the schema of Natural Instructions."""
    shown = [{"input": f"shown {i}", "output": f"said {i}", "explanation": "x"} for i in range(3)]
    return {
        "Definition": definition,
        "Positive Examples": shown,
        "Negative Examples": [],
        "Instances": [{"id": f"r{i}", "input": a, "output": b} for i, (a, b) in enumerate(rows)],
    }


def make_sapt(root: Path) -> Path:
    """`CL_Benchmark/{Long_Sequence,SuperNI}/<task>`, with the flaw of qqp's labels.json."""
    for name, listed in OLORA.items():
        task = name.split("/")[1].lower().replace("boolqa", "boolq").replace("sst-2", "sst2")
        labels = ("no", "yes") if task == "qqp" else listed
        folder = root / "CL_Benchmark" / "Long_Sequence" / task
        definition = [] if task == "copa" else [f"Do {task}.\n"]
        for split, count in SPLITS.items():
            rows = [(f"{split} {i}", labels[i % len(labels)]) for i in range(count)]
            put(folder / f"{split}.json", instructions(definition, rows))
        put(folder / "labels.json", list(listed))
    for number, rest in SUPERNI.items():
        folder = root / "CL_Benchmark" / "SuperNI" / f"task{number}_{rest}"
        for split, count in SPLITS.items():
            many = [(f"{split} {i}", [f"answer {i}", "other"]) for i in range(count)]
            put(folder / f"{split}.json", instructions([f"Do {rest}."], many))
    return root


def make_trace(root: Path) -> Path:
    """`LLM-CL-Benchmark_5000/<task>/{train,eval,test}.json`."""
    for task, answers in TRACE.items():
        for split, count in (("train", 20), ("eval", 6), ("test", 6)):
            rows = [
                {
                    "prompt": f"Read {task} {split} {i} .\nAnswer:",
                    "answer": answers[i % len(answers)],
                }
                for i in range(count)
            ]
            put(root / "LLM-CL-Benchmark_5000" / task / f"{split}.json", rows)
    return root / "LLM-CL-Benchmark_5000"


def make_natural_instructions(root: Path, tasks: list[str]) -> Path:
    """`data/tasks/task<number>_<words>.json`, all rows of a task in one file."""
    for task in tasks:
        rows = [(f"row {i}", [f"answer {i}"]) for i in range(120)]
        put(root / "data" / "tasks" / f"{task}_made_up.json", instructions([f"Do {task}."], rows))
    return root
