"""Who is turned away when there are too many at the door."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.lobby import WAITING_MAX, WAITING_PER_NETWORK_MAX, Lobby, compute_network


class Door:
    """A lobby, and who was turned away from it."""

    def __init__(self) -> None:
        self.lobby = Lobby()
        self.turned_away: list[str] = []

    def enter(self, host: str, name: str = "") -> int | None:
        return self.lobby.enter(host, lambda: self.turned_away.append(name or host))


def test_one_network_cannot_take_all_of_it():
    door = Door()
    tickets = [door.enter("10.0.0.1") for _ in range(WAITING_PER_NETWORK_MAX)]
    assert None not in tickets
    assert door.enter("10.0.0.1") is None
    assert door.enter("10.0.0.2") is not None
    door.lobby.leave(tickets[0])
    assert door.enter("10.0.0.1") is not None
    assert door.turned_away == []


def test_many_networks_push_out_the_one_that_waits_longest_and_let_in_who_comes():
    door = Door()
    for number in range(WAITING_MAX):
        assert door.enter(f"10.0.{number // 250}.{number % 250}", f"{number}") is not None
    assert door.enter("192.0.2.1", "member") is not None
    assert door.turned_away == ["0"]
    assert len(door.lobby) == WAITING_MAX
    assert door.enter("192.0.2.2") is not None
    assert door.turned_away == ["0", "1"]


def test_a_ticket_counts_once_however_often_it_is_given_back():
    door = Door()
    first = door.enter("10.0.0.1")
    for _ in range(3):
        door.lobby.leave(first)
    assert len(door.lobby) == 0
    for _ in range(WAITING_PER_NETWORK_MAX):
        assert door.enter("10.0.0.1") is not None
    assert door.enter("10.0.0.1") is None


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
    ],
)
def test_addresses_that_one_host_may_choose_from_count_as_one(host, network):
    assert compute_network(host) == network


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 600)), max_size=600))
def test_the_bounds_hold_and_nothing_is_left_over(steps):
    door = Door()
    tickets: list[int] = []
    for enters, number in steps:
        if enters:
            ticket = door.enter(f"10.0.0.{number % 7}")
            tickets += [] if ticket is None else [ticket]
        elif tickets:
            door.lobby.leave(tickets[number % len(tickets)])
        assert len(door.lobby) <= WAITING_MAX
        assert all(count <= WAITING_PER_NETWORK_MAX for count in door.lobby._per_network.values())
        assert sum(door.lobby._per_network.values()) == len(door.lobby)
    for ticket in tickets:
        door.lobby.leave(ticket)
    assert not door.lobby._per_network
