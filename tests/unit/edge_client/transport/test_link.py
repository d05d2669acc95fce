"""The simulated link: its text, and its times, measured with an injected clock."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.transport.link import Direction, Exchange, Line, Link
from protocol.errors import InvalidField


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def line(text: str, clock: Clock) -> Line:
    return Line(Link.parse(text), clock=lambda: clock.now, sleep=clock.sleep)


def talk(exchange: Exchange, up: int, down: int, piece: int = 10_000) -> None:
    for start in range(0, up, piece):
        exchange.send(min(piece, up - start))
    for start in range(0, down, piece):
        exchange.receive(min(piece, down - start))


# The text


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("20mbit,50ms", Link(20e6, 20e6, 0.05)),
        ("20mbit/5mbit,50ms", Link(20e6, 5e6, 0.05)),
        (
            "20mbit/5mbit,50ms,jitter=10ms,loss=0.01",
            Link(20e6, 5e6, 0.05, jitter_s=0.01, loss=0.01),
        ),
        ("1gbit", Link(1e9, 1e9)),
        ("1.5Mbit/256kbit, 0.6s, seed=7", Link(1.5e6, 256e3, 0.6, seed=7)),
        ("8mbit,seed=9223372036854775807,loss=1", Link(8e6, 8e6, loss=1.0, seed=2**63 - 1)),
    ],
)
def test_a_link_is_parsed_from_its_text(text: str, link: Link) -> None:
    assert Link.parse(text) == link


@pytest.mark.parametrize(
    ("link", "text"),
    [
        (Link(20e6, 20e6, 0.05), "20mbit,50ms"),
        (Link(1_500_000, 256_000), "1.5mbit/256kbit,0ms"),
        (Link(1e9, 1e9, 0.0005), "1gbit,0.5ms"),
        (
            Link(1e12, 1e3, 60.0, 0.01, 0.25, 3),
            "1000gbit/1kbit,60000ms,jitter=10ms,loss=0.25,seed=3",
        ),
    ],
)
def test_a_link_has_one_canonical_text(link: Link, text: str) -> None:
    assert str(link) == text


seconds = st.floats(0, 60)

bandwidths = st.floats(1e3, 1e12)

links = st.builds(
    Link, bandwidths, bandwidths, seconds, seconds, st.floats(0, 1), st.integers(0, 2**63 - 1)
)


@given(links)
def test_every_link_comes_back_from_its_text(link: Link) -> None:
    assert Link.parse(str(link)) == link


def refusal(text: str) -> InvalidField | None:
    try:
        link = Link.parse(text)
    except InvalidField as error:
        return error
    assert Link.parse(str(link)) == link
    return None


@given(st.text(alphabet="0159.,/=mkgbitsjerlod -", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_link_or_refused_with_an_example(text: str) -> None:
    error = refusal(text)
    if error is not None:
        assert (error.field or "").startswith("link.")
        assert error.limit is not None
        assert error.value is not None
        assert "20mbit/5mbit,50ms" in (error.hint or "")


@pytest.mark.parametrize(
    ("text", "field", "limit", "value"),
    [
        ("", "down", ["NUMBERgbit", "NUMBERmbit", "NUMBERkbit"], ""),
        ("fast", "down", ["NUMBERgbit", "NUMBERmbit", "NUMBERkbit"], "fast"),
        ("20mb,50ms", "down", ["NUMBERgbit", "NUMBERmbit", "NUMBERkbit"], "20mb"),
        ("20mbit/,50ms", "up", ["NUMBERgbit", "NUMBERmbit", "NUMBERkbit"], ""),
        ("20mbit/0kbit", "up", [1e3, 1e12], 0.0),
        ("2000gbit", "down", [1e3, 1e12], 2e12),
        ("20mbit,50", "latency", ["NUMBERs", "NUMBERms"], "50"),
        ("20mbit,-5ms", "latency", ["NUMBERs", "NUMBERms"], "-5ms"),
        ("20mbit,61s", "latency", [0.0, 60.0], 61.0),
        ("20mbit,50ms,10ms", "options", ["jitter", "loss", "seed"], "10ms"),
        ("20mbit,50ms,", "options", ["jitter", "loss", "seed"], ""),
        ("20mbit,delay=5ms", "options", ["jitter", "loss", "seed"], "delay=5ms"),
        ("20mbit,jitter=x", "jitter", ["NUMBERs", "NUMBERms"], "x"),
        ("20mbit,jitter=99s", "jitter", [0.0, 60.0], 99.0),
        ("20mbit,loss=1%", "loss", ["NUMBER"], "1%"),
        ("20mbit,loss=1.5", "loss", [0.0, 1.0], 1.5),
        ("20mbit,loss=0,loss=0", "loss", "once", "loss=0"),
        ("20mbit,seed=1.0", "seed", "up to 19 digits", "1.0"),
        ("20mbit,seed=9223372036854775808", "seed", [0, 2**63 - 1], 2**63),
        (f"{'9' * 400}kbit", "down", [1e3, 1e12], math.inf),
    ],
)
def test_an_error_names_the_value_and_the_accepted_form(
    text: str, field: str, limit: object, value: object
) -> None:
    with pytest.raises(InvalidField) as caught:
        Link.parse(text)
    error = caught.value
    assert (error.field, error.limit, error.value) == (f"link.{field}", limit, value)
    assert error.hint == "for example 20mbit/5mbit,50ms,jitter=10ms,loss=0.01"


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
@pytest.mark.parametrize("name", ["down_bps", "up_bps", "rtt_s", "jitter_s", "loss"])
def test_a_link_of_numbers_is_checked_too(name: str, bad: float) -> None:
    with pytest.raises(InvalidField):
        Link(**{"down_bps": 1e6, "up_bps": 1e6, name: bad})


# The times


@pytest.mark.parametrize(
    ("text", "up", "down", "expected"),
    [
        ("8mbit,50ms", 1_000_000, 0, 1.025),  # half a round trip, then 8e6 bits at 8e6 a second
        ("8mbit,50ms", 1_000_000, 100_000, 1.0 + 0.1 + 0.05),
        ("20mbit/5mbit,50ms", 1_000_000, 1_000_000, 1.6 + 0.4 + 0.05),
        ("20mbit/5mbit,50ms", 1, 1, 1.6e-6 + 0.4e-6 + 0.05),
        ("1gbit", 12_500_000, 0, 0.1),
    ],
)
@pytest.mark.parametrize("piece", [1000, 7777, 100_000_000])
def test_an_exchange_takes_its_bits_over_the_bandwidth_and_one_round_trip(
    text: str, up: int, down: int, expected: float, piece: int
) -> None:
    clock = Clock()
    talk(line(text, clock).exchange(), up, down, piece)
    assert clock.now - 100 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("round_trips", "expected"), [(1, 0.05), (2, 0.1)])
def test_opening_a_connection_takes_round_trips(round_trips: int, expected: float) -> None:
    clock = Clock()
    with line("8mbit,50ms", clock).opening(round_trips):
        clock.now += 0.01  # what loopback needs is within it
    assert clock.now - 100 == pytest.approx(expected)


def test_a_connection_that_fails_is_not_waited_for() -> None:
    clock = Clock()
    with pytest.raises(ConnectionRefusedError), line("8mbit,50ms", clock).opening(1):
        raise ConnectionRefusedError
    assert clock.now == 100


def test_the_time_on_loopback_is_part_of_the_simulated_time() -> None:
    clock = Clock()
    exchange = line("8mbit,50ms", clock).exchange()
    for _ in range(10):  # 0.1 s each on the line, of which loopback takes 0.03
        exchange.send(100_000)
        clock.now += 0.03
    # Half a round trip and 1 s, then what loopback needs for the last piece.
    assert clock.now - 100 == pytest.approx(1.025 + 0.03)


def test_a_loopback_slower_than_the_line_takes_its_own_time_and_no_more() -> None:
    clock = Clock()
    exchange = line("8mbit,0ms", clock).exchange()
    for _ in range(10):  # 0.1 s each on the line
        clock.now += 0.2
        exchange.receive(100_000)
    # Only the first piece was waited for: ever after, the line could have carried more.
    assert clock.now - 100 == pytest.approx(2.0 + 0.1)


def test_the_server_s_computation_is_added() -> None:
    clock = Clock()
    exchange = line("8mbit,50ms", clock).exchange()
    exchange.send(100_000)
    assert clock.now - 100 == pytest.approx(0.125)  # there, so that the server can begin
    clock.now += 0.7
    exchange.receive(100_000)
    assert clock.now - 100 == pytest.approx(0.1 + 0.7 + 0.1 + 0.05)


def test_two_connections_share_a_direction() -> None:
    """Two streams of 1 s each, piece by piece in turns, end after 2 s together."""
    direction = Direction(8e6)
    ends = [0.0, 0.0]
    for _ in range(10):
        for stream in (0, 1):
            ends[stream] = direction.pass_at(ends[stream], 100_000)
    assert ends == [pytest.approx(1.9), pytest.approx(2.0)]


def test_an_idle_link_starts_with_the_next_request() -> None:
    direction = Direction(8e6)
    assert direction.pass_at(10.0, 1_000_000) == pytest.approx(11.0)
    assert direction.pass_at(10.5, 1_000_000) == pytest.approx(12.0)
    assert direction.pass_at(50.0, 1_000_000) == pytest.approx(51.0)


def test_up_and_down_do_not_hold_each_other_up() -> None:
    clock = Clock()
    shared = line("8mbit,0ms", clock)
    shared.up.pass_at(clock.now, 5_000_000)  # somebody's upload, until 105
    shared.exchange().receive(1_000_000)
    assert clock.now == pytest.approx(101.0)
    shared.exchange().send(1_000_000)
    assert clock.now == pytest.approx(106.0)


def test_latency_of_one_connection_does_not_hold_up_another() -> None:
    """During a response's latency other connections use the line."""
    clock, others = Clock(), []

    def sleep(pause: float) -> None:
        if not others:  # the 5 s ahead of the answer have begun
            others.append(late.down.pass_at(clock.now, 100_000))
        clock.sleep(pause)

    late = Line(Link(8e6, 8e6, 10.0), clock=lambda: clock.now, sleep=sleep)
    late.exchange().receive(100_000)
    assert others == [pytest.approx(100.1)]
    assert clock.now == pytest.approx(105.1)


def test_a_piece_is_five_milliseconds_of_the_line_and_at_least_a_packet() -> None:
    assert Direction(20e6).piece_bytes == 12_500
    assert Direction(1e5).piece_bytes == 1500


# The draws


@pytest.mark.parametrize(("rtt_s", "expected"), [(0.0, 0.2), (0.1, 0.2), (0.15, 0.3), (2.0, 4.0)])
def test_a_lost_packet_costs_a_time_out(rtt_s: float, expected: float) -> None:
    clock = Clock()
    lossy = Line(Link(8e6, 8e6, rtt_s, loss=1.0), clock=lambda: clock.now, sleep=clock.sleep)
    talk(lossy.exchange(), 100_000, 100_000)
    assert clock.now - 100 == pytest.approx(rtt_s + expected + 0.2)


def test_as_many_exchanges_lose_a_packet_as_the_link_says() -> None:
    delays = [0.0] * 10_000
    lossy = line("8mbit,loss=0.1,seed=1", Clock())
    for number in range(len(delays)):
        delays[number] = lossy.draw_delay()
    assert set(delays) == {0.0, 0.2}
    # Binomial: mean 1000, standard deviation 30.
    assert 850 < sum(delay > 0 for delay in delays) < 1150


def test_jitter_is_uniform_from_nothing_to_the_most() -> None:
    shaky = line("8mbit,jitter=10ms,seed=1", Clock())
    delays = sorted(shaky.draw_delay() for _ in range(10_000))
    assert delays[0] >= 0
    assert delays[-1] <= 0.01
    # The empirical distribution is within 0.02 of the uniform one (Kolmogorov: p < 0.001).
    assert all(abs(d / 0.01 - n / 10_000) < 0.02 for n, d in enumerate(delays))


def test_an_exchange_is_delayed_once() -> None:
    clock = Clock()
    shaky = line("8mbit,jitter=10ms,loss=0.5,seed=3", clock)
    reference = line("8mbit,jitter=10ms,loss=0.5,seed=3", Clock())
    for _ in range(20):
        before = clock.now
        talk(shaky.exchange(), 50_000, 50_000)
        assert clock.now - before == pytest.approx(0.1 + reference.draw_delay())


def test_the_same_seed_draws_the_same_and_loss_does_not_move_the_jitter() -> None:
    def draws(text: str) -> list[float]:
        drawn = line(text, Clock())
        return [drawn.draw_delay() for _ in range(50)]

    assert draws("8mbit,jitter=1s,seed=5") == draws("8mbit,jitter=1s,seed=5")
    assert draws("8mbit,jitter=1s,seed=5") != draws("8mbit,jitter=1s,seed=6")
    lossy = draws("8mbit,jitter=1s,loss=1,seed=5")
    assert lossy == pytest.approx([delay + 0.2 for delay in draws("8mbit,jitter=1s,seed=5")])


def test_threads_that_send_at_once_are_served_one_after_the_other() -> None:
    direction, ends = Direction(8e6), []
    start = threading.Barrier(4)

    def send() -> None:
        start.wait(5)
        ends.extend([direction.pass_at(0.0, 1000) for _ in range(500)])

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == pytest.approx([0.001 * n for n in range(1, 2001)])
