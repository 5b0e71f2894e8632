"""Prompt styles.

A prompt has three parts, prefix, text and suffix, and only the text may be cut: the options and the
answer cue always reach the model. The answer starts right after the suffix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accrete.pipeline.data.config import Template
from accrete.pipeline.data.examples import TaskInfo
from accrete.pipeline.data.names import canonical
from accrete.pipeline.errors import DataError

_CLOSE = " Answer with exactly one of the options."
FAMILY_INSTRUCTIONS = {
    "SC": "Decide which sentiment the text expresses." + _CLOSE,
    "TC": "Decide which topic the text belongs to." + _CLOSE,
    "NLI": "Decide how sentence 2 relates logically to sentence 1." + _CLOSE,
    "QQP": "Decide if the two questions ask the same thing." + _CLOSE,
    "BoolQA": "Read the passage and decide if the answer to the question is yes (True) or no "
    "(False)." + _CLOSE,
    "MultiRC": "Read the paragraph and the question and decide if the candidate answer is correct."
    + _CLOSE,
    "WiC": "Decide if the word has the same meaning in both sentences." + _CLOSE,
    "COPA": "Choose the more plausible alternative." + _CLOSE,
}
"""Instruction per task family of the O-LoRA collection, where nothing else gives one; our wording.
`data.instructions` takes the published file instead."""

TASK_DEFINITIONS = {
    "agnews": "Name the topic of the following news article.",
    "amazon": "Judge the sentiment of the following product review: very negative, negative, "
    "neutral, positive or very positive.",
    "boolq": "Read the passage: is the answer to the question true or false? Answer True or False.",
    "cb": "Name the relation between sentence 1 and sentence 2.",
    "copa": "",
    "dbpedia": "Name the topic of the following entry of an encyclopedia.",
    "imdb": "Judge the sentiment of the following film review.",
    "mnli": "How does sentence 2 relate logically to sentence 1: contradiction, entailment or "
    "neutral?",
    "multirc": "Read the paragraph and the question: is the candidate answer right? Answer True or "
    "False.",
    "qqp": "Do the two questions ask the same thing? Answer True or False.",
    "rte": "Does sentence 1 entail or contradict sentence 2?",
    "sst2": "Judge the sentiment of the following text.",
    "wic": "Does the word have the same meaning in both sentences?",
    "yahoo": "Name the topic of the following question.",
    "yelp": "Judge the sentiment of the following review: very negative, negative, neutral, "
    "positive or very positive.",
}
"""Definition per task in the manner of SAPT, for `template: sapt` on rows of another layout; our
wording. As there, not every one names its options, and COPA has none. SAPT's own folder brings its
own."""

RAW_CUE = 200
"""A whole prompt's last line counts as its answer cue if it has at most so many characters."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One rendered prompt; `str()` is what the model reads."""

    prefix: str
    text: str
    suffix: str

    def __str__(self) -> str:
        return self.prefix + self.text + self.suffix


@dataclass(frozen=True)
class Frame:
    """What stands around the text in every prompt of one task."""

    prefix: str
    suffix: str
    raw: bool = False

    def render(self, text: str) -> Prompt:
        """The prompt of one input."""
        if not self.raw:
            return Prompt(self.prefix, text, self.suffix)
        # Nothing says where the text ends in a whole prompt, but its last line is the cue.
        body = text.rstrip()
        cut = body.rfind("\n")
        if cut < 0 or len(body) - cut > RAW_CUE:
            cut = body.rfind(" ", max(len(body) - RAW_CUE // 4, 0))
        cut = cut if cut > 0 else len(body)
        return Prompt("", text[:cut], text[cut:])


def frame_for(template: Template, info: TaskInfo) -> Frame:
    """The frame of a task under a template.

    Raises:
        DataError: The template needs something that the task does not have.
    """
    return _FRAMES["raw" if info.raw else template](info)


def _options(info: TaskInfo) -> str:
    return "Option: " + ", ".join(info.labels) if info.labels else ""


def _plain(info: TaskInfo) -> Frame:
    lines = [line for line in (info.instruction, _options(info)) if line]
    return Frame("".join(f"{line}\n" for line in lines), "\nAnswer:")


def _olora(info: TaskInfo) -> Frame:
    """Two lines that name family and data set, the family's instruction, the options, the text.

    Source: the prompt structure of the O-LoRA code base, to the character: published instructions
    bring their own line end, and a space stands behind the options. COPA has neither instruction
    nor options there, because its text carries both.
    """
    if not info.family:
        raise DataError(
            f"template olora: task {info.dataset!r} has no family, which its first line names. "
            f"Set the task's `family` (such as {', '.join(FAMILY_INSTRUCTIONS)})."
        )
    prefix = f"Task:{info.family}\nDataset:{info.dataset}\n"
    if canonical(info.family) != "copa":
        if info.instruction:
            prefix += info.instruction.removesuffix("\n") + "\n"
        if info.labels:
            prefix += _options(info) + " \n"
    return Frame(prefix, "\nAnswer:")


def _sapt(info: TaskInfo) -> Frame:
    """Definition, input, `Output:`. Source: the prompt of SAPT's long sequence."""
    return Frame(f"{info.instruction}\n" if info.instruction else "", "\nOutput:")


def _superni(info: TaskInfo) -> Frame:
    """The style of SuperNI: definition, worked examples, the row.

    Source: Tk-Instruct; SAPT uses it without examples, CITB with two.
    """
    if not info.instruction:
        raise DataError(
            f"template superni: task {info.dataset!r} has no definition. Set its `instruction`."
        )
    head = f"Definition: {info.instruction}\n\n"
    for number, (given, said) in enumerate(info.examples, 1):
        head += f"Positive Example {number} -\nInput: {given}\nOutput: {said}\n\n"
    return Frame(f"{head}Now complete the following example -\nInput: ", "\nOutput:")


def _raw(info: TaskInfo) -> Frame:
    return Frame("", "", raw=True)


_FRAMES: dict[Template, Callable[[TaskInfo], Frame]] = {
    "plain": _plain,
    "olora": _olora,
    "sapt": _sapt,
    "superni": _superni,
    "raw": _raw,
}
