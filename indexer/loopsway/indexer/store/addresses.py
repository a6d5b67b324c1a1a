"""Which folder an address names: a path of this machine, or the URL of an object store."""

from __future__ import annotations

from pathlib import Path

from .folders import Folder, LocalFolder


def open_folder(path: str | Path) -> Folder:
    """The folder at a path of this machine, or at a URL `s3://bucket/prefix`.

    Raises:
        ValueError: a URL of another kind.
        ImportError: a URL, and the extra `s3` is not installed.
    """
    text = str(path)
    if text.startswith("s3://"):
        from .s3_folder import S3Folder  # here: it is an extra's

        return S3Folder.open(text)
    if "://" in text:
        raise ValueError(f"{text} is a URL of a kind that Loopsway can't read; expected a path, or s3://bucket/prefix")
    if isinstance(path, Path) and path.parts[:1] == ("s3:",):
        raise ValueError(f"{text} was a URL before it was made a Path, which drops a slash; pass the URL as a str")
    return LocalFolder(Path(path))
