"""The settings of a server."""

from __future__ import annotations

from dataclasses import dataclass

from flextron.errors import FlextronError

__all__ = ["ServerSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Limits and objectives of a server."""

    name: str = "flextron"
    """Name of the model."""
    api_key: str | None = None
    """Key that clients must send; None lets everyone in."""
    allowed_hosts: tuple[str, ...] | None = ()
    """Names by which clients on this machine may call it, beside those of loopback; None for any name."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the server, such as `https://app.example`; `*` for any."""
    max_queue: int = 128
    """How many answers may wait while others run."""
    max_body_mb: float = 8.0
    """Largest body of a request, in 10^6 bytes."""
    max_file_mb: float = 100.0
    """Largest uploaded file, in 10^6 bytes."""
    max_loaded_adapters: int = 16
    """Most adapters in memory at once; others are read again when they are asked for."""
    max_tokens_limit: int | None = None
    """Most tokens of an answer; by default as many as the model has positions for."""
    drain_seconds: float = 30.0
    """Time for running answers to end after a signal."""
    client_seconds: float = 60.0
    """Time for a client to send a request's headers, to send its body, and to read what waits for it."""
    template_seconds: float = 5.0
    """Time limit of a chat template for one conversation."""
    slo_tpot_ms: float | None = None
    """TPOT objective: milliseconds between two tokens of an answer. Under load, requests are narrowed to meet it."""
    slo_ttft_ms: float | None = None
    """TTFT objective: milliseconds to an answer's first token. Under load, requests are narrowed to meet it."""
    min_latency_target: float | None = None
    """How narrow requests may become under load, as a fraction of the full model's latency, unless they say it."""
    page: bool = True
    """Whether there is a web page at `/`."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise FlextronError("the API key must be a word in ASCII letters; leave it out to let everyone in")
        if self.max_queue < 0 or not 0 < self.max_body_mb <= 1e6 or not 0 < self.max_file_mb <= 1e6:
            raise FlextronError("max_queue must be at least 0, max_body_mb and max_file_mb above 0 and at most 1e6")
        if self.max_tokens_limit is not None and self.max_tokens_limit < 1:
            raise FlextronError(f"max_tokens_limit must be at least 1, not {self.max_tokens_limit}")
        if self.max_loaded_adapters < 1:
            raise FlextronError(f"max_loaded_adapters must be at least 1, not {self.max_loaded_adapters}")
        for name in ("client_seconds", "template_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise FlextronError(f"{name} must be a number above 0, not {getattr(self, name)}")
        if self.min_latency_target is not None:
            if not 0 < self.min_latency_target <= 1:
                raise FlextronError(f"min_latency_target must be in (0, 1], not {self.min_latency_target}")
            if self.slo_tpot_ms is None and self.slo_ttft_ms is None:
                raise FlextronError("min_latency_target needs an objective; give slo_tpot_ms or slo_ttft_ms")
        if not 0 <= self.drain_seconds < float("inf"):
            raise FlextronError(f"drain_seconds must be a number of at least 0, not {self.drain_seconds}")
