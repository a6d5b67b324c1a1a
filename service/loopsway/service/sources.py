"""Settings from outside: flags before the environment, before a TOML file, before the defaults.

Knows where a setting comes from, and how to say what is wrong with one; not what any of them means.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from .faults import SettingsError
from .settings import Settings

PREFIX = "LOOPSWAY_"
# Read by others: the cache of object stores, the client, and experiments on GSM8K.
OTHER_VARIABLES = frozenset(
    {"LOOPSWAY_BERGSON_PYTHON", "LOOPSWAY_CACHE", "LOOPSWAY_CACHE_BYTES", "LOOPSWAY_GSM8K", "LOOPSWAY_TOKEN"}
)


def read_settings(flags: Mapping[str, Any] | None = None, *, file: Path | None = None) -> Settings:
    """The settings of a server.

    Args:
        flags: settings that were given by hand, nested as in the file; they win.
        file: TOML. None: none.

    Raises:
        SettingsError: a key is unknown, a value impossible, or the file no TOML.
        OSError: the file can't be read.
    """
    _refuse_unknown_variables(os.environ)

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_args: Any, **_others: Any) -> Any:
            environment = EnvSettingsSource(settings_cls)
            return (init_settings, environment, *([TomlConfigSettingsSource(settings_cls, file)] if file else ()))

    if file is not None:
        _read(file)  # the source takes a missing file for an empty one
    try:
        return Sourced(**(flags or {}))
    except SettingsError:
        raise
    except ValueError as error:  # of a variable that is to hold JSON; the cause would show its value
        raise SettingsError(f"{error}; expected JSON, such as '[\"runs/mine.index\"]'") from None


def _read(file: Path) -> None:
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also of a file that is not UTF-8
        raise SettingsError(f"{file} is not TOML: {error}") from None


def _refuse_unknown_variables(names: Iterable[str]) -> None:
    for name in sorted(names):
        key = name.removeprefix(PREFIX).partition("__")[0].lower()
        if name.startswith(PREFIX) and name not in OTHER_VARIABLES and key not in Settings.model_fields:
            known = ", ".join(PREFIX + field.upper() for field in Settings.model_fields)
            raise SettingsError(f"{name} is no variable of Loopsway's; it knows {known}")
