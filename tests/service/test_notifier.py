from __future__ import annotations

import asyncio
import threading

from service.notifier import Notifier


def notify_from_a_thread(notifier, run_id):
    thread = threading.Thread(target=notifier.notify, args=(run_id,))
    thread.start()
    thread.join()


async def wait(notifier, run_id, seconds):
    with notifier.subscribe(run_id) as subscription:
        return await subscription.wait(seconds)


def test_a_notification_from_a_thread_wakes_the_waiters_of_that_run():
    async def scene():
        notifier = Notifier()
        waiting = [asyncio.create_task(wait(notifier, "a", 30)) for _ in range(3)]
        other = asyncio.create_task(wait(notifier, "b", 0.05))
        await asyncio.sleep(0)
        notify_from_a_thread(notifier, "a")
        return await asyncio.gather(*waiting, other)

    assert asyncio.run(scene()) == [True, True, True, False]


def test_a_subscription_keeps_a_notification_between_two_waits():
    async def scene():
        notifier = Notifier()
        with notifier.subscribe("a") as subscription:
            notify_from_a_thread(notifier, "a")
            notify_from_a_thread(notifier, "a")
            return [await subscription.wait(30), await subscription.wait(0)]

    assert asyncio.run(scene()) == [True, False]


def test_all_waiters_are_woken_at_the_end_and_none_is_remembered():
    async def scene():
        notifier = Notifier()
        waiting = [asyncio.create_task(wait(notifier, run_id, 30)) for run_id in "ab"]
        await asyncio.sleep(0)
        notifier.notify_all()
        assert await asyncio.gather(*waiting) == [True, True]
        return notifier

    assert asyncio.run(scene())._subscriptions == {}


def test_a_notification_after_the_loop_has_closed_is_harmless():
    notifier = Notifier()

    async def leave():
        subscribed = notifier.subscribe("a")
        subscribed.__enter__()
        return subscribed

    subscribed = asyncio.run(leave())
    notifier.notify("a")
    subscribed.__exit__(None, None, None)
    notifier.notify("a")
