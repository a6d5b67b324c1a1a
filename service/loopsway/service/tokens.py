"""Who asks: tokens, what each allows, and how often. Knows no gRPC, and keeps hashes alone."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whoever makes the present request.

    Attributes:
        token: that came with it.
        scope: that the method asked for needs.
    """

    token: TokenSettings
    scope: Scope

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


def check_allowed(index: str) -> None:
    """Refuses an index that the caller may not use, whether or not there is one of that name.

    Raises:
        ForbiddenError: it may not.
    """
    caller = CALLER.get()
    if caller is None or (caller.may_use(index) if index else caller.indices):
        return
    of = f"index {index!r}" if index else "any index"
    raise ForbiddenError(f"token {caller.token.name} has no scope {caller.scope!r} for {of}", field="index")


def new_token() -> str:
    """A token that nobody can guess."""
    return f"lw_{secrets.token_urlsafe(32)}"


def digest(token: str) -> str:
    """What is kept of a token. Its 256 random bits need no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The tokens that a server knows. Use it within one event loop."""

    def __init__(self, tokens: Sequence[TokenSettings]) -> None:
        self._tokens = tuple(tokens)
        self._buckets = {token.name: _Bucket(token) for token in tokens}

    def admit(self, token: str | None) -> TokenSettings:
        """The known token that this is; counts as one request of its rate.

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
        found = [known for known in self._tokens if hmac.compare_digest(known.sha256, given)]
        if not found:
            raise UnknownCallerError("this server does not know the token; ask whoever runs it for one")
        self._buckets[found[0].name].take()
        return found[0]


class _Bucket:
    """Fills up with requests that may be made, to `burst` at most."""

    def __init__(self, token: TokenSettings) -> None:
        self._token, self._filled, self._time = token, float(token.burst), time.monotonic()

    def take(self) -> None:
        rate, burst = self._token.requests_per_second, self._token.burst
        if rate is None:
            return
        now = time.monotonic()
        self._filled = min(burst, self._filled + (now - self._time) * rate)
        self._time = now
        if self._filled < 1:
            raise RateError(
                f"token {self._token.name} allows {rate:g} requests a second, {burst} at once",
                retry_after_s=(1 - self._filled) / rate,
            )
        self._filled -= 1
