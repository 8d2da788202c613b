"""A run that is followed over REST, across whatever happens to the service."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from moedisco_ray.core.records.events import Event
from service.client import Client

WAIT_SECONDS = 200


class Story:
    """State of a run from its events so far."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Event]] = []
        self.starts = 0
        self.started = 0.0
        self.ended = False
        self._stages: set[str] = set()
        self._steps: dict[str, int] = {}
        self._before = 0

    def take(self, position: int, event: Event) -> None:
        """Hear the next event."""
        self.seen.append((position, event))
        if event.type == "state" and event.data["state"] == "starting":
            self.starts, self.started, self._before = self.starts + 1, time.monotonic(), self._reached
        elif event.type in ("stage_finished", "stage_skipped"):
            self._stages.add(str(event.stage))
        elif event.type == "progress":
            self._steps[str(event.unit)] = max(self._steps.get(str(event.unit), 0), event.data["step"])

    def reached(self, stage: str, step: int) -> bool:
        """Whether a unit of the stage has passed the step."""
        return any(
            event.type == "progress" and event.stage == stage and event.data["step"] >= step for _, event in self.seen
        )

    @property
    def advance(self) -> int:
        """Stages and steps that the present driver added to what any before it reached."""
        return self._reached - self._before

    @property
    def _reached(self) -> int:
        return len(self._stages) + sum(self._steps.values())


class Watcher:
    """Follows a run in a thread, as a person's `moedisco watch` would, across whatever happens to the service."""

    def __init__(self, client: Client, run_id: str) -> None:
        self.story = Story()
        self._news = threading.Condition()
        self._trouble: Exception | None = None
        self._thread = threading.Thread(target=self._follow, args=(client, run_id))
        self._thread.start()

    def wait_for(self, happened: Callable[[Story], bool]) -> None:
        """Until the story has come so far; a run that ends before fails the test."""
        with self._news:
            assert self._news.wait_for(lambda: happened(self.story) or self.story.ended, WAIT_SECONDS), self._last()
            assert not self.story.ended, (self._trouble, self._last())

    def join(self) -> list[tuple[int, Event]]:
        """Wait for the run's end; all events with their positions."""
        self._thread.join(2 * WAIT_SECONDS)
        assert not self._thread.is_alive(), self._last()
        assert self._trouble is None, self._trouble
        return self.story.seen

    def _follow(self, client: Client, run_id: str) -> None:
        try:
            for position, event in client.events(run_id):
                with self._news:
                    self.story.take(position, event)
                    self._news.notify_all()
        except Exception as error:  # noqa: BLE001 - raised again by the waiting thread
            self._trouble = error
        finally:
            with self._news:
                self.story.ended = True
                self._news.notify_all()

    def _last(self) -> Any:
        return self.story.seen[-5:]
