"""An S3-compatible server (moto) in a process of its own, on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from tests.support.tracking_server import free_port


@dataclass
class S3Server:
    """A server that can be paused and set going again; what it holds is in its memory."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_bucket(self) -> str:
        """The URL of an empty bucket."""
        import s3fs

        name = f"kasa-{uuid4().hex[:8]}"
        s3fs.S3FileSystem(endpoint_url=self.environment["AWS_ENDPOINT_URL"], key="test", secret="test").mkdir(name)
        return f"s3://{name}"


@contextmanager
def serving(port: int | None = None) -> Iterator[S3Server]:
    port = port or free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_open(port, process)
        yield S3Server(process, port)
    finally:
        process.kill()
        process.wait()


def wait_until_open(port: int, process: subprocess.Popen[bytes], patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, f"the server on port {port} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"nothing answers on port {port}"
            time.sleep(0.1)
