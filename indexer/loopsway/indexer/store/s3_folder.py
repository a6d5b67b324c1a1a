"""A folder in an object store: a prefix of an S3 bucket, or of whatever else speaks its protocol.

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL, ...), as obstore reads them. A PUT is whole and durable by itself. Files that must lie on this
machine to be read, for FAISS and for rows of codes, are fetched into a cache.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from zarr.storage import ObjectStore

from .cache import Cache
from .files import file_digest, new_digest
from .folders import FileFacts, Folder, IndexDamagedError, StorageError, facts_of_file

try:
    from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
    from obstore.store import S3Store
except ImportError as error:
    raise ImportError("s3:// needs an object store's client: pip install 'loopsway[s3]'") from error

REQUESTS = 16  # at once
RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}


class S3Folder(Folder):
    """A prefix of a bucket. Make it with `S3Folder.open`.

    Args:
        store: of the whole index.
        cache: for files that must lie on this machine.
        url: of the store.
        prefix: of this folder in the store.
    """

    is_local = False

    def __init__(self, store: S3Store, cache: Cache, url: str, prefix: str = "") -> None:
        self._store, self._cache, self._url, self._prefix = store, cache, url, prefix
        self.address = f"{url}/{prefix}" if prefix else url

    @classmethod
    def open(cls, url: str) -> S3Folder:
        """The folder at `s3://bucket/prefix`; nothing is asked of the store yet.

        Raises:
            ValueError: the URL names no bucket or no prefix, or the environment holds a setting that can't be read.
        """
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not bucket or not prefix:
            raise ValueError(f"{url} is not of the form s3://bucket/prefix, such as s3://my-bucket/runs/mine.index")
        url = f"s3://{bucket}/{prefix}"
        return cls(_opened(url), Cache.from_environment(), url)

    def __truediv__(self, name: str) -> S3Folder:
        return S3Folder(self._store, self._cache, self._url, self._key(name))

    def read(self, name: str) -> bytes:
        with self.clear_errors():
            return bytes(self._store.get(self._key(name)).bytes())

    def write(self, name: str, content: bytes) -> None:
        with self.clear_errors():
            self._store.put(self._key(name), content)

    def write_file(self, name: str, write: Callable[[Path], object]) -> FileFacts:
        with self._cache.new_file() as file:
            write(file)
            facts = facts_of_file(file)
            with self.clear_errors():
                self._store.put(self._key(name), file)
            self._cache.add(file, facts["digest"])
        return facts

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        names = list(names)
        with ThreadPoolExecutor(REQUESTS) as pool:
            return dict(zip(names, pool.map(self._size, names), strict=True))

    def files(self, below: str = "") -> list[str]:
        start = len(self._prefix) + 1 if self._prefix else 0
        with self.clear_errors():
            return sorted(each["path"][start:] for each in self._store.list(self._key(below) or None).collect())

    def folders(self, below: str) -> list[str]:
        with self.clear_errors():
            found = self._store.list_with_delimiter(self._key(below))["common_prefixes"]
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found)

    def remove(self, names: Iterable[str]) -> None:
        with self.clear_errors():
            self._store.delete([self._key(name) for name in names])

    def remove_folder(self, name: str) -> None:
        self.remove(self.files(name))

    def make_durable(self, names: Iterable[str]) -> None:
        pass

    def digest(self, name: str) -> str:
        digest = new_digest()
        for piece in self._pieces(name):
            digest.update(piece)
        return digest.hexdigest()

    @contextmanager
    def local(
        self, name: str, digest: Callable[[], str], digest_of: Callable[[Path], str] = file_digest
    ) -> Iterator[Path]:
        def size_bytes() -> int:
            size = self._size(name)
            if size is None:
                raise IndexDamagedError(f"{self.at(name)} is missing")
            return size

        def fetch(file: Path) -> None:
            with file.open("wb") as out:
                out.writelines(self._pieces(name))

        with self._cache.holding(digest(), size_bytes, fetch, digest_of, self.at(name)) as file:
            yield file

    def keep(self, file: Path, holder: object) -> None:
        self._cache.keep(file, holder)

    def arrays(self, name: str) -> Any:
        return ObjectStore(_opened(f"{self.address}/{name}"))  # of its own: Zarr writes into every folder above a path

    def clear_errors(self) -> AbstractContextManager[None]:
        return _clear_errors(self._url)

    def create(self, name: str, content: bytes) -> str:
        """Writes a file that is not there yet; gives its tag, which changes with its content.

        Raises:
            FileExistsError: it is there.
        """
        return self._put_if(name, content, "create")

    def replace(self, name: str, content: bytes, tag: str) -> str:
        """Writes a file whose tag is still this one; gives its new tag.

        Raises:
            FileExistsError: it was changed or removed meanwhile.
        """
        return self._put_if(name, content, {"e_tag": tag})

    def read_tagged(self, name: str) -> tuple[bytes, str]:
        """A file and its tag.

        Raises:
            FileNotFoundError: there is none.
        """
        with self.clear_errors():
            answer = self._store.get(self._key(name))
            return bytes(answer.bytes()), str(answer.meta["e_tag"])

    def _pieces(self, name: str) -> Iterator[Any]:
        """A file's content, a few MiB at a time."""
        with self.clear_errors():
            yield from self._store.get(self._key(name)).stream()

    def _put_if(self, name: str, content: bytes, condition: Any) -> str:
        with self.clear_errors():
            try:
                return str(self._store.put(self._key(name), content, mode=condition)["e_tag"])
            except (AlreadyExistsError, PreconditionError) as error:
                raise FileExistsError(f"{self.at(name)} was written by another") from error

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self._prefix, name) if part)

    def _size(self, name: str) -> int | None:
        try:
            with self.clear_errors():
                return self._store.head(self._key(name))["size"]
        except FileNotFoundError:
            return None


def _opened(url: str) -> S3Store:
    try:
        return S3Store.from_url(url, retry_config=RETRIES)
    except BaseError as error:
        raise ValueError(f"{url} can't be opened: {_line(error)}; look at the variables AWS_*") from error


@contextmanager
def _clear_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        if "NoSuchBucket" in str(error):
            raise StorageError(errno.ENOENT, f"{url}: the bucket does not exist; make it first") from error
        raise FileNotFoundError(_line(error)) from error
    except BaseError as error:
        raise StorageError(
            errno.EIO,
            f"{url} can't be reached: {_line(error)}; look at AWS_ENDPOINT_URL, AWS_REGION and the credentials. What "
            "is stored stays: run the same command to go on",
        ) from error


def _line(error: Exception) -> str:
    """An error of the store without the pages of detail below it."""
    return " ".join(str(error).partition("Debug source:")[0].split())[:500]
