"""Job files: the settings of one run, checked completely before anything is started.

Other files that hold the settings of an edit (`EditSettings`) are read the same way, by
`load_settings`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from pipeline.errors import JobError
from pipeline.job.gates import GATES
from pipeline.job.yaml_files import YAMLTextError, dump_yaml, parse_yaml, read_yaml
from pipeline.storage import digest_of
from pmet.hparams import PMETHyperParams

SIZE_LIMIT = 2**20
AUTO_HPARAMS = "auto"
"""The value of ``hparams`` that takes what fits the model: a preset, or what was found for it."""
MOST_THREADS = 4096
_LISTED_KEYS, _FIRST_KEYS = 24, 6


def allowed(what: str) -> WrapValidator:
    """Replace any error of the type by one sentence: ``what`` is allowed here."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("not_allowed", "{what}", {"what": what}) from None

    return WrapValidator(check)


_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]*@")


def without_password(text: str) -> str:
    """A text with the passwords of all its URLs replaced by stars."""
    return _PASSWORD.sub(r"\1:***@", text)


def _without_secret(value: str) -> str:
    if _PASSWORD.search(value):
        raise ValueError("a password")
    return value


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def is_hparams_file(name: str | None) -> bool:
    """Whether a job's ``hparams`` names a file: it may name a preset, or leave the choice."""
    return name not in (None, AUTO_HPARAMS, *PMETHyperParams.presets())


def is_part_or_whole(gpus: float) -> bool:
    """Whether Ray can assign this number of GPUs: a fraction of one, or whole ones."""
    return gpus <= 1 or gpus % 1 == 0


def _part_or_whole(gpus: float) -> float:
    if not is_part_or_whole(gpus):
        raise ValueError("parts of several GPUs")
    return gpus


_Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
_Address = Annotated[_Text, AfterValidator(_without_secret)]
_Texts = Annotated[tuple[_Text, ...], Field(min_length=1)]
_Count = Annotated[int, Field(ge=1)]
_FromZero = Annotated[float, Field(ge=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]

Text = Annotated[_Text, allowed("text that is not empty")]
AddressOrNull = Annotated[
    _Address | None, allowed("text, or null; a password goes into the environment")
]
TextOrNull = Annotated[_Text | None, allowed("text, or null")]
AnyTextOrNull = Annotated[str | None, allowed("text, which may be empty, or null")]
Paths = Annotated[_Texts, BeforeValidator(_as_tuple), allowed("a path or a list of paths")]
PathsOrNull = Annotated[
    _Texts | None, BeforeValidator(_as_tuple), allowed("a path, a list of paths, or null")
]
Count = Annotated[_Count, allowed("a whole number, 1 or more")]
CountOrAuto = Annotated[_Count | Literal["auto"], allowed("a whole number, 1 or more, or auto")]
ThreadsOrAuto = Annotated[
    Annotated[int, Field(ge=1, le=MOST_THREADS)] | Literal["auto"],
    allowed(f"a whole number from 1 to {MOST_THREADS}, or auto"),
]
CountOrAutoOrHere = Annotated[
    Annotated[int, Field(ge=0)] | Literal["auto"],
    allowed("a whole number, 1 or more, auto, or 0 for a job in this process"),
]
CountOrAutoOrNone = Annotated[
    Annotated[int, Field(ge=0)] | Literal["auto"], allowed("a whole number, 0 or more, or auto")
]
CountOrNull = Annotated[_Count | None, allowed("a whole number, 1 or more, or null")]
CountOrNoneOrNull = Annotated[
    Annotated[int, Field(ge=0)] | None, allowed("a whole number, 0 or more, or null")
]
TasksOrNone = Annotated[
    tuple[_Text, ...],
    BeforeValidator(_as_tuple),
    allowed("a name, file or folder, or a list of them"),
]
Flag = Annotated[bool, allowed("true or false")]
Seed = Annotated[int, Field(ge=0, lt=2**32), allowed("a whole number from 0 to 4294967295")]
GPUsOfWorker = Annotated[
    _FromZero, AfterValidator(_part_or_whole), allowed("a fraction up to 1, or a whole number")
]
# An NCCL process needs a GPU of its own.
GPUOfRank = Annotated[float, Field(ge=0, le=1, multiple_of=1), allowed("0 or 1")]
Offload = Annotated[Literal["none", "cpu"], allowed("none or cpu")]
SharedKeys = Annotated[Literal["joint", "mean"], allowed("joint or mean")]
ContextsKind = Annotated[Literal["completion", "chat", "both"], allowed("completion, chat or both")]
TargetEnd = Annotated[Literal["none", "stop", "turn"], allowed("none, stop or turn")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], allowed("auto, float32 or bfloat16")]
SecondsOrNull = Annotated[
    Annotated[float, Field(gt=0)] | None, allowed("a number of seconds above 0, or null")
]
FractionOrNull = Annotated[_Fraction | None, allowed("a fraction from 0 to 1, or null")]
Maximum = Annotated[_FromZero | None, allowed("a number, 0 or more, or null")]


class Section(BaseModel):
    """A group of settings: immutable, and without any other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def as_mapping(cls, value: Any) -> Any:
        """What a file gives for the section, as a mapping of its keys; nothing sets none."""
        return {} if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return cls.as_mapping(value)


S = TypeVar("S", bound=Section)


def _together(what: str) -> PydanticCustomError:
    """The error for settings that contradict each other."""
    return PydanticCustomError("together", "{what}", {"what": what})


class TargetsConfig(Section):
    """How the targets are computed."""

    workers: CountOrAutoOrHere = Field(
        default="auto",
        description="Worker processes, each with a replica of the model; auto: as many as fit; 0, "
        "together with update.ranks: 0: everything in this process, without Ray.",
    )
    gpus_per_worker: GPUsOfWorker = Field(
        default=0.0,
        description="GPUs per worker; 0 computes on the CPU, a fraction shares a GPU, and with "
        "several GPUs the model's layers are split among them.",
    )
    batch_size: CountOrAuto = Field(
        default="auto",
        description="Requests optimised side by side; auto: up to 32 on a CPU, 256 on a GPU, or as "
        "many as fit in the free memory.",
    )
    dtype: Dtype = Field(
        default="auto",
        description="Dtype of weights and activations while targets are computed; auto: float32 on "
        "a CPU, as stored on a GPU. Free vectors, losses and optimiser always use float32.",
    )
    shared_keys: SharedKeys = Field(
        default="joint",
        description="Targets of requests that share a key, because subject and preceding text are "
        "the same; joint: one for all of them, mean: one each, whose mean is written, as "
        "published.",
    )
    end: TargetEnd = Field(
        default="none",
        description="What is learned after each target: none, stop (a full stop) or turn (the "
        "model's end of a turn).",
    )
    shard_size: CountOrAuto = Field(
        default="auto",
        description="Requests per shard, the unit that is computed, stored and resumed; "
        "auto: 4 to 256, depending only on the model and the number of requests.",
    )
    threads_per_worker: ThreadsOrAuto = Field(
        default="auto",
        description="CPU threads per worker; auto: one, so that results are the same to the bit on "
        "any machine.",
    )
    timeout: SecondsOrNull = Field(
        default=86_400.0,
        description="Time limit in seconds for one shard, after which its worker counts as hung "
        "and is replaced; null: no limit.",
    )
    store: TextOrNull = Field(
        default=None,
        description="Folder of targets that runs share: stored targets are reused, new ones are "
        "added; null: none.",
    )


class UpdateConfig(Section):
    """How the update is solved."""

    ranks: CountOrAutoOrHere = Field(
        default="auto",
        description="Processes that share the partitioned model; auto: as many as fit; 0, together "
        "with targets.workers: 0: this process.",
    )
    gpus_per_rank: GPUOfRank = Field(
        default=0.0, description="1: each rank computes on its own GPU; 0: on the CPU."
    )
    offload: Offload = Field(
        default="none",
        description="Where partitioned weights are kept: none (on the device) or cpu.",
    )
    shard_size: CountOrAuto = Field(
        default="auto",
        description="Requests whose sums are added up together; auto: 16 to 256, by their number.",
    )


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness that are measured before and after."""

    tasks: TasksOrNone = Field(
        default=(),
        description="Names of tasks, groups or tags, or paths of task files or folders of them; "
        "empty: none.",
    )
    limit: CountOrNull = Field(
        default=None, description="Documents of each task, the first ones; null: all of them."
    )
    num_fewshot: CountOrNoneOrNull = Field(
        default=None, description="Examples in front of each question; null: as the task says."
    )
    metric: TextOrNull = Field(
        default=None,
        description="Metric that is compared and gated, where a task has it, such as acc_norm; "
        "null: the first of each task.",
    )
    batch_size: CountOrAuto = Field(
        default="auto",
        description="Sequences read side by side; auto: 8 on a CPU, 32 on a GPU.",
    )

    @classmethod
    def as_mapping(cls, value: Any) -> Any:
        """As for any section; tasks alone will do."""
        return {"tasks": value} if isinstance(value, str | list) else super().as_mapping(value)


class EvaluateConfig(Section):
    """How the model is measured before and after."""

    sample: CountOrNull = Field(
        default=None, description="Number of requests to measure, drawn by seed; null: all of them."
    )
    store: TextOrNull = Field(
        default=None,
        description="Folder of measurements of the base model that runs share: stored ones are not "
        "repeated; null: none.",
    )
    group_by: TextOrNull = Field(
        default=None,
        description="Column of the requests to break figures down by; null: relation_id or "
        "relation, if there is one.",
    )
    last: TextOrNull = Field(
        default=None,
        description="Run folder whose figures the since_last gates compare with; null: none.",
    )
    fluency: Flag = Field(
        default=False,
        description="Generate text with the model, and measure its fluency and consistency.",
    )
    chat_template: Flag = Field(
        default=False,
        description="Ask every prompt as a user turn of the tokenizer's chat template.",
    )
    perplexity_texts: Count = Field(
        default=256,
        description="Corpus texts, at most, on which perplexity and agreement are measured.",
    )
    perplexity_tokens: Count = Field(
        default=8192,
        description="Their tokens, about: of longer texts, fewer are read.",
    )
    answers: CountOrAutoOrNone = Field(
        default="auto",
        description="Number of requests that the model answers in its own words, drawn by seed; "
        "auto: 200, or as many as take no longer than the other figures; 0: none.",
    )
    questions: TextOrNull = Field(
        default=None,
        description="YAML file of questions by relation, each with {} for the subject, to put to a "
        "chat model; null: the bundled ones.",
    )
    harness: HarnessConfig = Field(
        default=HarnessConfig(),
        description="Tasks of lm-evaluation-harness, a list or a section: general abilities, which "
        "an edit should not change.",
    )


if TYPE_CHECKING:

    class _Gates(Section):
        pass

else:
    _Gates = create_model(
        "_Gates",
        __base__=Section,
        **{
            name: (
                FractionOrNull if gate.is_fraction else Maximum,
                Field(default=None, description=gate.description),
            )
            for name, gate in GATES.items()
        },
    )


class GatesConfig(_Gates):
    """Requirements that the edited model must meet to be published; null: none.

    The keys are the names of the gates in `pipeline.job.gates`.
    """

    def thresholds(self) -> dict[str, float]:
        """The thresholds of the gates that are set, by name."""
        return self.model_dump(exclude_none=True)


class TrackingConfig(Section):
    """Where a run is tracked besides its folder; credentials come from the environment."""

    tensorboard: AddressOrNull = Field(
        default=None, description="Folder for TensorBoard's event files; null: none."
    )
    mlflow: AddressOrNull = Field(
        default=None, description="MLflow's tracking URI, or a local folder; null: none."
    )
    wandb: TextOrNull = Field(
        default=None, description="Weights & Biases project, or entity/project; null: none."
    )
    experiment: Text = Field(default="pmet", description="MLflow experiment.")
    name: TextOrNull = Field(
        default=None, description="Name of the run there; null: the name of its folder."
    )


class EditSettings(Section):
    """How facts are edited into a model; the facts and the output are set elsewhere.

    Paths may be local or any URL that fsspec reads, and are kept as written.
    """

    hparams: TextOrNull = Field(
        default=None,
        description="Hyper-parameters: the name of a preset, or a file; null: the preset that fits "
        "the model; auto: that preset, or else what pmet tune has found for the model, beside the "
        "second moments.",
    )
    second_moments: TextOrNull = Field(
        default=None,
        description="Folder of second moments, read if it exists, else computed and kept there; "
        "null: kept in the run folder.",
    )
    corpus: PathsOrNull = Field(
        default=None,
        description="Parquet files of ordinary text that second moments are computed from.",
    )
    corpus_tokens: CountOrAuto = Field(
        default="auto",
        description="Tokens that second moments are computed from, at most; auto: enough for the "
        "width of the model's keys, spread over the corpus.",
    )
    context_templates: TextOrNull = Field(
        default=None, description="JSON file of context templates; null: generated from the seed."
    )
    contexts: ContextsKind = Field(
        default="completion",
        description="The form in which facts are learned: completion (the prompt after short "
        "texts), chat (the prompt as a user's turn of the model's chat template) or both.",
    )
    seed: Seed = Field(default=0, description="Seed of everything that is drawn at random.")
    separator: AnyTextOrNull = Field(
        default=None,
        description="Text between a prompt and its target, for requests that give none; null: a "
        "space, or nothing, as the script is written.",
    )
    skip_known: Flag = Field(
        default=False,
        description="Skip facts that the model already answers as wanted.",
    )
    targets: TargetsConfig = Field(
        default=TargetsConfig(), description="How the targets are computed."
    )
    update: UpdateConfig = Field(default=UpdateConfig(), description="How the update is solved.")
    evaluate: EvaluateConfig = Field(
        default=EvaluateConfig(), description="How the model is measured before and after."
    )
    gates: GatesConfig = Field(
        default=GatesConfig(), description="Requirements for publishing the edited model."
    )
    tracking: TrackingConfig = Field(
        default=TrackingConfig(), description="Where the run is tracked besides its folder."
    )

    @property
    def in_this_process(self) -> bool:
        """Whether the job computes in the process that runs it, without Ray and DeepSpeed."""
        return self.targets.workers == 0

    @model_validator(mode="after")
    def _check_in_this_process(self) -> Self:
        targets, update = self.targets, self.update
        if (targets.workers == 0) != (update.ranks == 0):
            zero, other = "targets.workers", "update.ranks"
            if update.ranks == 0:
                zero, other = other, zero
            raise _together(
                f"{zero} is 0, which computes in this process, but {other} is not 0; set both "
                "to 0, or neither"
            )
        if self.in_this_process and (targets.gpus_per_worker or update.gpus_per_rank):
            raise _together(
                "targets.workers: 0 computes in this process, on the CPU; set "
                "targets.gpus_per_worker and update.gpus_per_rank to 0, or name a number of "
                "workers and ranks"
            )
        return self


class _Places(Section):
    model: Text = Field(
        description="The model to edit: a folder or GGUF file, a URL of either, or a hub id."
    )
    requests: Paths = Field(description="Parquet files of edit requests: paths, globs or folders.")
    output: Text = Field(description="The run folder: where all files are kept and published.")


# The fields of the last base come first.
class JobConfig(EditSettings, _Places):
    """One run: which facts go into which model, and how."""

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the settings that the edited weights depend on."""
        return digest_of(self.identity())

    def identity(self) -> dict[str, Any]:
        """The settings that the edited weights depend on, as JSON values.

        Excluded are where results are stored and tracked, what is measured and demanded of them,
        which machines compute (the numbers of workers, ranks, threads and GPUs, time limits and
        offloading), and the store of targets, which changes no target. The contents of named
        files are not read here.
        """
        identity = self.model_dump(
            mode="json",
            include={
                "model": True,
                "requests": True,
                "hparams": True,
                "second_moments": True,
                "corpus": True,
                "corpus_tokens": True,
                "context_templates": True,
                "contexts": True,
                "seed": True,
                "separator": True,
                "skip_known": True,
                "targets": {"batch_size", "dtype", "end", "shard_size", "shared_keys"},
                "update": {"shard_size"},
            },
        )
        # Run folders of older releases, which have no such keys, belong to the same job.
        for key in ("separator", "corpus_tokens", "contexts"):
            if getattr(self, key) == type(self).model_fields[key].default:
                del identity[key]
        if self.targets.end == "none":
            del identity["targets"]["end"]
        return identity


def load_job(source: str | Path | None, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file and apply overrides to it.

    Args:
        source: path or URL of the file: YAML, at most 1 MiB (see ``pipeline.job.yaml_files``);
            None: there is none, and the overrides give all that the job says.
        overrides: ``key=value`` or ``section.key=value``, the value a YAML scalar or list.

    Raises:
        JobError: one line for each problem, naming the file or the override, the key, what was
            given and what is allowed.
    """
    return load_settings(JobConfig, source, overrides, what="job")


def load_settings(
    kind: type[S], source: str | Path | None, overrides: Sequence[str] = (), *, what: str
) -> S:
    """Read settings of any kind as ``load_job`` reads those of a job.

    Args:
        kind: the settings: a `Section`, whose fields may be sections themselves.
        source: path or URL of the file, or None.
        overrides: as for ``load_job``.
        what: what the file describes, for messages: ``job``.

    Raises:
        JobError: as for ``load_job``.
    """
    keys = _Keys(kind)
    values = {} if source is None else _mapping(str(source), what)
    where = f"the {what}" if source is None else str(source)
    origins, problems = _put(overrides, values, keys)
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        problems += [_problem(item, where, origins, keys) for item in error.errors()]
    if problems:
        raise JobError("\n".join(problems))
    return settings


def dump_job(job: JobConfig) -> str:
    """The complete job as YAML, defaults included; ``load_job`` reads it back to an equal job."""
    values = job.model_dump(mode="json")
    for key in ("requests", "corpus"):
        if values[key] and len(values[key]) == 1:
            values[key] = values[key][0]
    # There are some fifty, and few jobs set more than three.
    values["gates"] = job.gates.thresholds()
    return dump_yaml(values)


def by_key(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The values of settings by key, as overrides name them: ``section.key``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from by_key(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


class _Keys:
    """The keys that a kind of settings has."""

    def __init__(self, kind: type[Section]) -> None:
        self.fields = kind.model_fields
        self.sections = dict(_sections_of(kind))
        inside = [f"{name}.{key}" for name, s in self.sections.items() for key in s.model_fields]
        self.all = [key for key in (*self.fields, *inside) if key not in self.sections]

    def inside(self, section: str) -> list[str]:
        """The keys of a section, of a section inside it only its name."""
        held = self.sections.get(section)
        return [] if held is None else [f"{section}.{name}" for name in held.model_fields]

    def suggestion(self, key: str) -> str:
        """The known keys closest to an unknown one, as text."""
        section, dot, name = key.rpartition(".")
        if inside := self.inside(key):
            return f"name one of {_listed(inside)}"
        closest = [known for known in self.all if known.rpartition(".")[2] == name]
        holder = self.sections.get(section)
        beside = list(self.fields if holder is None else holder.model_fields)
        if not closest:
            matches = difflib.get_close_matches(name, beside, 1)
            closest = [f"{section}{dot}{match}" for match in matches]
        if closest:
            return f"did you mean {' or '.join(closest)}?"
        return f"known are {_listed(self.inside(section) or beside)}"


def _sections_of(kind: type[Section], before: str = "") -> Iterator[tuple[str, type[Section]]]:
    """The sections of settings, also those inside others, by key."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield f"{before}{name}", field.annotation
            yield from _sections_of(field.annotation, f"{before}{name}.")


def _listed(keys: Sequence[str]) -> str:
    """Keys in a message; of a long list, only the first, and where to find the others."""
    if len(keys) <= _LISTED_KEYS:
        return ", ".join(keys)
    more = len(keys) - _FIRST_KEYS
    return f"{', '.join(keys[:_FIRST_KEYS])} and {more} more, which docs/metrics.md lists"


def _mapping(source: str, what: str) -> dict[str, Any]:
    values = read_yaml(
        source,
        f"{what} file",
        limit=SIZE_LIMIT,
        too_large=f"a {what} file has at most 1 MiB; put data into files of their own",
        refusal=JobError,
    )
    if not isinstance(values, dict):
        raise JobError(f"{source}: {_shown(values)} is not a {what}; give keys with values")
    return values


def _put(
    overrides: Sequence[str], values: dict[str, Any], keys: _Keys
) -> tuple[dict[str, str], list[str]]:
    """Write overrides into ``values``; return the override behind each key, and the problems."""
    origins: dict[str, str] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        origin = f"override {override.encode(errors='backslashreplace').decode()}"
        try:
            value = parse_yaml(text)
        except YAMLTextError as error:
            problems.append(f"{origin}: {error}")
            continue
        if not equals:
            problems.append(f"{origin}: write key=value")
        elif key not in keys.all:
            problems.append(f"{origin}: unknown key {key}; {keys.suggestion(key)}")
        elif isinstance(value, dict):
            problems.append(f"{origin}: a mapping cannot be given here; override its keys")
        else:
            _set(values, key, value, keys)
            origins[key] = origin
    return origins, problems


def _set(values: dict[str, Any], key: str, value: Any, keys: _Keys) -> None:
    *sections, name = key.split(".")
    holder: Any = values
    for depth, section in enumerate(sections, 1):
        # A section that is not a mapping is a problem of the file, and is reported as such.
        if not isinstance(holder, dict):
            return
        kind = keys.sections[".".join(sections[:depth])]
        holder[section] = kind.as_mapping(holder.get(section))
        holder = holder[section]
    if isinstance(holder, dict):
        holder[name] = value


def _problem(item: ErrorDetails, source: str, origins: dict[str, str], keys: _Keys) -> str:
    key = ".".join(str(part) for part in item["loc"])
    where = origins.get(key, source)
    match item["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key {key}; {keys.suggestion(key)}"
        case "missing":
            return f"{where}: {key} is missing; {keys.fields[key].description}"
        case "not_allowed":
            what = item["ctx"]["what"]
        case "together":
            return f"{source}: {item['ctx']['what']}"
        case _:
            what = f"a section with keys {_listed(keys.inside(key))}"
    return f"{where}: {key}: {_shown(item['input'])} is not allowed; give {what}"


def _shown(value: Any, limit: int = 60) -> str:
    text = without_password(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
