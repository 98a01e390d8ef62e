"""What the writer that is killed and those who check on it agree on."""

from replication.schema import Schema

SCHEMA = Schema.parse(
    """
CREATE TABLE small (k INTEGER PRIMARY KEY, n INTEGER);
CREATE TABLE large (k INTEGER PRIMARY KEY, n INTEGER, of_rows INTEGER, v TEXT);
-- merge: column
CREATE TABLE shared (k INTEGER PRIMARY KEY, a, b);
CREATE TABLE third (k INTEGER PRIMARY KEY, v);
"""
)
PUT_SMALL = "INSERT OR REPLACE INTO small VALUES (?, ?)"
PUT_SHARED = "INSERT INTO shared VALUES (?, ?, ?) ON CONFLICT (k) DO UPDATE SET a = excluded.a"
PUT_THIRD = "INSERT OR REPLACE INTO third VALUES (?, ?)"
SMALL_KEYS = 200
# Beyond those of `small`: each concurrent writer has its own.
WRITERS = 32
