"""A proxy on loopback that can stop answering, while it still accepts connections."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from urllib.parse import urlsplit


class SilentProxy:
    """Forwards connections to a server. Once `silent` is set it forwards no response, and closes no connection.

    Parameters
    ----------
    url: URL of the server.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._server_address = (parts.hostname, parts.port)
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
                server_socket = socket.create_connection(self._server_address)
            except OSError:
                return
            self._open += [client_socket, server_socket]
            threading.Thread(target=self._forward, args=(client_socket, server_socket, False), daemon=True).start()
            threading.Thread(target=self._forward, args=(server_socket, client_socket, True), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_response: bool) -> None:
        try:
            while data := source.recv(65536):
                if is_response and self.silent.is_set():
                    continue
                target.sendall(data)
            if not self.silent.is_set():
                target.shutdown(socket.SHUT_WR)
        except OSError:
            return
