"""`moedisco` as a replica whose lease has a short term."""

from __future__ import annotations

from service.background import leasing
from service.cli import main

TERM = 4.0

if __name__ == "__main__":
    leasing.TERM_SECONDS, leasing.RENEW_SECONDS, leasing.MARGIN_SECONDS = TERM, 0.3, 1.5
    main()
