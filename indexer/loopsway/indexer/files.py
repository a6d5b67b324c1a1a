"""Files that a reader finds whole or not at all, also after a power failure; and their digests.

What says how an index stands (plan, block entries, manifest) is a *sealed* file: JSON with the digest of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

SEAL = "digest"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees all of it, or the file as it was before: by renaming one that is done."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """`write_whole` of the data as JSON."""
    write_whole(path, json.dumps(data, indent=1).encode())


class SealError(ValueError):
    """A sealed file is not what was written.

    Attributes:
        data: what it holds all the same, if that is JSON.
    """

    def __init__(self, text: str, data: Any = None) -> None:
        super().__init__(text)
        self.data = data


def write_sealed(path: Path, data: dict[str, Any]) -> None:
    """`write_whole` of the data as JSON, with its digest as one key more."""
    write_json(path, {**data, SEAL: _json_digest(data)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The data of a sealed file.

    Raises:
        FileNotFoundError: there is none.
        SealError: it is no JSON object, or its content is not what its digest says.
    """
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise SealError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict) or data.pop(SEAL, None) != _json_digest(data):
        raise SealError(f"{path} is damaged: its content does not match its digest", data)
    return data


def _json_digest(data: Any) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=16).hexdigest()


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
