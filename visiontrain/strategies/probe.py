"""How fast a link is, measured by what crosses it: two ends that talk over a plain TCP connection.

`python -m visiontrain.strategies.probe serve ADDRESS` on one host, `... ask ADDRESS` on the other,
which prints the link as JSON. What shapes the link is not asked.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time

PORT = 29_400
PINGS, ROUNDS = 21, 3
FIRST, LONG_S = 1 << 16, 2.0  # bytes of the first transfer; seconds that one has to take
CHUNK = 1 << 16
PATIENCE_S = 30.0


def serve(address: str) -> None:
    """Be the other end until it hangs up: send back as much as comes, at the same time."""
    with socket.create_server((address, PORT)) as listener:
        listener.settimeout(PATIENCE_S)
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                head = _exactly(connection, 8)
                if head is None:
                    return
                _both_ways(connection, int.from_bytes(head, "big"))


def ask(address: str) -> dict[str, float]:
    """Measure, from the other end; return latency in seconds and bandwidth in bytes per second.

    Latency is half of a byte's way there and back, the median of some. Bandwidth is that of
    transfers both ways at once, as in a ring: the median of three that take two seconds or more.
    """
    with _connected(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        latency = statistics.median(_exchange(connection, 1) for _ in range(PINGS)) / 2
        size = FIRST
        while (seconds := _exchange(connection, size)) < LONG_S:
            size = max(2 * size, int(1.2 * size * LONG_S / max(seconds, 1e-3) / 2))
        times = [_exchange(connection, size) for _ in range(ROUNDS)]
    return {"latency": latency, "bandwidth": size / (statistics.median(times) - latency)}


def _connected(address: str) -> socket.socket:
    """Connect to the other end, which may still be starting."""
    last = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection((address, PORT), timeout=PATIENCE_S)
        except ConnectionRefusedError:
            if time.monotonic() > last:
                raise
            time.sleep(0.05)


def _exchange(connection: socket.socket, size: int) -> float:
    """Send and get so many bytes; return how long both took."""
    began = time.perf_counter()
    connection.sendall(size.to_bytes(8, "big"))
    _both_ways(connection, size)
    return time.perf_counter() - began


def _both_ways(connection: socket.socket, size: int) -> None:
    sender = threading.Thread(target=connection.sendall, args=(bytes(size),))
    sender.start()
    left = size
    while left:
        got = connection.recv(min(left, CHUNK))
        if not got:
            raise ConnectionError("the other end hung up")
        left -= len(got)
    sender.join()


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    """Read so many bytes; None when the other end has hung up."""
    data = b""
    while len(data) < size:
        got = connection.recv(size - len(data))
        if not got:
            return None
        data += got
    return data


if __name__ == "__main__":
    role, where = sys.argv[1:]
    if role == "serve":
        serve(where)
    else:
        print(json.dumps(ask(where)))  # noqa: T201 - it is what this program is for
