"""A server's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .service import Service
from .worker import BatchReport

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._requests = Counter(
            "latentrt_requests", "HTTP requests answered.", ["method", "path", "status"], registry=r
        )
        self._latency = Histogram(
            "latentrt_request_seconds",
            "From request to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=r,
        )
        self._batch = Histogram(
            "latentrt_batch_images", "Images in a call.", buckets=(1, 2, 4, 8, 16, 32), registry=r
        )
        self._stages = Histogram(
            "latentrt_stage_seconds",
            "Each stage of a call; and queue, each image's wait for it.",
            ["stage"],
            buckets=_SECONDS,
            registry=r,
        )
        self._outcomes = Counter(
            "latentrt_batches", "Calls, by what became of them.", ["outcome"], registry=r
        )
        self._steps = Counter("latentrt_steps", "Denoising steps taken, each for a whole batch.", registry=r)
        self._images = Counter("latentrt_images", "Images made.", registry=r)
        self._errors = Counter("latentrt_errors", "Requests refused or failed.", ["kind"], registry=r)
        self._most_memory = 0
        self._memory = Gauge(
            "latentrt_peak_memory_bytes",
            "Largest seen: of PyTorch on a GPU, else of the process.",
            registry=r,
        )

    def watch(self, service: Service) -> None:
        """Add gauges of the service's queue, read at each scrape."""
        gauges = (
            ("latentrt_waiting_images", "Images that wait.", lambda: service.waiting),
            ("latentrt_running_images", "Images being made.", lambda: service.running),
            ("latentrt_ready", "Whether requests are taken.", lambda: service.reason is None),
        )
        for name, text, read in gauges:
            Gauge(name, text, registry=self.registry).set_function(read)

    def batch(self, report: BatchReport) -> None:
        """A call has ended."""
        self._outcomes.labels(report.outcome).inc()
        self._steps.inc(report.steps)
        self._batch.observe(report.images)
        for stage, seconds in report.timings.items():
            self._stages.labels(stage).observe(seconds)
        if report.outcome == "made":
            self._images.inc(report.images)
            for seconds in report.waited:
                self._stages.labels("queue").observe(seconds)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """An answer has ended. `path` is the route's, which keeps the number of labels small."""
        known = method if method in _METHODS else "other"  # clients may invent any number of them
        self._requests.labels(known, path, str(status)).inc()
        self._latency.labels(path).observe(seconds)

    def error(self, kind: str) -> None:
        """A request was refused, or failed."""
        self._errors.labels(kind).inc()

    def memory(self, peak: int) -> None:
        """Bytes at the peak of a call."""
        self._most_memory = max(self._most_memory, peak)
        self._memory.set(self._most_memory)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
