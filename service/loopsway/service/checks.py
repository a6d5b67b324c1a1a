"""What settings say before anything is served: who could reach the server, and whether its files are good."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from importlib import import_module

from loopsway.indexer import Index, open_index
from loopsway.wire.hosts import is_loopback_host

from .credentials import check_certificate
from .faults import SettingsError
from .loading import check_engine, newest_sound, task_of
from .settings import IndexSettings, Settings, TokenSettings


def check_settings(settings: Settings) -> list[str]:
    """Reads everything that the server would, without serving; runs no task.

    Returns:
        A line for each thing found good, and for each index whose last generation would be refused and not served.

    Raises:
        ValueError: something is not.
        OSError: a file can't be read.
        LookupError: an index is not there.
        ImportError: an extra is not installed.
    """
    if not settings.indices:
        raise SettingsError("indices is empty; name at least one index to serve")
    check_exposure(settings)
    check_tracing(settings)
    lines: list[str] = []
    if settings.tls is not None:
        check_certificate(settings.tls)
        lines.append(f"certificate {settings.tls.certificate}: it fits its key")
    lines += [f"token {token.name}" for token in settings.tokens]
    names: dict[str, str] = {}
    for asked in settings.indices:
        check_engine(asked)
        if asked.engine == "ray":
            import_module("loopsway.indexer.cluster")  # says how to install what is missing
        index, damage = newest_sound(asked, partial(_opened, asked))
        task = task_of(asked, index)
        if index.name in names:
            raise SettingsError(
                f"{names[index.name]} and {asked.path} are both named {index.name}; give one another name, as NAME=PATH"
            )
        names[index.name] = asked.path
        model = "without its model" if task is None else f"task {task}"
        lines.append(f"index {index.name}: {index.num_examples:,} examples, generation {index.generation}, {model}")
        if damage is not None:
            lines.append(f"index {index.name}: its last generation would be refused: {damage}")
    check_aliases(settings.aliases, names, settings.tokens)
    return lines


def _opened(asked: IndexSettings, generation: int | None) -> Index:
    here = asked.engine == "local" or asked.model  # else the device is the cluster's alone
    return open_index(asked.path, generation=generation, name=asked.name, device=asked.device if here else "cpu")


def check_aliases(aliases: Mapping[str, str], names: Collection[str], tokens: Iterable[TokenSettings]) -> None:
    """Refuses aliases that do not stand for exactly one of the indices of these names, or that a token's scope names.

    Raises:
        SettingsError: one is an index's own name, or of an index that is not served; or a scope would move with it.
    """
    for alias, name in aliases.items():
        if alias in names:
            raise SettingsError(f"alias {alias} is the name of an index itself; take another")
        if name not in names:
            raise SettingsError(f"alias {alias} is of index {name}, the indices are {', '.join(names)}")
    for token in tokens:
        for alias in (*token.read, *token.admin):
            if alias in aliases:
                raise SettingsError(
                    f"token {token.name} has a scope for {alias}, an alias; scopes are for indices by their own names: "
                    f"give it {aliases[alias]}"
                )


def check_exposure(settings: Settings) -> None:
    """Refuses to listen where others reach a server that lets everybody ask.

    Raises:
        SettingsError: a host is not loopback, and nothing protects the server.
    """
    if settings.metrics_port is not None and not (
        settings.metrics_insecure_bind or is_loopback_host(settings.metrics_host)
    ):
        raise SettingsError(
            f"metrics_host {settings.metrics_host} is not loopback, and whoever reaches it may read the metrics: use "
            "127.0.0.1, or set metrics_insecure_bind if the network is trusted"
        )
    if settings.insecure_bind or is_loopback_host(settings.host):
        return
    missing = [] if settings.tls else ["TLS (a [tls] table with `certificate` and `key`)"]
    if not settings.tokens and not (settings.tls and settings.tls.client_ca):
        missing.append("tokens (`loopsway token` makes one) or client certificates (`client_ca`)")
    if missing:
        raise SettingsError(
            f"host {settings.host} is not loopback, and others would reach a server without "
            f"{' and without '.join(missing)}: add what is missing to the settings, use 127.0.0.1, or set "
            "insecure_bind (--insecure-bind) if the network is trusted"
        )


def check_tracing(settings: Settings) -> None:
    """Raises a SettingsError if tracing is on, and its extra is not installed."""
    if not settings.tracing:
        return
    try:
        import_module("opentelemetry.exporter.otlp.proto.grpc")
    except ModuleNotFoundError as error:
        raise SettingsError("tracing is on, and needs the extra: pip install 'loopsway[otel]'") from error
