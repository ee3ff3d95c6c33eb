"""Every source that there is, made from the list of them."""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

from recsys.candidates.base import Parts, Source
from recsys.config.source_list import SOURCES

One = TypeVar("One", bound=Source)


def made(parts: Parts) -> dict[str, Source]:
    """Each listed source by its name, in the order of the list; those that no quota asks for too: features read their counts."""
    return {name: class_of(name)(parts) for name in SOURCES}


def class_of(name: str) -> type[Source]:
    """The class of a listed source."""
    module, _, attribute = SOURCES[name].made_by.partition(":")
    found: type[Source] = getattr(import_module(module), attribute)
    assert found.name == name, f"{SOURCES[name].made_by} calls itself {found.name!r}, and is listed as {name!r}"
    return found


def one_of(sources: dict[str, Source], kind: type[One]) -> One:
    """The source of a kind, for who reads more of it than candidates."""
    found = sources[kind.name]
    assert isinstance(found, kind)
    return found
