"""Leases end exactly once, on time, with the right reason."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diptych.transceiver.lease import EndedLease, LeaseTable

TICKETS = st.sampled_from([f"t{i}" for i in range(5)])
READERS = st.integers(1, 3)


def test_expiry_is_by_time_alone():
    table = LeaseTable()
    table.add("a", [1, 2], now=0.0, lease_s=10.0)
    table.add("b", [3], now=5.0, lease_s=10.0)
    assert table.next_expiry == 10.0
    assert table.expire(9.99) == []
    assert table.expire(10.0) == [EndedLease("a", (1, 2), "expired")]
    assert table.next_expiry == 15.0
    assert table.expire(99.0) == [EndedLease("b", (3,), "expired")]
    assert table.next_expiry == float("inf")


def test_a_renewed_lease_ends_later():
    table = LeaseTable()
    table.add("a", [1], now=0.0, lease_s=10.0)
    assert table.renew("a", now=8.0)
    assert table.expire(17.9) == []
    assert [lease.ticket_id for lease in table.expire(18.0)] == ["a"]
    assert not table.renew("a", now=18.0)


def test_a_lost_reader_ends_only_what_it_was_reading():
    table = LeaseTable()
    table.add("read", [1], now=0.0, lease_s=10.0)
    table.add("waiting", [2], now=0.0, lease_s=10.0)
    table.add("shared", [3], now=0.0, lease_s=10.0)
    table.begin("read", 1, now=0.0)
    table.begin("shared", 1, now=0.0)
    table.begin("shared", 2, now=0.0)
    assert table.lose(1) == [EndedLease("read", (1,), "peer_gone")]
    assert table.give_up("shared", 2) == EndedLease("shared", (3,), "released")
    assert table.held_blocks() == [2]


class LeaseMachine(RuleBasedStateMachine):
    """Against a model that keeps, for each ticket, when it ends and who reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.now = 0.0
        self.model: dict[str, tuple[float, float, set[int]]] = {}
        self.num_added = 0
        self.num_ended = 0

    def end(self, ended: EndedLease | None, ticket_id: str, reason: str) -> None:
        known = self.model.pop(ticket_id, None)
        assert (ended is None) == (known is None)
        if ended is not None:
            assert (ended.ticket_id, ended.reason) == (ticket_id, reason)
            self.num_ended += 1

    @rule(ticket_id=TICKETS, lease_s=st.sampled_from([1.0, 5.0, 30.0]))
    def add(self, ticket_id, lease_s):
        if ticket_id not in self.model:
            self.table.add(ticket_id, [int(ticket_id[1])], self.now, lease_s)
            self.model[ticket_id] = (self.now + lease_s, lease_s, set())
            self.num_added += 1

    @rule(ticket_id=TICKETS)
    def renew(self, ticket_id):
        assert self.table.renew(ticket_id, self.now) == (ticket_id in self.model)
        self.touch(ticket_id)

    @rule(ticket_id=TICKETS, reader=READERS)
    def begin(self, ticket_id, reader):
        assert self.table.begin(ticket_id, reader, self.now) == (ticket_id in self.model)
        self.touch(ticket_id)
        if ticket_id in self.model:
            self.model[ticket_id][2].add(reader)

    def touch(self, ticket_id):
        if ticket_id in self.model:
            ends, lease_s, readers = self.model[ticket_id]
            self.model[ticket_id] = (max(ends, self.now + lease_s), lease_s, readers)

    @rule(ticket_id=TICKETS)
    def release(self, ticket_id):
        self.end(self.table.release(ticket_id), ticket_id, "released")

    @rule(ticket_id=TICKETS)
    def cancel(self, ticket_id):
        self.end(self.table.cancel(ticket_id), ticket_id, "cancelled")

    @rule(ticket_id=TICKETS, reader=READERS)
    def give_up(self, ticket_id, reader):
        ended = self.table.give_up(ticket_id, reader)
        if ticket_id in self.model and self.model[ticket_id][2] - {reader}:
            self.model[ticket_id][2].discard(reader)
            assert ended is None
        else:
            self.end(ended, ticket_id, "released")

    @rule(reader=READERS)
    def lose(self, reader):
        expected = [t for t, (_, _, readers) in self.model.items() if readers == {reader}]
        ended = self.table.lose(reader)
        assert [lease.ticket_id for lease in ended] == expected
        for lease in ended:
            self.end(lease, lease.ticket_id, "peer_gone")
        for _, _, readers in self.model.values():
            readers.discard(reader)

    @rule(passed_s=st.floats(0, 20))
    def expire(self, passed_s):
        self.now += passed_s
        expected = {t for t, (ends, _, _) in self.model.items() if ends <= self.now}
        ended = self.table.expire(self.now)
        assert {lease.ticket_id for lease in ended} == expected
        for lease in ended:
            self.end(lease, lease.ticket_id, "expired")

    @invariant()
    def conserved(self):
        assert self.num_added == self.num_ended + len(self.table)
        assert sorted(self.table.held_blocks()) == sorted(int(t[1]) for t in self.model)
        assert all(self.table.next_expiry <= ends for ends, _, _ in self.model.values())


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
