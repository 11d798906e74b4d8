"""The query former against a loop over crops and heads, by hand, and against recorded outputs.

Shapes: B crops, L patches, Nq queries, D channels, H heads of Dh.
"""

import math

import pytest
import torch
from reference import part_of, recorded_modules
from torch.utils.flop_counter import FlopCounterMode

from sliming.qformer import QueryFormer, query_attention, sincos_2d


def attention_twin(q, k, v):
    """query_attention with explicit softmax, one crop and one head at a time."""
    crops = []
    for b in range(k.shape[0]):
        heads = []
        for h in range(q.shape[0]):
            weights = (q[h] @ k[b, h].T / math.sqrt(q.shape[-1])).softmax(dim=-1)   # [Nq, L]
            heads.append(weights @ v[b, h])                                         # [Nq, Dh]
        crops.append(torch.cat(heads, dim=-1))                                      # [Nq, H*Dh]
    return torch.stack(crops) if crops else q.new_zeros(0, q.shape[1], q.shape[0] * q.shape[2])


def bicubic_twin(size_in, size_out):
    """1-D bicubic resize as a matrix [out, in]: Keys' kernel, a = -3/4, edges repeated."""
    def kernel(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        centre = (i + 0.5) * size_in / size_out - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), size_in - 1)] += kernel(centre - j)
    return matrix


def normalise_twin(x, ln):
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * ln.weight + ln.bias


def qformer_twin(former, x, heads):
    """The four equations, one crop and one head at a time."""
    def linear(w, t):
        return t @ w.weight.T + w.bias

    def split(t):                                                      # [N, D] -> [H, N, Dh]
        return torch.stack(t.chunk(heads, dim=-1))

    side = math.isqrt(x.shape[1])
    # The module resizes in float32; that the resize itself is right has a test of its own.
    key_position = former.to_patch_grid(former.position, side**2).to(x.dtype)
    q = split(linear(former.w_q, normalise_twin(former.query, former.ln_q) + former.position))
    out = []
    for crop in x:
        patches = normalise_twin(crop, former.ln_kv)
        k, v = split(linear(former.w_k, patches + key_position)), split(linear(former.w_v, patches))
        attended = attention_twin(q, k[None], v[None])[0]
        out.append(normalise_twin(linear(former.w_o, attended), former.ln_post))
    return torch.stack(out)


def randomise(module):
    """Replace every parameter by noise, so that no zero or one hides a mistake."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def released_query_former(weights, prefix, heads):
    """A QueryFormer with the weights `prefix*` of a released Resampler, which packs q, k and v."""
    w = {name: tensor.float() for name, tensor in part_of(weights, prefix).items()}
    former = QueryFormer(w["query"].shape[1], w["query"].shape[0], heads)
    state = {"query": w["query"], "position": w["pos_embed"]}
    for part in ("weight", "bias"):
        state |= {f"{ln}.{part}": w[f"{ln}.{part}"] for ln in ("ln_q", "ln_kv", "ln_post")}
        for which, tensor in zip("qkv", w[f"attn.in_proj_{part}"].chunk(3), strict=True):
            state[f"w_{which}.{part}"] = tensor
        state[f"w_o.{part}"] = w[f"attn.out_proj.{part}"]
    former.load_state_dict(state)
    return former


# ------------------------------------------------------------------------- attention and positions


@pytest.mark.parametrize("crops", [0, 1, 3])
@pytest.mark.parametrize("heads, queries, patches, width",
                         [(1, 1, 1, 4), (2, 4, 49, 8), (3, 9, 4, 5), (2, 144, 576, 16)])
def test_attention_is_softmax_by_hand(crops, heads, queries, patches, width):
    torch.manual_seed(0)
    q = torch.randn(heads, queries, width, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(2, crops, patches, heads, width, dtype=torch.float64, requires_grad=True)
    k, v = packed.transpose(2, 3).unbind(0)                            # strided views [B, H, L, Dh]
    out, expected = query_attention(q, k, v), attention_twin(q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    if crops:
        cotangent = torch.randn_like(out)
        grads = (torch.autograd.grad(y, [q, packed], cotangent) for y in (out, expected))
        torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


def test_positions_on_paper():
    """dim 8: two frequencies, 1 and 1/100. The cell in row 0, column 1 is the second one."""
    s, c, s2, c2 = math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)
    expected = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1], [s, s2, c, c2, 0, 0, 1, 1],
                             [0, 0, 1, 1, s, s2, c, c2], [s, s2, c, c2, s, s2, c, c2]])
    torch.testing.assert_close(sincos_2d(8, 2), expected)


@pytest.mark.parametrize("query_side, key_side",
                         [(1, 7), (2, 1), (3, 7), (12, 24), (7, 3), (12, 12)])
def test_key_positions_are_resized_bicubically(query_side, key_side):
    former = QueryFormer(16, query_side**2)
    matrix = bicubic_twin(query_side, key_side)
    grid = former.position.double().view(query_side, query_side, 16)
    expected = torch.einsum("ir,jc,rcd->ijd", matrix, matrix, grid).flatten(0, 1)
    got = former.to_patch_grid(former.position, key_side**2)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    if query_side == key_side:
        assert torch.equal(got, former.position)


# --------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("queries", [1, 4, 9, 144])
@pytest.mark.parametrize("patches", [1, 4, 49, 576])
@pytest.mark.parametrize("crops", [1, 3])
def test_forward_and_every_gradient(queries, patches, crops):
    torch.manual_seed(queries + patches + crops)
    former = randomise(QueryFormer(8, queries, num_heads=2).double())
    x = torch.randn(crops, patches, 8, dtype=torch.float64, requires_grad=True)
    out, expected = former(x), qformer_twin(former, x, heads=2)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(former.as_written(x), expected, rtol=1e-8, atol=1e-9)
    leaves = {"x": x, **dict(former.named_parameters())}
    assert len(leaves) == 1 + 1 + 3 * 2 + 4 * 2
    cotangent = torch.randn_like(out)
    got, want = (dict(zip(leaves, torch.autograd.grad(y, leaves.values(), cotangent), strict=True))
                 for y in (out, expected))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_no_product_for_a_gradient_that_nobody_needs():
    """With x frozen, the two products dk W_k and dv W_v are left out: 2 * 2 B L D^2 FLOP."""
    former, flop = QueryFormer(64, 4, num_heads=2), {}
    for needed in (False, True):
        x = torch.randn(3, 25, 64, requires_grad=needed)
        with FlopCounterMode(display=False) as counter:
            former(x).sum().backward()
        flop[needed] = counter.get_total_flops()
    assert flop[True] - flop[False] == 2 * 2 * 3 * 25 * 64**2


def test_no_crops_still_give_gradients_and_queries_are_projected_once():
    former, seen = QueryFormer(8, 4), []
    former.w_q.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    former(torch.zeros(3, 9, 8))
    assert seen == [(4, 8)]
    out = former(torch.zeros(0, 9, 8))
    assert out.shape == (0, 4, 8)
    out.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in former.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close_to_float32(autocast):
    torch.manual_seed(0)
    former, x, results = QueryFormer(64, 9, num_heads=2), torch.randn(2, 25, 64), []
    for narrow in (False, True):
        if narrow and not autocast:
            former, x = former.bfloat16(), x.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow and autocast):
            out = former(x)
        leaves = [former.query, former.w_v.weight]
        results.append((out, *torch.autograd.grad(out.float().sin().sum(), leaves)))
    assert out.dtype == torch.bfloat16
    for expected, got in zip(*results, strict=True):
        # bfloat16 rounds at 2^-9 in some ten steps, and LN_post enlarges small errors.
        assert (got.float() - expected).norm() <= 0.05 * expected.norm()


def test_compiles_in_one_graph():
    torch.manual_seed(0)
    former, x = randomise(QueryFormer(8, 4, num_heads=2)), torch.randn(2, 9, 8)
    out = torch.compile(former, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, former(x))
    out.sum().backward()


def test_initialisation_and_state():
    torch.manual_seed(0)
    former = QueryFormer(256, 144)
    assert [QueryFormer(width, 4).num_heads for width in (64, 256, 1024)] == [1, 2, 8]
    assert former.query.std().item() == pytest.approx(0.02, rel=0.05)
    assert former.query.abs().max() > 0.05
    for linear in (former.w_q, former.w_k, former.w_v, former.w_o):
        bound = math.sqrt(6 / (256 + 256))                 # xavier: uniform, variance bound^2 / 3
        assert linear.weight.abs().max() <= bound and (linear.bias == 0).all()
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert {former.ln_q.eps, former.ln_kv.eps, former.ln_post.eps} == {1e-6}
    assert "position" in former.state_dict() and not former.position.requires_grad


@pytest.mark.parametrize("dim, queries, options, message", [
    *((8, queries, {}, "num_queries must be a perfect square") for queries in (0, -4, 2, 12, 145)),
    (8, 4, {"num_heads": 3}, "num_heads must divide dim"), (6, 4, {}, "divisible by 4")])
def test_sizes_must_fit(dim, queries, options, message):
    with pytest.raises(ValueError, match=message):
        QueryFormer(dim, queries, **options)


@pytest.mark.parametrize("patches", [0, 2, 48])
def test_patches_must_form_a_square(patches):
    with pytest.raises(ValueError, match="patches per crop must be a perfect square"):
        QueryFormer(8, 4)(torch.zeros(1, patches, 8))


@pytest.mark.reference
def test_released_resamplers():
    """Each Resampler and input: positions 1e-5, outputs 5e-5 (a float32 port saw 8.4e-6)."""
    compared = 0
    for info, tensors in recorded_modules("Resampler"):
        former = released_query_former(tensors, "weights/", info["num_heads"])
        # Their positions are ours rounded to float16: up to 1, they move by at most 2^-12 = 2.4e-4.
        ours = sincos_2d(former.query.shape[1], former.side)
        torch.testing.assert_close(former.position, ours, rtol=0, atol=2.5e-4)
        for key, value in tensors.items():
            if key.startswith("inter/key_pos_"):
                key_position = former.to_patch_grid(former.position, len(value))
                torch.testing.assert_close(key_position, value, rtol=0, atol=1e-5)
            elif key.startswith("in/x"):
                expected = tensors[key.replace("in/x", "out/y")]
                torch.testing.assert_close(former(value), expected, rtol=0, atol=5e-5)
                compared += 1
        if "out/y_2d_of_x0" in tensors:
            out = former(tensors["in/x"][:1])[0]
            torch.testing.assert_close(out, tensors["out/y_2d_of_x0"], rtol=0, atol=5e-5)
    assert compared
