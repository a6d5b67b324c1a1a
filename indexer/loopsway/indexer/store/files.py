"""Files that a reader finds whole or not at all, also after a power failure; and digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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
    write_whole(path, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    return json.dumps(data, indent=1).encode()


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def bytes_digest(content: Any) -> str:
    """Of bytes, or of whatever else has a buffer of them; the same as of a file that holds them."""
    digest = new_digest()
    digest.update(content)
    return digest.hexdigest()


def new_digest() -> Any:
    """To be updated with bytes; `hexdigest()` is then the digest of a file that holds them."""
    return hashlib.blake2b(digest_size=16)
