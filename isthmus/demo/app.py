"""The demo's web app: a guestbook that runs in every region and writes in one.

It shows what an app does behind isthmus: it answers for itself, or it answers with `fly-replay` and lets
the proxy deliver the request where it belongs. Run as
`python -m isthmus.demo.app REGION MACHINE HOST:PORT DATABASE`, where machines of one region share a database.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from contextlib import closing

from aiohttp import web

from isthmus.config import parse_listen
from isthmus.demo import PRIMARY_REGION

ENTRIES_SHOWN = 100


class Guestbook:
    """One machine of the app."""

    def __init__(self, region: str, machine: str, database: sqlite3.Connection) -> None:
        self.region = region
        self.machine = machine
        self._database = database
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, text TEXT NOT NULL)"
            )

    def routes(self) -> list[web.RouteDef]:
        """Return what the app answers."""
        return [
            web.get("/", self.hello),
            web.get("/healthz", self.health),
            web.get("/in/{region}", self.in_region),
            web.get("/on/{machine}", self.on_machine),
            web.get("/guestbook", self.read),
            web.post("/guestbook", self.sign),
            web.get("/count", self.count),
            web.get("/echo", self.echo),
        ]

    def _answer(self, request: web.Request) -> web.Response:
        lines = [f"hello from machine {self.machine} in {self.region}"]
        source = request.headers.get("fly-replay-src")
        if source:
            lines.append(f"replayed: {source}")
        return web.Response(text="\n".join(lines) + "\n")

    async def hello(self, request: web.Request) -> web.Response:
        """Say who answers."""
        return self._answer(request)

    async def health(self, _request: web.Request) -> web.Response:
        """Tell the node's check that this machine can serve."""
        return web.Response(text="ok\n")

    async def in_region(self, request: web.Request) -> web.Response:
        """Answer in the named region and nowhere else."""
        if request.match_info["region"] == self.region:
            return self._answer(request)
        return web.Response(status=307, headers={"fly-replay": f"region={request.match_info['region']}"})

    async def on_machine(self, request: web.Request) -> web.Response:
        """Answer on the named machine and nowhere else."""
        if request.match_info["machine"] == self.machine:
            return self._answer(request)
        return web.Response(status=307, headers={"fly-replay": f"instance={request.match_info['machine']}"})

    async def read(self, _request: web.Request) -> web.Response:
        """Show the newest entries first, from the primary region."""
        if self.region != PRIMARY_REGION:
            return web.Response(status=307, headers={"fly-replay": f"region={PRIMARY_REGION}"})
        newest = "SELECT text FROM entries ORDER BY id DESC LIMIT ?"
        return web.Response(
            text="".join(f"{text}\n" for (text,) in self._database.execute(newest, (ENTRIES_SHOWN,)))
        )

    async def sign(self, request: web.Request) -> web.Response:
        """Take an entry; a machine elsewhere has the whole request replayed to the primary region."""
        if self.region != PRIMARY_REGION:
            return web.Response(
                status=409, headers={"fly-replay": f"region={PRIMARY_REGION};state=captured_write"}
            )
        entry = (await request.text()).strip()
        with self._database:
            self._database.execute("INSERT INTO entries (text) VALUES (?)", (entry,))
        return web.Response(status=201, text=f"written on {self.machine} in {self.region}\n")

    async def count(self, request: web.Request) -> web.StreamResponse:
        """Stream a number now and then, to see that nothing is held back."""
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        for number in range(1, 6):
            await response.write(f"{number}\n".encode())
            await asyncio.sleep(0.2)
        return response

    async def echo(self, request: web.Request) -> web.WebSocketResponse:
        """Echo WebSocket messages."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(f"{self.machine}: {message.data}")
        return socket


def main() -> None:
    """Serve one machine of the guestbook until it is told to stop."""
    region, machine, listen, file = sys.argv[1:5]
    app = web.Application()
    host, port = parse_listen(listen)
    with closing(sqlite3.connect(file)) as database:
        app.add_routes(Guestbook(region, machine, database).routes())
        web.run_app(app, host=host, port=port, print=None, access_log=None, shutdown_timeout=1)


if __name__ == "__main__":
    main()
