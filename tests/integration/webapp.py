"""A web application for real clients: every way in which a body can come and go.

Run as `python -m tests.integration.webapp HOST:PORT`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys

from aiohttp import WSMsgType, web

from isthmus.config import parse_listen

PIECE = 65_536
LARGE = random.Random(1).randbytes(8 * 1024 * 1024)
LARGE_DIGEST = hashlib.sha256(LARGE).hexdigest()

PAGE = """<!doctype html><title>a page</title><img src="/until-reported"><pre id="told"></pre><script>
async function digest(buffer) {
  const made = await crypto.subtle.digest("SHA-256", buffer);
  return [...new Uint8Array(made)].map(b => b.toString(16).padStart(2, "0")).join("");
}
async function stream() {
  const reader = (await fetch("/chunks")).body.getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return text;
    text += new TextDecoder().decode(value);
  }
}
function events() {
  return new Promise((resolve, reject) => {
    const found = [], source = new EventSource("/events");
    source.onmessage = event => {
      if (found.push(event.data) < 3) return;
      source.close();
      resolve(found);
    };
    source.onerror = () => reject("no events");
  });
}
function talk() {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(`ws://${location.host}/ws`);
    socket.onopen = () => socket.send("hello");
    socket.onmessage = event => { resolve(event.data); socket.close(); };
    socket.onerror = () => reject("no socket");
  });
}
async function main() {
  const told = {};
  try {
    const asked = [...Array(20).keys()].map(async number => (await fetch("/small?" + number)).text());
    told.many = (await Promise.all(asked)).join("");
    told.large = await digest(await (await fetch("/large")).arrayBuffer());
    const body = new Uint8Array(3000000).fill(120);
    told.posted = await (await fetch("/digest", {method: "POST", body})).text();
    told.expected = await digest(body);
    told.stream = await stream();
    told.events = await events();
    told.socket = await talk();
  } catch (error) { told.error = String(error); }
  document.getElementById("told").textContent = JSON.stringify(told);
  await fetch("/report", {method: "POST", body: JSON.stringify(told)});
}
main();
</script>"""


async def page(_: web.Request) -> web.Response:
    return web.Response(text=PAGE, content_type="text/html")


async def small(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def large(_: web.Request) -> web.Response:
    return web.Response(body=LARGE)


async def digest(request: web.Request) -> web.Response:
    """Answer the digest of a body, however it comes."""
    found = hashlib.sha256()
    async for piece in request.content.iter_any():
        found.update(piece)
    return web.Response(text=found.hexdigest())


async def chunks(request: web.Request) -> web.StreamResponse:
    """Stream without a length."""
    response = web.StreamResponse()
    await response.prepare(request)
    for number in range(50):
        await response.write(b"piece %d;" % number)
        if number % 10 == 0:
            await asyncio.sleep(0.005)
    await response.write_eof()
    return response


async def echo(request: web.Request) -> web.StreamResponse:
    """Stream a body back while it comes."""
    response = web.StreamResponse()
    await response.prepare(request)
    async for piece in request.content.iter_any():
        await response.write(piece)
    await response.write_eof()
    return response


async def events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(3):
        await response.write(b"data: event %d\n\n" % number)
        await asyncio.sleep(0.02)
    return response


async def talk(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data.upper())
    return socket


def make_app() -> web.Application:
    reported = asyncio.Event()

    async def report(_: web.Request) -> web.Response:
        reported.set()
        return web.Response(text="thanks")

    async def until_reported(_: web.Request) -> web.Response:
        """Keep a page loading until its script is done, for a browser that prints what it has loaded."""
        await asyncio.wait_for(reported.wait(), 60)
        return web.Response(text="<svg xmlns='http://www.w3.org/2000/svg'/>", content_type="image/svg+xml")

    app = web.Application(client_max_size=1 << 30)
    for path, handler in (
        ("/page", page),
        ("/small", small),
        ("/large", large),
        ("/chunks", chunks),
        ("/events", events),
        ("/ws", talk),
        ("/until-reported", until_reported),
    ):
        app.router.add_get(path, handler)
    for path, handler in (("/digest", digest), ("/echo", echo), ("/report", report)):
        app.router.add_post(path, handler)
        app.router.add_put(path, handler)
    return app


async def main() -> web.Application:
    return make_app()


if __name__ == "__main__":
    host, port = parse_listen(sys.argv[1])
    web.run_app(main(), host=host, port=port, print=None, handle_signals=True)
