"""Rows in, decisions out. No sockets, no clock of its own, no asyncio."""
