"""Options as typed records: one line for each says its type, its default, its range and its help text.

A record is a `strict` dataclass of huggingface_hub, whose annotations give the types and the choices. A range is a
validator of the field.
"""

import math
import os
from collections.abc import Callable
from dataclasses import field
from types import NoneType
from typing import Literal, get_args, get_origin

from huggingface_hub.errors import StrictDataclassFieldValidationError


def option(default, help: str, *ranges: Callable, group: str | None = None, is_path: bool = False, **settings):
    """A field with a help text for the command line, and the ranges that its value must lie in.

    `group` is the title in the help under which this field stands, with those that follow it. A path, or a list of
    paths, may begin with `~`.
    """
    metadata = {"help": help, "validator": list(ranges), "group": group, "is_path": is_path}
    return field(default=default, metadata=metadata, **settings)


def from_home(path: str | os.PathLike) -> str:
    """`path` with the folder of its user in place of `~` or `~name` at its beginning.

    A file or folder whose own name begins with `~` is taken for what it is.

    Raises:
        ValueError: this process has no home, or there is no such user.
    """
    path = os.fspath(path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # out of a preset, which is UTF-8, under a locale that is not
        path = os.fsdecode(path.encode())
    found = os.path.expanduser(path)
    first = found.split("/")[0]
    if first == "~":
        raise ValueError(f"{path} needs a home folder, and this user has none: set HOME, or write the path in full")
    if first.startswith("~") and not os.path.lexists(first):
        raise ValueError(f"{path} needs the home of a user {first[1:]}, and there is none: write the path in full")
    return found


def must(expected: str, holds: Callable[[object], bool]) -> Callable:
    """A range: refuses every value, other than `None`, for which `holds(value)` is false."""

    def check(value):
        if value is not None and not holds(value):
            raise ValueError(f"must {expected}, got {value!r}")

    return check


positive = must("be positive", lambda value: value > 0)
not_negative = must("not be negative", lambda value: value >= 0)
at_least_one = must("be at least 1", lambda value: value >= 1)
below_one = must("lie in [0, 1)", lambda value: 0 <= value < 1)
utf8 = must("be spelt in UTF-8, as paths of weights and tables are", lambda path: _is_utf8(os.fsencode(path)))
finite = must("be a finite number", lambda value: abs(value) < math.inf)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def one_sentence(record: type) -> type:
    """Decorator of a `strict` dataclass: what it refuses becomes a ValueError of one sentence that names the field.

    A field without a `repr` holds a secret, which the sentence does not show.
    """
    checked = record.__setattr__

    def set_checked(self, name, value):
        try:
            if self.__dataclass_fields__[name].metadata.get("is_path"):
                value = _paths_from_home(value)
            checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            told = error.__cause__
            if isinstance(told, TypeError):
                told = _other_type(self.__dataclass_fields__[name], value)
            raise ValueError(f"{name} {told}") from None

    record.__setattr__ = set_checked
    return record


def _paths_from_home(value):
    if isinstance(value, list | tuple):
        return type(value)(map(_paths_from_home, value))
    return from_home(value) if isinstance(value, str | os.PathLike) else value


def kinds_of(annotation) -> tuple:
    """The members of a union, or the annotation alone."""
    return (annotation,) if get_origin(annotation) is Literal else get_args(annotation) or (annotation,)


def _other_type(entry, value) -> str:
    kinds = kinds_of(entry.type)
    got = repr(value) if entry.repr else type(value).__name__
    hint = " (YAML needs the dot in 1.0e-3)" if float in kinds and isinstance(value, str) else ""
    return f"must be {' or '.join(map(_name_of, kinds))}, got {got}{hint}"


def _name_of(kind) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return "nothing" if kind is NoneType else kind.__name__
