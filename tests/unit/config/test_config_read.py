from pathlib import Path

import pytest

from accrete.pipeline.config.problems import ProblemList
from accrete.pipeline.config.read import read_file, read_value
from accrete.pipeline.config.tree import Node, Origin, merge

HERE = Origin("override x", "override")


def read(tmp_path: Path, text: str) -> tuple[Node | None, list[str]]:
    problems = ProblemList()
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    node = read_file(path, "x.yaml", problems)
    return node, [f"{p.where}|{p.path}|{p.message}" for p in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("12", 12),
        ("0o17", 15),
        ("017", 17),
        ("true", True),
        ("yes", "yes"),
        ("no", "no"),
        ("off", "off"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("a=b", "a=b"),
        ("[q, 1]", ["q", 1]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("google-t5/t5-large", "google-t5/t5-large"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    problems = ProblemList()
    node = read_value(text, HERE, problems)
    assert node is not None
    assert not len(problems)
    assert node.plain() == value
    assert type(node.plain()) is type(value)


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    node, problems = read(tmp_path, "# c\na: 1\nb:\n\n  c: 2\n  d:\n    - x\n    - y: 3\n")
    assert not problems
    assert node is not None
    lines = {
        path: node.get(*path).origin.where  # type: ignore[union-attr]
        for path in [("a",), ("b",), ("b", "c"), ("b", "d", 0), ("b", "d", 1, "y")]
    }
    assert list(lines.values()) == [f"x.yaml:{n}" for n in (2, 3, 5, 7, 8)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "x.yaml:2|b.c|the same key again (first: x.yaml:2)"),
        ("a: [1\n", "x.yaml:2||not valid YAML"),
        ("a: 1\n\tb: 2\n", "x.yaml:2||not valid YAML"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2||not valid YAML"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "x.yaml:3|c|`<<` is not part"),
        ("a: &x [*x]\n", "x.yaml:1|a.0|an alias"),
        ("a: !!python/object:os.system x\n", "x.yaml:1|a|the YAML tag"),
        ("a: .inf\n", "x.yaml:1|a|.inf is not a finite number"),
        ("? [1]\n: 2\n", "x.yaml:1||a key must be a name"),
    ],
)
def test_bad_yaml_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    _, problems = read(tmp_path, text)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


def test_anchors_work(tmp_path: Path) -> None:
    node, problems = read(tmp_path, "a: &x {b: 1}\nc: *x\n")
    assert not problems
    assert node is not None
    assert node.plain() == {"a": {"b": 1}, "c": {"b": 1}}


def test_not_text_is_a_problem(tmp_path: Path) -> None:
    problems = ProblemList()
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe\n")
    assert read_file(tmp_path / "x.yaml", "x.yaml", problems) is None
    assert [p.message for p in problems] == ["cannot be read: it is not UTF-8 text"]


def test_merge_is_deep_for_mappings_only_and_copies() -> None:
    problems = ProblemList()
    low = read_value("{a: {x: 1, y: 2}, l: [1, 2], s: {t: 1}}", HERE, problems)
    high = read_value("{a: {y: 3}, l: [9], s: null}", Origin("up", "up"), problems)
    assert low is not None
    assert high is not None
    merged = merge(low, high)
    assert merged.plain() == {"a": {"x": 1, "y": 3}, "l": [9], "s": None}
    assert merged.get("a", "x").origin.label == "override"  # type: ignore[union-attr]
    assert merged.get("a", "y").origin.label == "up"  # type: ignore[union-attr]
    merged.mapping["a"].mapping["x"].value = 7
    assert low.plain()["a"]["x"] == 1
