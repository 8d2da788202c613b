"""Read back, without a network, what experiment trackers have stored."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig

Series = dict[str, list[tuple[int, float]]]


@dataclasses.dataclass
class Stored:
    """What a tracker has stored of one run; units of the run are `units`."""

    series: Series = dataclasses.field(default_factory=dict)
    units: dict[str, Stored] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tags: set[str] = dataclasses.field(default_factory=set)
    samples: list[str] = dataclasses.field(default_factory=list)
    figures: set[str] = dataclasses.field(default_factory=set)
    ends: list[str] = dataclasses.field(default_factory=list)


def tensorboard(config: RunConfig) -> Stored:
    """The event files in the run directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415  # optional

    def read(folder: Path) -> Stored:
        board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
        board.Reload()
        texts = {}
        for tag in board.Tags()["tensors"]:
            tensors = [value.tensor_proto for value in board.Tensors(tag)]
            texts[tag.removesuffix("/text_summary")] = [str(each.string_val[0], "utf-8") for each in tensors]
        lines = [line.strip().partition(": ") for line in texts.get("config", [""])[-1].splitlines()]
        settings = {name: value for name, _, value in lines}
        return Stored(
            series={tag: _points(board.Scalars(tag)) for tag in board.Tags()["scalars"]},
            settings=settings,
            tags={f"{k.removeprefix('tags.')}:{v}" for k, v in settings.items() if k.startswith("tags.")},
            samples=[texts[tag][-1] for tag in texts if tag.startswith("samples/")],
            figures={tag.removeprefix("figures/") for tag in board.Tags()["images"]},
        )

    root = config.directory / "tensorboard"
    stored = read(root)
    stored.units = {folder.name: read(folder) for folder in root.iterdir() if folder.is_dir()}
    return stored


def wandb(config: RunConfig) -> Stored:
    """The files of W&B's offline mode in the run directory, as `wandb sync` would upload them."""
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415  # optional

    runs: dict[str, Stored] = {}
    groups, names = set(), {}
    for path in sorted(config.directory.glob("wandb/offline-run-*/*.wandb")):
        records = [Record.FromString(content) for content in _records(path.read_bytes())]
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        stored = runs.setdefault(run.run_id, Stored())
        groups.add(run.run_group)
        names[run.run_id] = run.display_name if run.job_type == "unit" else ""
        stored.settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        stored.tags |= set(run.tags)
        axes = {record.metric.name: record.metric.step_metric for record in records if record.metric.step_metric}
        for record in records:
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[name] = {**row.get(name, {}), ".".join(inner): value} if inner else value
            for name, value in row.items():
                if name in axes and axes[name] in row:
                    stored.series.setdefault(name, []).append((row[axes[name]], value))
                if name == "samples":
                    stored.samples += [
                        text
                        for line in json.loads((path.parent / "files" / value["path"]).read_text())["data"]
                        for text in line
                    ]
                if name.startswith("figures/"):
                    assert (path.parent / "files" / value["path"]).stat().st_size == value["size"]
                    stored.figures.add(name.removeprefix("figures/"))
            if record.WhichOneof("record_type") == "exit":
                stored.ends.append("FINISHED" if record.exit.exit_code == 0 else "KILLED")
    assert len(groups) == 1
    stored = runs[next(run_id for run_id, name in names.items() if not name)]
    stored.units = {name: runs[run_id] for run_id, name in names.items() if name}
    return stored


def _points(values: Iterable[Any]) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in values]


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a log file in LevelDB's format, after W&B's header of 7 bytes."""
    size, offset, parts = 32768, 7, b""
    while offset + 7 <= len(content):
        if size - offset % size < 7:
            offset += size - offset % size
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        parts += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def mlflow(config: RunConfig) -> Stored:
    """The store at MLFLOW_TRACKING_URI."""
    import mlflow as library  # noqa: PLC0415  # optional

    client = library.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(config.tracking.trackers["mlflow"])
    runs = client.search_runs([experiment.experiment_id])

    def read(run: Any) -> Stored:
        return Stored(
            series={name: _points(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics},
            settings=run.data.params,
            tags={f"{key}:{value}" for key, value in run.data.tags.items()},
            ends=[run.info.status],
        )

    (root,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    stored = read(root)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == root.info.run_id]
    assert len(children) == len(runs) - 1
    stored.units = {run.info.run_name: read(run) for run in children}

    def files(folder: str | None = None) -> set[str]:
        return {Path(each.path).name for each in client.list_artifacts(root.info.run_id, folder)}

    if "samples.json" in files():
        samples = library.artifacts.load_dict(f"{root.info.artifact_uri}/samples.json")["samples"]
        stored.samples = [text for sample in samples for text in sample.values()]
        assert {"report.json", "config.json"} <= files()
    stored.figures = {Path(name).stem for name in files("figures")}
    return stored


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
