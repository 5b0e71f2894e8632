"""One row of a task, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accrete.pipeline.data.config import Metric
from accrete.pipeline.data.names import nearest


@dataclass(frozen=True, slots=True)
class Example:
    """A row as its file has it, before any prompt."""

    id: str
    input: str
    references: tuple[str, ...]
    """Right answers, at least one. The first is trained on, all of them count in scoring."""
    where: str
    """`file:line`, for messages."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row or a file."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What is known about a task beside its rows; a recipe's own fields win over the format's."""

    dataset: str
    """Name of the data set, as its folder spells it."""
    instruction: str | None
    labels: tuple[str, ...] | None
    """The closed set of answers, in the order of the prompt; None: open."""
    family: str | None
    metric: Metric
    splits: tuple[str, ...]
    """Splits that exist."""
    raw: bool = False
    """The rows hold whole prompts, so that no template applies."""
    no_gold: str | None = None
    """Answer by which the published files mark an unlabelled test row."""
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples (input, output) that go into every prompt."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a record keeps its fields."""

    input: str | Sequence[str] = "input"
    output: str = "output"
    id: str | None = "id"
    id_required: bool = False
    mixed_outputs: bool = False
    """Text and list answers may alternate in one file (SuperNI)."""


def kind(value: object) -> str:
    """The type of a JSON value in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


class RowParser:
    """Turns the records of one split into examples.

    It remembers the types seen so far: a column whose type changes within a split is the mark of a
    broken export, which `datasets` would let pass.
    """

    def __init__(
        self, name: str, split: str, columns: Columns, label_names: Sequence[str] | None = None
    ) -> None:
        self._name = f"{name}-{split}"
        self._columns = columns
        self._label_names = label_names
        self._kinds: dict[str, str] = {}

    def parse(self, record: object, where: str, number: int) -> Example | Problem:
        """The example in `record`, or what is wrong with it.

        Args:
            record: One decoded JSON value or Parquet row.
            where: Its `file:line`.
            number: Its number in the split, from 0; names it if there is no id column.
        """
        if not isinstance(record, Mapping):
            return Problem(where, f"a row must be a JSON object, this is {kind(record)}")
        try:
            return Example(
                self._id(record, number), self._input(record), self._references(record), where
            )
        except _FieldError as error:
            return Problem(where, str(error))

    def _field(self, record: Mapping[str, object], name: str) -> object:
        if name not in record:
            hint = nearest(name, list(record))
            raise _FieldError(
                f"field {name!r} is missing; the row has {', '.join(map(repr, record)) or 'none'}"
                + (f", did you mean {hint!r}?" if hint else "")
            )
        value = record[name]
        if value is None:
            raise _FieldError(f"field {name!r} is null")
        return value

    def _steady(self, name: str, value: object) -> None:
        first = self._kinds.setdefault(name, kind(value))
        if first != kind(value):
            raise _FieldError(
                f"field {name!r} is {kind(value)} ({value!r}) but {first} in the rows before; "
                "use one type throughout"
            )

    def _id(self, record: Mapping[str, object], number: int) -> str:
        name = self._columns.id
        if name is None or (name not in record and not self._columns.id_required):
            return f"{self._name}-{number}"
        value = self._field(record, name)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise _FieldError(f"field {name!r} must be text or a whole number, got {value!r}")
        self._steady(name, value)
        return _whole(name, str(value))

    def _input(self, record: Mapping[str, object]) -> str:
        names = self._columns.input
        if isinstance(names, str):
            value = self._field(record, names)
            if not isinstance(value, str):
                raise _FieldError(f"field {names!r} must be text, this is {kind(value)}")
            text = value
        else:
            parts = {name: self._field(record, name) for name in names}
            for name, value in parts.items():
                if kind(value) not in ("text", "a number"):
                    raise _FieldError(f"field {name!r} must be text, this is {kind(value)}")
            text = "\n".join(f"{name}: {value}" for name, value in parts.items())
            names = ", ".join(names)
            if not any(str(value).strip() for value in parts.values()):
                text = ""
        if not text.strip():
            raise _FieldError(f"field {names!r} is blank")
        return _whole(names, text)

    def _references(self, record: Mapping[str, object]) -> tuple[str, ...]:
        name = self._columns.output
        value = self._field(record, name)
        if not self._columns.mixed_outputs:
            self._steady(name, value)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if not values:
            raise _FieldError(f"field {name!r} is an empty list")
        return tuple(self._answer(name, item) for item in values)

    def _answer(self, name: str, value: object) -> str:
        if isinstance(value, str):
            return _whole(name, value)
        if isinstance(value, (bool, int)) and self._label_names is not None:
            number = int(value)
            if 0 <= number < len(self._label_names):
                return self._label_names[number]
            raise _FieldError(
                f"field {name!r} is label number {number}, but label_names has "
                f"{len(self._label_names)} names (0 to {len(self._label_names) - 1})"
            )
        raise _FieldError(
            f"field {name!r} must be text or a list of texts, this is {kind(value)} ({value!r})"
            + ("; set label_names to turn numbers into words" if isinstance(value, int) else "")
        )


class _FieldError(Exception):
    """A field that cannot be used."""


def _whole(name: str, text: str) -> str:
    """`text`, of whole characters: JSON can name half of one, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _FieldError(
            f"field {name!r} has half a character, {text[error.start]!r} at position "
            f"{error.start}: a surrogate without its pair. Write the whole character or leave it "
            "out"
        ) from None
    return text
