"""HTTP as no proper client would send it, over a socket, and what comes back."""

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


def connect(port: int, timeout_s: float = 15, receive_buffer: int = 0) -> socket.socket:
    made = socket.socket()
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)  # only before connecting
    made.settimeout(timeout_s)
    made.connect(("127.0.0.1", port))
    return made


def read_answer(connection: socket.socket, method: str = "POST") -> Answer | None:
    """The next answer; None if the server hung up without one. Raises TimeoutError for one that says nothing."""
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    except (http.client.BadStatusLine, http.client.IncompleteRead, ConnectionError):
        return None
    finally:
        response.close()


def ask(port: int, data: bytes, method: str = "POST") -> Answer | None:
    """The first answer to these bytes on a connection of their own."""
    with connect(port) as connection:
        try:
            connection.sendall(data)
        except ConnectionError:
            return None
        return read_answer(connection, method)


def everything(port: int, data: bytes) -> bytes:
    """All that the server says to these bytes until it hangs up."""
    with connect(port) as connection:
        connection.sendall(data)
        return until_closed(connection)


def until_closed(connection: socket.socket) -> bytes:
    """What still comes. Raises TimeoutError where the server does not hang up."""
    got = b""
    try:
        while piece := connection.recv(65536):
            got += piece
    except ConnectionError:
        pass
    return got
