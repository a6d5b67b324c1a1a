"""The limits that a server works within, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What whoever runs a server may vary; every default is safe on one's own machine.

    Attributes:
        host: address to listen on. Anything but loopback needs `insecure_bind`, as there is no TLS yet.
        port: 0 lets the system pick a free one.
        insecure_bind: listen on `host` even when it is not loopback: everybody who reaches it may ask.
        max_message_bytes: largest request accepted and largest response sent.
        max_queries: in one request.
        max_k: proponents, and opponents, in one ranking.
        max_steps: of a query given as a sketch.
        max_example_ids: in one GetTrajectories.
        max_influencers: in one FindInfluences response, over all queries and rankings.
        max_gradient_bytes: of one query that comes as gradients.
        max_streams: of queries or gradients, over all indices; more are told to come back.
        stall_s: seconds that a stream may let pass before its next message.
        max_waiting: requests that one index lets wait behind the one it works on; more are told to come back.
        retry_after_s: seconds after which they are told to.
        batch_size: examples in one forward and backward of the model, of one request or several.
        batch_delay_s: how long a lone query waits for others to share its batch. With 0, a batch holds what came while
            the one before it ran.
        model_bytes: of all models' weights in memory; the checkpoints that were not used for longest leave, and are
            loaded again when they are needed. 0: half of the device's free memory.
        reload_poll_s: how often each index is looked at for a new generation. 0: on SIGHUP alone.
        search_threads: searches of one index that may run at once.
        grace_s: seconds that running requests get to finish on shutdown.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    insecure_bind: bool = False
    max_message_bytes: int = 64 << 20
    max_queries: int = 64
    max_k: int = 1000
    max_steps: int = 1024
    max_example_ids: int = 10_000
    max_influencers: int = 200_000
    max_gradient_bytes: int = 1 << 30
    max_streams: int = 32
    stall_s: float = 30.0
    max_waiting: int = 64
    retry_after_s: float = 1.0
    batch_size: int = 32
    batch_delay_s: float = 0.0
    model_bytes: int = 0
    reload_poll_s: float = 5.0
    search_threads: int = 2
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}, expected 0 to 65535 (0: any free one)")
        may_be_zero = {"port", "max_waiting", "batch_delay_s", "grace_s", "model_bytes", "reload_poll_s"}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str | bool) or (field.name in may_be_zero and value >= 0):
                continue
            if value <= 0:
                bound = ">= 0" if field.name in may_be_zero else "> 0"
                raise ValueError(f"{field.name} is {value}, expected a number {bound}")
