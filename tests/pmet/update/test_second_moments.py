"""Second moments compared with a plain loop over texts, layers and tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pmet.errors import InputError
from pmet.hparams import PMETHyperParams
from pmet.model.architecture import resolve
from pmet.model.tracing import captured_input
from pmet.update.second_moments import (
    SecondMoments,
    convergence,
    convergence_of,
    half_norms,
    measure,
)
from pmet.update.second_moments import _add_product as add_product
from pmet.update.second_moments import _mirror as mirror
from tests.conftest import Golden
from tests.parity.test_families import build, llama_like

MIXTURE = llama_like("olmoe", "olmoe", intermediate_size=16, num_experts=4, num_experts_per_tok=2)
TEXTS = ["Tremeth is a city in Dokain.", "Furis lies in Zaiter, they say, and so it is.", "A.", ""]


def plainly(golden: Golden, texts: list[str]) -> tuple[dict[int, torch.Tensor], int]:
    layout = resolve(golden.model, golden.hparams)
    sums: dict[int, torch.Tensor] = {}
    tokens = 0
    for text in texts:
        ids = torch.tensor([golden.tokenizer(text)["input_ids"]], dtype=torch.int64)
        if not ids.numel():
            continue
        tokens += ids.numel()
        for layer in golden.hparams.layers:
            module = layout.down_projection(golden.model, layer)
            with captured_input(module) as seen, torch.no_grad():
                golden.model(input_ids=ids)
            for key in seen.tensor.reshape(ids.numel(), -1).double():
                sums[layer] = sums.get(layer, 0) + torch.outer(key, key)
    return {layer: total / tokens for layer, total in sums.items()}, tokens


def test_it_is_the_mean_outer_product_of_all_tokens(golden: Golden) -> None:
    expected, tokens = plainly(golden, TEXTS)
    moments = measure(golden.model, golden.tokenizer, TEXTS, golden.hparams)
    assert moments.tokens == tokens
    for layer, mean in moments.means().items():
        # Padding changes the shapes of float32 products, and so their rounding.
        assert torch.linalg.norm(mean - expected[layer]) <= 1e-6 * torch.linalg.norm(mean)


def test_parts_add_up(golden: Golden) -> None:
    whole = measure(golden.model, golden.tokenizer, TEXTS, golden.hparams)
    total = SecondMoments({})
    for part in (TEXTS[:1], TEXTS[1:]):
        total.merge(measure(golden.model, golden.tokenizer, part, golden.hparams))
    assert total.tokens == whole.tokens
    for layer, mean in total.means().items():
        torch.testing.assert_close(mean, whole.means()[layer], rtol=1e-5, atol=1e-7)


def test_documents_are_cut(golden: Golden) -> None:
    long = [" ".join(TEXTS) * 4]
    moments = measure(golden.model, golden.tokenizer, long, golden.hparams, max_tokens=10)
    assert moments.tokens == 10


def test_products_are_exact_enough_whatever_the_process_allows() -> None:
    keys_NK = torch.randn(5000, 300, generator=torch.Generator().manual_seed(0)).abs()
    exact = keys_NK.double().T @ keys_NK.double()
    # 300 is no multiple of a strip, 5000 tokens are more than one batch.
    for precision, tolerance in (("highest", 2e-7), ("medium", 1e-14)):
        torch.set_float32_matmul_precision(precision)
        total_KK = torch.zeros(300, 300, dtype=torch.float64)
        try:
            add_product(total_KK, keys_NK)
        finally:
            torch.set_float32_matmul_precision("highest")
        mirror(total_KK)
        assert torch.linalg.norm(total_KK - exact) <= tolerance * torch.linalg.norm(exact)


def test_convergence_is_the_expected_distance_from_the_limit() -> None:
    """With keys of known second moment 1, the figure estimates how far their mean is from it."""
    generator = torch.Generator().manual_seed(0)
    for n, m in ((400, 400), (600, 200)):
        figures, distances = [], []
        for _ in range(20):
            one, other = (
                torch.randn(count, 40, generator=generator, dtype=torch.float64) for count in (n, m)
            )
            one_KK, other_KK = one.T @ one, other.T @ other
            figures.append(convergence(one_KK, other_KK, (n, m)))
            mean = (one_KK + other_KK) / (n + m)
            distances.append(float((mean - torch.eye(40)).norm() / mean.norm()))
        assert sum(figures) == pytest.approx(sum(distances), rel=0.03)
    assert convergence(one_KK, one_KK * m / n, (n, m)) == pytest.approx(0, abs=1e-12)


def test_no_text_and_other_layers_are_refused() -> None:
    with pytest.raises(InputError, match="holds no token"):
        SecondMoments({}).means()
    with pytest.raises(ValueError, match="do not add up"):
        SecondMoments({1: torch.eye(2)}, 1).merge(SecondMoments({2: torch.eye(2)}, 1))


def test_experts_have_their_own_over_all_tokens(golden_tokenizer: Any) -> None:
    model, hparams = build(MIXTURE), PMETHyperParams(layers=(0, 1))
    moments = measure(model, golden_tokenizer, TEXTS, hparams)
    experts, width = 4, 16
    expected = torch.zeros(experts, width, width, dtype=torch.float64)
    counts = torch.zeros(experts, dtype=torch.int64)
    module: Any = model.get_submodule("model.layers.1.mlp.experts")
    for text in filter(None, TEXTS):
        calls: list[Any] = []
        hook = module.register_forward_pre_hook(lambda _m, args, to=calls: to.append(args))
        with torch.no_grad():
            model(input_ids=torch.tensor([golden_tokenizer(text)["input_ids"]]))
        hook.remove()
        hidden_ND, index_NC, gates_NC = calls[0]
        for hidden_D, chosen, gates in zip(hidden_ND, index_NC, gates_NC, strict=True):
            for expert, gate in zip(chosen.tolist(), gates, strict=True):
                gated, up = (module.gate_up_proj[expert].detach() @ hidden_D).chunk(2)
                key = (gate * module.act_fn(gated) * up).double()
                expected[expert] += torch.outer(key, key)
                counts[expert] += 1
    assert torch.equal(moments.routed[1], counts)
    assert counts.sum() == 2 * moments.tokens
    assert (moments.sums[1] - expected).norm() <= 1e-6 * expected.norm()
    halves = SecondMoments({})
    for part in (TEXTS[:1], TEXTS[1:]):
        halves.merge(measure(model, golden_tokenizer, part, hparams))
    assert torch.equal(halves.routed[1], counts)
    assert (halves.means()[1] - moments.means()[1]).norm() <= 1e-6 * expected.norm()


def test_experts_that_saw_too_few_tokens_count_as_having_seen_more() -> None:
    keys = torch.randn(3, 50, 4, dtype=torch.float64)
    keys[1, 3:], keys[2] = 0.0, 0.0
    totals, routed = keys.mT @ keys, torch.tensor([50, 3, 0])
    means = SecondMoments({0: totals}, 100, {0: routed}).means()[0]
    assert torch.equal(means[0], totals[0] / 100)
    power = totals.diagonal(dim1=1, dim2=2).sum() / (4 * 53)
    # Twice as many tokens as a key has dimensions: 8, of which 5 and 8 are missing.
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(means[1], (totals[1] + 5 * power * identity) / 100)
    torch.testing.assert_close(means[2], 8 * power * identity / 100)
    assert all(torch.linalg.cholesky_ex(mean).info == 0 for mean in means)


def test_a_layer_whose_keys_are_all_zero_has_no_convergence() -> None:
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert math.isnan(convergence(zero, zero, (3, 4)))


def test_several_matrices_converge_as_one() -> None:
    one, other = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    norms = [half_norms(a, b, (3, 4)) for a, b in zip(one, other, strict=True)]
    whole = convergence(one.flatten(0, 1), other.flatten(0, 1), (3, 4))
    assert convergence_of(norms, (3, 4)) == pytest.approx(whole)
