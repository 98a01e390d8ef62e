"""What can be set about the data plane, and why each default is what it is.

Decides nothing by itself and refuses to know where settings come from.
Invariant: immutable; a change means another object, which the Server adopts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """Limits and times of one worker; times in seconds, sizes in bytes."""

    node: str
    region: str

    # Peers whose X-Forwarded-* and Via are believed: networks in CIDR form. Nobody by default.
    trusted_proxies: tuple[str, ...] = ()
    # Peers whose connections begin with a PROXY header, which is believed. Nobody by default.
    proxy_protocol_from: tuple[str, ...] = ()
    # Networks that machines may be in; empty for any but link-local, where clouds keep their metadata.
    machine_networks: tuple[str, ...] = ()
    # Addresses (host, port) never connected to: this node's own listeners, lest a row makes a loop or
    # leads to the admin API. Names are resolved once; a wildcard stands for every address of this host.
    forbidden_addresses: tuple[tuple[str, int], ...] = ()
    # What machines are shown that ask for a certificate: `CERT:KEY`, or a file with both; empty: none.
    client_certificate: str = ""
    # Whether clients may name a machine or region (fly-force-instance-id and the like), as on Fly.
    client_routing: bool = True
    # Whether a client that closes its side gets its answer; else it counts as gone, as most of them are.
    half_close: bool = False
    # Protocols that a client may upgrade to. Never h2c: a tunnel past all rules of this proxy.
    upgrades: tuple[bytes, ...] = (b"websocket",)

    # A head with its cookies fits; it is what nginx and Apache allow in total.
    head_bytes_max: int = 32_768
    # Browsers send about 20 fields, API clients rarely 50.
    header_count_max: int = 100
    url_bytes_max: int = 8_192
    # What an app may send as a head; larger than a request's because of Set-Cookie and CSP.
    response_head_bytes_max: int = 65_536
    # More 1xx than this before a final answer is no protocol but a flood.
    informational_max: int = 16

    # Of one worker. A connection with a request takes two files and some 20 KB, an idle one half of that.
    # Never more than half of the files that the process may open.
    connections_max: int = 32_768
    # Of one address, or IPv6 /64, at one worker; trusted proxies are exempt. A company behind one address
    # has a few hundred.
    connections_per_client_max: int = 1_024
    # Of one client as above that are opened each second, and four times as many at once; 0: any. Without TLS
    # one costs little more than a request, and programs that open one for each are many.
    connections_per_client_per_s: int = 0
    # The same over TLS. A handshake takes 0.7 ms: a client that makes no others takes a sixth of a core.
    handshakes_per_client_per_s: int = 256
    # Lets connections move to other workers now and then; rare enough to cost nothing.
    requests_per_connection_max: int = 10_000
    # Resident memory of this process above which requests are refused; 0: no bound.
    memory_bytes_max: int = 0

    # Answers that one worker compresses at a time, at up to half a megabyte each; others go uncompressed.
    compressions_max: int = 128
    # Of one request; 0: any, as bodies are passed on as they come.
    body_bytes_max: int = 0
    # What a replay or a retry can send again; Fly documents 1 MB.
    replay_body_bytes_max: int = 1_048_576
    replays_max: int = 10
    # Machines tried for one request before giving up: bounds the wait at attempts * connect timeout.
    attempts_max: int = 6
    # Requests of an app that may be retries, of those of the last seconds; as in Linkerd and Envoy.
    retry_percent: int = 20
    # And so many a second on top: enough for apps with little traffic, nothing for a machine in trouble.
    retries_per_s_min: int = 10
    # Replays remembered by one worker, for all apps; one takes some 500 bytes. 0: none.
    replay_cache_entries_max: int = 16_384
    # How long a request waits when all machines are at their hard limit: longer than most bursts, and than
    # a usual request takes, shorter than clients wait.
    queue_timeout_s: float = 5.0
    # How long a request waits for a machine to be started: most take seconds, and clients give up after 30.
    start_timeout_s: float = 25.0
    # Requests of one app that wait: bounds memory, and beyond it the wait would be in vain anyway.
    queue_max: int = 1_024
    # Of a body that nobody reads any more: cheaper to drain this much than to open a new connection.
    discard_bytes_max: int = 262_144
    # Above it the writer is paused. Four times a usual socket read keeps both sides busy.
    write_buffer_bytes_max: int = 131_072

    # Between nodes round trips reach 0.3 s; a SYN lost once costs 1 s, lost twice 3 s.
    connect_timeout_s: float = 3.0
    # From the first byte of a head to its end, however the bytes trickle.
    head_timeout_s: float = 15.0
    # Between requests of one connection; above the 60 s that balancers in front usually keep.
    keepalive_timeout_s: float = 75.0
    # Without a byte of the request body.
    body_timeout_s: float = 30.0
    # After these seconds a body must have come this fast on average: a byte now and then is no body but
    # somebody who occupies a machine. Far below the slowest modem.
    body_bytes_per_s_min: int = 256
    # In which a client takes three quarters of `write_buffer_bytes_max` of what waits for it: 3.3 KB/s.
    send_timeout_s: float = 30.0
    # From the end of the request to the head of the answer: what users of 60 s gateways expect.
    response_timeout_s: float = 60.0
    # Between two reads of an answer; event streams are told to send a comment more often than this.
    stream_timeout_s: float = 300.0
    # Without a byte in either direction of an upgraded connection.
    tunnel_timeout_s: float = 3_600.0
    # After a refusal: the time in which the client can read it before the connection is cut.
    linger_s: float = 2.0

    # Fly keeps upstream connections for about 4 s. Common servers close idle ones after 5 s, and a
    # connection that both sides give up at the same time costs a retry.
    pool_idle_timeout_s: float = 4.0
    pool_idle_max: int = 128  # per machine; bounds file descriptors, not concurrency

    # How often deadlines are looked at: a wait may last this much longer than set.
    sweep_interval_s: float = 0.25
