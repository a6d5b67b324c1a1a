"""The limits that a server works within, what it serves, and where it listens. sources.py reads them from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .faults import settings_error
from .logs import LogFormat

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ConnectionAge = Annotated[float, Field(ge=1, le=2_000_000)]  # gRPC counts milliseconds in 32 bits
ReceiveWindow = Annotated[int, Field(ge=64 << 10, le=64 << 20)]


class Table(BaseModel):
    """A part of the settings that is a table in the file."""

    # What is refused may be a secret that was pasted into the wrong place.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class IndexSettings(Table):
    """An index to serve; a path alone, or "NAME=PATH", stands for one with defaults.

    Attributes:
        path: its folder or URL.
        name: that requests call it by. None: as its folder.
        task: the task to run, as `path/to/file.py:Class`. None: the one that the index names.
        task_arguments: for the task's constructor. None: those that the index was built with.
        model: False to run no task at all and answer sketches only.
        device: a torch device name, for the model, which runs on this machine, and for the searches; those of engine
            "ray" run on this device of each worker's machine.
        engine: who reads the index's codes: this process, or actors on a Ray cluster.
        workers: of engine "ray": shards. None: one for each GPU of the cluster, or each node.
        address: of engine "ray": the cluster's. None: that of RAY_ADDRESS, or one that is started here.
        max_gradient_bytes: of one query that comes as gradients. None: as the server's other indices.
    """

    path: str
    name: str | None = None
    task: str | None = None
    task_arguments: dict[str, Any] | None = None
    model: bool = True
    device: str = "cpu"
    engine: Literal["local", "ray"] = "local"
    workers: Annotated[int, Field(gt=0)] | None = None
    address: str | None = None
    max_gradient_bytes: Positive | None = None


class TlsSettings(Table):
    """The server's certificate; the files may be replaced while it runs.

    Attributes:
        certificate: PEM, the server's own and then those above it.
        key: PEM, unencrypted.
        client_ca: PEM. Callers must show a certificate that one of these signed. None: they need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


class TokenSettings(Table):
    """A caller's token, as `loopsway token` writes it. The token itself is nowhere.

    Attributes:
        name: of the caller, for the log and for errors.
        sha256: of the token, in hexadecimal.
        read: the names of the indices that it may ask, never aliases, which move; "*" stands for all.
        admin: the same of those that it may also have reloaded (ReloadIndex).
        requests_per_second: calls, and batches of a stream, which wait for it. None: any number.
        burst: requests that may come at once after a pause.
    """

    name: Annotated[str, Field(pattern=r"^[\w.@-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    read: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    requests_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    burst: Positive = 10


def _index(value: Any) -> Any:
    """A path, or NAME=PATH; a path may have an "=" in it."""
    if not isinstance(value, str):
        return value
    name, _, path = value.partition("=")
    return {"name": name, "path": path} if name and path and "/" not in name else {"path": value}


class Settings(BaseSettings):
    """What whoever runs a server may vary; every default is safe on one's own machine.

    Made from its arguments alone; `read_settings` asks a file and the environment too.

    Attributes:
        indices: what `loopsway serve` serves. Another index takes another server, or a restart.
        aliases: other names for indices, by alias; read again on SIGHUP, so that one can be pointed elsewhere at once.
        host: address to listen on. Anything but loopback needs `tls`, and `tokens` or its `client_ca`.
        port: 0 lets the system pick a free one.
        insecure_bind: listen on `host` without them: everybody who reaches it may ask or listen in.
        tls: None: the server speaks plaintext.
        tokens: one of them comes with every request; read again on SIGHUP. Empty at the start: whoever reaches the
            server may ask, until it is started again. Empty later: nobody may.
        max_message_bytes: largest request accepted and largest response sent.
        max_queries: in one request.
        max_k: proponents, and opponents, in one ranking.
        max_steps: of a query given as a sketch.
        max_example_ids: in one GetTrajectories.
        max_id_characters: of an example's id in a request.
        max_example_characters: of a query's JSON.
        max_json_depth: arrays and objects of it that may lie within one another.
        max_where_characters: of a filter.
        max_influencers: in one FindInfluences response, over all queries and rankings.
        max_gradient_bytes: of one query that comes as gradients, to an index that sets no other.
        max_streams: of queries, gradients or scores, over all indices; more are told to come back. Where there are
            tokens, one may have half of them.
        stall_s: seconds that a stream's client may let pass before it sends its next message, or takes one.
        batch_timeout_s: that shards have for one batch of StreamInfluences, which is answered without those that don't
            answer in time. Keep it below what clients wait for a batch, by default 30 s.
        stream_batches: batches of one StreamInfluences that are under way or wait to be taken.
        max_waiting: requests that one index lets wait behind the one it works on; more are told to come back.
        max_wait_s: seconds of work that may lie before a request, as far as the server can tell from what it did
            last; a request that would wait for longer is told to come back.
        retry_after_s: seconds after which they are told to, at the least.
        batch_size: examples in one forward and backward of the model, of one request or several.
        batch_delay_s: how long a lone query waits for others to share its batch. With 0, a batch holds what came while
            the one before it ran.
        model_threads: of the process that runs the models. None: all processors but one, which searches and answers
            need, and at least one.
        model_bytes: of all models' weights in the memory of one device; the checkpoints that were not used for longest
            leave, and are loaded again when they are needed. None: half of the device's free memory.
        reload_poll_s: how often each index is looked at for a new generation. 0: on SIGHUP alone.
        search_threads: searches of one index that may run at once.
        receive_window_bytes: of a request or stream, what gRPC takes in before the server reads it, and what a stream
            gets in a round trip. A sketch that is larger comes later by a round trip for each window; each of
            `max_arriving` requests may hold one. Raise it for gradients from far away.
        max_arriving: requests, streams apart, whose message is on its way; more are told to come back, unread.
        max_connection_age_s: after so long a connection takes no new requests, and ends with those that run on it,
            streams included; its client connects anew, and finds replicas that have come meanwhile.
        grace_s: seconds that running requests get to finish on shutdown.
        log_format: of each line on stderr.
        log_level: of what Loopsway says there.
        metrics_port: where Prometheus finds metrics, over plain HTTP; 0 lets the system pick. None: nowhere.
        metrics_host: address of that port.
        metrics_insecure_bind: listen there even if others reach it, who learn indices' names and how they are used.
        tracing: send spans over OTLP, to where the variables OTEL_EXPORTER_OTLP_... say; needs the extra `otel`.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix="LOOPSWAY_",
        env_nested_delimiter="__",
    )

    indices: tuple[Annotated[IndexSettings, BeforeValidator(_index)], ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    insecure_bind: bool = False
    tls: TlsSettings | None = None
    tokens: tuple[TokenSettings, ...] = ()
    max_message_bytes: Positive = 64 << 20
    max_queries: Positive = 64
    max_k: Positive = 1000
    max_steps: Positive = 1024
    max_example_ids: Positive = 10_000
    max_id_characters: Positive = 4096
    max_example_characters: Positive = 1 << 20
    max_json_depth: Positive = 64
    max_where_characters: Positive = 10_000
    max_influencers: Positive = 200_000
    max_gradient_bytes: Positive = 1 << 30
    max_streams: Positive = 32
    stall_s: PositiveSeconds = 60.0
    batch_timeout_s: PositiveSeconds = 25.0
    stream_batches: Positive = 4
    max_waiting: NotNegative = 64
    max_wait_s: PositiveSeconds = 30.0
    retry_after_s: PositiveSeconds = 1.0
    batch_size: Positive = 32
    batch_delay_s: Seconds = 0.0
    model_threads: Positive | None = None
    model_bytes: Positive | None = None
    reload_poll_s: Seconds = 5.0
    search_threads: Positive = 2
    receive_window_bytes: ReceiveWindow = 512 << 10
    max_arriving: Positive = 256
    max_connection_age_s: ConnectionAge = 1800.0
    grace_s: Seconds = 10.0
    log_format: LogFormat = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    metrics_host: str = "127.0.0.1"
    metrics_insecure_bind: bool = False
    tracing: bool = False

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(error, Settings) from None  # the cause would show values

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_args: Any, **_others: Any) -> Any:
        return (init_settings,)

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, tokens: tuple[TokenSettings, ...]) -> tuple[TokenSettings, ...]:
        for what in ("name", "sha256"):
            values = [getattr(token, what) for token in tokens]
            if len(set(values)) < len(values):
                raise ValueError(f"two of them have the same {what}, expected each its own")
        return tokens

    def with_index_settings(self, given: dict[str, Any]) -> Settings:
        """These settings with some of `IndexSettings` set for every index."""
        return self.model_copy(update={"indices": tuple(each.model_copy(update=given) for each in self.indices)})
