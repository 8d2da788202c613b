"""Settings of the service."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, SecretStr, ValidationInfo, field_validator

from moedisco_ray.core.config.places import has_credentials
from moedisco_ray.core.config.sources import FunctionName
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.hub import private_places
from moedisco_ray.core.store.locations import Location, cache_directory, is_uri, settings_directory
from service.domain.path_sandbox import Roots

MIB = 2**20
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
OWN_PATHS = frozenset({"v1", "static", "ray", "reference", "openapi.json", "healthz", "readyz", "metrics"})
"""First parts of the paths of the service, with which the path of `public_url` may not begin."""
BUCKET_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
HUB_SCHEME = "hf"
"""Scheme of the Hugging Face hub, from which runs read but to which they do not write."""
"""URI schemes of the object stores that may be roots."""


class Settings(BaseModel):
    """Settings that the operator chooses; paths are absolute, with symbolic links and `..` resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    state_dir: Path
    """Directory for the SQLite database, the files of the local Ray cluster and the service's log."""
    database_url: SecretStr | None = None
    """URL of the database, `sqlite:///FILE` or `postgresql+psycopg://...`; null uses SQLite in `state_dir`."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8300
    public_url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[\w.~-]+)*/?$")] | None = None
    """URL at which browsers and drivers reach the service, also with a path, such as `https://HOST/moedisco`; null uses
    `http://HOST:PORT`."""
    ray_address: str | None = None
    """URL that accepts the Ray cluster's jobs, such as `http://HEAD:8265`; with null, the service starts a local
    cluster."""
    dashboard_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """URL at which the service reaches the Ray dashboard; null uses `ray_address`. Browsers reach it at `/ray/`."""
    input_roots: tuple[str, ...] = ()
    """Directories and URIs such as `s3://BUCKET/PREFIX` or `hf://ORG` that runs may read. Hidden files, and directories
    of the service and its runs, are not read. The built-in text is always allowed."""
    output_roots: Annotated[tuple[Location, ...], Field(min_length=1)] = (Path("runs"),)
    """Directories and URIs such as `s3://BUCKET/PREFIX` in which run directories are created; the first is the
    default."""
    home_dir: Path | None = None
    """Directory of the service's own files of runs at URIs, which their drivers read; null uses the first output root
    that is a directory, or else `state_dir`."""
    driver_user: str | None = None
    """Unprivileged user that the local Ray and its drivers run as; null uses the service's user. If it is set, the
    service must run as root."""
    storage_roots: tuple[str, ...] = ()
    """Directories and URIs such as `s3://BUCKET/PREFIX` that `checkpoint.storage` may name. Without any, checkpoints
    stay in run directories."""
    map_functions: tuple[FunctionName, ...] = ()
    """Functions that `map` of a source may name, as MODULE:FUNCTION. Drivers call them; the service does not import
    them."""
    max_active_runs: PositiveInt = 4
    """Limit on active runs of all owners together; the policies set limits for each owner."""
    policies: Path | None = None
    """YAML file with the policies of all owners; with null, they are set through the REST API."""
    requests_per_minute: PositiveInt = 1200
    """Maximum number of requests per minute with one token, and from one address without a token."""
    max_streams_per_token: PositiveInt = 100
    """Maximum number of event streams, followed logs and downloads that one token may have open at the same time."""
    max_body_bytes: PositiveInt = MIB
    """Maximum size of the body of a request (bytes)."""
    max_report_bytes: PositiveInt = 8 * MIB
    """Maximum size of the body of a driver's report (bytes)."""
    webhook_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """URL that gets a POST when a run has ended, signed with the text in `webhook-secret` of `state_dir`; null: none
    is sent."""
    forwarded_allow_ips: str = ""
    """Comma-separated addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted."""
    sign_in_header: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$")] | None = None
    """Header in which a proxy at one of these addresses names the person who has signed in there, such as
    `X-Forwarded-Email` of oauth2-proxy; null: no header signs anyone in."""
    session_idle_hours: Annotated[float, Field(gt=0, le=24 * 365)] = 24
    """Hours without use after which a browser session ends."""
    session_max_hours: Annotated[float, Field(gt=0, le=24 * 365)] = 24 * 7
    """Maximum duration of a browser session, in hours."""
    log_format: Literal["console", "json"] = "console"
    admin_token_file: Path | None = None
    """File with the first administrator's token, created if the database has no token; null uses `admin-token` in
    `state_dir`."""
    secrets_key_file: Path | None = None
    """File with the key that seals the secrets of projects, created if it is missing; null uses `secrets-key` in
    `state_dir`. Replicas need the same file."""

    @property
    def roots(self) -> Roots:
        """Directories and buckets that runs may read and write."""
        # Even for runs at URIs, the service keeps its own files, such as stop files, on this machine.
        first = () if self.home_dir is None else (self.home_dir,)
        homes = (*first, *(Path(root) for root in self.output_roots if not is_uri(root)), self.state_dir / "runs")
        own = (settings_directory().resolve(), cache_directory().resolve())
        inputs = [Path(root) for root in self.input_roots if not is_uri(root)]
        hub = (place.resolve() for place in private_places(inputs))
        private = (self.state_dir, self.admin_token_path, self.secrets_key_path, *own, *hub, *self._database_files)
        return Roots(
            self.input_roots,
            self.output_roots,
            self.storage_roots,
            homes=homes,
            private=private,
            functions=self.map_functions,
        )

    @property
    def is_local(self) -> bool:
        """Whether the service starts its own Ray cluster on this machine."""
        return self.ray_address is None

    @field_validator("public_url", mode="after")
    @classmethod
    def _no_path_of_our_own(cls, url: str | None) -> str | None:
        first = urlsplit(url or "").path.partition("/")[2].partition("/")[0]
        if first in OWN_PATHS:
            raise ValueError(f"begins with a path that the service itself uses (/{first}); choose another one")
        return url

    @field_validator("sign_in_header", mode="after")
    @classmethod
    def _from_known_addresses(cls, header: str | None, info: ValidationInfo) -> str | None:
        try:
            known = header is None or networks(info.data.get("forwarded_allow_ips", ""))
        except ValueError:
            known = ()
        if not known:
            raise ValueError(
                "needs the addresses of its proxy in --forwarded-allow-ips, such as 127.0.0.1, 10.0.0.0/24"
            )
        return header

    @field_validator("driver_user", mode="after")
    @classmethod
    def _drivers_reach_their_homes(cls, user: str | None, info: ValidationInfo) -> str | None:
        if (
            user is not None
            and info.data.get("home_dir") is None
            and all(map(is_uri, info.data.get("output_roots", ["."])))
        ):
            raise ValueError("cannot read the service's files of its runs; name a directory for them with --home-dir")
        return user

    @field_validator("state_dir", "home_dir", "admin_token_file", "secrets_key_file", mode="after")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().resolve()

    @field_validator("output_roots", mode="after")
    @classmethod
    def _absolute_outputs(cls, roots: tuple[Location, ...]) -> tuple[Location, ...]:
        return tuple(_root(str(root)) if is_uri(root) else Path(root).expanduser().resolve() for root in roots)

    @field_validator("input_roots", mode="after")
    @classmethod
    def _absolute_inputs(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_root(root, (*BUCKET_SCHEMES, HUB_SCHEME)) for root in roots)

    @field_validator("storage_roots", mode="after")
    @classmethod
    def _absolute_storages(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_root(root) for root in roots)

    @property
    def database(self) -> str:
        """`database_url` with its default resolved."""
        stored = f"sqlite:///{self.state_dir / 'service.sqlite3'}"
        return stored if self.database_url is None else self.database_url.get_secret_value()

    @property
    def admin_token_path(self) -> Path:
        """`admin_token_file` with its default resolved."""
        return self.admin_token_file or self.state_dir / "admin-token"

    @property
    def secrets_key_path(self) -> Path:
        """`secrets_key_file` with its default resolved."""
        return self.secrets_key_file or self.state_dir / "secrets-key"

    @property
    def _database_files(self) -> list[Path]:
        """SQLite's files of the database; empty for another database."""
        name = self.database.partition("?")[0].removeprefix("sqlite:///")
        return (
            [] if "://" in name else [Path(f"{name}{ending}").resolve() for ending in ("", "-wal", "-shm", "-journal")]
        )

    @property
    def session_idle_seconds(self) -> float:
        """`session_idle_hours` in seconds."""
        return 3600 * self.session_idle_hours

    @property
    def url(self) -> str:
        """Base URL of the service, without a trailing slash."""
        if self.public_url is not None:
            return self.public_url.rstrip("/")
        host = "127.0.0.1" if is_any_address(self.host) else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def path(self) -> str:
        """Path of `url`, without a trailing slash; empty for a service that has a host name of its own."""
        return urlsplit(self.url).path

    def job_url(self, submission_id: str) -> str:
        """URL of a job's page in the Ray dashboard, through the service."""
        return f"{self.url}/ray/#/jobs/{quote(submission_id, safe='')}"

    def report_url(self, run_id: str) -> str:
        """URL to which a run's driver reports."""
        return f"{self.url}/v1/runs/{quote(run_id)}/report"


def networks(addresses: str) -> tuple[IPNetwork, ...]:
    """Comma-separated IP addresses and networks.

    Raises:
        ValueError: One of them is neither.
    """
    return tuple(ipaddress.ip_network(each.strip(), strict=False) for each in addresses.split(",") if each.strip())


def check_bind(settings: Settings, *, tokens: int) -> None:
    """Refuse to listen on a public address while the database has no valid token.

    Raises:
        ConfigError: The host is not a loopback address and no token is valid.
    """
    if not is_loopback(settings.host) and not tokens:
        raise ConfigError(
            "--host",
            settings.host,
            "is reachable from other machines and no token is valid; create one first "
            "(`moedisco tokens create NAME --owner OWNER --state-dir DIR`), or listen on 127.0.0.1",
        )


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address, reachable only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any_address(host: str) -> bool:
    """Whether a host, such as 0.0.0.0, means all addresses of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def _root(root: str, schemes: Sequence[str] = BUCKET_SCHEMES) -> str:
    scheme, sign, rest = root.partition("://")
    if not sign:
        return str(Path(root).expanduser().resolve())
    if scheme not in schemes:
        raise ValueError(f"root {root!r}: the scheme {scheme}:// is not supported; use one of {', '.join(schemes)}")
    if has_credentials(root):
        raise ValueError("a root contains credentials; remove them, and use environment variables or an instance role")
    bucket = rest.rstrip("/")
    if not bucket or "?" in bucket or "#" in bucket or ".." in bucket.split("/"):
        raise ValueError(f"root {root!r} must have the form {scheme}://BUCKET or {scheme}://BUCKET/PREFIX")
    return f"{scheme}://{bucket}"
