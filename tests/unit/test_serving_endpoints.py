"""The directory of replicas, what gateways tell of it, and where replicas listen."""

import asyncio
import dataclasses

import pytest
from direct_fakes import LocalDirectory
from trunkline_wire.hosts import is_loopback
from trunkline_wire.specs import Endpoint, Endpoints
from trunkline_worker.serving import endpoints as module
from trunkline_worker.serving.addresses import Place, find_place, host_port, parse_ports
from trunkline_worker.serving.auth import Principal, Role
from trunkline_worker.serving.direct import Announcer
from trunkline_worker.serving.endpoints import FORGET_S, LIST_TTL_S, Announcement, Directory, EndpointBook
from trunkline_worker.serving.tickets import VALID_S, Ticket, holder_key, read_ticket
from trunkline_worker.store.clock import ManualClock

USER = Principal("physics", Role.USER)
ONE = Announcement("net", "127.0.0.1:1001", "r1", "here")
TWO = Announcement("net", "127.0.0.1:1002", "r2", "here")
OTHER = Announcement("other", "127.0.0.1:1003", "r3", "here")


@pytest.fixture
def clock():
    return ManualClock()


def listed(directory, backbone="net"):
    return [one.replica for one in directory.list(backbone).announcements]


def test_replicas_are_listed_by_backbone_and_forgotten_without_a_sign_of_life(clock):
    directory = Directory(clock=clock)
    for one in (ONE, TWO, OTHER):
        directory.announce(one)
    assert listed(directory) == ["r1", "r2"]
    assert listed(directory, "other") == ["r3"]
    assert listed(directory, "nobody") == []
    clock.advance(FORGET_S - 1)
    directory.announce(TWO)
    clock.advance(1)
    assert listed(directory) == ["r2"]


def test_a_replica_that_withdrew_does_not_come_back_by_a_late_sign_of_life(clock):
    directory = Directory(clock=clock)
    directory.announce(ONE)
    directory.withdraw("r1")
    directory.withdraw("never-heard-of")
    assert listed(directory) == []
    directory.announce(ONE)
    assert listed(directory) == []


def test_everyone_gets_one_secret_which_is_another_one_at_each_start(clock):
    directory = Directory(clock=clock)
    secret = directory.announce(ONE)
    assert directory.announce(TWO) == directory.list("net").secret == secret
    assert len(secret) == 32
    assert Directory(clock=clock).announce(ONE) != secret
    assert str(secret) not in repr(directory.list("net"))


def book(client, clock, **options):
    return EndpointBook(client, clock=clock, **{"node": "here", **options})


def ask(found, backbone="net", principal=USER):
    return asyncio.run(found.endpoints(backbone, principal))


def addresses(found):
    return [one.address for one in found.endpoints]


def test_a_caller_gets_endpoints_and_a_ticket_of_its_own(clock):
    client = LocalDirectory(clock)
    client.directory.announce(ONE)
    secret = client.directory.announce(TWO)
    found = ask(book(client, clock))
    assert found.endpoints == (Endpoint("127.0.0.1:1001", "r1"), Endpoint("127.0.0.1:1002", "r2"))
    assert (found.valid_s, found.tls, found.tls_name) == (VALID_S, False, "")
    assert read_ticket(secret, found.ticket) == Ticket(USER, "net", clock.now() + VALID_S)
    assert found.key == holder_key(secret, found.ticket)
    assert ask(book(client, clock)).ticket != found.ticket


def test_nobody_there_is_an_empty_answer_without_a_ticket(clock):
    client = LocalDirectory(clock)
    assert ask(book(client, clock)) == Endpoints()
    client.directory.announce(OTHER)
    assert ask(book(client, clock)) == Endpoints()


def test_the_directory_is_asked_once_a_second_at_most_and_by_one_caller_at_a_time(clock):
    client = LocalDirectory(clock)
    client.directory.announce(ONE)
    asked, answer = [], client.list

    async def slow(backbone, *, timeout_s):
        asked.append(backbone)
        await asyncio.sleep(0)
        return await answer(backbone, timeout_s=timeout_s)

    client.list = slow

    async def run():
        found = book(client, clock)
        await asyncio.gather(*(found.endpoints("net", USER) for _ in range(5)))
        assert asked == ["net"]
        client.directory.announce(TWO)
        assert addresses(await found.endpoints("net", USER)) == ["127.0.0.1:1001"]
        clock.advance(LIST_TTL_S)
        assert len(addresses(await found.endpoints("net", USER))) == 2
        assert asked == ["net", "net"]

    asyncio.run(run())


def test_while_the_directory_is_away_what_it_said_last_holds_for_a_while_and_then_nothing_does(clock):
    client = LocalDirectory(clock)
    client.directory.announce(ONE)
    found = book(client, clock)
    client.away = True
    assert ask(found) == Endpoints()
    client.away = False
    ask(found)
    client.away = True
    clock.advance(FORGET_S - 1)
    assert addresses(ask(found)) == ["127.0.0.1:1001"]
    clock.advance(1)
    assert ask(found) == Endpoints()


def test_a_directory_that_does_not_answer_or_fails_otherwise_is_one_that_is_away(clock, monkeypatch):
    client = LocalDirectory(clock)

    async def silent(backbone, *, timeout_s):
        await asyncio.Event().wait()

    async def broken(backbone, *, timeout_s):
        raise AttributeError("a controller of another version")

    monkeypatch.setattr(module, "LIST_TIMEOUT_S", 0.01)
    for client.list in (silent, broken):
        assert ask(book(client, clock)) == Endpoints()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["127.0.0.1:1001", "10.0.0.2:1004"]),
        ({"node": "there"}, ["[::1]:1005", "10.0.0.2:1004"]),
        ({"is_local": False}, ["10.0.0.2:1004"]),
        ({"needs_tls": True}, []),
    ],
)
def test_callers_are_told_only_of_what_they_can_reach_as_safely_as_the_gateway(clock, options, expected):
    client = LocalDirectory(clock)
    elsewhere = Announcement("net", "[::1]:1005", "r5", "there")
    for one in (ONE, elsewhere, Announcement("net", "10.0.0.2:1004", "r4", "there")):
        client.directory.announce(one)
    assert sorted(addresses(ask(book(client, clock, **options)))) == sorted(expected)


def test_replicas_under_different_names_are_not_mixed_while_certificates_change(clock):
    client = LocalDirectory(clock)
    for one, name in ((ONE, "new"), (TWO, "old"), (dataclasses.replace(TWO, replica="r4"), "new")):
        client.directory.announce(dataclasses.replace(one, tls=True, tls_name=name))
    found = ask(book(client, clock))
    assert (found.tls, found.tls_name) == (True, "new")
    assert [one.replica for one in found.endpoints] == ["r1", "r4"]


def test_signs_of_life_go_on_through_a_directory_that_is_away_and_bring_the_new_secret():
    async def run():
        client, learnt = LocalDirectory(), []
        client.away = True
        seen = asyncio.Event()

        def learn(secret):
            learnt.append(secret)
            seen.set()

        announcer = Announcer(client, ONE, learn, interval_s=0.0)
        announcer.start()
        for _ in range(10):
            await asyncio.sleep(0)
        assert learnt == []
        client.away = False
        async with asyncio.timeout(60):
            await seen.wait()
            first = client.directory.list("net").secret
            assert learnt[-1] == first
            client.restart()
            seen.clear()
            await client.announced.wait()
            await seen.wait()
        assert learnt[-1] == client.directory.list("net").secret != first
        assert listed(client.directory) == ["r1"]
        await announcer.close()
        assert listed(client.directory) == []
        await announcer.close()

    asyncio.run(run())


def test_ending_does_not_wait_for_a_directory_that_is_away():
    async def run():
        client = LocalDirectory()
        announcer = Announcer(client, ONE, lambda secret: None)
        await announcer.close()
        announcer.start()
        await client.announced.wait()
        client.away = True
        await announcer.close()
        assert listed(client.directory) == ["r1"]

    asyncio.run(run())


def no_way_out():
    raise AssertionError("asked for the way out")


@pytest.mark.parametrize(
    ("direct", "gateway", "node", "expected"),
    [
        ("", "127.0.0.1", "127.0.0.1", Place("127.0.0.1", "127.0.0.1")),
        ("", "localhost", "10.0.0.2", Place("localhost", "localhost")),
        ("", "::1", "10.0.0.2", Place("::1", "::1")),
        ("", "0.0.0.0", "10.0.0.2", Place("10.0.0.2", "10.0.0.2")),
        ("", "10.0.0.1", "10.0.0.2", Place("10.0.0.2", "10.0.0.2")),
        ("0.0.0.0", "10.0.0.1", "10.0.0.2", Place("0.0.0.0", "10.0.0.2")),
        ("::", "127.0.0.1", "10.0.0.2", Place("::", "10.0.0.2")),
        ("192.168.0.7", "0.0.0.0", "127.0.0.1", Place("192.168.0.7", "192.168.0.7")),
        # Ray on this machine alone, whose gateway others reach.
        ("", "10.0.0.1", "127.0.0.1", Place("10.0.0.1", "10.0.0.1")),
        ("0.0.0.0", "gateway.example", "127.0.0.1", Place("0.0.0.0", "gateway.example")),
        ("0.0.0.0", "localhost", "127.0.0.1", Place("0.0.0.0", "127.0.0.1")),
    ],
)
def test_where_replicas_listen(direct, gateway, node, expected):
    assert find_place(direct, gateway, node, no_way_out) == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_on_a_single_machine_open_to_others_the_way_out_says_its_address(host):
    assert find_place("", host, "127.0.0.1", lambda: "10.0.0.9") == Place("10.0.0.9", "10.0.0.9")
    assert find_place("0.0.0.0", host, "127.0.0.1", lambda: "10.0.0.9") == Place("0.0.0.0", "10.0.0.9")


def test_ports():
    assert parse_ports("") == ()
    assert parse_ports("50100") == (50100,)
    assert parse_ports("50100-50102") == (50100, 50101, 50102)
    for text in ("0", "5-3", "-", "70000", "1-70000", "a-b", "50100,50101", "1-2-3"):
        with pytest.raises(ValueError, match="range of ports"):
            parse_ports(text)


def test_addresses_are_written_so_that_they_can_be_read():
    assert host_port("10.0.0.1", 5) == "10.0.0.1:5"
    assert host_port("::1", 5) == "[::1]:5"
    assert host_port("[::1]", 5) == "[::1]:5"
    assert is_loopback("[::1]") and is_loopback("127.8.0.1") and not is_loopback("example.org")
