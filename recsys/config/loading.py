"""Reading the configuration: a TOML file over the one that it `extends`, then RECSYS_ environment variables over both.

Tables are laid over tables; anything else replaces what was there. `RECSYS_RANKING__PORT=8001` sets `ranking.port`.
An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from recsys.config.features import CounterConfig
from recsys.config.sections import Config
from recsys.config.slate_section import BoostConfig, CapConfig, PinConfig
from recsys.config.tasks import TaskConfig
from recsys.errors import ConfigError, masked

PREFIX = "RECSYS_"
_LISTED: dict[str, Any] = {
    "tasks": TaskConfig,
    "counters": CounterConfig,
    "boosts": BoostConfig,
    "caps": CapConfig,
    "pins": PinConfig,
}
"""What the entries of a list of tables are."""


def load(path: Path | str | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Read the file (none: defaults), let the environment override, validate. ConfigError names field, value and remedy."""
    raw = {} if path is None else _read(Path(path))
    _override(raw, os.environ if environ is None else environ)
    return parse(raw)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's tables over those of what it extends."""
    if path.resolve() in above:
        raise ConfigError(f"configuration file {str(path)!r} extends itself: take `extends` out of one of the files")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        how = f"check `extends` in {str(above[-1])!r}" if above else "check its name"
        raise ConfigError(f"configuration file {str(path)!r} does not exist: {how}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from None
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"extends = {base!r} in {str(path)!r} must be one file's name, relative to that file")
    return _laid_over(_read(path.parent / base, (*above, path.resolve())), raw)


def _laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        below[key] = _laid_over(below[key], value) if both else value
    return below


def one_thread_each() -> None:
    """One thread for OpenMP and BLAS in this process, unless the environment says otherwise. Call before numpy is imported.

    Our processes bring their own threads; a BLAS worker that spins beside them costs 25 ms a request on two cores.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def parse(raw: Mapping[str, Any]) -> Config:
    """Validate a parsed TOML document."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e) for e in error.errors())) from None


def _override(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX):
            continue
        path = name[len(PREFIX) :].lower().split("__")
        target = raw
        for part in path[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"environment variable {name}: {part!r} is not a section")
        target[path[-1]] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    field = ".".join(path) or "configuration"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _known(path[:-1]), n=1, cutoff=0.0)
        return f"{field} is not a known key; did you mean {'.'.join([*path[:-1], *near])!r}?"
    message = error["msg"].removeprefix("Value error, ")
    return masked(f"{field} = {error['input']!r}: {message}" if path else message)


def _known(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        if part.isdigit():
            continue
        annotation = _LISTED.get(part) or model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
