"""`ditbench sync`: MLflow rebuilt from the records of a study."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.commands.common import Parser
from studies.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from harness.config import OutputConfig
    from harness.records.run_folder import RunFolder
    from harness.tracking.mirror import Mirrored


def main(argv: Sequence[str]) -> int:
    """Bring every run of a study into MLflow, and print what had to be done."""
    parser = Parser(
        prog="ditbench sync",
        description="Rebuild MLflow from the records of a study: each run and each point once. Again changes nothing.",
    )
    parser.add_argument("study", type=Path, help="study folder, such as runs/digits")
    parser.add_argument("--mlflow_uri", default="", help="MLflow tracking URI (default: where the runs logged to)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    rows = sync_study(arguments.study, arguments.mlflow_uri)
    if arguments.format == "json":
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        from studies.terminal.tables import print_table

        print_table([{k: str(v) for k, v in row.items() if not k.startswith("mlflow")} for row in rows])
        for uri in dict.fromkeys(row["mlflow_uri"] for row in rows):
            print(f"mlflow: {uri}")
    return 0


def sync_study(study: Path, mlflow_uri: str) -> list[dict[str, Any]]:
    """Sync every run, after waiting for another sync of the study; returns a row for each."""
    from harness.config import OutputConfig
    from harness.records.run_folder import find_runs
    from studies.dispatch.leases import held
    from studies.runs.folders import study_lock

    study = study.absolute()
    folders, rows = find_runs(study), []
    with held(study_lock(study.parent, study.name, "sync")):
        for folder in folders:
            uri = mlflow_uri or folder.manifest()["config"]["output"].get("mlflow_uri", "")
            rows.append(sync_run(folder, OutputConfig(runs=str(study.parent), mlflow_uri=uri)))
    return rows


def sync_run(folder: "RunFolder", output: "OutputConfig") -> dict[str, Any]:
    """Sync one run and note in its manifest where it is; a run that another process trains keeps its manifest."""
    from harness.tracking.mirror import place_of
    from harness.tracking.store import tracking_uri
    from studies.dispatch.leases import claim
    from studies.runs.folders import lease_path

    place = place_of(folder)
    lease = claim(lease_path(output.runs, place["study"], place["cell"], int(place["seed"])))
    try:
        done, manifest = mirrored(folder, output, lease is None), folder.manifest()
        facts = {"mlflow_run": done.run_id, "mlflow_uri": tracking_uri(output), "mlflow_failure": ""}
        if lease and facts != {name: manifest.get(name) for name in facts}:
            folder.update_manifest(**facts)
    finally:
        if lease:
            lease.release()
    return {
        "cell": place["cell"],
        "seed": int(place["seed"]),
        "status": manifest["status"],
        "points": done.points,
        "action": done.action,
        "mlflow_run": done.run_id,
        "mlflow_uri": tracking_uri(output),
    }


def mirrored(folder: "RunFolder", output: "OutputConfig", in_progress: bool) -> "Mirrored":
    """Sync one run. `UserError` for a store that cannot be reached or written."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from harness.errors import UserError
    from harness.tracking.mirror import sync
    from harness.tracking.store import quiet, reason, tracking_uri

    try:
        with quiet():
            return sync(output, folder, in_progress)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"MLflow at {tracking_uri(output)} failed ({reason(error)}): "
            "start its server, free or remove its database, or give another --mlflow_uri"
        ) from None
