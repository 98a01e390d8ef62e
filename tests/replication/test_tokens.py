"""Names of writes, and those who wait for them."""

import pytest

from replication.core.clock import SiteId
from replication.core.tokens import Arrivals, Token, parse_token
from replication.core.versions import VersionRanges

A, B = SiteId(b"a" * 16), SiteId(b"b" * 16)
HEX = "61" * 16


class Replica:
    """What has been seen, and who was called."""

    def __init__(self, waiting_max: int = 100) -> None:
        self.seen = {A: VersionRanges(), B: VersionRanges()}
        self.arrivals = Arrivals(lambda site: self.seen[site].head, waiting_max)
        self.called: list[str] = []

    def wait(self, site: SiteId, version: int, name: str):
        return self.arrivals.wait(Token(site, version), lambda: self.called.append(name))

    def see(self, site: SiteId, *versions: int) -> None:
        for version in versions:
            self.seen[site].add(version, version)
            self.arrivals.handle_seen(site)


def test_a_token_is_read_as_it_is_written():
    token = Token(A, 2**63 - 1)
    assert str(token) == "61" * 16 + ":9223372036854775807"
    assert parse_token(str(token)) == token


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        ":1",
        ":",
        HEX,
        *(HEX + rest for rest in (":", ":0", ":01", ":-1", ":1 ", f":{2**63}", ":\u0663")),
    ],
)
def test_any_other_text_is_no_token(text):
    with pytest.raises(ValueError, match="is not a token"):
        parse_token(text)


def test_a_write_is_here_when_all_that_its_site_wrote_before_is():
    replica = Replica()
    replica.wait(A, 2, "two")
    replica.see(B, 1, 2, 3)
    replica.see(A, 2, 3)
    assert replica.called == []
    replica.see(A, 1)
    assert (replica.called, len(replica.arrivals)) == (["two"], 0)


def test_who_asks_for_what_is_here_is_called_at_once():
    replica = Replica()
    replica.see(A, 1, 2)
    replica.wait(A, 1, "one")
    assert (replica.called, len(replica.arrivals)) == (["one"], 0)


def test_each_is_called_once_and_in_order_of_versions():
    replica = Replica()
    for version in (3, 1, 2, 1):
        replica.wait(A, version, f"{version}")
    replica.see(A, 1, 2)
    replica.see(A, 2)
    assert (replica.called, len(replica.arrivals)) == (["1", "1", "2"], 1)


def test_who_gave_up_is_not_called_and_leaves_room_for_others():
    replica = Replica(waiting_max=2)
    forget = replica.wait(A, 1, "first")
    replica.wait(A, 1, "second")
    assert replica.arrivals.is_full
    forget()
    forget()
    assert not replica.arrivals.is_full
    replica.see(A, 1)
    forget()
    assert (replica.called, len(replica.arrivals)) == (["second"], 0)
