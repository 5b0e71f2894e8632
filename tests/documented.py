"""The commands that README and docs tell, and the files that they tell to write."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VARIABLES = {"$seed": "0", "$method": "sequential"}
"""What the loops of the docs go through, by one value each."""


def blocks(page: Path, *languages: str) -> list[str]:
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```$"
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


def lines() -> list[tuple[str, list[str]]]:
    """Page and words of every command line in a shell block."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                for name, value in VARIABLES.items():
                    line = line.replace(name, value)
                words = shlex.split(line, comments=True)
                if words:
                    found.append((page.name, words))
    return found


def accrete_commands() -> list[tuple[str, list[str]]]:
    """Page and arguments of every `accrete ...`, whatever stands before it on its line."""
    found = []
    for page, words in lines():
        for number, word in enumerate(words):
            if word in ("accrete", ".venv/bin/accrete"):
                found.append((page, words[number + 1 :]))
                break
    return found


PLACEHOLDERS = {
    "FOLDER": "out",
    "RECIPE": "quickstart",
    "NAME": "sequential",
    "RUN": "runs/one",
    "t": "0",
    "T": "0",
}


def inline_commands() -> list[tuple[str, list[str]]]:
    """Page and arguments of every `accrete ...` in running text, with something for placeholders.

    A command's bare name, without arguments, only mentions it and is left out.
    """
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`accrete ([^`]+)`", text):
            if command.startswith("--"):  # of accrete itself
                continue
            words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
            if any(
                not re.fullmatch("[a-z0-9]+", word) or word in PLACEHOLDERS.values()
                for word in words
            ):
                found.append((page.name, words))
    return found


def write_files(folder: Path) -> None:
    """What the pages tell to write, from the pages themselves."""
    [own] = [b for b in blocks(ROOT / "README.md", "yaml") if b.startswith("# mine.yaml")]
    (folder / "mine.yaml").write_text(own)
    code = next(b for b in blocks(ROOT / "docs" / "new-method.md", "python") if "class Hold" in b)
    (folder / "hold.py").write_text(code)
    cluster = next(b for b in blocks(ROOT / "docs" / "clusters.md", "yaml") if "\nk8s:" in b)
    (folder / "my_k8s.yaml").write_text(cluster)
    (folder / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n")
