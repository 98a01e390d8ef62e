"""Who a replica is: the site under which it numbers its changesets, and when it must become another.

Decides when a file may go on as the site that it was. Knows nothing of rows. Invariant: a site numbers a
changeset once; a file that may have lost commits, or whose original may be in use elsewhere, becomes a new
site, for a number must never stand for two things.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from . import sidetables
from .errors import StoreError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from .core.clock import SiteId

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Opened(NamedTuple):
    """What is known of the opening of a file; what is empty is not known.

    boot names the time since the machine started: a file that was not closed and comes to another boot may
    have lost commits. home names the file itself: a copy has another.
    """

    boot: str = ""
    home: str = ""


def read_boot() -> str:
    """Return what names the time since the machine started; nothing where the system does not say."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def read_home(path: str) -> str:
    """Return what names the file itself: a copy has another inode, a file that was renamed does not."""
    return "" if path == ":memory:" else str(Path(path).stat().st_ino)


def prepare_identity(
    connection: sqlite3.Connection,
    site: SiteId | None,
    opened: Opened,
    make_site: Callable[[], bytes],
) -> None:
    """Make the file a replica, or check that it is one and still is who it was; whoever opens it now."""
    boot, home = opened.boot, opened.home
    if not sidetables.has_common(connection):
        sidetables.create_common(connection)
        connection.execute("INSERT INTO _repl_site VALUES (0, ?)", (site or make_site(),))
        connection.execute(
            "INSERT INTO _repl_state (id, format, site, version, hlc, seq, boot, home) "
            "VALUES (1, ?, 0, 0, 0, 0, ?, ?)",
            (sidetables.STORAGE_FORMAT, boot, home),
        )
        return
    stored, was_clean, last_boot, last_home = connection.execute(
        "SELECT t.site, s.is_clean, s.boot, s.home "
        "FROM _repl_state AS s JOIN _repl_site AS t ON t.ordinal = s.site"
    ).fetchone()
    if site is not None and site != stored:
        raise StoreError(f"the file belongs to site {stored.hex()}, not {site.hex()}")
    may_have_lost = not was_clean and (not boot or boot != last_boot)
    is_copy = bool(home and last_home) and home != last_home
    if site is None and (may_have_lost or is_copy):
        renew_identity(connection, make_site())
    connection.execute("UPDATE _repl_state SET is_clean = 0, boot = ?, home = ?, merging = 0", (boot, home))


def renew_identity(connection: sqlite3.Connection, site: bytes) -> None:
    """Go on as a new site: versions of the old one may be known to peers and lost here."""
    (ordinal,) = connection.execute("SELECT max(ordinal) + 1 FROM _repl_site").fetchone()
    connection.execute("INSERT INTO _repl_site VALUES (?, ?)", (ordinal, site))
    connection.execute("UPDATE _repl_state SET site = ?, version = 0", (ordinal,))
    connection.execute(f"DROP TABLE IF EXISTS {sidetables.HELD_TABLE}")  # a new site lacks nothing of its own
