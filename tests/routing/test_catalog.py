from __future__ import annotations

import contextlib
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.catalog import (
    TABLES,
    RowError,
    canonical_hostname,
    canonical_prefix,
    load_schema_sql,
    parse_address,
    parse_row,
)
from routing.types import MachineRow, MachineState, Row, ServiceRow, SqlValue
from tests.routing.rows import TABLES as ROW_TABLES
from tests.routing.rows import row


def test_reads_the_columns_of_the_shipped_schema() -> None:
    database = sqlite3.connect(":memory:")
    database.executescript(load_schema_sql())
    for table, spec in TABLES.items():
        columns = database.execute(f"PRAGMA table_info({table})").fetchall()
        assert len(columns) == spec.columns + spec.added
        assert [column[1] for column in columns if column[5]] == [column[1] for column in columns[: spec.pk]]
    database.close()


def test_reads_a_row_that_sqlite_filled_with_defaults() -> None:
    database = sqlite3.connect(":memory:")
    database.executescript(load_schema_sql())
    database.execute(
        "INSERT INTO machines (id, app, node, region, address) VALUES ('m', 'a', 'n', 'ams', '[::1]:80')"
    )
    database.execute("INSERT INTO services (app) VALUES ('a')")
    machine = parse_row("machines", database.execute("SELECT * FROM machines").fetchone())
    service = parse_row("services", database.execute("SELECT * FROM services").fetchone())
    database.close()
    assert machine == MachineRow("m", "a", "n", "ams", "::1", 80, MachineState.STARTED, False, "")
    assert isinstance(service, ServiceRow)
    assert (service.port, service.soft_limit, service.hard_limit) == (0, 20, None)


@pytest.mark.parametrize("table", ROW_TABLES)
def test_accepts_the_usual_row_and_columns_of_a_newer_schema(table: str) -> None:
    _, pk, values = row(table)
    assert parse_row(table, (*values, "from the future"), pk) == parse_row(table, values, pk)


@pytest.mark.parametrize(
    ("table", "columns", "reason"),
    [
        ("machines", {"id": "a;b"}, "id"),
        ("machines", {"id": "a\r\nb"}, "id"),
        ("machines", {"id": ""}, "id"),
        ("machines", {"app": "Web"}, "app"),
        ("machines", {"app": None}, "app must be text, not NULL"),
        ("machines", {"region": "eu"}, "name of an area"),
        ("machines", {"region": "AMS"}, "region"),
        ("machines", {"address": "10.0.0.1:0"}, "port"),
        ("machines", {"state": "running"}, "none of started, stopped, suspended, draining"),
        ("machines", {"state": 5}, "state must be text, not int"),
        ("machines", {"cordoned": 2}, "cordoned"),
        ("machines", {"driver": "a b"}, "driver"),
        ("machines", {"since_ms": -1}, "since_ms"),
        ("machines", {"problem": None}, "problem must be text"),
        ("goals", {"state": "starting"}, "nothing to ask for"),
        ("goals", {"state": "up"}, "none of started"),
        ("goals", {"release": "../../bin"}, "release"),
        ("goals", {"release": "v1/../../bin"}, "release"),
        ("goals", {"version": -1}, "version"),
        ("goals", {"machine": ""}, "machine"),
        ("checks", {"since_ms": "now"}, "since_ms"),
        ("services", {"options": '{"autostop": "never"}'}, "autostop must be one of"),
        ("services", {"options": '{"autostart": 1}'}, "autostart must be true or false"),
        ("services", {"options": '{"min_machines_running": -1}'}, "a number of machines"),
        ("services", {"options": '{"min_machines_running": true}'}, "a number of machines"),
        ("services", {"options": '{"primary_region": 1}'}, "the code of a region"),
        ("machines", {"cordoned": "no"}, "cordoned must be an integer"),
        ("services", {"port": 65536}, "port"),
        ("services", {"port": 80.0}, "port must be an integer, not float"),
        ("services", {"internal_port": 0}, "internal_port"),
        ("services", {"soft_limit": 0}, "soft_limit"),
        ("services", {"hard_limit": 0}, "hard_limit"),
        ("services", {"concurrency": "threads"}, "concurrency"),
        ("services", {"checks": "x" * 65_537}, "longer"),
        ("services", {"options": "{"}, "not valid JSON"),
        ("services", {"options": '{"handlers": "tls"}'}, "must be a list of tls and http"),
        ("services", {"options": '{"handlers": ["tls", "ftp"]}'}, "must be a list of tls and http"),
        ("services", {"options": '{"handlers": [["tls"]]}'}, "must be a list of tls and http"),
        ("services", {"options": '{"idle_timeout_ms": -1}'}, "must be a whole number"),
        ("services", {"options": '{"idle_timeout_ms": 1.5}'}, "must be a whole number"),
        ("services", {"options": '{"body_bytes_max": true}'}, "must be a whole number"),
        ("services", {"options": '{"tls_versions": []}'}, "tls_versions must be a list"),
        ("services", {"options": '{"tls_versions": ["TLSv1.1"]}'}, "tls_versions must be a list"),
        ("services", {"options": '{"tls_versions": [["TLSv1.3"]]}'}, "tls_versions must be a list"),
        ("services", {"options": '{"tls_versions": "TLSv1.3"}'}, "tls_versions must be a list"),
        ("services", {"options": "[]"}, "must be a JSON object"),
        ("services", {"options": '{"force_https": 1}'}, "must be true or false"),
        ("services", {"options": '{"proxy_protocoll": "v1"}'}, "unknown option 'proxy_protocoll'"),
        ("services", {"options": '{"proxy_protocol": "v3"}'}, "must be v1 or v2"),
        ("apps", {"network": ""}, "network"),
        ("hostnames", {"hostname": "Web.test."}, "must be written 'web.test'"),
        ("hostnames", {"path_prefix": "/api/"}, "must be written '/api'"),
        ("hostnames", {"hostname": "a.*.test"}, "host name"),
        ("regions", {"latitude": 90.5}, "latitude"),
        ("regions", {"longitude": float("nan")}, "longitude"),
        ("regions", {"code": "any"}, "area"),
        ("nodes", {"address": "nowhere:"}, "port"),
        ("checks", {"status": "failing"}, "status"),
        ("loads", {"in_flight": -1}, "in_flight"),
    ],
)
def test_refuses_a_bad_column_and_names_it(table: str, columns: dict[str, SqlValue], reason: str) -> None:
    _, pk, values = row(table, **columns)
    with pytest.raises(RowError) as caught:
        parse_row(table, values, pk)
    assert (caught.value.table, caught.value.pk) == (table, pk)
    assert reason in caught.value.reason


def test_refuses_short_rows_unknown_tables_and_keys_that_disagree() -> None:
    _, _, values = row("machines")
    with pytest.raises(RowError, match="7 columns where 8"):
        parse_row("machines", values[:7])
    with pytest.raises(RowError, match="no such table"):
        parse_row("cats", values)
    with pytest.raises(RowError, match="disagree"):
        parse_row("machines", values, ("other",))
    with pytest.raises(RowError, match="disagree"):
        parse_row("services", row("services", port=80)[2], ("web", 80.0))


_ANY_VALUE = st.none() | st.integers() | st.floats() | st.text() | st.binary()


@given(st.sampled_from(ROW_TABLES), st.lists(_ANY_VALUE, max_size=10).map(tuple))
def test_any_row_is_read_or_refused(table: str, values: Row) -> None:
    with contextlib.suppress(RowError):
        parse_row(table, values)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:8080", ("10.0.0.1", 8080)),
        ("10.0.0.1", ("10.0.0.1", None)),
        ("[fdaa::1]:443", ("fdaa::1", 443)),
        ("[::1]", ("::1", None)),
        ("localhost:65535", ("localhost", 65535)),
        ("a_b-c.internal", ("a_b-c.internal", None)),
    ],
)
def test_splits_addresses(text: str, address: tuple[str, int | None]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":80",
        "host:",
        "host:0",
        "host:65536",
        "host:+80",
        "host: 80",
        "host:080",
        "host:80 ",
        "host:٣",
        "fdaa::1",
        "fdaa::1:80",
        "[fdaa::1",
        "[fdaa::1]80",
        "[fdaa::1]:",
        "[fe80::1%eth0]:80",
        "[10.0.0.1]:80",
        "10.0.0.256",
        "127.1:80",
        "0x7f000001",
        "2130706433",
        "10.0.0.01",
        "user@host:80",
        "host/path",
        "a..b",
        ".a",
        "a.",
        "-a",
        "Host",
        "hôte",
        "a b",
        "a\n",
        "host:80\n",
        "a" * 64,
        "a." * 127 + "a",
    ],
)
def test_refuses_addresses_that_could_be_read_in_two_ways(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_address(text)


def test_port_alone_is_told_with_what_an_address_looks_like() -> None:
    with pytest.raises(ValueError, match=r"a port without a host, as in 127\.0\.0\.1:3000"):
        parse_address("3000")


def test_puts_hostnames_and_prefixes_into_one_spelling() -> None:
    assert canonical_hostname("Example.COM.") == "example.com"
    assert canonical_hostname("*.Example.com") == "*.example.com"
    assert canonical_hostname("*") == "*"
    assert canonical_hostname("[::1]") == "[::1]"
    assert canonical_prefix("/api//") == "/api"
    assert canonical_prefix("//") == "/"
    assert canonical_prefix("/ünder") == "/ünder"


@pytest.mark.parametrize(
    "text", ["", "a:80", "[::1]:80", "**.a", "*a.b", "a*", "http://a", "1.2.3", "[::1", "é.test"]
)
def test_refuses_hostnames_that_no_request_can_have(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_hostname(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "api",
        "/a//b",
        "/a/../b",
        "/.",
        "/a%2fb",
        "/a?b",
        "/a#b",
        "/a\\b",
        "/a b",
        "/a\n",
        "/" + "a" * 1024,
    ],
)
def test_refuses_prefixes_that_normalised_paths_never_have(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_prefix(text)
