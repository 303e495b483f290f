"""How processes of one machine find each other with nothing listening beyond the loopback."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from visiontrain.strategies.environment import LOOPBACK
from visiontrain.strategies.meeting import listen

LOOPBACK_ONLY = "visiontrain"


def register() -> None:
    """Let `LaunchConfig.rdzv_backend` name this rendezvous."""
    rendezvous_handler_registry.register(LOOPBACK_ONLY, LoopbackRendezvous)


class LoopbackRendezvous(RendezvousHandler):
    """One agent, which meets nobody, and the store of its workers.

    torch's own handlers open a store that listens on all interfaces.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.run_id = parameters.run_id

    def get_backend(self) -> str:
        """Name the backend."""
        return LOOPBACK_ONLY

    @property
    def use_agent_store(self) -> bool:
        """Let workers use the store that is opened here."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open a new store, so that a restarted group finds nothing of the one before."""
        descriptor, port = listen()
        store = dist.TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
        )
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def is_closed(self) -> bool:
        """Tell whether no group may form any more."""
        return False

    def set_closed(self) -> None:
        """Let no group form any more; there is nobody else to tell."""

    def num_nodes_waiting(self) -> int:
        """Count machines that want to join."""
        return 0

    def get_run_id(self) -> str:
        """Return what the launch calls this run."""
        return self.run_id

    def shutdown(self) -> bool:
        """Close what is open; the store closes with the agent."""
        return True
