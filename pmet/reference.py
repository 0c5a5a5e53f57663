"""The method in its simplest form, the easiest to verify: one request at a time.

Every evaluation runs the whole model over all contexts; nothing is cached, shared between
requests or skipped. The fast modules are compared with this second implementation, so it imports
none of them. It is also the baseline of the benchmarks: the cost of the method when implemented
literally.

Shape letters: E requests, C contexts, B rows of one forward pass (the contexts and anything run
with them), T tokens, N vocabulary, D model width, K key width, V value width (= D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pmet.errors import InputError
from pmet.hparams import PMETHyperParams
from pmet.request import EditRequest, SharedKeys

_SETTLED_LOSS = 0.05
_SETTLED_KL = 0.01


@dataclass(frozen=True)
class PlainTargets:
    """The result of the optimisation of each request; all on the CPU.

    Attributes:
        values: (E, D) float32, the FFN output wanted at the target layer, v* = v_f + δ_f.
        attention_values: (E, D) float32, its attention counterpart, which no update uses.
        steps: (E,) int64, number of evaluations.
        losses: (E,) float32, the loss of the last evaluation.
    """

    values: Tensor
    attention_values: Tensor
    steps: Tensor
    losses: Tensor


# --- Tokens -------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of ``text`` and the characters that each one covers, without trailing special tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, so no token of the subject "
            "can be found; use a fast tokenizer"
        )
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    end = len(encoded["input_ids"])
    while end and encoded["special_tokens_mask"][end - 1]:
        end -= 1
    return encoded["input_ids"][:end], encoded["offset_mapping"][:end]


def _located(tokenizer: Any, request: EditRequest, template: str) -> tuple[list[int], int]:
    """Ids of the prompt within ``template``, and the index of the subject's last token."""
    ids, spans = _tokens(tokenizer, template.replace("{}", request.text))
    subject_end = template.index("{}") + request.subject_span[1]
    return ids, max(i for i, (start, end) in enumerate(spans) if start < min(end, subject_end))


def _continuation(tokenizer: Any, request: EditRequest, text: str, target: str) -> list[int]:
    """Ids that ``target`` adds to ``text``, one of the request's prompts, with their separator."""
    before, _ = _tokens(tokenizer, text)
    whole, _ = _tokens(tokenizer, f"{text}{request.between(text, target)}{target}")
    if whole[: len(before)] != before:
        raise InputError(
            f"the tokenizer joins the end of {text!r} and the start of {target!r} in one token; "
            "let the prompt end elsewhere"
        )
    return whole[len(before) :]


# --- Reading and changing the model with hooks ---------------------------------------------------


def _module(model: nn.Module, template: str | None, layer: int) -> nn.Module:
    if template is None:
        raise InputError(
            "the plain form does not search for modules; give hyper-parameters that name "
            "rewrite_module_tmps and attn_module_tmp"
        )
    return model.get_submodule(template.format(layer))


def _logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits (B, T, N) of ``rows``, padded on the right, where causal models never look."""
    length = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    device = next(model.parameters()).device
    output = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False)
    return _wide(output.logits)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Place:
    """One position in each row of a module's output, which is read there and optionally shifted.

    A context manager that hooks the module. ``inputs`` (B, K) and ``outputs`` (B, V) hold the
    values of the last forward pass at the positions ``lasts``, before the shift.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, module: nn.Module, lasts: list[int], shift_V: Tensor | None = None) -> None:
        self._module, self._shift_V = module, shift_V
        self._index = torch.arange(len(lasts)), torch.tensor(lasts)

    def __enter__(self) -> _Place:
        self._handle = self._module.register_forward_hook(self._hook)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        self.inputs = self._by_row(inputs[0])[self._index].detach()
        self.outputs = self._by_row(hidden)[self._index].detach()
        if self._shift_V is None:
            return None
        shifted = hidden.clone()
        self._by_row(shifted)[self._index] += self._shift_V.to(hidden.dtype)
        return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

    def _by_row(self, hidden: Tensor) -> Tensor:
        """(B, T, ·): some models flatten the rows before their FFN."""
        return hidden.view(len(self._index[0]), -1, hidden.shape[-1])


@contextmanager
def _unchanged(model: nn.Module, weights: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Within: evaluation mode, nothing trainable. Afterwards: model and ``weights`` as before."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    originals = [weight.detach().clone() for weight in weights]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data.copy_(original)
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode


# --- Targets ------------------------------------------------------------------------------------


def plain_targets(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    hparams: PMETHyperParams,
    context_templates: Sequence[Sequence[str]],
    *,
    shared_keys: SharedKeys = "joint",
) -> PlainTargets:
    """Optimise the target of each request alone, or of those that share their key together.

    Args:
        model: a causal language model of transformers; left unchanged.
        tokenizer: its fast tokenizer.
        requests: E requests, at least one.
        hparams: names of the modules, and settings of the optimisation.
        context_templates: groups of templates; the first of the first group is the bare ``{}``.
        shared_keys: ``joint``: requests with the same subject and the same text before it get one
            target; ``mean``: each gets its own, as published.

    Raises:
        InputError: the tokenizer gives no offsets, or joins a prompt and its target in one token.
    """
    templates = [template for group in context_templates for template in group]
    together = [
        [other for other in requests if shared_keys == "joint" and _same_key(request, other)]
        or [request]
        for request in requests
    ]
    with _unchanged(model), torch.enable_grad():
        results = [_optimise(model, tokenizer, group, hparams, templates) for group in together]
    values, attention_values, steps, losses = zip(*results, strict=True)
    return PlainTargets(
        torch.stack(values),
        torch.stack(attention_values),
        torch.tensor(steps),
        torch.tensor(losses),
    )


def _same_key(request: EditRequest, other: EditRequest) -> bool:
    before, others_before = (r.prompt.partition("{}")[0] for r in (request, other))
    return (before, request.subject) == (others_before, other.subject)


def _optimise(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    hparams: PMETHyperParams,
    templates: Sequence[str],
) -> tuple[Tensor, Tensor, int, float]:
    """v* (D,) of requests with one key, attention counterpart (D,), evaluations and last loss."""
    layer = hparams.layers[-1]
    ffn = _module(model, hparams.down_projection_template, layer)
    attention = _module(model, hparams.attn_module_tmp, layer)

    prompts = [_located(tokenizer, r, t) for r in requests for t in templates]
    targets = [
        # Text after the prompt, as in a chat template, decides how the target begins.
        _continuation(
            tokenizer, r, r.text if t.endswith("{}") else t.replace("{}", r.text), r.target_new
        )
        for r in requests
        for t in templates
    ]
    essence = EditRequest("{} is a", requests[0].subject, requests[0].target_new)
    essence_ids, essence_last = _located(tokenizer, essence, "{}")
    rows = [ids + target[:-1] for (ids, _), target in zip(prompts, targets, strict=True)]
    rows.append(essence_ids)
    lasts = [last for _, last in prompts] + [essence_last]
    # The token before the target predicts its first token; the target's last predicts nothing.
    asked = [
        (c, slice(len(ids) - 1, len(ids) - 1 + len(target)), target)
        for c, ((ids, _), target) in enumerate(zip(prompts, targets, strict=True))
    ]

    with torch.no_grad(), _Place(ffn, lasts) as at_ffn, _Place(attention, lasts) as at_attention:
        log_before_N = _logits(model, rows)[-1, essence_last].log_softmax(-1)
    v_f, v_a = _wide(at_ffn.outputs[0]), _wide(at_attention.outputs[0])
    delta_f = torch.zeros_like(v_f, requires_grad=True)
    delta_a = torch.zeros_like(v_a, requires_grad=True)
    adam = torch.optim.Adam([delta_f, delta_a], lr=hparams.v_lr)
    nll_factor = hparams.nll_loss_factor

    for step in range(1, hparams.v_num_grad_steps + 1):
        with _Place(ffn, lasts, delta_f), _Place(attention, lasts, delta_a):
            logits_BTN = _logits(model, rows)
        said = [(logits_BTN[c, at].log_softmax(-1), target) for c, at, target in asked]
        log_after_N = logits_BTN[-1, essence_last].log_softmax(-1)
        nll = -torch.stack([log_TN[range(len(t)), t].mean() for log_TN, t in said]).mean()
        kl = hparams.kl_factor * (log_after_N.exp() * (log_after_N - log_before_N)).sum()
        decay = delta_f.norm() / v_f.norm() ** 2 + delta_a.norm() / v_a.norm() ** 2
        loss = nll_factor * nll + kl + hparams.v_weight_decay * decay

        greedy = all(log_TN.argmax(-1).tolist() == target for log_TN, target in said)
        nll_factor = hparams.nll_loss_factor / 10 if greedy else hparams.nll_loss_factor
        settled = loss < _SETTLED_LOSS or (greedy and kl <= _SETTLED_KL)
        if settled or step == hparams.v_num_grad_steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        _shrink(delta_f, hparams.clamp_norm_factor * v_f.norm())
        _shrink(delta_a, hparams.clamp_norm_factor * v_a.norm())

    wanted, wanted_attention = (v_f + delta_f).detach(), (v_a + delta_a).detach()
    return wanted.float().cpu(), wanted_attention.float().cpu(), step, loss.item()


def _shrink(delta: Tensor, radius: Tensor) -> None:
    """Scale ``delta`` in place onto the ball of ``radius`` if it is outside."""
    norm = delta.detach().norm()
    if norm > radius:
        delta.data *= radius / norm


# --- The update ---------------------------------------------------------------------------------


def plain_deltas(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    hparams: PMETHyperParams,
    context_templates: Sequence[Sequence[str]],
    second_moments: Mapping[int, Tensor],
    targets: Tensor,
) -> dict[str, Tensor]:
    """Compute the weight change of each edited layer, with all earlier changes applied.

    Args:
        model: a causal language model of transformers; left unchanged.
        tokenizer: its fast tokenizer.
        requests: E requests, at least one.
        hparams: names of the modules, spread, solves, and the weight of the second moments.
        context_templates: as for :func:`plain_targets`.
        second_moments: per edited layer, C as a (K, K) tensor; (X, K, K) with X experts.
        targets: v* as an (E, D) tensor.

    Returns:
        For each edited layer's parameter, its delta: float64, on the CPU, in the parameter's shape.
    """
    layers, template = hparams.layers, hparams.down_projection_template
    modules = [_module(model, template, layer) for layer in layers]
    names = [_stack(module) or "weight" for module in modules]
    weights = [module.get_parameter(name) for module, name in zip(modules, names, strict=True)]
    deltas: dict[str, Tensor] = {}
    with _unchanged(model, weights), torch.no_grad():
        originals = [weight.detach().to("cpu", torch.float64, copy=True) for weight in weights]
        # All layers in turn, then all layers again, as often as they are to be solved for.
        for i, layer, module, name in hparams.solves * list(
            zip(range(len(layers)), layers, modules, names, strict=True)
        ):
            of_experts = name != "weight"
            read = [
                _expert_keys_and_value(
                    model, tokenizer, request, module, name, modules[-1], context_templates
                )
                if of_experts
                else _key_and_value(
                    model, tokenizer, request, module, modules[-1], context_templates
                )
                for request in requests
            ]
            keys = torch.stack([key for key, _ in read])
            values_EV = torch.stack([value_V for _, value_V in read])
            left = len(layers) - i
            divisor = {"sqrt": math.sqrt(left), "linear": left, "none": 1}[hparams.spread]
            residuals_EV = (targets.double().cpu() - values_EV) / divisor
            moment = second_moments[layer].double().cpu()
            solved = _plain_expert_delta if of_experts else _plain_delta
            weight = hparams.mom2_update_weight
            if hparams.mom2_update_share is not None:
                weight = hparams.mom2_update_share * _plain_scale(keys, moment)
            delta = solved(keys, residuals_EV, weight * moment)
            if _is_transposed(module, weights[i], values_EV.shape[1]):
                delta = delta.mT
            parameter = f"{str(template).format(layer)}.{name}"
            deltas[parameter] = (delta + deltas.get(parameter, 0.0)).contiguous()
            weights[i].copy_((originals[i] + deltas[parameter]).to(weights[i].device))
    return deltas


def _plain_scale(keys: Tensor, moment: Tensor) -> float:
    """The mean squared norm of a request's key, by the mean eigenvalue of C.

    With experts (``keys_EXK``, ``moment_XKK``), of the keys and the C of all experts side by side.
    """
    norms_E = keys.flatten(1).square().sum(1)
    eigenvalues = torch.linalg.eigvalsh(moment)
    return (norms_E.mean() / eigenvalues.mean()).item()


def _plain_delta(keys_EK: Tensor, residuals_EV: Tensor, weighted_KK: Tensor) -> Tensor:
    """Δ (V, K), from λC."""
    return torch.linalg.solve(keys_EK.T @ keys_EK + weighted_KK, keys_EK.T @ residuals_EV).T


def _plain_expert_delta(keys_EXK: Tensor, residuals_EV: Tensor, weighted_XKK: Tensor) -> Tensor:
    """Δ (X, V, K) of a stack of experts, from λC of each.

    Keys are the experts' own, times their gates: zero where a request is not routed.
    """
    shares_EX = keys_EXK.square().sum(2)
    shares_EX /= shares_EX.sum(1, keepdim=True)
    deltas = []
    for x, weighted_KK in enumerate(weighted_XKK):
        there = shares_EX[:, x] > 0
        keys_EK, share_E1 = keys_EXK[there, x], shares_EX[there, x, None]
        system_KK = keys_EK.T @ (keys_EK / share_E1) + weighted_KK
        deltas.append(torch.linalg.solve(system_KK, keys_EK.T @ residuals_EV[there]).T)
    return torch.stack(deltas)


def _is_transposed(module: nn.Module, weight: Tensor, value_width: int) -> bool:
    """Whether a weight is stored K×V."""
    return isinstance(module, Conv1D) or (weight.dim() == 3 and weight.shape[2] == value_width)


def _stack(module: nn.Module) -> str:
    """The name of the experts' stacked down-projection; empty for a module of another kind."""
    stacks = [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
    return next((name for name in stacks if "down" in name), "")


def _expert_keys_and_value(
    model: nn.Module,
    tokenizer: Any,
    request: EditRequest,
    keyed: nn.Module,
    name: str,
    valued: nn.Module,
    context_templates: Sequence[Sequence[str]],
) -> tuple[Tensor, Tensor]:
    """A request's keys (X, K), one for each expert of ``keyed``, and its value (V,) at ``valued``.

    The output is linear in the stacked weight, so expert x's key times its gate is the gradient of
    any one component of the output with respect to that row of its weight.
    """
    weight = keyed.get_parameter(name)
    keys: list[Tensor] = []
    for group in context_templates:
        total_XK: Tensor | float = 0.0
        for template in group:
            ids, last = _located(tokenizer, request, template)
            with torch.enable_grad(), _Place(valued, [last]) as at_value:
                weight.requires_grad_(True)
                outputs: list[Tensor] = []
                handle = keyed.register_forward_hook(
                    lambda _m, _a, output, to=outputs: to.append(output)
                )
                _logits(model, [ids])
                handle.remove()
                component = outputs[0].view(len(ids), -1)[last, 0]
                (gradient,) = torch.autograd.grad(component, weight)
                weight.requires_grad_(False)
            transposed = gradient.shape[2] == outputs[0].shape[-1]
            total_XK = total_XK + (gradient[:, :, 0] if transposed else gradient[:, 0]).double()
            if template == "{}":
                value_V = at_value.outputs[0].double().cpu()
        assert isinstance(total_XK, Tensor)
        keys.append(total_XK.cpu() / len(group))
    return torch.stack(keys).mean(0), value_V


def _key_and_value(
    model: nn.Module,
    tokenizer: Any,
    request: EditRequest,
    keyed: nn.Module,
    valued: nn.Module,
    context_templates: Sequence[Sequence[str]],
) -> tuple[Tensor, Tensor]:
    """A request's key (K,) at ``keyed`` and its current value (V,) at ``valued``; float64, CPU.

    The key is the mean over groups of the mean over a group's contexts; the value is that of the
    bare context.
    """
    templates = [template for group in context_templates for template in group]
    prompts = [_located(tokenizer, request, template) for template in templates]
    lasts = [last for _, last in prompts]
    with _Place(keyed, lasts) as at_key, _Place(valued, lasts) as at_value:
        _logits(model, [ids for ids, _ in prompts])
    grouped = at_key.inputs.double().cpu().split([len(group) for group in context_templates])
    key_K = torch.stack([keys_CK.mean(0) for keys_CK in grouped]).mean(0)
    return key_K, at_value.outputs[0].double().cpu()


# --- Evaluation ---------------------------------------------------------------------------------


def plain_evaluate(
    model: nn.Module, tokenizer: Any, requests: Sequence[EditRequest]
) -> dict[str, Any]:
    """Score the model's current answers, with a pass for every prompt with every target.

    In the probability form a prompt counts if the wanted target is more likely than the other one
    (mean negative log-likelihood over each target's own tokens), in the strict form if it is the
    greedy answer at every position; the accuracy is the share of positions where it is. The wanted
    target is the new one, except for neighborhood prompts (the true one) and portability prompts
    (their own answers).

    Returns:
        ``efficacy``, ``generalization``, ``specificity`` and ``portability``, each also with
        ``_strict`` and ``_accuracy``: fractions in [0, 1], means over all prompts of all requests,
        NaN if there are none; ``rows``: the same for each single request, with its
        ``case_id``; ``nll``: by prompt and target, the mean negative log-likelihood.
    """
    nll: dict[tuple[str, str], float] = {}
    with _unchanged(model), torch.no_grad():
        wins = [_wins(model, tokenizer, request, nll) for request in requests]
    rows = [
        {"case_id": request.case_id, **{name: _mean(own[name]) for name in own}}
        for request, own in zip(requests, wins, strict=True)
    ]
    means = {name: _mean([win for own in wins for win in own[name]]) for name in wins[0]}
    return {**means, "rows": rows, "nll": nll}


def _wins(
    model: nn.Module, tokenizer: Any, request: EditRequest, nll: dict[tuple[str, str], float]
) -> dict[str, list[float]]:
    """For each figure, the result of each prompt; none if a target is not given."""
    new, true = request.target_new, request.target_true
    ask = request.portability_prompts
    before: Sequence[str | None] = request.portability_targets_true or [None] * len(ask)
    asked: dict[str, list[tuple[str, str | None, str | None]]] = {
        "efficacy": [(request.text, new, true)],
        "generalization": [(prompt, new, true) for prompt in request.paraphrase_prompts],
        "specificity": [(prompt, true, new) for prompt in request.neighborhood_prompts],
        "portability": list(zip(ask, request.portability_targets, before, strict=True)),
    }
    wins: dict[str, list[float]] = {}
    for name, prompts in asked.items():
        likelier = wins[name] = []
        greedy = wins[f"{name}_strict"] = []
        accuracy = wins[f"{name}_accuracy"] = []
        for prompt, wanted, other in prompts:
            if wanted is None:
                continue
            log_prob, said, share = _answer(model, tokenizer, request, prompt, wanted)
            nll[prompt, wanted] = -log_prob
            greedy.append(said)
            accuracy.append(share)
            if other is not None:
                log_prob_of_other, *_ = _answer(model, tokenizer, request, prompt, other)
                nll[prompt, other] = -log_prob_of_other
                likelier.append(log_prob > log_prob_of_other)
    return wins


def _answer(
    model: nn.Module, tokenizer: Any, request: EditRequest, prompt: str, target: str
) -> tuple[float, bool, float]:
    ids, _ = _tokens(tokenizer, prompt)
    return plain_score(model, ids, _continuation(tokenizer, request, prompt, target))


def plain_score(
    model: nn.Module, prompt: Sequence[int], target: Sequence[int]
) -> tuple[float, bool, float]:
    """One pass for one target: its mean log-likelihood in nats, whether it is the greedy answer at
    every position, and the share of positions where it is.
    """
    rows = [[*prompt, *target[:-1]]]
    log_TN = _logits(model, rows)[0, len(prompt) - 1 :].log_softmax(-1).cpu()
    mean = log_TN[torch.arange(len(target)), list(target)].mean().item()
    right = [int(said == token) for said, token in zip(log_TN.argmax(-1), target, strict=True)]
    return mean, all(right), sum(right) / len(right)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
