"""A server on loopback that passes everything on, until it accepts connections and says nothing more."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from urllib.parse import urlsplit


class SilentProxy:
    """Stands before a real server. Once `silent` is set no byte of an answer comes through, and no connection ends.

    Parameters
    ----------
    url: of the server behind it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._behind = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self._closed = False
        self.silent = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> SilentProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._closed = True
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client_socket, _ = self._listener.accept()
                there = socket.create_connection(self._behind)
            except OSError:
                return
            self._open += [client_socket, there]
            threading.Thread(target=self._forward, args=(client_socket, there, False), daemon=True).start()
            threading.Thread(target=self._forward, args=(there, client_socket, True), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        try:
            while data := source.recv(65536):
                if is_answer and self.silent.is_set():
                    continue
                target.sendall(data)
            if not self.silent.is_set():
                target.shutdown(socket.SHUT_WR)
        except OSError:
            return
