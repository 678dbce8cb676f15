"""How a run that trains gives its records to its mirror: in batches, never able to stop it or to hold it up long."""

from collections.abc import Mapping
from typing import Any

from harness.config import OutputConfig
from harness.records.run_folder import RecordName, RunFolder
from harness.tracking.mirror import Mirror, place_of
from harness.tracking.store import Patience, open_experiment

LINES = 30
"""The number of records that are sent together."""


class Feed:
    """Gives records to a run's mirror. The first failure turns it off and is kept in `failure`.

    A run that was killed after a flush but before the checkpoint makes those steps again, and MLflow keeps the points
    of the first time: values repeat bit for bit on the CPU, but seconds never do, and with CUDA or a budget in seconds
    nothing need. `ditbench sync` puts the recorded ones in their place.
    """

    def __init__(self, output: OutputConfig, folder: RunFolder, parent: str = "") -> None:
        """Open the run that the manifest names, or make one; it is a child of the run `parent` if that is not empty.

        With MLflow off, every method does nothing.
        """
        self._patience, self._mirror = Patience(), None
        self._waiting: list[tuple[RecordName, Mapping[str, Any]]] = []
        if not output.mlflow:
            return
        # Two calls: one that is given up may end later, and should not leave a run in MLflow then.
        experiment = self._patience.run(lambda: open_experiment(output, place_of(folder)["study"]))
        if experiment:
            run_id = folder.manifest().get("mlflow_run", "")
            self._mirror = self._patience.run(lambda: Mirror(experiment, folder, run_id, parent))
        if self._mirror:
            self._patience.run(self._mirror.begin)

    @property
    def run_id(self) -> str:
        """The id of the run in MLflow; "" where it could not be opened."""
        return self._mirror.run_id if self._mirror else ""

    @property
    def failure(self) -> str:
        """Why MLflow lacks a part of the run, in one line; "" as long as it lacks nothing."""
        return self._patience.failure

    def add(self, name: RecordName, record: Mapping[str, Any]) -> None:
        """Take in a record of that kind; it is sent when enough are waiting, or by `flush`."""
        self._waiting.append((name, record))
        if len(self._waiting) == LINES:
            self.flush()

    def flush(self) -> None:
        """Send what is waiting."""
        mirror, waiting = self._mirror, self._waiting
        self._waiting = []
        if mirror and waiting:
            self._patience.run(lambda: mirror.update(waiting))

    def end(self, status: str) -> None:
        """Send what is waiting, and close the run with a status of ours."""
        self.flush()
        if mirror := self._mirror:
            self._patience.run(lambda: mirror.set_status(status))
