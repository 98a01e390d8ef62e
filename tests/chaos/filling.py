"""Fill the small disk that a database is on; run as a process with a disk of its own, which ends with it."""

import asyncio
import shutil
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path

from replication.core.change import some
from replication.core.clock import SiteId
from replication.database import Database
from replication.errors import ReadOnlyError
from replication.store import Store
from tests.chaos.world import PUT_SMALL, PUT_THIRD, SCHEMA
from tests.chaos.writer import wall_ms

DEADLINE_S = 30.0
BLOCK = bytes(4096)


async def run(disk: Path) -> None:
    """Raise AssertionError unless the database is read-only for as long as its disk is full."""
    database = await Database.open(
        disk / "a.db", SCHEMA, lambda _: None, rows_max=1_000_000, timeout_ms=5_000
    )
    source = Store.open(":memory:", SCHEMA, site=SiteId(b"s" * 16))
    sent = source.execute([(PUT_THIRD, (1, bytes(1 << 19)))], wall_ms())[1]
    assert sent is not None
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(BLOCK) == len(BLOCK):
            pass
    assert shutil.disk_usage(disk).free < len(BLOCK)
    written = 0
    with suppress(ReadOnlyError):
        for written in count():
            await database.execute([(PUT_SMALL, (written, 0))], wall_ms())
    print(database.trouble)
    assert database.trouble is not None
    for _ in range(2):  # the second finds it known
        try:
            await database.execute([(PUT_SMALL, (written, 0))], wall_ms())
        except ReadOnlyError:
            continue
        raise AssertionError("it takes writes")
    try:
        await database.commit(
            lambda store: store.apply(sent.changesets, wall_ms()), lambda done: some(done.commit)
        )
    except ReadOnlyError:
        assert source.site not in await database.run(Store.seen)
    else:
        raise AssertionError("it takes what peers send")
    assert (await database.query("SELECT count(*) FROM small")).rows == [(written,)]
    filler.unlink()
    async with asyncio.timeout(DEADLINE_S):
        assert database._probing is not None
        await database._probing
    await database.execute([(PUT_SMALL, (written, 0))], wall_ms())
    await database.commit(
        lambda store: store.apply(sent.changesets, wall_ms()), lambda done: some(done.commit)
    )
    assert (await database.run(Store.seen))[source.site].head == 1
    assert (await database.query("SELECT count(*) FROM small")).rows == [(written + 1,)]
    check = await database.run(lambda store: store.connection.execute("PRAGMA integrity_check").fetchall())
    assert check == [("ok",)]
    await database.close()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
