from __future__ import annotations

import asyncio
import threading

from service.bell import Bell


def ring_from_a_thread(bell, run_id):
    thread = threading.Thread(target=bell.ring, args=(run_id,))
    thread.start()
    thread.join()


def test_a_ring_from_a_thread_wakes_those_who_wait_for_that_run():
    async def scene():
        bell = Bell()
        waiting = [asyncio.create_task(bell.wait("a", 30)) for _ in range(3)]
        other = asyncio.create_task(bell.wait("b", 0.05))
        await asyncio.sleep(0)
        ring_from_a_thread(bell, "a")
        return await asyncio.gather(*waiting, other)

    assert asyncio.run(scene()) == [True, True, True, False]


def test_a_listener_hears_what_rings_between_two_waits():
    async def scene():
        bell = Bell()
        with bell.listen("a") as listener:
            ring_from_a_thread(bell, "a")
            ring_from_a_thread(bell, "a")
            return [await listener.wait(30), await listener.wait(0)]

    assert asyncio.run(scene()) == [True, False]


def test_everybody_is_woken_at_the_end_and_nobody_is_remembered():
    async def scene():
        bell = Bell()
        waiting = [asyncio.create_task(bell.wait(run_id, 30)) for run_id in "ab"]
        await asyncio.sleep(0)
        bell.ring_all()
        assert await asyncio.gather(*waiting) == [True, True]
        return bell

    assert asyncio.run(scene())._listeners == {}


def test_a_ring_after_its_loop_has_closed_is_harmless():
    bell = Bell()

    async def leave():
        listening = bell.listen("a")
        listening.__enter__()
        return listening

    listening = asyncio.run(leave())
    bell.ring("a")
    listening.__exit__(None, None, None)
    bell.ring("a")
