"""A server that speaks S3's protocol on loopback, and a proxy before it that delays, refuses and breaks off."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import re
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRETS = {"AWS_ACCESS_KEY_ID": "AKIAOFTHESETESTS0001", "AWS_SECRET_ACCESS_KEY": "secretOfTheseTestsOnly/0123456789"}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        what: "slow down" (503), "break" (reset in the middle of the answer's body), "lose" (done, and no answer).
        method: of the requests.
        path: is searched for in what is asked for.
        times: how many such requests.
        after: such requests that pass before.
    """

    what: str
    method: str = ""
    path: str = ""
    times: int = 1
    after: int = 0

    def hits(self, method: str, path: str) -> bool:
        if self.method not in {"", method} or not re.search(self.path, path):
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return self.times >= 0


@dataclass
class Server:
    """The proxy, and what is behind it.

    Attributes:
        port: of the server itself.
        delay: seconds before each request is passed on.
        faults: what happens to requests, the first that fits.
        requests: method and path of each that came.
        down: whether connections are refused in the midst of whatever is asked.
    """

    port: int
    delay: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    down: bool = False
    lock: Any = field(default_factory=threading.Lock)
    url: str = ""
    _numbers: Any = field(default_factory=itertools.count)

    def reset(self) -> None:
        self.delay, self.down = 0.0, False
        self.faults.clear()
        self.requests.clear()

    @property
    def environment(self) -> dict[str, str]:
        """What names it, and what it is asked with."""
        return {**SECRETS, "AWS_ENDPOINT_URL": self.url, "AWS_REGION": "us-east-1"}

    def bucket(self) -> str:
        """Make a new bucket; return its URL."""
        name = f"bucket-{os.getpid()}-{next(self._numbers)}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        with urllib.request.urlopen(request):
            return f"s3://{name}"

    def put(self, url: str, data: bytes) -> None:
        """Write an object as another process does."""
        address = f"http://127.0.0.1:{self.port}/{url.removeprefix('s3://')}"
        headers = {
            "Content-Type": "application/octet-stream",
            "Authorization": "AWS4-HMAC-SHA256 Credential=another/20200101/us-east-1/s3/aws4_request",
        }
        request = urllib.request.Request(address, data, headers, method="PUT")
        with urllib.request.urlopen(request):
            pass

    def fault(self, method: str, path: str) -> str:
        with self.lock:
            self.requests.append((method, path))
            return next((fault.what for fault in self.faults if fault.hits(method, path)), "")


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            fault = server.fault(self.command, self.path)
            time.sleep(server.delay)
            if server.down:
                self._reset()
            elif fault == "slow down":
                self._send(503, {"content-type": "application/xml"}, SLOW_DOWN)
            else:
                status, headers, found = self._upstream(body)
                if fault == "lose":
                    self._reset()
                else:
                    self._send(status, headers, found, broken=fault == "break")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

        def _upstream(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                found = connection.getresponse()
                kept = {k: v for k, v in found.getheaders() if k.lower() not in {"connection", "transfer-encoding"}}
                return found.status, kept, found.read()
            finally:
                connection.close()

        def _send(self, status: int, headers: dict[str, str], body: bytes, *, broken: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if broken else body)
            if broken:
                self._reset()

        def _reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            raise ConnectionResetError

        def log_message(self, *args: object) -> None:
            pass

    return Handler


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: object) -> None:
        pass


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served() -> Iterator[Server]:
    """Run the server as a process, and the proxy in this one."""
    port = free_port()
    command = [sys.executable, "-c", "import sys; from moto.server import main; main(sys.argv[1:])"]
    command += ["-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        server = Server(port)
        proxy: socketserver.BaseServer = _Proxy(("127.0.0.1", 0), _handler(server))
        server.url = f"http://127.0.0.1:{proxy.server_address[1]}"
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            proxy.shutdown()
            proxy.server_close()
    finally:
        process.kill()
        process.wait()
