"""ibma.fusion: absent modalities have no influence, samples do not see each other, attention weights are what is said."""
import pytest
import torch

from ibma.fusion import FUSIONS, Concatenation, CrossModalAttention, stack_tokens

N, M, D = 6, 3, 16


@pytest.fixture(params=sorted(FUSIONS))
def fusion(request):
    torch.manual_seed(0)
    return FUSIONS[request.param](M, D)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    module = CrossModalAttention(M, D, heads=2)
    with torch.no_grad():
        module.modality_embedding.mul_(50)  # as if trained: of the size of the representations
    return module


def representations(seed=0, n=N, m=M):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=g) for _ in range(m)]


def presence():
    return [torch.tensor([1, 1, 0, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.tensor([1, 0, 0, 1, 1, 1]).bool()]


def test_tokens_are_the_representations_in_order_with_absent_ones_zeroed():
    z, mask = representations(), presence()
    tokens, present = stack_tokens(dict(zip("abc", z, strict=True)), mask)
    assert tokens.shape == (N, M, D) and present.tolist() == torch.stack(mask, 1).tolist()
    for i in range(N):
        for j in range(M):
            assert torch.equal(tokens[i, j], z[j][i] if mask[j][i] else torch.zeros(D))
    assert stack_tokens(z)[1].all()


@pytest.mark.parametrize("z", [[torch.zeros(3, 4), torch.zeros(3, 5)], [torch.zeros(3, 4), torch.zeros(2, 4)]])
def test_unequal_shapes_are_refused_with_the_shapes(z):
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        stack_tokens(z)


@pytest.mark.parametrize("filler", [100.0, float("nan"), float("inf")])
def test_what_stands_in_an_absent_place_has_no_influence(fusion, filler):
    z, mask = representations(), presence()
    expected = fusion(z, mask)
    filled = [torch.where(m[:, None], v, filler).requires_grad_() for v, m in zip(z, mask, strict=True)]
    got = fusion(filled, mask)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    got.square().sum().backward()
    for v, m in zip(filled, mask, strict=True):
        assert not v.grad[~m].any() and v.grad[m].abs().amax(1).gt(0).all()


def test_an_absent_token_is_not_attended_to_nor_does_its_embedding_count(attention):
    z, mask = representations(), presence()
    expected = attention(z, mask)
    here = mask[2]
    with torch.no_grad():
        attention.modality_embedding[2] += 3
    changed = (attention(z, mask) - expected).abs().amax(1) > 1e-4
    assert changed.tolist() == here.tolist()


def test_two_of_three_modalities_fuse_as_in_a_model_that_masks_nothing_else(attention):
    """A block over the two present tokens alone gives the same tokens."""
    z = representations()
    mask = [torch.ones(N).bool(), torch.ones(N).bool(), torch.zeros(N).bool()]
    tokens, present = stack_tokens(z, mask)
    got = attention._block(tokens, present)[0]
    pair = z[0] + attention.modality_embedding[0], z[1] + attention.modality_embedding[1]
    small = torch.stack(pair, 1)
    mixed = attention.norm_attention(small + attention.attention(small, small, small)[0])
    expected = attention.norm_mlp(mixed + attention.mlp(mixed))
    torch.testing.assert_close(got[:, :2], expected, atol=1e-5, rtol=0)
    assert not got[:, 2].any()
    torch.testing.assert_close(attention(z, mask), attention.project(torch.cat([expected.flatten(1), torch.zeros(N, D)], 1)), atol=1e-5, rtol=0)


def test_samples_of_a_batch_do_not_see_each_other(fusion):
    z, mask = representations(), presence()
    fused = fusion(z, mask)
    assert fused.shape == (N, D)
    for i in range(N):
        torch.testing.assert_close(fusion([v[i:i + 1] for v in z], [m[i:i + 1] for m in mask])[0], fused[i], atol=1e-6, rtol=0)


def test_every_present_modality_counts_and_so_does_its_place(fusion):
    z = [v.requires_grad_() for v in representations()]
    fused = fusion(z)
    for gradient in torch.autograd.grad(fused.square().sum(), z):
        assert gradient.abs().amax(1).gt(1e-6).all()
    assert not torch.allclose(fusion([z[1], z[0], z[2]]), fused)


def test_a_mask_of_everybody_is_no_mask(fusion):
    z = representations()
    torch.testing.assert_close(fusion(z, [torch.ones(N).bool()] * M), fusion(z), atol=1e-6, rtol=0)


def test_attention_weights_are_distributions_over_the_present_modalities(attention):
    z, mask = representations(), presence()
    weights = attention.attention_weights(z, mask)
    assert weights.shape == (N, M, M)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, M))
    for i in range(N):
        here = torch.stack(mask, 1)[i]
        assert not weights[i][:, ~here].any() and (weights[i][:, here] > 0).all()
    # and they are the softmax of scaled products, averaged over heads
    tokens = torch.stack(z, 1) + attention.modality_embedding
    a = attention.attention
    q, k = (torch.nn.functional.linear(tokens, a.in_proj_weight[s], a.in_proj_bias[s]).view(N, M, 2, D // 2).transpose(1, 2) for s in (slice(0, D), slice(D, 2 * D)))
    expected = (q @ k.mT / (D // 2) ** 0.5).softmax(-1).mean(1)
    torch.testing.assert_close(attention.attention_weights(z), expected, atol=1e-5, rtol=0)


def test_concatenation_is_one_linear_map():
    z, module = representations(), Concatenation(M, D)
    torch.testing.assert_close(module(z), torch.cat(z, 1) @ module.project.weight.T + module.project.bias)


def test_dropout_acts_in_training_only():
    module, z = CrossModalAttention(M, D, heads=2, dropout=0.5), representations()
    assert not torch.equal(module(z), module(z))
    module.eval()
    torch.testing.assert_close(module(z), module(z))


@pytest.mark.parametrize("m", [1, 2, 5])
def test_any_number_of_modalities(m):
    for cls in FUSIONS.values():
        assert cls(m, D)(representations(m=m)).shape == (N, D)


def test_width_must_fit_the_heads():
    with pytest.raises(ValueError, match="dim=20 must be a multiple of heads=8"):
        CrossModalAttention(2, 20)


def test_a_sample_without_any_modality_is_defined(attention):
    mask = [torch.zeros(N).bool()] * M
    fused = attention(representations(), mask)
    assert fused.isfinite().all()
    torch.testing.assert_close(fused, attention.project.bias.expand(N, D))


def test_another_number_of_modalities_is_refused_by_name(fusion):
    with pytest.raises(ValueError, match="modalities"):
        fusion(representations(m=M + 1))
