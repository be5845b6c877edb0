"""Events are delivered in order, elsewhere, to everyone who listens, whatever another listener does."""

import logging
import threading

from omlx_core.cache.events import CacheEvent, EventBus

WAIT_S = 30


def publish(bus, *sizes):
    for size_bytes in sizes:
        bus.publish("store", "hot", num_blocks=1, size_bytes=size_bytes)


def test_events_arrive_in_order_on_a_thread_of_their_own():
    bus, heard, threads = EventBus(b"\x01\xff"), [], set()
    bus.subscribe(lambda event: (heard.append(event), threads.add(threading.current_thread().name)))
    publish(bus, 10, 20)
    bus.close()
    assert heard == [CacheEvent("store", "hot", 1, size_bytes, "01ff") for size_bytes in (10, 20)]
    assert threads == {"omlx-events"}


def test_a_failing_listener_is_logged_and_harms_no_other(caplog):
    bus, heard = EventBus(), []

    def fail(event):
        raise ValueError("boom")

    bus.subscribe(fail)
    bus.subscribe(heard.append)
    with caplog.at_level(logging.ERROR):
        publish(bus, 10, 20)
        bus.close()
    assert [event.size_bytes for event in heard] == [10, 20]
    assert caplog.text.count("a listener to cache events failed") == 2


def test_a_slow_listener_delays_no_publisher():
    bus, gate, heard = EventBus(), threading.Event(), []
    bus.subscribe(lambda event: (gate.wait(WAIT_S), heard.append(event)))
    publish(bus, *range(100))  # would take for ever
    assert not heard
    gate.set()
    bus.close()
    assert len(heard) == 100


def test_a_subscription_ends():
    bus, heard, others = EventBus(), [], []
    unsubscribe = bus.subscribe(heard.append)
    bus.subscribe(others.append)
    unsubscribe()
    unsubscribe()
    publish(bus, 10)
    bus.close()
    assert heard == []
    assert len(others) == 1


def test_without_listeners_nothing_is_queued_and_no_thread_runs():
    bus = EventBus()
    publish(bus, 10)
    assert bus._events.empty()
    assert bus._thread is None
    bus.close()
    bus.close()


def test_no_blocks_are_no_event():
    bus, heard = EventBus(), []
    bus.subscribe(heard.append)
    bus.publish("hit", "hot", num_blocks=0, size_bytes=0)
    bus.close()
    assert heard == []
