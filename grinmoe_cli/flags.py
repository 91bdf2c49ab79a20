"""Parsers made of the options dataclasses of `grinmoe/<room>/options.py`.

A command's options are one dataclass. Its docstring has three parts, separated by empty lines: the command's help, its
description and an example. The command line makes a flag of every field `Annotated[type, help, metavar]`:

| field | flag |
|---|---|
| `int`, `float`, `str`, each also `\\| None` | `--field-name VALUE` |
| `tuple[str, ...]` | `--field-name VALUE VALUE ...` |
| `Literal["a", "b"]` | `--field-name {a,b}` |
| `bool` that is False by default | `--field-name` |
| `bool` that is True by default | `--no-field-name`, which the help describes |
| a dataclass | the flags of its fields; a help and a metavar are text and title of their group |

A field without a default is a required flag, and so is one marked `typing.Required`, whose default is for callers from
Python. A field that is not `Annotated` has no flag.

These modules import the standard library and `grinmoe/files.py` alone: the command line reads them to parse a command line,
and importing `grinmoe`, which registers the model with Transformers, takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin, get_type_hints

_ALIAS = "_grinmoe_options"


def read_options(room: str, name: str) -> type:
    """
    An options dataclass, read without importing `grinmoe`, which takes seconds.

    The module is imported below an alias of the package whose `__init__.py` files do not run.
    """
    spec = importlib.util.find_spec("grinmoe")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    for alias, path in ((_ALIAS, folder), (f"{_ALIAS}.{room}", folder / room)):
        if alias not in sys.modules:
            package = types.ModuleType(alias)
            package.__path__ = [str(path)]
            sys.modules[alias] = package
    return getattr(importlib.import_module(f"{_ALIAS}.{room}.options"), name)


def add_flags(parser: Any, options: Any) -> None:
    """Give a parser, or a group of one, a flag for every field that has one; required flags first."""
    found = list(_fields(options))
    for field, kind, said in sorted(found, key=lambda one: not _is_required(one[0], one[2])):
        if dataclasses.is_dataclass(kind):
            add_flags(parser.add_argument_group(said[1], said[0]) if said else parser, kind)
        elif said:
            _add_flag(parser, field, kind, said)


def make_options(options: Any, given: dict[str, Any]) -> Any:
    """
    An instance of an options dataclass.

    Args:
        options: the dataclass.
        given: values of flags that were given, by the names of their fields; others keep the field's default.
    """
    values = {}
    for field, kind, _ in _fields(options):
        if dataclasses.is_dataclass(kind):
            values[field.name] = make_options(kind, given)
        elif field.name in given:
            value = given[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return options(**values)


def _fields(options: Any) -> Iterator[tuple[dataclasses.Field, Any, list[Any]]]:
    """Fields with their types and what `Annotated` says of them."""
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        kind, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        yield field, kind, said


def _whole_number(text: str) -> int:
    with contextlib.suppress(ValueError):
        if -(2**63) <= (number := int(text)) < 2**63:
            return number
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at most 64 bits")


def _finite_number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a finite number")


def _is_required(field: dataclasses.Field, said: list[Any]) -> bool:
    return Required in said or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)


def _add_flag(parser: Any, field: dataclasses.Field, kind: Any, said: list[Any]) -> None:
    text, *metavar = [word for word in said if word is not Required]
    flag = field.name.replace("_", "-")
    # Not the default: a flag that is not given is not in the namespace, and the dataclass has it.
    how: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool:
        parser.add_argument(
            f"--no-{flag}" if field.default else f"--{flag}",
            action="store_false" if field.default else "store_true",
            help=text,
            **how,
        )
        return
    kinds = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)
    how["required"] = _is_required(field, said)
    if not how["required"] and field.default is not None and "default" not in text:
        text += f" (default: {field.default})"
    for one in kinds:
        if get_origin(one) is tuple:
            how["nargs"] = "+"
        elif get_origin(one) is Literal:
            how["choices"] = get_args(one)
        elif one in (int, float) and str not in kinds:
            how["type"] = _whole_number if one is int else _finite_number
    parser.add_argument(f"--{flag}", metavar=metavar[0] if metavar else None, help=text, **how)
