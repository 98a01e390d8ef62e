"""Where a client asks its request to go.

Decides what Fly's four routing headers mean together: an instance before a region, and a region
still limits what stands in for a preferred instance. Refuses to know machines.
Invariant: a wish never leads to another app; the balancer holds that, whatever the ids say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from routing.balancer import ANYWHERE, Want
from routing.catalog import IDENTIFIER
from routing.replay import ReplayError, parse_regions

from .errors import BAD_ROUTING_FIELD, RequestError

if TYPE_CHECKING:
    from proxy.settings import ProxySettings
    from routing.table import Service

    from .request_head import RequestHead


def plan_want(fields: list[tuple[bytes, bytes]]) -> Want:
    """Return the choice that (lower-case name, value) pairs ask for. Raises RequestError."""
    said: dict[bytes, str] = {}
    for name, value in fields:
        if name in said:
            raise RequestError(BAD_ROUTING_FIELD, f"{name.decode()} is given twice")
        said[name] = value.decode("latin-1")
    try:
        forced = said.get(b"fly-force-region")
        preferred = said.get(b"fly-prefer-region")
        if forced is not None:
            regions = parse_regions(forced)
        elif preferred is not None:
            regions = parse_regions(preferred + ",any")
        else:
            regions = ()
    except ReplayError as error:
        raise RequestError(BAD_ROUTING_FIELD, error.message) from error
    instance = said.get(b"fly-force-instance-id")
    prefer = said.get(b"fly-prefer-instance-id") if instance is None else None
    for wish in (instance, prefer):
        if wish is not None and not IDENTIFIER.fullmatch(wish):
            raise RequestError(BAD_ROUTING_FIELD, "malformed instance")
    if instance is not None and forced is None:
        regions = ()  # the one machine is wanted wherever it is
    return Want(regions, instance, prefer)


def take_wishes(head: RequestHead, service: Service, settings: ProxySettings) -> Want:
    """Return the choice that a request asks for, and forget it where clients may not choose.

    Raises RequestError.
    """
    options = service.options
    if settings.client_routing and (options is None or options.replay.client_routing):
        return plan_want(head.routing or [])
    head.routing = None
    return ANYWHERE
