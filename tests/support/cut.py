"""A TCP connection that can be cut: clients connect to a door that passes everything on, until it is shut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Door:
    """Listens on a free port of loopback and passes connections on to another; `shut` breaks them all."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = True
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        """Break all connections, and every new one."""
        self._open = False
        while self._sockets:
            _close(self._sockets.pop())

    def reopen(self) -> None:
        """Let new connections pass again."""
        self._open = True

    def close(self) -> None:
        """Stop listening."""
        self.shut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                if not self._open:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                if self._listener.fileno() < 0:
                    return
                continue
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


@contextmanager
def door_to(target_port: int) -> Iterator[Door]:
    """A door for the time of the block."""
    door = Door(target_port)
    try:
        yield door
    finally:
        door.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    _close(source)
    _close(sink)


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads from it
    one.close()
