"""How processes that torchrun starts again tell each other from the dead ones, and what they keep.

They find the store as the dead ones left it. Nothing in torch tells them apart: a rank that is
early reads a dead rank's address, and waits for it in vain. Nor does the count of attempts, which
a change of members leaves as it is.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

from visiontrain.core.errors import RankError
from visiontrain.strategies.environment import Launched

START_S = 600.0  # for a process to start, where others did
POLL_S = 0.05


def named(store: dist.Store, told: Launched) -> tuple[str, Mapping[str, str]]:
    """Agree on a name that the processes living now share with no dead one. Collective.

    Rank 0 draws it, and tells it to each rank that shows a password of its own.

    Returns:
        The name; and on rank 0 what any of them `keep` before they were started again.

    Raises:
        RankError: some did not come in ten minutes.
    """
    return (_hear(store, told), {}) if told.rank else _tell(store, told)


def _tell(store: dist.Store, told: Launched) -> tuple[str, Mapping[str, str]]:
    name, passwords = secrets.token_hex(8), dict.fromkeys(range(1, told.world), "")
    kept = _kept(told)

    def all_know() -> bool:
        for rank in list(passwords):
            if store.check([f"{name}/{rank}"]):
                kept.update(json.loads(store.get(f"{name}/{rank}")) | kept)
                del passwords[rank]
            elif store.check([f"here/{rank}"]):
                password = store.get(f"here/{rank}").decode()
                if password != passwords[rank]:  # that of a dead rank is answered first, in vain
                    store.set(password, name)
                    passwords[rank] = password
        return not passwords

    if not _waited(all_know):
        rank = min(passwords)
        raise RankError(f"rank {rank} of {told.world}: did not start within {START_S:g} s")
    return name, kept


def _hear(store: dist.Store, told: Launched) -> str:
    password = secrets.token_hex(8)
    store.set(f"here/{told.rank}", password)
    if not _waited(lambda: store.check([password])):
        raise RankError(f"rank 0 of {told.world}: did not start within {START_S:g} s")
    name = store.get(password).decode()
    store.set(f"{name}/{told.rank}", json.dumps(_kept(told)))
    return name


def _waited(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + START_S
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def keep(told: Launched, key: str, text: str) -> None:
    """Leave a text for the processes that torchrun may start after these.

    It lies with torchrun's own files on each machine: its store may end with rank 0, and the
    next rank 0 be on a machine that was not there before.
    """
    if told.scratch is not None and told.local_rank == 0:
        path = told.scratch / "visiontrain.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(_kept(told) | {key: text}), encoding="utf-8")
        draft.replace(path)


def _kept(told: Launched) -> dict[str, str]:
    path = told.scratch and told.scratch / "visiontrain.json"
    if path is None or told.local_rank != 0 or not path.is_file():
        return {}
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found
