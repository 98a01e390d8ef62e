"""Spans as OTLP has them in JSON (opentelemetry-proto, `trace/v1/trace.proto`).

Decides the form only. Refuses to know where it is sent. Invariant: every number that is 64 bits wide in the
protocol is a text, and ids are hexadecimal, as OTLP's JSON encoding asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .traced_exchange import Span

_ERROR = 2  # of Status.code
_SCOPE = "isthmus"


def encode_spans(spans: Sequence[Span], resource: Mapping[str, str | int]) -> dict[str, Any]:
    """Return an ExportTraceServiceRequest."""
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _encode_attributes(resource)},
                "scopeSpans": [{"scope": {"name": _SCOPE}, "spans": [_encode_span(span) for span in spans]}],
            }
        ]
    }


def _encode_span(span: Span) -> dict[str, Any]:
    encoded: dict[str, Any] = {
        "traceId": span.context.trace_id.decode("ascii"),
        "spanId": span.context.span_id.decode("ascii"),
        "flags": span.context.flags,
        "name": span.name,
        "kind": span.kind,
        "startTimeUnixNano": f"{span.start_us}000",
        "endTimeUnixNano": f"{span.end_us}000",
        "attributes": _encode_attributes(span.attributes),
    }
    if span.parent_id:
        encoded["parentSpanId"] = span.parent_id.decode("ascii")
    if span.state:
        encoded["traceState"] = span.state.decode("latin-1")
    if span.failed:
        encoded["status"] = {"code": _ERROR}
    return encoded


def _encode_attributes(attributes: Mapping[str, str | int | bool]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _encode_value(value)} for key, value in attributes.items()]


def _encode_value(value: str | int | bool) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"stringValue": value}
