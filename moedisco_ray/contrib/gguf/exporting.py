"""Export the model of a run, finished or not, as a GGUF file.

Import this module only to do so: it needs the package `gguf`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from moedisco_ray.contrib.gguf.file import write_gguf
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.records.finished_models import finished_model, has_finished_model
from moedisco_ray.core.store.artifacts import reporting_full_disk
from moedisco_ray.core.store.locations import Location, parent
from moedisco_ray.execution.export_run import export_run
from moedisco_ray.execution.output_checks import check_output


def export_gguf(location: Location, target: Path, *, from_checkpoint: bool) -> dict[str, Any]:
    """Write the model of a run as a GGUF file, in the dtype of the export.

    Args:
        location: Directory or URI of the run, or the directory of an exported model.
        target: File to write; it must not exist.
        from_checkpoint: Whether to export the newest checkpoint of the fine-tune, instead of the finished model.

    Returns:
        `parameters`, `bytes`, and `step` of the checkpoint or None.

    Raises:
        RunDirError: The place holds no run and no model, the model does not exist yet, or the file exists.
        CheckpointError: llama.cpp does not know the family, or computes it differently.
        ConfigError: llama.cpp does not know how the tokenizer splits text.
        StorageError: The storage does not respond, or the checkpoint is damaged.
    """
    if target.exists():
        raise RunDirError("--output", str(target), "exists already; choose another file")
    check_output(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with reporting_full_disk(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as draft:
        step, model, file = None, Path(draft) / "model", Path(draft) / "model.gguf"
        if has_finished_model(location) and not from_checkpoint:
            model = finished_model(location)
        else:
            step = export_run(location, model, from_checkpoint=from_checkpoint)["step"]
        figures = write_gguf(model, file, name=parent(location)[1])
        file.rename(target)
    return {**figures, "step": step}
