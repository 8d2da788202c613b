"""Renders chat templates in a process of its own: the program of that process.

`chat_templates` starts it and talks to it.

A template is a program of a stranger. The sandbox of transformers keeps it from files and from the interpreter, but not
from loops that never end and texts that fill the memory. The kernel ends this process after `SECONDS` of computing time
per rendered text, and its memory is limited. It imports neither torch nor this package, so it starts within a second.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

SECONDS = 3
"""Maximum computing time per rendered text (s); an honest one takes milliseconds."""
MEMORY_BYTES = 1 << 30
"""Maximum memory for a template and its conversation (bytes)."""
OUT_OF_MEMORY = 3
"""Exit status of the process if its memory did not suffice."""


def render(asked: dict[str, Any]) -> dict[str, Any]:
    """Text and `{% generation %}` spans of each part of a conversation, or the reason why there are none."""
    try:
        return {"parts": [_render(asked, count, prompt) for count, prompt in asked["parts"]]}
    except MemoryError:
        raise  # there may be too little memory left to answer
    except Exception as error:  # noqa: BLE001  # the template is a program, which can fail in any way
        return {"failed": str(error) or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _render(asked: dict[str, Any], count: int, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, wherever the template computes
    texts, spans = render_jinja_template(
        [asked["messages"][:count]],
        tools=asked["tools"],
        chat_template=asked["template"],
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=asked["marks"],
        **asked["special_tokens"],
    )
    return texts[0], spans[0] if spans else []


def main(file_descriptor: int) -> None:
    """Answer requests until the other side closes the connection."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    with Connection(file_descriptor) as connection:
        connection.send_bytes(b"ready")
        try:
            while True:
                connection.send_bytes(json.dumps(render(json.loads(connection.recv_bytes()))).encode())
        except EOFError:
            return
        except MemoryError:
            os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main(int(sys.argv[1]))
