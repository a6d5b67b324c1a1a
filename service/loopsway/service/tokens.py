"""Who asks: tokens, what each allows, and how often. Knows no gRPC, and keeps hashes alone."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeVar

from .errors import ForbiddenError, RateError, UnknownCallerError
from .settings import TokenSettings

Scope = Literal["read", "admin"]
_Value = TypeVar("_Value")

ALL = "*"
UNKNOWN = "this server does not know the token; ask whoever runs it for one"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whoever makes the present request.

    Attributes:
        bucket: of the token that came with it.
        scope: that the method asked for needs.
    """

    bucket: Bucket
    scope: Scope

    @property
    def token(self) -> TokenSettings:
        """As the server knows it now, which a stream may outlast.

        Raises:
            UnknownCallerError: it was revoked meanwhile.
        """
        return self.bucket.token

    @property
    def indices(self) -> tuple[str, ...]:
        """The names of those that the token gives this scope for; "*" stands for all. Who may change may read."""
        return self.token.admin if self.scope == "admin" else (*self.token.read, *self.token.admin)

    def may_use(self, index: str) -> bool:
        return ALL in self.indices or index in self.indices


# Of the request that the present asyncio task answers. None: the server has no tokens, and all is allowed.
CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def allowed(engines: Mapping[str, _Value]) -> dict[str, _Value]:
    """Those of the indices that the caller may use."""
    caller = CALLER.get()
    return {name: value for name, value in engines.items() if caller is None or caller.may_use(name)}


def check_allowed(index: str, asked: str) -> None:
    """Refuses an index that the caller may not use, whether or not there is one of that name.

    Args:
        index: its own name. Empty: the caller named none.
        asked: the name that the caller used, which the refusal tells alone: an alias, maybe.

    Raises:
        ForbiddenError: it may not.
        UnknownCallerError: its token was revoked meanwhile.
    """
    caller = CALLER.get()
    if caller is None or (caller.may_use(index) if index else caller.indices):
        return
    of = f"index {asked!r}" if index else "any index"
    raise ForbiddenError(f"token {caller.token.name} has no scope {caller.scope!r} for {of}", field="index")


async def rate_allows() -> None:
    """Waits until the caller's rate allows one request more, and counts it."""
    caller = CALLER.get()
    if caller is not None:
        await caller.bucket.take_in_turn()


def new_token() -> str:
    """A token that nobody can guess."""
    return f"lw_{secrets.token_urlsafe(32)}"


def digest(token: str) -> str:
    """What is kept of a token. Its 256 random bits need no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The tokens that a server knows; without any, it admits nobody. Use it within one event loop."""

    def __init__(self, tokens: Sequence[TokenSettings]) -> None:
        self._buckets = {token.sha256: Bucket(token) for token in tokens}

    def replace(self, tokens: Sequence[TokenSettings]) -> None:
        """Knows these from now on, and no others. One that it knew before keeps what is used up of its rate."""
        before, self._buckets = self._buckets, {}
        for token in tokens:
            bucket = self._buckets[token.sha256] = before.pop(token.sha256, None) or Bucket(token)
            bucket.change(token)
        for revoked in before.values():
            revoked.change(None)

    def admit(self, token: str | None) -> Bucket:
        """The bucket of the known token that this is, which counts one request.

        Raises:
            UnknownCallerError: it is none. The text never holds it.
            RateError: it comes too fast.
        """
        if not token:
            raise UnknownCallerError(
                "this server wants a token: send it as `authorization: Bearer TOKEN` "
                "(Client(token=...), or the command's --token-file or LOOPSWAY_TOKEN)"
            )
        # All are compared, each in constant time, so that time tells nothing of the hashes.
        given = digest(token)
        found = [bucket for sha256, bucket in self._buckets.items() if hmac.compare_digest(sha256, given)]
        if not found:
            raise UnknownCallerError(UNKNOWN)
        found[0].take()
        return found[0]


class Bucket:
    """Fills up with requests that may be made with a token, to its `burst` at most. Use it within one event loop."""

    def __init__(self, token: TokenSettings) -> None:
        self._token: TokenSettings | None = token
        self._filled, self._time = float(token.burst), time.monotonic()
        self._turn = asyncio.Lock()

    @property
    def token(self) -> TokenSettings:
        """Whose it is.

        Raises:
            UnknownCallerError: it was revoked.
        """
        if self._token is None:
            raise UnknownCallerError(UNKNOWN)
        return self._token

    def change(self, token: TokenSettings | None) -> None:
        """Goes by what is known of the token now; None: it is revoked."""
        self._token = token

    async def take_in_turn(self) -> None:
        """Takes one as soon as there is one: those who wait, in the order in which they came."""
        async with self._turn:
            while True:
                try:
                    return self.take()
                except RateError as error:
                    await asyncio.sleep(error.retry_after_s)

    def take(self) -> None:
        """Takes one.

        Raises:
            RateError: there is none.
            UnknownCallerError: the token was revoked.
        """
        rate, burst = self.token.requests_per_second, self.token.burst
        if rate is None:
            return
        now = time.monotonic()
        self._filled = min(burst, self._filled + (now - self._time) * rate)
        self._time = now
        if self._filled < 1:
            raise RateError(
                f"token {self.token.name} allows {rate:g} requests a second, {burst} at once",
                retry_after_s=(1 - self._filled) / rate,
            )
        self._filled -= 1
