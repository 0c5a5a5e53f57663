"""Experiment trackers: a run is reported to TensorBoard, MLflow or Weights & Biases if requested.

Each tracker is one small class behind `Tracker`. Everything is reported once, at the end; only the
run itself is announced at the start, so that it is visible while it is in progress. A tracker that
fails or hangs is dropped with a warning, and never stops a run. Credentials come from the
environment, as each tracker documents.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.errors import JobError
from pipeline.evaluation import is_number
from pipeline.events import EventKind, OnEvent
from pipeline.job import JobConfig, by_key, without_password
from pipeline.run_folder import RunRecord, layers, read_run, throughput
from pipeline.storage import Store, digest_of

ARTIFACTS = ("report.html", "metrics.json", "job.yaml")
PATIENCE_S = 60.0
"""Time limit in seconds for each call of a tracker."""
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 6
_LONGEST_REASON = 700
_MLFLOW_NAME = re.compile(r"[^\w\-. :/]")
_MLFLOW_VALUE = 6000

Status = Literal["complete", "held", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """A run as reported to trackers.

    Attributes:
        name: the displayed name.
        identity: the same for every attempt at one run, and unique to the run.
        params: the resolved job, one value per key: ``targets.workers``.
    """

    name: str
    identity: str
    params: dict[str, str | int | float | bool]


class Tracker(Protocol):
    """A place where runs are tracked. Each call comes from a thread of its own, one at a time."""

    def begin(self, run: TrackedRun) -> None:
        """Announce a run, or resume it if an earlier attempt was announced."""

    def figures(self, values: Mapping[str, float]) -> None:
        """Numbers by name: ``after/efficacy``, ``seconds/targets``."""

    def artifact(self, file: Path) -> None:
        """Store a file, if the tracker stores files."""

    def end(self, status: Status) -> None:
        """Report how the run ended."""


class TensorBoard:
    """Event files in a folder, one folder per run; `tensorboard --logdir` shows them."""

    def __init__(self, folder: str) -> None:
        self._folder, self._run = folder, TrackedRun("", "", {})

    def begin(self, run: TrackedRun) -> None:
        """Open the run's event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._writer: Any = SummaryWriter(f"{self._folder.rstrip('/')}/{run.name}")
        table = "\n".join(f"| {key} | `{value}` |" for key, value in run.params.items())
        self._writer.add_text("job", f"| key | value |\n| --- | --- |\n{table}")
        self._writer.flush()

    def figures(self, values: Mapping[str, float]) -> None:
        """Write scalars, and a row in the table of hyper-parameters."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, 0)
        after = {name: value for name, value in values.items() if name.startswith("after/")}
        # In the run's own folder: by default each row creates another run.
        self._writer.add_hparams(self._run.params, after, run_name=".")

    def artifact(self, file: Path) -> None:
        """Do nothing: TensorBoard stores no files."""

    def end(self, status: Status) -> None:
        """Close the event file."""
        self._writer.add_text("status", status)
        self._writer.close()


class MLflow:
    """A run in an experiment of a tracking server, or of a local store."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri, self._experiment = uri, experiment

    def begin(self, run: TrackedRun) -> None:
        """Create the run, or find the one of an earlier attempt by its tag."""
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._created()
        runs = self._client.search_runs([experiment], f"tags.`pmet.run` = '{run.identity}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"pmet.run": run.identity}
            self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        # MLflow refuses to change a parameter: one changed by another attempt keeps its value.
        told = runs[0].data.params if runs else {}
        for key, value in run.params.items():
            if key not in told:
                self._client.log_param(self._id, key, str(value)[:_MLFLOW_VALUE])

    def _created(self) -> str:
        return str(self._client.create_experiment(self._experiment))

    def figures(self, values: Mapping[str, float]) -> None:
        """Log metrics of the run."""
        for name, value in values.items():
            self._client.log_metric(self._id, _MLFLOW_NAME.sub("_", name), value)

    def artifact(self, file: Path) -> None:
        """Upload an artifact of the run."""
        self._client.log_artifact(self._id, str(file))

    def end(self, status: Status) -> None:
        """Mark the run as finished or failed; a tag says whether it was held."""
        self._client.set_tag(self._id, "pmet.status", status)
        ended = "FAILED" if status == "failed" else "FINISHED"
        self._client.set_terminated(self._id, ended)


class WeightsAndBiases:
    """A run in a project."""

    def __init__(self, project: str) -> None:
        entity, _, self._project = project.rpartition("/")
        self._entity = entity or None

    def begin(self, run: TrackedRun) -> None:
        """Start the run, or resume it."""
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        self._run: Any = wandb.init(
            project=self._project,
            entity=self._entity,
            id=run.identity,
            name=run.name,
            config=dict(run.params),
            resume="allow",
            settings=settings,
        )

    def figures(self, values: Mapping[str, float]) -> None:
        """Write the run's summary, which tables of runs show."""
        self._run.log(dict(values))

    def artifact(self, file: Path) -> None:
        """Upload a file of the run."""
        # Files in the run's own folder are uploaded with it.
        shutil.copy(file, self._run.dir)

    def end(self, status: Status) -> None:
        """Mark the run as finished or failed; the summary says whether it was held."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))


def trackers_of(job: JobConfig) -> dict[str, Tracker]:
    """Return the trackers that a job asks for, by name.

    Raises:
        JobError: the package of a tracker is not installed.
    """
    asked = job.tracking
    places = {name: getattr(asked, name) for name in _PACKAGES if getattr(asked, name) is not None}
    for name in places:
        if find_spec(_PACKAGES[name]) is None:
            raise JobError(
                f"tracking.{name} needs the package {_PACKAGES[name]}, which is not installed; "
                "pip install 'pmet-pipeline[tracking]', or remove the key"
            )
    if "wandb" in places and not _wandb_lets_in():
        # It would prompt at the terminal, in the middle of the run.
        raise JobError(
            "tracking.wandb needs an API key: set WANDB_API_KEY, run wandb login once, or set "
            "WANDB_MODE=offline"
        )
    makers: dict[str, Callable[[str], Tracker]] = {
        "tensorboard": lambda folder: TensorBoard(os.path.expanduser(folder)),
        "mlflow": lambda uri: MLflow(os.path.expanduser(uri), asked.experiment),
        "wandb": WeightsAndBiases,
    }
    return {name: makers[name](place) for name, place in places.items()}


def _wandb_lets_in() -> bool:
    import wandb

    offline = wandb.setup().settings.mode not in ("online", "shared")
    return offline or bool(wandb.login(prompt=False))


class Tracking:
    """The trackers of one run; their failures are events, never errors.

    Args:
        trackers: by name.
        on_event: called with each failure.
        patience: time limit in seconds for each call of a tracker.

    Attributes:
        failed: whether any tracker has been dropped.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], on_event: OnEvent, patience: float = PATIENCE_S
    ) -> None:
        self._trackers, self._on_event, self._patience = dict(trackers), on_event, patience
        self.failed = False

    def begin(self, job: JobConfig, digest: str) -> None:
        """Announce a run.

        Args:
            job: its job.
            digest: digest of everything that its result depends on.
        """
        run = tracked(job, digest)
        self._tell("begin", lambda tracker: tracker.begin(run))

    def end(self, store: Store, status: Status) -> None:
        """Report how the run ended, with figures and files from its folder unless it failed."""
        if not self._trackers:
            return
        # Trackers may read the files until the end is reported.
        with ExitStack() as files:
            if status != "failed":
                values = figures_of(read_run(store))
                self._tell("figures", lambda tracker: tracker.figures(values))
                for name in ARTIFACTS:
                    file = files.enter_context(store.local_copy(name))
                    self._tell(name, partial(_keep, file=file))
            self._tell("end", lambda tracker: tracker.end(status))

    def _tell(self, what: str, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            if error := _tried(tell, tracker, self._patience):
                self.failed = True
                del self._trackers[name]
                text = f"{name} is given up at {what}: {without_secrets(error)}"
                self._on_event(EventKind.WARNING, f"{text}; the run goes on without it")


def _keep(tracker: Tracker, file: Path) -> None:
    tracker.artifact(file)


def _tried(tell: Callable[[Tracker], None], tracker: Tracker, patience: float) -> str | None:
    """Call a tracker; return what went wrong, or None.

    The call runs in a daemon thread, which is abandoned if it hangs.
    """
    errors: list[str] = []

    def work() -> None:
        try:
            tell(tracker)
        except BaseException as error:  # noqa: BLE001 (a library may even raise an interrupt)
            errors.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        return f"it did not answer within {patience:g} seconds"
    return errors[0] if errors else None


def without_secrets(text: str) -> str:
    """A text on one line, without the values of environment variables that hold secrets."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return without_password(" ".join(text.split()))[:_LONGEST_REASON]


def tracked(job: JobConfig, digest: str) -> TrackedRun:
    """A run as reported to trackers; the tracking settings are not among its parameters."""
    values = job.model_dump(mode="json", exclude={"tracking"})
    return TrackedRun(
        name=job.tracking.name or Path(job.output.rstrip("/")).name or "run",
        identity=digest_of([job.output, digest])[:32],
        params={key: _param(value) for key, value in by_key(values) if value is not None},
    )


def _param(value: Any) -> str | int | float | bool:
    """A setting in a type that trackers accept."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return without_password(value) if isinstance(value, str) else value


def figures_of(record: RunRecord) -> dict[str, float]:
    """All numbers of a run that trackers get, by name."""
    found: dict[str, Any] = {}
    for when, scores in (("before", record.before), ("after", record.after)):
        found |= {f"{when}/{name}": value for name, value in scores.items()}
    found |= {f"counts/{name}": value for name, value in record.counts.items()}
    for stage in record.run["stages"]:
        found[f"seconds/{stage['name']}"] = stage["seconds"]
        if rate := throughput(stage, record):
            found[f"rate/{stage['name']}"] = rate[0]
    found["seconds/run"] = record.seconds()
    for layer in layers(record.run):
        for name in ("delta_norm", "weight_norm", "share", "rounding"):
            found[f"{name}/{layer['parameter']}"] = layer.get(name)
    found["gates/passed"] = sum(bool(gate["passed"]) for gate in record.gates)
    found["gates/asked"] = len(record.gates)
    return {name: float(value) for name, value in found.items() if is_number(value)}
