"""Sealed files: JSON with the digest of its content. Plans, block entries and manifests are such."""

from __future__ import annotations

import json
from typing import Any

from .files import bytes_digest, json_bytes
from .folders import Folder

SEAL = "digest"


class SealError(ValueError):
    """A sealed file is not what was written.

    Attributes:
        data: what it holds all the same, if that is JSON.
    """

    def __init__(self, text: str, data: Any = None) -> None:
        super().__init__(text)
        self.data = data


def write_sealed(folder: Folder, name: str, data: dict[str, Any]) -> None:
    """Writes the data as JSON, with its digest as one key more, whole and durably."""
    folder.write(name, json_bytes({**data, SEAL: _json_digest(data)}))


def read_sealed(folder: Folder, name: str) -> dict[str, Any]:
    """The data of a sealed file.

    Raises:
        FileNotFoundError: there is none.
        SealError: it is no JSON object, or its content is not what its digest says.
    """
    try:
        data = json.loads(folder.read(name))
    except ValueError as error:
        raise SealError(f"{folder.at(name)} is damaged: {error}") from error
    if not isinstance(data, dict) or data.pop(SEAL, None) != _json_digest(data):
        raise SealError(f"{folder.at(name)} is damaged: its content does not match its digest", data)
    return data


def _json_digest(data: Any) -> str:
    return bytes_digest(json.dumps(data, sort_keys=True).encode())
