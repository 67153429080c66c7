"""Metrics of the server in Prometheus's text format."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]


class Metrics:
    """Counters of one server."""

    def __init__(self, engine):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vlm_jax_requests", "Requests, by HTTP status.", ["status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "vlm_jax_prompt_tokens", "Tokens of prompts, images included.", registry=registry
        )
        self.generated_tokens = Counter(
            "vlm_jax_generated_tokens", "Tokens of answers.", registry=registry
        )
        self.seconds = Histogram(
            "vlm_jax_request_seconds",
            "Seconds of an answer, waiting included.",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=registry,
        )
        waiting = Gauge("vlm_jax_waiting_requests", "Requests that wait.", registry=registry)
        waiting.set_function(lambda: engine.waiting)

    def text(self) -> bytes:
        return generate_latest(self._registry)
