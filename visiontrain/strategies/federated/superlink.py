"""Flower's link between server and clients, with a door that only clients' calls pass.

`python -m visiontrain.strategies.federated.superlink ARGS` is `flower-superlink ARGS`. One port
serves clients (`/v1/fleet`) and whoever starts runs, brings code or adds clients (`/v1/control`,
`/v1/runtime`), and Flower asks the latter for no name. All but clients' calls are let in only from
this machine, and where the system tells, only from processes of the user who runs the link. Clients
are let in when it is known who they may be: before, they would be told that they may not.
"""

from __future__ import annotations

import os
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from visiontrain.strategies.federated.programs import end_with_parent

OPEN = "/v1/fleet"  # what clients call
READY = "VISIONTRAIN_READY"  # in the environment: a file that is there when they may
OPENED = "01"  # state of a connection, as the kernel writes it
SOCKETS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))  # a line for each, with its user
REFUSED = {403: b"only clients' calls are taken here\n", 503: b"not yet\n"}


class Door:
    """An ASGI middleware that refuses all but clients' calls from anybody else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a call on, or refuse it."""
        status = refusal(scope) if scope["type"] in {"http", "websocket"} else None
        if status is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(status, send)


async def _refuse(status: int, send: Any) -> None:
    text = REFUSED[status]
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def refusal(scope: Any) -> int | None:
    """Return with which status a call is refused: all but clients' ones, and our own user's."""
    path, client = scope.get("path", ""), scope.get("client")
    if path == OPEN or path.startswith(f"{OPEN}/"):
        return None if Path(os.environ[READY]).exists() else 503
    if client is None or not ip_address(client[0]).is_loopback:
        return 403
    return None if user_of(client, scope["server"]) in (None, os.getuid()) else 403


def user_of(near: tuple[str, int], far: tuple[str, int]) -> int | None:
    """Return the number of the user whose end of an open connection this is, -1 if there is none.

    None where the system does not tell (elsewhere than on Linux).

    Args:
        near: that end's address and port.
        far: those of the other end.
    """
    if not any(table.exists() for table in SOCKETS):
        return None
    wanted = [forms(*near), forms(*far), {OPENED}]
    for table in SOCKETS:
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            words = line.split()
            # A socket that its program has closed has no inode, and is said to be root's.
            ends = all(word in some for word, some in zip(words[1:4], wanted, strict=True))
            if ends and words[9] != "0":
                return int(words[7])
    return -1


def forms(host: str, port: int) -> set[str]:
    """Return how the kernel may write an address: one of IPv4 is also seen in a socket of both."""
    packed = ip_address(host).packed
    found = {named(packed, port)}
    if len(packed) == 4:
        found.add(named(bytes(10) + b"\xff\xff" + packed, port))
    return found


def named(packed: bytes, port: int) -> str:
    """Write an address as the kernel's tables do: words of four bytes, the lowest byte first."""
    words = [packed[k : k + 4][::-1].hex().upper() for k in range(0, len(packed), 4)]
    return f"{''.join(words)}:{port:04X}"


def main() -> None:
    """Run Flower's program with the door in it."""
    end_with_parent()  # at once: imports take seconds
    import uvicorn  # noqa: PLC0415
    from flwr.superlink import extensions  # noqa: PLC0415 - after the environment
    from flwr.superlink.cli import flower_superlink  # noqa: PLC0415
    from starlette.middleware import Middleware  # noqa: PLC0415

    before = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(Door), *before())
    # A header may not say where a call comes from: the door looks at that.
    uvicorn.run = partial(uvicorn.run, proxy_headers=False)
    flower_superlink()


if __name__ == "__main__":
    main()
