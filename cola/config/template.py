"""Templates of one's own data: "Review: {text} Sentiment: " with the names of columns in braces.

Nothing but names is allowed, so a template can neither reach into a value nor format it. No torch:
a bad template is found before anything heavy is imported.
"""

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cola.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Template:
    """A text with gaps.

    Attributes:
        parts: (literal text, column that follows it); None where no column follows.
    """

    parts: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that it names, once, in order."""
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    def fill(self, row: Mapping[str, Any], place: str) -> str:
        """The text with the row's values.

        Args:
            row: has every column of the template.
            place: file and line, for the message.

        Raises:
            DataError: a value is null, a list or an object.
        """
        return "".join(
            literal
            + ("" if column is None else format_value(row[column], f"{place}, column '{column}'"))
            for literal, column in self.parts
        )


def parse_template(text: str) -> Template:
    """A template from its text; `{{` and `}}` are literal braces.

    Raises:
        ConfigError: a lone brace, no column, or more than a column's name between braces.
    """
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"task.template={text!r}: {error}; write a column as {{name}}, and a literal brace as "
            "{{ or }}"
        ) from None
    for _, column, spec, conversion in fields:
        if column is None:
            continue
        if not column or spec or conversion or any(mark in column for mark in ".["):
            given = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ConfigError(
                f"task.template={text!r}: {{{given}}} is not the plain name of a column; "
                "attributes, indices and formats are not supported, prepare such values in the file"
            )
    template = Template(parts=tuple((literal, column) for literal, column, _, _ in fields))
    if not template.columns:
        raise ConfigError(
            f"task.template={text!r} names no column; write it as in 'Review: {{text}}'"
        )
    return template


def format_value(value: object, place: str) -> str:
    """Text as it is; numbers and booleans as JSON writes them.

    Args:
        value: what the column holds.
        place: file, line and column, for the message.

    Raises:
        DataError: it is null, a list or an object.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    kind = "null" if value is None else f"a {type(value).__name__}"
    raise DataError(f"{place}: {kind}, but it has to be text, a number or a boolean")
