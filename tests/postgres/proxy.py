"""A relay between a ledger and its server, which counts round trips and can lose an answer, as a network would."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit


class Proxy:
    """
    Listens on loopback and passes everything on to a server.

    `round_trips` counts how often a client spoke after the server had. `lose_answers(n)` lets the next n transactions
    reach the server and end there, and then cuts the connection instead of passing the last answer on. `down` refuses everybody
    and cuts who is there.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._path = parse_qs(parts.query).get("host", [""])[0]
        self._address = (parts.hostname or "", parts.port or 5432)
        self._database = parts.path
        self._user = parts.username or "postgres"
        self._lock = threading.Lock()
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._to_lose = 0
        self.round_trips = 0
        self.lost = 0
        self.is_down = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"postgresql://{self._user}@127.0.0.1:{self._listener.getsockname()[1]}{self._database}"

    def lose_answers(self, count: int) -> None:
        with self._lock:
            self._to_lose = count

    def down(self) -> None:
        with self._lock:
            self.is_down = True
            links, self._links = self._links, []
        for link in links:
            _cut(*link)

    def up(self) -> None:
        self.is_down = False

    def close(self) -> None:
        self.down()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_down:
                client.close()
                continue
            if self._path:
                server = socket.socket(socket.AF_UNIX)
                server.connect(f"{self._path}/.s.PGSQL.{self._address[1]}")
            else:
                server = socket.create_connection(self._address)
            with self._lock:
                self._links.append((client, server))
            state = {"is_asked": False, "is_greeted": False}
            threading.Thread(target=self._ask, args=(client, server, state), daemon=True).start()
            threading.Thread(target=self._answer, args=(client, server, state), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                with self._lock:
                    if not state["is_asked"]:
                        state["is_asked"] = True
                        self.round_trips += 1
                server.sendall(data)
        _cut(client, server)

    def _answer(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        answer, sent = b"", 0
        with suppress(OSError):
            while data := server.recv(65536):
                answer += data
                # Ready for more: in no transaction, or in one.
                is_over = answer[-6:-1] == b"Z\x00\x00\x00\x05"
                with self._lock:
                    if is_over:
                        state["is_asked"] = False
                    if self._to_lose and state["is_greeted"]:
                        if not is_over:
                            continue
                        if answer[-1:] == b"I":
                            # It is done, and nobody will know.
                            self._to_lose -= 1
                            self.lost += 1
                            break
                client.sendall(answer[sent:])
                answer, sent = (b"", 0) if is_over else (answer, len(answer))
                state["is_greeted"] = state["is_greeted"] or is_over
        _cut(client, server)


def _cut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
