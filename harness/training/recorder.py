"""The place where a run's records go. Of several processes that train one run the main one alone writes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from harness.records.run_folder import LineRecord, RunFolder
from harness.records.schema import DetailRecord, RecordName, Status
from harness.tracking.feed import Feed
from harness.training import checkpoint
from harness.training.checkpoint import Counters


@dataclass(frozen=True)
class Recorder:
    """The run folder of one run and the feed of its mirror in MLflow. Where `writes` is false, nothing is done."""

    folder: RunFolder
    feed: Feed
    writes: bool = True

    def line(self, name: RecordName, record: LineRecord) -> None:
        """Append one record."""
        if self.writes:
            self.folder.append(name, record)
            self.feed.add(name, record)

    def picture(self, step: int, images_NHWC: np.ndarray, name: str) -> str:
        """Keep the first samples of an evaluation under a name; returns the file's path in the run folder."""
        if not self.writes:
            return ""
        path = self.folder.write_samples(step, images_NHWC, name)
        return str(path.relative_to(self.folder.path))

    def ema(self, step: int, backbone: Mapping[str, Tensor]) -> None:
        """Keep the EMA backbone of an evaluation."""
        if self.writes:
            checkpoint.save_ema(self.folder.checkpoints, step, backbone)

    def checkpoint(self, name: str, tensors: Mapping[str, Mapping[str, Tensor]], counters: Counters, keep: int) -> str:
        """Keep all that continues the run, and drop all but the last `keep`; returns its path in the run folder."""
        if not self.writes:
            return ""
        checkpoint.save(self.folder.checkpoints, name, tensors, counters)
        checkpoint.prune(self.folder.checkpoints, keep)
        self.feed.flush()  # a continued run logs nothing before its checkpoint again
        return str((self.folder.checkpoints / name).relative_to(self.folder.path))

    def truncate(self, step: int) -> None:
        """Drop records after `step`."""
        if self.writes:
            self.folder.truncate(step)

    def end(self, status: Status, detail: DetailRecord) -> None:
        """Write the status of a run that came to its end."""
        if self.writes:
            self.feed.end(status)
            self.folder.update_manifest(status=status, status_detail=detail, mlflow_failure=self.feed.failure)
