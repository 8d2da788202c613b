"""Download models from the Hugging Face hub into the cache that other programs share.

The access token is in the environment variable HF_TOKEN of each machine; no configuration and no log holds it.
HF_ENDPOINT can hold the address of another hub. Large files come through the hub's Xet storage, which huggingface_hub
brings a library for. Import this module only where a model is at the hub: the import takes half a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.printable import progress_bars
from moedisco_ray.core.store.hub import HUB, hub_cache, hub_parts

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base class of the errors of the HTTP client; which client it is depends on the version of huggingface_hub."""
_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
_WEIGHTS = "*.safetensors"
_IN_FOLDERS = ("*/*.safetensors", "*/*.json")
"""Files in folders of a repository, which are the model in other formats."""


class _Quiet(tqdm):
    """No progress bar, for small files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


def hub_directory(setting: str, place: str, *, weights: bool) -> Path:
    """Directory with a model of the hub on this machine. Without a network, it has the files of an earlier download.

    Args:
        setting: Setting that names the model; errors name it.
        place: The model, `hf://ORG/NAME` or `hf://ORG/NAME@REVISION`. The directory's name is the commit.
        weights: Whether to download the weights too.

    Raises:
        CheckpointError: There is no such model or revision, it may not be read, or the hub cannot be reached.
    """
    name, revision = hub_parts(place)
    with _one_line(setting, name, revision), progress_bars():
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=hub_cache(),
                token=hub_token() or False,
                endpoint=hub_endpoint(),
                allow_patterns=[*_FILES, _WEIGHTS] if weights else [*_FILES],
                ignore_patterns=[*_IN_FOLDERS],
                tqdm_class=tqdm if weights else _Quiet,
            )
        )


class HubFiles(HfFileSystem):
    """Read-only files of the hub's repositories: `datasets/ORG/NAME/FILE` or `datasets/ORG/NAME@REVISION/FILE`."""

    def resolve_path(self, path: str, revision: str | None = None) -> Any:
        """The repository, the revision and the path in it.

        Raises:
            OSError: There is no such repository or revision, it may not be read, or the hub does not respond.
        """
        try:
            return super().resolve_path(path, revision)
        except FileNotFoundError as error:  # pyarrow would take this one for a missing file in the repository
            raise OSError(
                "no repository or revision that this machine may read at the hub; correct it, or set HF_TOKEN"
            ) from error
        except OSError:
            raise
        except (ValueError, NotImplementedError) as error:
            raise OSError("no name of a repository; write hf://datasets/ORG/NAME") from error
        except HTTP_ERROR as error:
            raise ConnectionError("the hub does not respond; go online, or name a directory") from error


def hub_files() -> HubFiles:
    """The files of the hub, for this machine's token."""
    return HubFiles(endpoint=hub_endpoint(), token=hub_token() or False)


def hub_token() -> str | None:
    """Access token of the hub: HF_TOKEN, or None."""
    return os.environ.get("HF_TOKEN") or None


def hub_endpoint() -> str | None:
    """Address of the hub, if HF_ENDPOINT names another one than the public hub."""
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _one_line(setting: str, name: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        remedy = "is gated: accept its terms at the hub, and set the environment variable HF_TOKEN"
        raise CheckpointError(setting, HUB + name, remedy) from error
    except RepositoryNotFoundError as error:
        remedy = (
            "is no model that this machine may read at the hub; correct the name, name a directory, or set HF_TOKEN"
        )
        raise CheckpointError(setting, HUB + name, remedy) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            setting, HUB + name, f"has no revision {revision!r}; name a branch, a tag or a commit"
        ) from error
    except LocalEntryNotFoundError as error:
        remedy = (
            "is not in this machine's cache, and the hub does not respond; go online, or name an existing directory"
        )
        raise CheckpointError(setting, HUB + name, remedy) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = f"cannot be downloaded: the hub answers {status}; check HF_TOKEN, or try again later"
        raise CheckpointError(setting, HUB + name, remedy) from error
    except HTTP_ERROR as error:
        remedy = f"cannot be downloaded ({type(error).__name__}); check the network and its proxies"
        raise CheckpointError(setting, HUB + name, remedy) from error
    except RuntimeError as error:  # of the library for Xet storage, whatever the cause
        remedy = (
            "cannot be downloaded from the hub's Xet storage; check the network, its proxies and the free disk space, "
            "or set HF_HUB_DISABLE_XET=1 to download over HTTP"
        )
        raise CheckpointError(setting, HUB + name, remedy) from error
