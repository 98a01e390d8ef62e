"""A session of verification between two stores without a network, and writes past the triggers."""

import sqlite3
from collections import Counter

from replication.errors import StoreError
from replication.verifying import adopt_strays, find_differences, heal, read_range_states, read_ranges

NOW = 1_700_000_000_000


class Session:
    """One replica asks another about a table, slice by slice; keeps what came of it."""

    def __init__(self, asker, peer, table="t", *, rows_max=1000, gone=(), chunk_bytes=2000, now=NOW):
        self.healed = 0
        self.unresolved = Counter()
        self.sent_bytes = 0
        self.commits = []
        after, is_last = None, False
        while not is_last:
            ranges, is_last = read_ranges(peer, table, after, rows_max)
            if not (ranges or is_last):
                raise StoreError("not known there")
            differing, upper = find_differences(asker, table, after, ranges, is_last, 4 * rows_max)
            for bounds in differing:
                chunks = list(read_range_states(peer, table, *bounds, chunk_bytes))
                self.sent_bytes += sum(map(len, chunks))
                done = heal(asker, chunks, now, peer.site, lambda site: site in gone)
                self.healed += done.rows
                self.unresolved += done.unresolved
                self.commits += done.commits
            adopted = adopt_strays(asker, table, after, upper, now)
            if adopted is not None:
                self.commits.append(adopted)
            after, is_last = upper, upper is None


def write_past_triggers(path, *statements):
    """Run statements as somebody would who knows how to keep triggers from noting them."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE _repl_state SET merging = 1")
        for sql, *values in statements:
            connection.execute(sql, values)
        connection.execute("UPDATE _repl_state SET merging = 0")
        connection.execute("COMMIT")
    finally:
        connection.close()
