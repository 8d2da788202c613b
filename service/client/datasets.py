"""Requests about data sets, which clients inherit."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from service import schemas
from service.client import downloading, uploading
from service.client.administration import Administration
from service.client.downloading import Progress, no_progress
from service.client.http import segment


class Datasets(Administration):
    """Requests about data sets: text that people upload for their runs."""

    def datasets(self, *, name: str | None = None, page_size: int = 100) -> AsyncGenerator[schemas.DatasetInfo]:
        """The data sets that the caller may see, newest first, with this name or all."""
        return self._pages(schemas.DatasetPage, "/v1/datasets", page_size, name=name)

    async def dataset(self, dataset_id: str) -> schemas.DatasetDetail:
        """A data set with its files."""
        return await self._get(schemas.DatasetDetail, f"/v1/datasets/{segment(dataset_id)}")

    async def upload_dataset(
        self,
        files: Path | Mapping[str, Path],
        name: str | None = None,
        *,
        project: str | None = None,
        progress: Progress = no_progress,
    ) -> schemas.DatasetInfo:
        """Create a data set from local files; see `service.client.uploading.upload`.

        Args:
            files: A file, a folder without its hidden files, or local files by their path in the data set.
            name: Name of the data set; None means that of the file or folder.
            project: Id or name of the project whose members may see it; None means the caller's own.
            progress: Called with the bytes that have arrived and the total.
        """
        found = uploading.files_at(files) if isinstance(files, Path) else files
        called = name or uploading.name_of(files if isinstance(files, Path) else Path(next(iter(files), "")))
        return await uploading.upload(self._connection, found, called, project, progress)

    async def download_dataset(self, dataset_id: str, directory: Path, progress: Progress = no_progress) -> Path:
        """Download a data set into a new directory; see `service.client.downloading.download_dataset`."""
        found = await self.dataset(dataset_id)
        return await downloading.download_dataset(self._connection, found, directory, progress)

    async def delete_dataset(self, dataset_id: str) -> None:
        """Delete a data set that no run may still read."""
        await self._delete("datasets", dataset_id)
