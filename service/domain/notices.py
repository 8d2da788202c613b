"""What people get when a run has ended, and where it may be sent."""

from __future__ import annotations

import dataclasses
import math
from urllib.parse import urlsplit

from moedisco_ray.core.records.bill import format_dollars, format_seconds

PRODUCTS = ("discord", "gchat", "pagerduty", "pover", "slack", "tgram", "wxteams")
"""Schemes of apprise's URLs whose products have one address on the Internet, which no part of the URL changes."""
_LONGEST_URL = 1024


@dataclasses.dataclass(frozen=True)
class Notice:
    """A run that has ended.

    Attributes:
        dollars: Dollars metered over all attempts.
        hours: Wall-clock hours of all attempts; None if unknown.
        parent_loss: Held-out loss of the run that this one retries; None if unknown.
        link: URL of the run's page.
    """

    id: str
    name: str
    owner: str
    state: str
    reason: str | None
    attempt: int
    dollars: float
    hours: float | None
    held_out_loss: float | None
    perplexity: float | None
    parent_loss: float | None
    link: str

    @property
    def text(self) -> str:
        """Name, state, price, result and link of the run, in one or two sentences."""
        time = "" if self.hours is None else f" in {format_seconds(3600 * self.hours)}"
        ended = f"{self.name} {self.state}{time} for {format_dollars(self.dollars)}"
        why = f": {self.reason}" if self.reason and self.state != "succeeded" else ""
        words = verdict(self.held_out_loss, self.perplexity, self.parent_loss)
        return " ".join((f"{ended}{why}.", *([] if words is None else [words]), self.link))


def verdict(loss: float | None, perplexity: float | None, parent_loss: float | None) -> str | None:
    """The sentence about a finished model's loss on held-out text, next to its parent's; None without a loss."""
    if loss is None:
        return None
    shown = f" (perplexity {perplexity:.2f})" if perplexity is not None and math.isfinite(perplexity) else ""
    parent = "" if parent_loss is None else f", parent {parent_loss:.4f}"
    return f"Held-out loss {loss:.4f}{shown}{parent}."


def check_url(url: str) -> str:
    """Check the URL of a project's notices, which anyone who may edit the project can set; returns it.

    Raises:
        ValueError: The URL is not of a supported form.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError("is not a URL") from error
    if len(url) > _LONGEST_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"must have at most {_LONGEST_URL} visible ASCII characters")
    if parts.scheme == "https":
        if not parts.hostname or "@" in parts.netloc or parts.fragment:
            raise ValueError("must have the form https://HOST/PATH")
    elif parts.scheme not in PRODUCTS:
        raise ValueError(f"must begin with https:// or, as apprise's URLs, with {'://, '.join(PRODUCTS)}://")
    elif parts.query or parts.fragment:
        raise ValueError("may have no options after `?`")
    return url


def without_secret(url: str) -> str:
    """The part of a URL that may be shown: its scheme, and the host of an https URL."""
    parts = urlsplit(url)
    return f"https://{parts.hostname}/..." if parts.scheme == "https" else f"{parts.scheme}://..."
