"""The gated mixture against the equation token by token, by hand, and against recorded outputs.

Shapes: B images, L tokens, Dv vision channels, D LLM channels, 2 experts.
"""

import math

import pytest
import torch
from reference import part_of, recorded_modules
from test_qformer import qformer_twin, randomise, released_query_former

from sliming.moe_adapter import MoEAdapter


def mlp_twin(mlp, x):
    hidden = x @ mlp[0].weight.T + mlp[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))     # GELU, exact form
    return hidden @ mlp[2].weight.T + mlp[2].bias


def adapter_twin(adapter, x, noise=None):
    """G(x)_0 f_m(x) + G(x)_1 f_q(x), token by token; noise: draws [B, L, 2], None in evaluation."""
    f_m, f_q = (mlp_twin(adapter.mlp, y)
                for y in (x, qformer_twin(adapter.query_former, x, heads=1)))
    tokens, gates = [], []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            logit = [x[b, t] @ adapter.w_gate[:, i] for i in (0, 1)]
            if noise is not None:
                std = [torch.log(1 + torch.exp(x[b, t] @ adapter.w_noise[:, i])) for i in (0, 1)]
                logit = [logit[i] + noise[b, t, i] * std[i] for i in (0, 1)]
            total = logit[0].exp() + logit[1].exp()
            gates.append(torch.stack([logit[0].exp() / total, logit[1].exp() / total]))
            tokens.append(gates[-1][0] * f_m[b, t] + gates[-1][1] * f_q[b, t])
    return torch.stack(tokens).view_as(f_m), torch.stack(gates).view(*x.shape[:2], 2)


@pytest.mark.parametrize("images, tokens", [(1, 1), (3, 4), (2, 49)])
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_every_gradient(images, tokens, training):
    torch.manual_seed(images + tokens)
    adapter = randomise(MoEAdapter(8, 12, tokens).double()).train(training)
    x = torch.randn(images, tokens, 8, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(images, tokens, 2, dtype=torch.float64).float().double()  # exact in float32
    cotangents = [torch.randn(images, tokens, size, dtype=torch.float64) for size in (12, 2)]
    leaves = {"x": x, **dict(adapter.named_parameters())}
    assert {"w_gate", "w_noise", "mlp.0.weight", "query_former.query"} < set(leaves)
    got, want = {}, {}
    for found, outs in ((got, adapter(x, noise)),
                        (want, adapter_twin(adapter, x, noise if training else None))):
        found["tokens"], found["gates"] = outs = [out.double() for out in outs]
        grads = torch.autograd.grad(outs, leaves.values(), cotangents, allow_unused=True,
                                    materialize_grads=True)
        found |= zip(leaves, grads, strict=True)
    # The gates are float32 by design, hence 1e-5 although the rest is float64.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert bool(want["w_noise"].any()) == training


def test_gates_on_paper():
    """Features 0 and ln 3 on the first expert's gate: weights 1/2 : 1/2 and 3/4 : 1/4."""
    adapter = MoEAdapter(4, 4, 4).eval()
    with torch.no_grad():
        adapter.w_gate[0, 0] = 1
    x = torch.zeros(1, 4, 4)
    x[0, 2, 0] = math.log(3)
    expected = torch.tensor([[.5, .5], [.5, .5], [.75, .25], [.5, .5]])  # they start even
    torch.testing.assert_close(adapter.gate(x)[0], expected)


def test_noise_statistics_in_training_and_none_in_evaluation():
    """Constant x: a logit is x.W_g + N(0, softplus(x.W_noise)^2), log(g_0/g_1) the difference."""
    torch.manual_seed(0)
    adapter = MoEAdapter(4, 4, 4).train()
    with torch.no_grad():
        adapter.w_gate[0] = torch.tensor([0.5, -0.25])
        adapter.w_noise[0] = torch.tensor([1.0, -1.0])
    x = torch.zeros(10_000, 4, 4)
    x[..., 0] = 1
    gates = adapter.gate(x)
    log_ratio = (gates[..., 0] / gates[..., 1]).log()
    # Of 40,000 draws of standard deviation 1.350, 5 sigma are 0.034.
    std = math.hypot(math.log(1 + math.e), math.log(1 + 1 / math.e))
    assert log_ratio.mean().item() == pytest.approx(0.75, abs=0.034)
    assert log_ratio.std().item() == pytest.approx(std, rel=0.02)
    neighbour = torch.corrcoef(log_ratio[:, :2].T)[0, 1].item()
    assert abs(neighbour) < 0.05                           # tokens draw apart; 5 sigma is 0.05

    adapter.eval()
    state = torch.get_rng_state()
    first, second = adapter.gate(x), adapter.gate(x)
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close((first[..., 0] / first[..., 1]).log(), torch.full((10_000, 4), 0.75))


def test_gate_logits_are_float32_under_bfloat16():
    torch.manual_seed(0)
    adapter = randomise(MoEAdapter(64, 12, 4)).eval()
    x = torch.randn(2, 4, 64).bfloat16()
    expected = (x.double() @ adapter.w_gate.double()).softmax(dim=-1).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adapter(x)[1], expected)
    adapter.bfloat16()
    expected = (x.double() @ adapter.w_gate.double()).softmax(dim=-1).float()
    tokens, gates = adapter(x)
    assert tokens.dtype == torch.bfloat16 and gates.dtype == torch.float32
    torch.testing.assert_close(gates, expected)


def test_no_images_and_wrong_token_count():
    adapter = MoEAdapter(8, 12, 9)
    tokens, gates = adapter(torch.zeros(0, 9, 8))
    assert tokens.shape == (0, 9, 12) and gates.shape == (0, 9, 2)
    with pytest.raises(ValueError, match="built for 9 tokens per image, got 16"):
        adapter(torch.zeros(1, 16, 8))
    with pytest.raises(ValueError, match="perfect square"):
        MoEAdapter(8, 12, 10)


# --------------------------------------------------------------------------------- recorded outputs

RELEASED = {"gate_noise": "w_gate", "gate_epsilon": 1e-6}


def recorded_blocks(**choices):
    """Every recorded GatedBlock: its tensors, its gradients' norms, our adapter with `choices`."""
    for info, tensors in recorded_modules("GatedBlock"):
        weights = part_of(tensors, "weights/")
        adapter = MoEAdapter(info["mm_hidden_size"], info["hidden_size"], info["tokens"], **choices)
        adapter.query_former = released_query_former(weights, "attn.", info["num_heads_qformer"])
        adapter.mlp.load_state_dict(part_of(weights, "projection."))
        with torch.no_grad():
            adapter.w_gate.copy_(weights["w_gate"])
            adapter.w_noise.copy_(weights["w_noise"])
        yield tensors, info["grads"], adapter


@pytest.mark.reference
def test_released_block_in_evaluation():
    """Outputs 5e-5, gates 2e-6; their sum, 1e-6 less than 1, to 2e-7 in the mean over tokens."""
    for tensors, _, adapter in recorded_blocks(**RELEASED):
        x = tensors["in/x"][None]
        tokens, gates = adapter.eval()(x)
        former = adapter.query_former(x)
        got = {"out/y_eval": tokens[0], "out/expert0_mlp": adapter.mlp(x)[0],
               "inter/qformer_out": former[0], "out/expert1_qformer_mlp": adapter.mlp(former)[0],
               "out/clean_logits": x[0] @ adapter.w_gate}
        want = {name: tensors[name] for name in got}
        torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
        torch.testing.assert_close(gates[0], tensors["out/gates_eval"], rtol=0, atol=2e-6)
        sums = [each.double().sum(-1).mean() for each in (gates[0], tensors["out/gates_eval"])]
        assert abs(sums[0] - sums[1]) < 2e-7
        local = adapter.mlp(tensors["in/x_local"])
        torch.testing.assert_close(local, tensors["out/y_local"], rtol=0, atol=5e-5)


@pytest.mark.reference
def test_training_noise_of_the_paper():
    for tensors, _, adapter in recorded_blocks():
        gates = adapter.train()(tensors["in/x"][None], tensors["in/noise"][None])[1][0]
        expected = tensors["out/gates_train_PAPER_formula"]
        torch.testing.assert_close(gates, expected, rtol=0, atol=2e-6)


@pytest.mark.reference
def test_released_block_in_training():
    """Forward and gradients with the recorded noise."""
    for tensors, norms, adapter in recorded_blocks(**RELEASED):
        tokens, gates = adapter.train()(tensors["in/x"][None], tensors["in/noise"][None])
        torch.testing.assert_close(gates[0], tensors["out/gates_train"], rtol=0, atol=2e-6)
        torch.testing.assert_close(tokens[0], tensors["out/y_train"], rtol=0, atol=5e-5)
        (tokens[0] * tensors["in/cotangent"]).sum().backward()

        former = adapter.query_former
        ours = {"attn.query": former.query.grad, "w_gate": adapter.w_gate.grad}
        for part in ("weight", "bias"):
            ours |= {f"projection.{i}.{part}": getattr(adapter.mlp[i], part).grad for i in (0, 2)}
            ours |= {f"attn.{ln}.{part}": getattr(getattr(former, ln), part).grad
                     for ln in ("ln_q", "ln_kv", "ln_post")}
            packed = [getattr(w, part).grad for w in (former.w_q, former.w_k, former.w_v)]
            ours[f"attn.attn.in_proj_{part}"] = torch.cat(packed)
            ours[f"attn.attn.out_proj.{part}"] = getattr(former.w_o, part).grad
        norms = {name: norm for name, norm in norms.items() if norm is not None}
        assert set(norms) == set(ours) and adapter.w_noise.grad is None
        for name, grad in ours.items():
            assert grad.norm().item() == pytest.approx(norms[name], rel=1e-3), name
            if f"grad/{name}" in tensors:
                want = tensors[f"grad/{name}"]
                torch.testing.assert_close(grad, want, rtol=0, atol=1e-4 * want.abs().max().item())
