"""Upload a model directory to the Hugging Face hub. Import this module only to push: the import takes half a second."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HfUriError, HFValidationError

from moedisco_ray.core.errors import ConfigError, RunDirError, StorageError
from moedisco_ray.core.printable import progress_bars
from moedisco_ray.core.store.hub import is_hub_name
from moedisco_ray.core.store.hub_files import HTTP_ERROR, hub_endpoint, hub_token

_LEFT_OUT = ["manifest.json", ".*", ".*/**"]
"""Files of a run's directory that are no part of the model."""
_REPLACED = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier push that do not stay: transformers would load `model.safetensors` in place of the files of an
index."""


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        url: Page of the repository.
        commit: Commit with the model.
        private: Whether only people with access can read it.
    """

    url: str
    commit: str
    private: bool


def push_model(directory: Path, name: str, *, public: bool, message: str) -> Pushed:
    """Upload a model directory to a repository, which is created if it is missing.

    Weights that the repository has are replaced.

    Args:
        directory: A Hugging Face model directory.
        name: Name of the repository, ORG/NAME.
        public: Whether everybody may read the repository. If not, an existing public repository is refused.
        message: Message of the commit.

    Raises:
        ConfigError: The name is no repository's, the token is missing or may not write, or the repository is public.
        RunDirError: This machine cannot read the directory, or has no space for what the upload writes.
        StorageError: The hub cannot be reached, or refuses the upload.
    """
    if not is_hub_name(name):
        raise ConfigError("REPO", name, "is no name of a repository; write ORG/NAME")
    token = hub_token()
    if token is None:
        raise ConfigError("REPO", name, "needs an access token that may write, in the environment variable HF_TOKEN")
    api = HfApi(endpoint=hub_endpoint(), token=token)
    with _one_line(name, directory):
        page = api.create_repo(name, private=not public, exist_ok=True)
        private = bool(api.model_info(name, revision="main").private)
        if not private and not public:
            raise ConfigError(
                "REPO", name, "exists and is public; pass --public to publish the model, or choose another name"
            )
        with progress_bars():
            made = api.upload_folder(
                repo_id=name,
                folder_path=directory,
                commit_message=message,
                ignore_patterns=_LEFT_OUT,
                delete_patterns=_REPLACED,
            )
    return Pushed(str(page), str(made.oid), private)


@contextlib.contextmanager
def _one_line(name: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except (HFValidationError, HfUriError) as error:
        raise ConfigError("REPO", name, "is no name of a repository; write ORG/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            remedy = "may not be written with this HF_TOKEN; use a token with write access to ORG"
            raise ConfigError("REPO", name, remedy) from error
        raise StorageError(f"{name}: the hub answers {status}; try again later") from error
    except (OSError, HTTP_ERROR, RuntimeError) as error:
        # A thread that uploads a file reports a RuntimeError. HTTP clients wrap the system's errors in their own,
        # without a number.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if (
            isinstance(cause, OSError)
            and cause.errno
            and not isinstance(cause, (ConnectionError, TimeoutError, socket.gaierror))
        ):
            remedy = f"cannot be uploaded from here ({cause.strerror}); correct this and push again"
            raise RunDirError("RUN_DIR", str(cause.filename or directory), remedy) from error
        raise StorageError(f"{name}: the hub cannot be reached; try again when you are online") from error
