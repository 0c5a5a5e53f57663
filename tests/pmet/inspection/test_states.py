"""What an optimisation moves, against plain passes with hooks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from pmet import PMETHyperParams, compute_targets
from pmet.inspection import Optimised, optimise_and_compare
from pmet.reference import plain_targets
from tests.conftest import Golden, load_golden

SOME = slice(6, 10)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden numbers of a serial block in two families."""
    return load_golden(request.param)


@pytest.fixture(scope="module")
def hparams(golden: Golden) -> PMETHyperParams:
    return golden.hparams.model_copy(update={"v_num_grad_steps": 4, "layers": (0, 1)})


@pytest.fixture(scope="module")
def found(golden: Golden, hparams: PMETHyperParams) -> list[Optimised]:
    return optimise_and_compare(
        golden.model,
        golden.tokenizer,
        golden.requests[SOME],
        hparams,
        context_templates=golden.context_templates,
    )


def plain(golden: Golden, hparams: PMETHyperParams, e: int, deltas: dict[str, Tensor]) -> Any:
    """Outputs by part and layer at the subject's last token, and the new target's probability."""
    request = golden.requests[SOME][e]
    templates = {
        "ffn": str(hparams.down_projection_template),
        "attention": str(hparams.attn_module_tmp),
    }
    said = f"{request.text} {request.target_new}"
    encoded = golden.tokenizer(said, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    stop = request.subject_span[1]
    last = max(i for i, (a, b) in enumerate(spans) if a < min(b, stop))
    answer = [ids[i] for i, (_, b) in enumerate(spans) if b > len(request.text)]
    outputs: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        for part, template in templates.items():
            for layer in range(5):

                def hook(
                    _module: Any, _args: Any, output: Tensor, site: Any = (part, layer)
                ) -> Tensor:
                    output = output.clone()
                    if site[1] == hparams.target_layer and site[0] in deltas:
                        output[0, last] += deltas[site[0]]
                    outputs[site] = output[0, last].double()
                    return output

                module = golden.model.get_submodule(template.format(layer))
                stack.callback(module.register_forward_hook(hook).remove)
        with torch.no_grad():
            logits = golden.model(torch.tensor([ids[:-1]])).logits[0, -len(answer) :]
    log = logits.double().log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
    return outputs, log.mean().exp().item()


def test_it_equals_plain_passes(
    golden: Golden, hparams: PMETHyperParams, found: list[Optimised]
) -> None:
    expected = plain_targets(
        golden.model,
        golden.tokenizer,
        golden.requests[SOME],
        hparams,
        golden.context_templates,
    )
    z = hparams.target_layer
    for e, own in enumerate(found):
        before, probability = plain(golden, hparams, e, {})
        deltas = {
            "ffn": expected.values[e] - before["ffn", z].float(),
            "attention": expected.attention_values[e] - before["attention", z].float(),
        }
        after, both = plain(golden, hparams, e, deltas)
        _, ffn = plain(golden, hparams, e, {"ffn": deltas["ffn"]})
        assert own.before == pytest.approx(probability, abs=1e-5)
        assert own.reached["both"] == pytest.approx(both, abs=1e-4)
        assert own.reached["ffn of both"] == pytest.approx(ffn, abs=1e-4)
        for site, output in before.items():
            moved = ((after[site] - output).norm() / output.norm()).item()
            cosine = torch.cosine_similarity(output, after[site], dim=0).item()
            assert own.moved[site] == pytest.approx(moved, abs=1e-3)
            assert own.similarity[site] == pytest.approx(cosine, abs=1e-3)


def learned(found: list[Optimised]) -> list[Optimised]:
    """Those that the model did not say before."""
    changed = [own for own in found if own.reached["both"] > own.before + 0.01]
    assert len(changed) > 1
    return changed


def test_nothing_moves_below_the_target_layer(
    hparams: PMETHyperParams, found: list[Optimised]
) -> None:
    for own in found:
        for (_, layer), moved in own.moved.items():
            assert layer >= hparams.target_layer or moved < 1e-6
    for own in learned(found):
        assert own.moved["ffn", hparams.target_layer] > 0.01
        assert own.moved["attention", hparams.target_layer] > 0.01


@pytest.mark.parametrize(("free", "fixed"), [("ffn", "attention_values"), ("attention", "values")])
def test_a_vector_that_is_not_free_stays_zero(free: Any, fixed: str) -> None:
    golden = load_golden("gpt2")

    def targets(steps: int, **options: Any) -> Any:
        return compute_targets(
            golden.model,
            golden.tokenizer,
            golden.requests[SOME],
            golden.hparams.model_copy(update={"v_num_grad_steps": steps}),
            context_templates=golden.context_templates,
            **options,
        )

    clean, alone, both = targets(1), targets(3, free=free), targets(3)
    assert torch.equal(getattr(alone, fixed), getattr(clean, fixed))
    other = "values" if fixed == "attention_values" else "attention_values"
    moving = both.steps > 1
    assert moving.any()
    assert not torch.equal(getattr(alone, other)[moving], getattr(clean, other)[moving])
    assert not torch.equal(getattr(both, fixed)[moving], getattr(clean, fixed)[moving])


def test_each_vector_alone_is_an_optimisation_of_its_own(found: list[Optimised]) -> None:
    for own in learned(found):
        # Alone, δ_f has to do what δ_a does beside it.
        assert abs(own.reached["ffn"] - own.reached["ffn of both"]) > 1e-4
