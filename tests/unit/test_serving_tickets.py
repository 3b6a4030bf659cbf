"""What lets a caller in at a replica, and what does not."""

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA, make_proof
from trunkline_worker.serving import tickets
from trunkline_worker.serving.auth import NOBODY, Principal, Role
from trunkline_worker.serving.tickets import LEEWAY_S, VALID_S, WINDOW, Numbers, Ticket, TicketGate
from trunkline_worker.store.clock import ManualClock

PREDICT = "/trunkline_wire.v1.InferenceService/Predict"
EXTRACT = "/trunkline_wire.v1.InferenceService/Extract"
PUT = "/trunkline_wire.v1.TrunkService/PutBottleneck"
SECRET, OTHER_SECRET = b"s" * 32, b"t" * 32
USER = Principal("physics", Role.USER)


class World:
    """A gate, and tickets for it."""

    def __init__(self, **options):
        self.clock = ManualClock()
        self.gate = TicketGate("timm/net", "replica-1", clock=self.clock, **options)
        self.gate.learn(SECRET)
        self.made = 0

    def ticket(self, principal=USER, backbone="timm/net", secret=SECRET):
        def new_id(size):
            self.made += 1
            return self.made.to_bytes(size, "big")

        said = Ticket(principal, backbone, self.clock.now() + VALID_S)
        return tickets.make_ticket(secret, said, new_id=new_id)

    def call(self, data, number, *, method=PREDICT, secret=SECRET, replica="replica-1", shown=None):
        key = tickets.holder_key(secret, data)
        proof = make_proof(key, data, replica, method, number)
        return self.gate(shown or method, {TICKET_METADATA: data, PROOF_METADATA: proof})

    def refused(self, *args, code=ErrorCode.UNAUTHENTICATED, **keywords):
        with pytest.raises(WireError) as caught:
            self.call(*args, **keywords)
        assert caught.value.code is code
        return caught.value.message


@pytest.fixture
def world():
    return World()


def test_a_ticket_says_whose_data_a_caller_sees(world):
    reader = Principal("chemistry", Role.READER)
    assert world.call(world.ticket(), 1) == USER
    assert world.call(world.ticket(reader), 1) == reader


def test_tickets_and_keys_are_never_the_same_twice(world):
    one, other = world.ticket(), world.ticket()
    assert one != other
    assert tickets.holder_key(SECRET, one) != tickets.holder_key(SECRET, other)
    assert tickets.holder_key(SECRET, one) not in one


def test_without_ticket_or_proof_nobody_comes_in(world):
    data = world.ticket()
    proof = make_proof(tickets.holder_key(SECRET, data), data, "replica-1", PREDICT, 1)
    for metadata in (
        {},
        {TICKET_METADATA: data},
        {PROOF_METADATA: proof},
        {TICKET_METADATA: "text", PROOF_METADATA: proof},
        {"authorization": "Bearer a-token-that-a-gateway-would-take"},
    ):
        with pytest.raises(WireError, match="GetEndpoints") as caught:
            world.gate(PREDICT, metadata)
        assert caught.value.code is ErrorCode.UNAUTHENTICATED


def test_health_needs_no_ticket_and_unknown_methods_are_not_there(world):
    assert world.gate("/grpc.health.v1.Health/Check", {}) == NOBODY
    with pytest.raises(WireError) as caught:
        world.gate("/trunkline_wire.v1.InferenceService/Nothing", {})
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_every_byte_of_a_ticket_counts(world):
    data = world.ticket()
    for index in range(len(data)):
        forged = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
        assert "none of this cluster's" in world.refused(forged, 1)
    for short in (b"", data[:-1], data[1:], data[:40]):
        assert "none of this cluster's" in world.refused(short, 1)
    assert len(world.gate) == 0


def test_a_ticket_of_another_cluster_is_refused(world):
    assert "none of this cluster's" in world.refused(world.ticket(secret=OTHER_SECRET), 1, secret=OTHER_SECRET)


def test_a_replica_that_knows_no_secret_yet_lets_nobody_in():
    world = World()
    world.gate = TicketGate("timm/net", "replica-1", clock=world.clock)
    assert "none of this cluster's" in world.refused(world.ticket(), 1)
    assert "none of this cluster's" in world.refused(world.ticket(secret=b""), 1, secret=b"")


def test_a_ticket_expires_after_the_leeway(world):
    data = world.ticket()
    world.clock.advance(VALID_S + LEEWAY_S)
    assert world.call(data, 1) == USER
    world.clock.advance(0.5)
    assert "expired" in world.refused(data, 2)
    assert "expired" in world.refused(past_ticket(world), 1)


def past_ticket(world):
    said = Ticket(USER, "timm/net", world.clock.now() - LEEWAY_S - 1)
    return tickets.make_ticket(SECRET, said, new_id=bytes)


def test_a_ticket_for_another_backbone_is_refused_with_both_names(world):
    message = world.refused(world.ticket(backbone="resnet50"), 1)
    assert "'resnet50'" in message and "'timm/net'" in message


def test_a_reader_may_not_do_what_users_may(world):
    data = world.ticket(Principal("physics", Role.READER))
    assert "'user'" in world.refused(data, 1, method=PUT, code=ErrorCode.PERMISSION_DENIED)
    assert world.call(data, 2).role is Role.READER
    assert world.call(world.ticket(), 1, method=PUT) == USER


@pytest.mark.parametrize(
    "other", [{"replica": "replica-2"}, {"shown": EXTRACT}, {"secret": OTHER_SECRET}], ids=["replica", "method", "key"]
)
def test_a_proof_for_something_else_is_refused_and_fills_no_memory(world, other):
    assert "proof" in world.refused(world.ticket(), 1, **other)
    assert len(world.gate) == 0


def test_a_call_that_was_overheard_cannot_be_made_again(world):
    data = world.ticket()
    world.call(data, 7)
    assert "used" in world.refused(data, 7)
    assert world.call(data, 8) == USER
    # The numbers of each ticket are its own.
    assert world.call(world.ticket(), 7) == USER


def test_calls_may_arrive_out_of_order_within_the_window(world):
    data = world.ticket()
    for number in (3, 1, 2, 10, WINDOW + 9, 11):
        assert world.call(data, number) == USER
    for number in (1, 2, 3, 10, 11, WINDOW + 9):
        assert "used" in world.refused(data, number)
    assert "too far behind" in world.refused(data, 9)


def test_numbers_agree_with_a_set_of_all_that_were_used():
    import random

    random = random.Random(1)
    for _ in range(20):
        numbers, used, highest = Numbers(), set(), 0
        for _ in range(2000):
            number = max(1, highest + random.choice([-WINDOW - 1, -WINDOW, -100, -3, -1, 0, 1, 2, 50, WINDOW - 1]))
            expected = number not in used and highest - number < WINDOW
            assert numbers.use(number) is expected
            used.add(number)
            highest = max(highest, number)


def test_numbers_take_no_more_memory_the_longer_a_ticket_is_used():
    numbers = Numbers()
    assert all(numbers.use(number) for number in range(1, 3 * WINDOW))
    assert numbers._bits.bit_length() <= WINDOW


def test_a_number_far_ahead_forgets_what_lies_behind_and_lets_none_of_it_in():
    numbers = Numbers()
    assert numbers.use(5)
    assert numbers.use(2**63)
    assert not numbers.use(5)
    assert not numbers.use(6)
    assert numbers.use(2**63 - WINDOW + 1)


def test_tickets_of_the_secret_before_are_taken_and_no_older_ones(world):
    old = world.ticket()
    world.gate.learn(OTHER_SECRET)
    world.gate.learn(OTHER_SECRET)
    assert world.call(old, 1) == USER
    assert world.call(world.ticket(secret=OTHER_SECRET), 1, secret=OTHER_SECRET) == USER
    world.gate.learn(b"u" * 32)
    assert "none of this cluster's" in world.refused(world.ticket(), 1)


def test_what_is_remembered_is_bounded_and_forgotten_when_it_has_expired():
    world = World(capacity=3)
    for _ in range(3):
        world.call(world.ticket(), 1)
    assert "gateway" in world.refused(world.ticket(), 1, code=ErrorCode.UNAVAILABLE)
    world.clock.advance(VALID_S + LEEWAY_S + 1)
    world.call(world.ticket(), 1)
    assert len(world.gate) == 1


def test_a_ticket_of_a_clock_ahead_does_not_keep_expired_ones_in_memory():
    world = World(capacity=3)
    ahead = tickets.make_ticket(SECRET, Ticket(USER, "timm/net", world.clock.now() + 1e6), new_id=bytes)
    for data in (ahead, world.ticket(), world.ticket()):
        world.call(data, 1)
    world.clock.advance(VALID_S + LEEWAY_S + 1)
    assert world.call(world.ticket(), 1) == USER
    assert len(world.gate) == 2


def test_names_of_any_length_that_is_allowed_fit():
    said = Ticket(Principal("t" * 128, Role.READER), "l" * 128 + "/" + "b" * 128, 1.5)
    data = tickets.make_ticket(SECRET, said, new_id=bytes)
    assert tickets.read_ticket(SECRET, data) == said
