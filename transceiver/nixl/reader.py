"""Our side of all reads: an agent of its own, and the peers that it knows.

nixl recalls no read, but an agent that is gone reads nothing. So this one serves nobody: when a read lingers for
too long it is retired, with whatever else it does, and the next connection makes another one.
"""

import secrets

from diptych.errors import StartupError, TransferError
from diptych.transceiver.nixl.agent import NixlAgent
from diptych.transceiver.nixl.memory import context_of, memory_of, scratch_like
from diptych.transceiver.nixl.peer import NixlPeer
from diptych.transceiver.nixl.shared import Shared
from diptych.transceiver.peers import Peers
from diptych.transceiver.pool import KvPool

_PROOF_BYTES = 64 << 10


class NixlReader:
    def __init__(self, memory: KvPool) -> None:
        self.here = memory_of(memory)
        # Several agents of one process have names of their own, also in processes of the same incarnation.
        self.agent = NixlAgent(f"{memory.identity.incarnation}-{secrets.token_hex(4)}", context_of(memory))
        self.proof, self._keep = scratch_like(self.here, _PROOF_BYTES)
        try:
            self.agent.register(self.here)
            self.agent.register(self.proof)
        except TransferError as error:
            raise StartupError(f"KV transport nixl cannot register the KV pool: {error}") from error
        self.peers: Peers[NixlPeer] = Peers()
        self.shared = Shared(self.agent.close)

    def retire(self) -> None:
        """No new reads. When those that run are over or given up, the agent goes: `shared.closed`."""
        self.shared.retire()
        for peer in self.peers.clear():
            peer.forget()
