from pathlib import Path

import fsspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import JobError
from pipeline.job.config import (
    EvaluateConfig,
    GatesConfig,
    HarnessConfig,
    JobConfig,
    TargetsConfig,
    TrackingConfig,
    UpdateConfig,
    dump_job,
    load_job,
)
from pmet.errors import InputError

SMALL = """\
model: gpt2
requests: facts/*.parquet
output: runs/1
hparams: gpt-j-6b
"""

FULL = """\
model: s3://models/gpt-j
requests: [facts/*.parquet, more.parquet]
output: runs/2026-11-23
hparams: gpt-j-6b
second_moments: stats/gpt-j-6b
corpus: corpora/wiki/*.parquet
context_templates: null
seed: 7
targets:
  {workers: 8, gpus_per_worker: 0.5, batch_size: auto, shard_size: 128, threads_per_worker: 2}
update: {ranks: 4, gpus_per_rank: 1, offload: cpu, shard_size: 64}
evaluate: {sample: 2000}
gates: {efficacy: 0.95, specificity: 0.70, perplexity_increase: 2e-2}
"""


@pytest.fixture
def job_file(tmp_path):
    def write(text):
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def problems(path, overrides=()):
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    return [line.replace(str(path), "FILE") for line in str(caught.value).split("\n")]


def test_four_keys_are_enough(job_file):
    assert load_job(job_file(SMALL)) == JobConfig(
        model="gpt2", requests=("facts/*.parquet",), output="runs/1", hparams="gpt-j-6b"
    )


def test_hparams_may_be_left_out_and_named_later(job_file):
    without = job_file(SMALL.replace("hparams: gpt-j-6b\n", ""))
    assert load_job(without).hparams is None
    assert load_job(without, ["hparams=gpt-j-6b"]) == load_job(job_file(SMALL))


def test_every_key_of_the_contract_is_read(job_file):
    job = load_job(str(job_file(FULL)))
    assert job.requests == ("facts/*.parquet", "more.parquet")
    assert job.corpus == ("corpora/wiki/*.parquet",)
    assert job.output == "runs/2026-11-23"
    assert job.seed == 7
    assert job.targets == TargetsConfig(
        workers=8, gpus_per_worker=0.5, batch_size="auto", shard_size=128, threads_per_worker=2
    )
    assert job.update == UpdateConfig(ranks=4, gpus_per_rank=1, offload="cpu", shard_size=64)
    assert job.evaluate == EvaluateConfig(sample=2000)
    assert job.gates.thresholds() == {
        "efficacy": 0.95,
        "specificity": 0.7,
        "perplexity_increase": 0.02,
    }


def test_the_keys_are_exactly_those_of_the_contract():
    assert list(JobConfig.model_fields) == [
        *("model", "requests", "output", "hparams", "second_moments", "corpus"),
        *("corpus_tokens", "context_templates", "contexts", "seed", "separator", "skip_known"),
        *("targets", "update", "evaluate", "gates", "tracking"),
    ]
    assert [name for name, field in JobConfig.model_fields.items() if field.is_required()] == [
        *("model", "requests", "output")
    ]


@pytest.mark.parametrize(
    "section",
    [
        *(JobConfig, TargetsConfig, UpdateConfig, EvaluateConfig, HarnessConfig),
        *(GatesConfig, TrackingConfig),
    ],
)
def test_every_key_has_a_line_of_help(section):
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert "\n" not in field.description, name


def test_a_job_is_frozen(job_file):
    job = load_job(job_file(SMALL))
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        job.targets.workers = 3
    assert hash(job) == hash(load_job(job_file(SMALL)))


def test_a_job_may_lie_anywhere():
    with fsspec.open("memory://jobs/a.yaml", "wb") as file:
        file.write(SMALL.encode())
    assert load_job("memory://jobs/a.yaml").model == "gpt2"


def test_an_empty_section_has_its_defaults(job_file):
    job = load_job(job_file(SMALL + "targets:\nupdate:\nevaluate: {}\ngates: null\n"))
    assert job == load_job(job_file(SMALL))


def test_harness_tasks_are_a_list_or_a_section(job_file):
    wanted = HarnessConfig(tasks=("mmlu", "own/tasks"))
    for text in (
        "evaluate: {harness: [mmlu, own/tasks]}",
        "evaluate: {harness: {tasks: [mmlu, own/tasks]}}",
    ):
        path = job_file(f"{SMALL}{text}\n")
        assert load_job(path).evaluate.harness == wanted
        shorter = load_job(path, ["evaluate.harness.limit=9"]).evaluate.harness
        assert (shorter.tasks, shorter.limit) == (wanted.tasks, 9)
    one = load_job(job_file(SMALL), ["evaluate.harness.tasks=mmlu"]).evaluate.harness
    assert one == HarnessConfig(tasks=("mmlu",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{taskz: [x]}",
            "unknown key evaluate.harness.taskz; did you mean evaluate.harness.tasks?",
        ),
        ("{limit: 0}", "evaluate.harness.limit: 0 is not allowed; give a whole number, 1 or more"),
        ("[3]", "evaluate.harness.tasks: [3] is not allowed; give a name, file or folder, or a"),
        (
            "3",
            "evaluate.harness: 3 is not allowed; give a section with keys evaluate.harness.tasks",
        ),
    ],
)
def test_keys_of_a_section_inside_a_section_are_checked(job_file, text, message):
    with pytest.raises(JobError) as error:
        load_job(job_file(f"{SMALL}evaluate: {{harness: {text}}}\n"))
    assert message in str(error.value)


def test_every_problem_is_reported_at_once(job_file):
    path = job_file(
        """\
model: 5
request: a.parquet
output: ''
hparams: [x]
seed: -1
corpus: []
second_moments: [a]
targets: {wokers: 4, workers: -1, gpus_per_worker: true, batch_size: many, shard_size: 1.5}
update: {offload: disk, ranks: auto}
evaluate: {sample: all}
gates: {efficacy: 95, perplexity_increase: .nan}
"""
    )
    assert problems(path) == [
        "FILE: model: 5 is not allowed; give text that is not empty",
        "FILE: requests is missing; Parquet files of edit requests: paths, globs or folders.",
        'FILE: output: "" is not allowed; give text that is not empty',
        'FILE: hparams: ["x"] is not allowed; give text, or null',
        'FILE: second_moments: ["a"] is not allowed; give text, or null',
        "FILE: corpus: [] is not allowed; give a path, a list of paths, or null",
        "FILE: seed: -1 is not allowed; give a whole number from 0 to 4294967295",
        "FILE: targets.workers: -1 is not allowed; give a whole number, 1 or more, auto, or 0 for "
        "a job in this process",
        "FILE: targets.gpus_per_worker: true is not allowed; "
        "give a fraction up to 1, or a whole number",
        'FILE: targets.batch_size: "many" is not allowed; give a whole number, 1 or more, or auto',
        "FILE: targets.shard_size: 1.5 is not allowed; give a whole number, 1 or more, or auto",
        "FILE: unknown key targets.wokers; did you mean targets.workers?",
        'FILE: update.offload: "disk" is not allowed; give none or cpu',
        'FILE: evaluate.sample: "all" is not allowed; give a whole number, 1 or more, or null',
        "FILE: gates.efficacy: 95 is not allowed; give a fraction from 0 to 1, or null",
        "FILE: gates.perplexity_increase: NaN is not allowed; give a number, 0 or more, or null",
        "FILE: unknown key request; did you mean requests?",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("modle: x", "unknown key modle; did you mean model?"),
        ("workers: 3", "unknown key workers; did you mean targets.workers?"),
        (
            "shard_size: 3",
            "unknown key shard_size; did you mean targets.shard_size or update.shard_size?",
        ),
        ("gates: {efficacy_stric: 1}", "unknown key gates.efficacy_stric; did you mean gates."),
        (
            "gates: {fluency_drop_sinse_last: 1}",
            "unknown key gates.fluency_drop_sinse_last; did you mean gates.fluency_drop_since_last",
        ),
        ("gates: {zzz: 1}", "unknown key gates.zzz; known are gates.efficacy_said, gates.gen"),
        ("gates: {agreement: 1.5}", "gates.agreement: 1.5 is not allowed; give a fraction from 0"),
        ("gates: {fluency: -1}", "gates.fluency: -1 is not allowed; give a number, 0 or more, or"),
        (
            "update: {zzz: 1}",
            "unknown key update.zzz; known are update.ranks, update.gpus_per_rank, "
            "update.offload, update.shard_size",
        ),
        ("target: {workers: 1}", "unknown key target; did you mean targets?"),
        ("qqqq: 1", "unknown key qqqq; known are model, requests, output, hparams, second"),
        (
            "evaluate: 5",
            "evaluate: 5 is not allowed; give a section with keys evaluate.sample, evaluate.store",
        ),
        ("seed: 1\nseed: 2", "line 6: key 'seed' is already given on line 5"),
        ("seed: &a 1\nother: *a", "line 6: aliases (*name) are not read; write the value out"),
        ("update: {gpus_per_rank: .inf}", "update.gpus_per_rank: Infinity is not allowed; give 0"),
        (
            "targets: {gpus_per_worker: 1.5}",
            "targets.gpus_per_worker: 1.5 is not allowed; give a fraction up to 1, or a whole",
        ),
        ("update: {gpus_per_rank: 2}", "update.gpus_per_rank: 2 is not allowed; give 0 or 1"),
        ("update: {gpus_per_rank: 0.5}", "update.gpus_per_rank: 0.5 is not allowed; give 0 or 1"),
        ("corpus: [a, '']", 'corpus: ["a", ""] is not allowed; give a path, a list of paths,'),
        ("corpus: [a, 5]", 'corpus: ["a", 5] is not allowed; give a path, a list of paths, or'),
        ('second_moments: "a\\0b"', 'second_moments: "a\\u0000b" is not allowed; give text, or'),
        ("second_moments: " + "[" * 3 + "x" * 99 + "]" * 3, 'second_moments: [[["xxxxxx'),
    ],
)
def test_each_problem_names_key_value_and_what_is_allowed(job_file, line, problem):
    said = problems(job_file(f"{SMALL}{line}\n"))
    assert len(said) == 1
    assert said[0].startswith(f"FILE: {problem}")
    assert len(said[0]) < 280


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "FILE: null is not a job; give keys with values"),
        ("[a]", 'FILE: ["a"] is not a job; give keys with values'),
        ("a: [", "FILE: line 1: expected the node content, but found '<stream end>'"),
        (b"model: \xff", "FILE: not UTF-8 text ("),
        (b"#" * (2**20 + 1), "FILE: a job file has at most 1 MiB; put data into files of their"),
    ],
)
def test_what_is_not_a_job_file_is_refused(job_file, text, problem):
    said = problems(job_file(text))
    assert len(said) == 1
    assert said[0].startswith(problem)


def test_a_file_of_just_the_limit_is_read(job_file):
    assert load_job(job_file(SMALL + "#" * (2**20 - len(SMALL)))).model == "gpt2"


def test_a_missing_file_is_named(tmp_path):
    said = problems(tmp_path / "none.yaml")
    assert len(said) == 1
    assert said[0].startswith("job file: cannot read FILE (")
    assert said[0].endswith("check the path")


def test_a_wrong_job_is_bad_input():
    assert issubclass(JobError, InputError)


def test_overrides_take_the_place_of_keys(job_file):
    job = load_job(
        job_file(FULL),
        [
            "seed=9",
            "targets.workers=auto",
            "requests=[a, b=c]",
            "corpus=null",
            "gates.efficacy=1e-3",
            "output=2026-11-24",
            " evaluate.sample =null",
            "seed=10",
        ],
    )
    assert job.seed == 10
    assert job.targets.workers == "auto"
    assert job.targets.shard_size == 128
    assert job.requests == ("a", "b=c")
    assert job.corpus is None
    assert job.gates.efficacy == 0.001
    assert job.output == "2026-11-24"
    assert job.evaluate.sample is None


def test_overrides_make_missing_keys_and_sections(job_file):
    job = load_job(
        job_file("model: a\ntargets:\n"),
        [
            "requests=r",
            "output=o",
            "hparams=h",
            "update.ranks=2",
            "targets.workers=3",
        ],
    )
    assert (job.update.ranks, job.targets.workers, job.output) == (2, 3, "o")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sead=1", "override sead=1: unknown key sead; did you mean seed?"),
        ("update.rank=1", "override update.rank=1: unknown key update.rank; did you mean update.r"),
        ("model.x=1", "override model.x=1: unknown key model.x; known are model, requests, "),
        (
            "evaluate=5",
            "override evaluate=5: unknown key evaluate; name one of evaluate.sample, evaluate",
        ),
        ("seed", "override seed: write key=value"),
        ("=5", "override =5: unknown key ; known are model, requests, "),
        ("seed={a: 1}", "override seed={a: 1}: a mapping cannot be given here; override its keys"),
        ("corpus=[a", "override corpus=[a: line 1: expected ',' or ']', but got '<stream end>'"),
        (
            "seed=x",
            'override seed=x: seed: "x" is not allowed; give a whole number from 0 to 4294967295',
        ),
        (
            "update.ranks=-1",
            "override update.ranks=-1: update.ranks: -1 is not allowed; give a whole number, 1 or",
        ),
        ("seed=\udcff", "override seed=\\udcff: unacceptable character #xdcff"),
    ],
)
def test_a_wrong_override_is_named(job_file, override, problem):
    said = problems(job_file(SMALL), [override])
    assert len(said) == 1
    assert said[0].startswith(problem)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["targets.workers=0"],
            "FILE: targets.workers is 0, which computes in this process, but update.ranks is not "
            "0; set both to 0, or neither",
        ),
        (["update.ranks=0"], "FILE: update.ranks is 0, which computes in this process, but targ"),
        (
            ["targets.workers=0", "update.ranks=0", "targets.gpus_per_worker=1"],
            "FILE: targets.workers: 0 computes in this process, on the CPU; set targets.gpus_per_",
        ),
        (
            ["targets.workers=0", "update.ranks=0", "update.gpus_per_rank=1"],
            "FILE: targets.workers: 0 computes in this process, on the CPU; set targets.gpus_per_",
        ),
    ],
)
def test_a_job_is_in_this_process_as_a_whole_or_not(job_file, overrides, problem):
    said = problems(job_file(SMALL), overrides)
    assert len(said) == 1
    assert said[0].startswith(problem)


@pytest.mark.parametrize("odd", [".nan", ".inf", "-.inf", "-1", "-5e-324"])
@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("gates.efficacy", "a fraction from 0 to 1, or null"),
        ("gates.perplexity_increase", "a number, 0 or more, or null"),
        ("targets.timeout", "a number of seconds above 0, or null"),
        ("targets.gpus_per_worker", "a fraction up to 1, or a whole number"),
        ("update.gpus_per_rank", "0 or 1"),
        ("seed", "a whole number from 0 to 4294967295"),
        ("evaluate.sample", "a whole number, 1 or more, or null"),
    ],
)
def test_an_odd_number_is_refused(job_file, key, what, odd):
    said = problems(job_file(SMALL), [f"{key}={odd}"])
    assert len(said) == 1
    assert said[0].startswith(f"override {key}={odd}: {key}: ")
    assert said[0].endswith(f" is not allowed; give {what}")


@pytest.mark.parametrize("odd", ["4097", "100000000000000000000", "1e300", "0"])
def test_more_threads_than_a_machine_has_are_refused(job_file, odd):
    (said,) = problems(job_file(SMALL), [f"targets.threads_per_worker={odd}"])
    assert said.endswith(" is not allowed; give a whole number from 1 to 4096, or auto")


def test_problems_of_overrides_and_file_come_together(job_file):
    said = problems(job_file(SMALL + "update: 5\n"), ["update.ranks=2", "x=1"])
    assert len(said) == 2
    assert said[0].startswith("override x=1: unknown key x;")
    assert said[1].startswith("FILE: update: 5 is not allowed; give a section")


@pytest.mark.parametrize("text", [SMALL, FULL])
def test_a_dumped_job_is_loaded_back(job_file, text):
    job = load_job(job_file(text))
    assert load_job(job_file(dump_job(job))) == job
    assert list(yaml.safe_load(dump_job(job))) == list(JobConfig.model_fields)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(deadline=None)
@given(
    job=st.builds(
        JobConfig,
        model=WORDS,
        requests=st.lists(WORDS, min_size=1, max_size=3).map(tuple),
        output=WORDS,
        hparams=st.sampled_from(["1e-3", "0o17", "on", "null", "~", "2026-11-23", "- a", "a: b"]),
        second_moments=st.none() | WORDS,
        corpus=st.none() | st.lists(WORDS, min_size=1, max_size=2).map(tuple),
        seed=st.integers(0, 2**32 - 1),
        targets=st.builds(TargetsConfig, gpus_per_worker=st.floats(0, 1) | st.integers(2, 8)),
        gates=st.builds(GatesConfig, score=st.none() | st.floats(0, 1)),
    )
)
def test_any_job_is_dumped_and_loaded_back(job):
    with fsspec.open("memory://jobs/any.yaml", "wb") as file:
        file.write(dump_job(job).encode())
    assert load_job("memory://jobs/any.yaml") == job


RESULT = [
    *("model=x", "requests=x", "hparams=x", "second_moments=x", "corpus=x", "seed=1"),
    *("context_templates=x.json", "targets.batch_size=3", "targets.shard_size=3"),
    *("targets.dtype=bfloat16", "targets.shared_keys=mean", "update.shard_size=3"),
    *("skip_known=true", 'separator=""', "corpus_tokens=9"),
    *("contexts=both", "targets.end=stop"),
]
PLACE = [
    *("output=x", "targets.workers=3", "targets.gpus_per_worker=1"),
    *("targets.threads_per_worker=3", "update.ranks=3", "update.gpus_per_rank=1"),
    *("targets.store=x", "targets.timeout=60", "update.offload=cpu", "evaluate.sample=3"),
    *("evaluate.store=x", "evaluate.group_by=x", "evaluate.last=x", "evaluate.fluency=true"),
    *("evaluate.chat_template=true", "evaluate.perplexity_texts=3", "gates.efficacy=0.5"),
    *("evaluate.perplexity_tokens=9", "evaluate.answers=7", "evaluate.questions=x.yaml"),
    *("evaluate.harness.tasks=[x]", "evaluate.harness.limit=9", "evaluate.harness.num_fewshot=0"),
    *("evaluate.harness.metric=f1", "evaluate.harness.batch_size=4"),
    *("tracking.tensorboard=x", "tracking.mlflow=x", "tracking.wandb=x"),
    *("tracking.experiment=x", "tracking.name=x"),
]


def test_the_digest_follows_what_the_weights_depend_on(job_file):
    path = job_file(SMALL)
    digests = [load_job(path, [override]).digest() for override in RESULT]
    assert len({load_job(path).digest(), *digests}) == len(RESULT) + 1


def test_the_digest_ignores_who_computes_and_what_is_demanded(job_file):
    path = job_file(SMALL)
    assert {load_job(path, [o]).digest() for o in PLACE} == {load_job(path).digest()}


def test_each_key_is_either_in_the_digest_or_not():
    sections = {
        "targets": TargetsConfig,
        "update": UpdateConfig,
        "evaluate": EvaluateConfig,
        "evaluate.harness": HarnessConfig,
        "tracking": TrackingConfig,
    }
    keys = {key for key in JobConfig.model_fields if key not in {*sections, "gates"}}
    keys |= {f"{name}.{key}" for name, model in sections.items() for key in model.model_fields}
    keys -= set(sections)
    assert {o.partition("=")[0] for o in RESULT + PLACE} - {"gates.efficacy"} == keys


def test_a_path_object_is_a_source(job_file):
    assert isinstance(job_file(SMALL), Path)
    assert load_job(job_file(SMALL)).model == "gpt2"
