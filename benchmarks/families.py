"""Every family of causal models in the installed transformers: edited and checked, or why not.

python -m benchmarks.families --output docs/models.md
python -m benchmarks.families --only llama,bloom,mixtral
python -m benchmarks.families --only mixtral --output docs/models.md  # replaces one row

For each model type, a small copy with random weights is made from the type's default configuration.
A few facts are edited in it, and targets, deltas and scores are compared with the plain form, which
runs one request at a time with plain hooks. A type is

- edited: all three agree; fast if prompts start at the subject's last token, whole if they start
  at their first;
- refused, with the reason that the plan of a job gives;
- unknown: no small copy could be made from the default configuration, so nothing was tried. Real
  checkpoints have configurations of their own, with which it may well work.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from pmet import EditRequest, PMETHyperParams, compute_edit, compute_targets, evaluate
from pmet.errors import InputError
from pmet.model import (
    Layout,
    Miniature,
    NoMiniatureError,
    miniature_of,
    resolve,
    transformers_internals,
)
from pmet.reference import plain_deltas, plain_evaluate, plain_targets
from pmet.targets import why_whole

_WORDS = (
    "Ada Bo Cy Dee Eve Finn is was lives works sings in at near a the and then red blue tall old"
)
_PLACES = ["Rome", "Oslo", "Lima", "Bonn"]
_CONTEXTS = [["{}"], ["the old and tall . {}", "then blue . {}"]]
_REQUESTS = [
    EditRequest("{} lives in", "Ada", "Rome", target_true="Oslo"),
    EditRequest("then the old {} works near", "Bo Cy", "Lima", target_true="Bonn"),
    EditRequest("in red , {} sings at", "Dee", "Oslo Rome", target_true="Lima"),
    EditRequest("{}", "Eve Finn", "Bonn", target_true="Rome"),
]
_MEASURED = [
    replace(
        request,
        paraphrase_prompts=[_REQUESTS[i - 1].text],
        neighborhood_prompts=[_REQUESTS[i - 2].text],
    )
    for i, request in enumerate(_REQUESTS)
]
# What default configurations lack although every checkpoint has it.
_SETTINGS: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}
# Random weights and three steps of Adam amplify rounding; another meaning is apart by 1e-2 or more.
_SAME = 2e-3
_PATIENCE_S = 180
_SCORES = [
    f"{n}{f}" for n in ("efficacy", "generalization", "specificity") for f in ("", "_strict")
]


@dataclass(frozen=True)
class Finding:
    """What became of one model type."""

    model_type: str
    status: str
    detail: str


def main() -> None:
    """Try the model types and print a table, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="model types, separated by commas; all by default")
    parser.add_argument(
        "--output", type=Path, help="Markdown file whose table, or rows with --only, are replaced"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    wanted = options.only.split(",") if options.only else sorted(_types())
    found = []
    for model_type in wanted:
        finding = _tried_apart(model_type)
        _say(f"{finding.model_type:24} {finding.status:16} {finding.detail}")
        found.append(finding)
    _say(_summary(found))
    if options.output:
        _write(options.output, found, keep=bool(options.only))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _types() -> set[str]:
    return transformers_internals.text_types()


def _tried_apart(model_type: str) -> Finding:
    """Try a type in a process of its own, which takes its memory along when it ends."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(_tried(model_type)), daemon=True)
    process.start()
    theirs.close()
    try:
        if mine.poll(_PATIENCE_S):
            return cast(Finding, mine.recv())
        return Finding(model_type, "unknown", f"not done after {_PATIENCE_S} s")
    except EOFError:
        return Finding(model_type, "unknown", "its process died")
    finally:
        process.kill()
        process.join()


def _tried(model_type: str) -> Finding:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            small = miniature_of(_model(model_type))
        except NoMiniatureError as error:
            return Finding(model_type, "unknown", _line(error))
        except Exception as error:  # noqa: BLE001 - whatever a family's code raises
            return Finding(model_type, "unknown", f"default configuration: {_line(error)}")
        try:
            hparams = _hyper_parameters(small)
            layout = resolve(small.model, hparams)
            whole = why_whole(small.model, layout)
        except InputError as error:
            return Finding(model_type, "refused", _line(error))
        try:
            apart = _checked(small.model, hparams, layout)
        except Exception as error:  # noqa: BLE001 - shown in the table
            return Finding(model_type, "wrong", _line(error))
    experts = " (routed experts)" if layout.experts else ""
    names = f"`{layout.family.down_projection}`{experts}, `{layout.family.attention_projection}`"
    if not apart <= _SAME:
        return Finding(model_type, "wrong", f"{apart:.1e} from the plain form; {names}")
    return Finding(model_type, "edited, fast" if whole is None else "edited, whole", names)


def _model(model_type: str) -> nn.Module:
    """A model of a type with its default configuration, without weights."""
    config = AutoConfig.for_model(model_type, **_SETTINGS.get(model_type, {}))
    causal = transformers_internals.is_causal_type(model_type)
    kind: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config)
    return model


def _hyper_parameters(small: Miniature) -> PMETHyperParams:
    """Two layers of a kind that can be edited, the lowest; or the reason why there are none."""
    depth = len(small.layers)
    refused: InputError | None = None
    for first in range(depth):
        for last in range(first + 1, depth):
            hparams = PMETHyperParams(
                layers=(first, last), v_num_grad_steps=3, v_lr=0.5, mom2_update_weight=10.0
            )
            try:
                resolve(small.model, hparams)
            except InputError as error:
                refused = refused or error
            else:
                return hparams
    raise refused or InputError("it has only one layer")


def _checked(model: nn.Module, hparams: PMETHyperParams, layout: Layout) -> float:
    """The largest relative difference from the plain form, in targets, deltas and scores."""
    tokenizer = _tokenizer()
    named = hparams.model_copy(
        update={
            "rewrite_module_tmps": (layout.family.down_projection,),
            "attn_module_tmp": layout.family.attention_projection,
        }
    )
    plain = plain_targets(model, tokenizer, _REQUESTS, named, _CONTEXTS)
    fast = compute_targets(
        model, tokenizer, _REQUESTS, hparams, context_templates=_CONTEXTS, batch_size=3
    )
    generator = torch.Generator().manual_seed(0)
    width = layout.key_width
    samples_XNK = torch.randn(max(1, layout.experts), 2 * width, width, generator=generator)
    moment = (samples_XNK.mT @ samples_XNK / (2 * width)).reshape(layout.moment_shape)
    moments = dict.fromkeys(hparams.layers, moment)
    deltas = plain_deltas(model, tokenizer, _REQUESTS, named, _CONTEXTS, moments, plain.values)
    edit = compute_edit(
        model,
        tokenizer,
        _REQUESTS,
        hparams,
        context_templates=_CONTEXTS,
        second_moments=moments,
        targets=plain.values,
    )
    scores, expected = (f(model, tokenizer, _MEASURED) for f in (evaluate, plain_evaluate))
    if fast.steps.tolist() != plain.steps.tolist():
        return math.inf
    return max(
        _apart(fast.values, plain.values),
        *(_apart(edit.deltas[name].double(), delta) for name, delta in deltas.items()),
        *(abs(scores[name] - expected[name]) for name in _SCORES),
    )


def _apart(mine: torch.Tensor, expected: torch.Tensor) -> float:
    return float((mine - expected).norm() / expected.norm())


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, few enough for every small copy."""
    words = ["<unk>", *_WORDS.split(), *_PLACES, ".", ","]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]


def _summary(found: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in found)
    return ", ".join(f"{count} {status}" for status, count in counts.most_common())


_ROW = re.compile(r"^\| `(.+?)` \| (.+?) \| (.*) \|$", re.MULTILINE)
_START, _END = "<!-- made by benchmarks/families.py -->", "<!-- end -->"


def _write(page: Path, found: Sequence[Finding], *, keep: bool) -> None:
    """Replace the table in a page, between two comments; ``keep`` the rows of other types."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_START)
    table, _, after = rest.partition(_END)
    if keep:
        rows = {row[1]: Finding(*row.groups()) for row in _ROW.finditer(table)}
        rows |= {finding.model_type: finding for finding in found}
        found = [rows[model_type] for model_type in sorted(rows)]
    table = "\n".join([_START, "", *_table(found), "", _END])
    page.write_text(f"{before}{table}{after}", encoding="utf-8")


def _table(found: Sequence[Finding]) -> Iterator[str]:
    yield f"transformers {transformers.__version__}: {_summary(found)}."
    yield ""
    yield "| model type | | edited module and attention output, or the reason |"
    yield "| --- | --- | --- |"
    for finding in found:
        detail = re.sub(r"(?<!\\)\|", r"\\|", finding.detail)
        yield f"| `{finding.model_type}` | {finding.status} | {detail} |"


if __name__ == "__main__":
    main()
