"""What an operator sets."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from moedisco_ray.core.config.places import has_credentials
from moedisco_ray.core.errors import ConfigError

MIB = 2**20
BUCKET_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
"""Schemes of file systems whose buckets may be named as input and storage roots."""


class Settings(BaseModel):
    """Frozen; paths are absolute, with links and `..` resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    state_dir: Path
    """Holds the SQLite database, the local Ray cluster's files and the service's own log."""
    database_url: str | None = None
    """`sqlite:///FILE` or `postgresql+psycopg://...`; null: SQLite in `state_dir`."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8300
    public_url: Annotated[str, Field(pattern=r"^https?://[^\s/]+(/[^\s]*)?$")] | None = None
    """Under which browsers and drivers reach the service, when it is not `http://HOST:PORT`."""
    ray_address: str | None = None
    """URL that takes the Ray cluster's jobs: `http://HEAD:8265`; null: a local cluster is started."""
    dashboard_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """URL at which the service reaches the Ray dashboard, when it is not `ray_address`. Browsers reach it at `/ray/`."""
    driver_user: str | None = None
    """User of this machine that a local Ray and its drivers run as; null: the service's own. Needs a service of root."""
    input_roots: tuple[str, ...] = (".",)
    """Directories, and `s3://BUCKET/PREFIX` and the like, that a run may read. The embedded text is always allowed."""
    output_roots: Annotated[tuple[Path, ...], Field(min_length=1)] = (Path("runs"),)
    """Directories that hold run directories; the first is the default."""
    storage_roots: tuple[str, ...] = ()
    """Directories, and `s3://BUCKET/PREFIX` and the like, that `checkpoint.storage` may name. None: checkpoints stay in run
    directories."""
    max_active_runs: PositiveInt = 4
    """Of all owners together; each owner's limit is in the policies."""
    policies: Path | None = None
    """A YAML file with the policies of every owner, which holds instead of what was set over REST; null: REST sets them."""
    requests_per_minute: PositiveInt = 1200
    """Of one token, or of one address that has none."""
    max_streams_per_token: PositiveInt = 100
    """Event streams, followed logs and downloads that one token may have open at once."""
    max_body_bytes: PositiveInt = MIB
    max_report_bytes: PositiveInt = 8 * MIB
    """Of a driver's report."""
    allow_private_webhooks: bool = False
    """Whether webhooks may go to loopback, private and link-local addresses."""
    forwarded_allow_ips: str = ""
    """Addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, comma-separated."""
    session_cookie: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "moedisco_session"
    """Name of the session cookie; over HTTPS with the prefix `__Host-`."""
    session_idle_hours: Annotated[float, Field(gt=0, le=24 * 365)] = 24
    """A browser's session ends after this long without use (h)."""
    session_max_hours: Annotated[float, Field(gt=0, le=24 * 365)] = 24 * 7
    """A browser's session ends after this long at the latest (h)."""
    log_format: Literal["console", "json"] = "console"
    admin_token_file: Path | None = None
    """Holds the first administrator's token; made where nobody has a token yet. Null: `admin-token` in `state_dir`."""

    @property
    def is_local(self) -> bool:
        """Whether runs work on this machine, in a Ray cluster that the service starts."""
        return self.ray_address is None

    @field_validator("state_dir", "admin_token_file", mode="after")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().resolve()

    @field_validator("output_roots", mode="after")
    @classmethod
    def _absolute_outputs(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(root.expanduser().resolve() for root in roots)

    @field_validator("input_roots", "storage_roots", mode="after")
    @classmethod
    def _absolute_places(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_root(root) for root in roots)

    @property
    def database(self) -> str:
        """`database_url` with its default resolved."""
        return self.database_url or f"sqlite:///{self.state_dir / 'service.sqlite3'}"

    @property
    def admin_token_path(self) -> Path:
        """`admin_token_file` with its default resolved."""
        return self.admin_token_file or self.state_dir / "admin-token"

    @property
    def session_idle_seconds(self) -> float:
        """`session_idle_hours` in seconds."""
        return 3600 * self.session_idle_hours

    @property
    def url(self) -> str:
        """Base of the service's own URLs, without a trailing slash."""
        if self.public_url is not None:
            return self.public_url.rstrip("/")
        host = "127.0.0.1" if is_any_address(self.host) else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def job_url(self, submission_id: str) -> str:
        """Page of a job in the Ray dashboard, through the service."""
        return f"{self.url}/ray/#/jobs/{quote(submission_id, safe='')}"

    def report_url(self, run_id: str) -> str:
        """Where a run's driver reports."""
        return f"{self.url}/v1/runs/{quote(run_id)}/report"


def check_bind(settings: Settings, *, tokens: int) -> None:
    """Refuse to listen where others can reach the service while no token is valid.

    Args:
        settings: Names the host.
        tokens: Valid tokens in the database.

    Raises:
        ConfigError: The host is not a loopback address and there is no token.
    """
    if not is_loopback(settings.host) and not tokens:
        raise ConfigError(
            "--host", settings.host,
            "is reachable from other machines and no token is valid; make one first "
            "(`moedisco tokens create NAME --owner OWNER --state-dir DIR`), or listen on 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any_address(host: str) -> bool:
    """Whether it stands for every address of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def _root(root: str) -> str:
    scheme, sign, rest = root.partition("://")
    if not sign:
        return str(Path(root).expanduser().resolve())
    if scheme not in BUCKET_SCHEMES:
        raise ValueError(f"root {root!r}: {scheme}:// is none of {', '.join(BUCKET_SCHEMES)}")
    if has_credentials(root):
        raise ValueError("a root holds credentials; leave them out, and set them by environment variables or an instance role")
    bucket = rest.rstrip("/")
    if not bucket or "?" in bucket or "#" in bucket or ".." in bucket.split("/"):
        raise ValueError(f"root {root!r} must read {scheme}://BUCKET or {scheme}://BUCKET/PREFIX")
    return f"{scheme}://{bucket}"
