"""The quantizer in training: gradients, moving codebooks against a slow reference, dead codes, prefixes."""

import pytest
import torch
from codec_cases import make_codec
from torch import Tensor

from higgs.codec.quantizer import Codebook, CodeSums, Quantized, ResidualQuantizer, code_sums, nearest, usage

SIZE, WIDTH = 16, 5


@pytest.fixture
def quantizer() -> ResidualQuantizer:
    codec = make_codec("hop-320")
    return codec.quantizer.train()


@pytest.fixture
def features(quantizer: ResidualQuantizer) -> Tensor:
    width = quantizer.quantizers[0].project_in.in_features
    return torch.randn(2, 7, width, generator=torch.Generator().manual_seed(1))


def test_training_quantizes_as_coding_does(quantizer: ResidualQuantizer, features: Tensor):
    for k in (1, 2, 3):
        found = quantizer.quantize(features, k)
        codes = quantizer.encode(features, k)
        assert torch.equal(found.codes, codes)
        torch.testing.assert_close(found.features, quantizer.decode(codes))
        assert found.commitment.shape == (k,) and found.vectors.shape[:2] == (k, 14)


def test_prefixes_of_codebooks_share_their_codes(quantizer: ResidualQuantizer, features: Tensor):
    whole = quantizer.quantize(features).codes
    for k in (1, 2):
        assert torch.equal(quantizer.quantize(features, k).codes, whole[:, :k])


def test_the_gradient_passes_straight_through_the_code_space(quantizer: ResidualQuantizer, features: Tensor):
    """It is that of the same stages with every vector taken for its own code."""
    features.requires_grad_()
    goal = torch.randn_like(features)
    (found,) = torch.autograd.grad((quantizer.quantize(features).features * goal).sum(), features)
    residual, total = features, 0
    for stage in quantizer.quantizers:
        passed = stage.project_out(stage.project_in(residual))
        residual, total = residual - passed, total + passed
    (expected,) = torch.autograd.grad((total * goal).sum(), features)
    torch.testing.assert_close(found, expected)


def test_a_stage_with_identity_projections_has_the_identity_as_gradient():
    codec = make_codec("hop-320")
    stage = codec.quantizer.quantizers[0]
    size = stage.project_in.in_features
    assert stage.project_in.out_features == size
    with torch.no_grad():
        stage.project_in.weight.copy_(torch.eye(size))
        stage.project_out.weight.copy_(torch.eye(size))
    features = torch.randn(1, 4, size, requires_grad=True)
    goal = torch.randn(1, 4, size)
    (found,) = torch.autograd.grad((stage.quantize(features).features * goal).sum(), features)
    torch.testing.assert_close(found, goal)


def test_commitment_pulls_vectors_to_their_codes_and_moves_no_code(quantizer: ResidualQuantizer, features: Tensor):
    features.requires_grad_()
    stage = quantizer.quantizers[0]
    found = stage.quantize(features)
    vectors = stage.project_in(features)
    codes = stage.codebook.embed[found.codes]
    torch.testing.assert_close(found.commitment, (vectors - codes).square().mean())
    slope = 2 * (vectors - codes) / vectors.numel()
    (expected,) = torch.autograd.grad(vectors, features, slope.detach())
    (got,) = torch.autograd.grad(found.commitment, features)
    torch.testing.assert_close(got, expected)
    assert not stage.codebook.embed.requires_grad


def test_sums_count_every_vector_once(quantizer: ResidualQuantizer, features: Tensor):
    found = quantizer.quantize(features)
    sums = code_sums(found, 64)
    assert sums.counts.shape == (3, 64) and sums.counts.sum(1).tolist() == [14, 14, 14]
    for k in range(3):
        for code, vector in zip(found.codes[:, k].flatten().tolist(), found.vectors[k], strict=True):
            sums.sums[k, code] -= vector
            sums.counts[k, code] -= 1
    assert not sums.counts.any()
    torch.testing.assert_close(sums.sums, torch.zeros_like(sums.sums), atol=1e-5, rtol=0)
    halves = [
        code_sums(Quantized(found.features, found.codes[b : b + 1], found.commitment, part), 64)
        for b, part in enumerate(found.vectors.split(7, dim=1))
    ]
    torch.testing.assert_close((halves[0] + halves[1]).sums, code_sums(found, 64).sums)


def slow_update(codebook: Codebook, vectors: Tensor, decay: float) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """The moving averages as the paper writes them, one code and one vector at a time."""
    counts, sums, means = [], [], []
    chosen = [min(range(SIZE), key=lambda i: float((v - codebook.embed[i]).square().sum())) for v in vectors]
    for code in range(SIZE):
        mine = [vector for vector, index in zip(vectors, chosen, strict=True) if index == code]
        total = sum(mine) if mine else torch.zeros(WIDTH)
        counts.append(decay * float(codebook.cluster_size[code]) + (1 - decay) * len(mine))
        sums.append(decay * codebook.embed_avg[code] + (1 - decay) * total)
        means.append(sums[-1] / counts[-1] if counts[-1] > 1e-5 else codebook.embed[code].clone())
    return counts, sums, means


def test_codes_move_as_the_slow_reference_says():
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(SIZE, WIDTH)
    codebook.assign_(torch.randn(SIZE, WIDTH, generator=generator), torch.full((SIZE,), 3.0))
    codebook.cluster_size[:2] = 0  # never met: they stay where they are unless a vector comes
    codebook.embed_avg[:2] = 0
    for _ in range(5):
        vectors = 0.7 * torch.randn(40, WIDTH, generator=generator)
        counts, sums, means = slow_update(codebook, vectors, 0.9)
        codes = nearest(vectors, codebook.embed)
        found = code_sums(Quantized(vectors, codes[None, None], vectors.new_zeros(1), vectors[None]), SIZE)
        codebook.update_(found.counts[0], found.sums[0], 0.9)
        torch.testing.assert_close(codebook.cluster_size, torch.tensor(counts))
        torch.testing.assert_close(codebook.embed_avg, torch.stack(sums))
        torch.testing.assert_close(codebook.embed, torch.stack(means))


def test_moving_codes_find_the_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(SIZE, WIDTH, generator=generator)
    codebook = Codebook(SIZE, WIDTH)
    codebook.assign_(centres + torch.randn(SIZE, WIDTH, generator=generator), torch.full((SIZE,), 4.0))
    for _ in range(200):
        picked = torch.randint(SIZE, (64,), generator=generator)
        vectors = centres[picked] + 0.05 * torch.randn(64, WIDTH, generator=generator)
        codes = nearest(vectors, codebook.embed)
        found = code_sums(Quantized(vectors, codes[None, None], vectors.new_zeros(1), vectors[None]), SIZE)
        codebook.update_(found.counts[0], found.sums[0], 0.95)
    assert (codebook.embed - centres).norm(dim=1).max() < 0.1


def test_dead_codes_become_vectors_of_the_batch_and_others_stay():
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(SIZE, WIDTH)
    codebook.assign_(torch.randn(SIZE, WIDTH, generator=generator), torch.full((SIZE,), 3.0))
    dead = [2, 5, 11]
    codebook.cluster_size[dead] = 1.9
    before = {name: buffer.clone() for name, buffer in codebook.named_buffers()}
    vectors = torch.randn(30, WIDTH, generator=generator)
    assert int(codebook.replace_(vectors, 2.0, torch.Generator().manual_seed(7))) == 3
    alive = [i for i in range(SIZE) if i not in dead]
    for name, buffer in codebook.named_buffers():
        if name != "inited":
            assert torch.equal(buffer[alive], before[name][alive])
    moved = {int((vectors == code).all(1).nonzero()) for code in codebook.embed[dead]}
    assert len(moved) == 3  # three different vectors
    torch.testing.assert_close(codebook.embed_avg / codebook.cluster_size[:, None], codebook.embed)
    assert bool((codebook.cluster_size >= 2).all())
    again = Codebook(SIZE, WIDTH)
    again.load_state_dict(before)
    again.replace_(vectors, 2.0, torch.Generator().manual_seed(7))
    assert torch.equal(again.embed, codebook.embed)


def test_more_dead_codes_than_vectors_share_them():
    codebook = Codebook(SIZE, WIDTH)
    vectors = torch.randn(3, WIDTH)
    codebook.replace_(vectors, 2.0, torch.Generator().manual_seed(0))
    assert all(bool((vectors == code).all(1).any()) for code in codebook.embed)


def test_only_the_stages_in_use_move(quantizer: ResidualQuantizer, features: Tensor):
    before = [stage.codebook.embed.clone() for stage in quantizer.quantizers]
    quantizer.update_(code_sums(quantizer.quantize(features, 2), 64))
    changed = [
        not torch.equal(old, stage.codebook.embed) for old, stage in zip(before, quantizer.quantizers, strict=True)
    ]
    assert changed == [True, True, False]
    size = quantizer.quantizers[0].codebook.cluster_size[None].clone()
    quantizer.update_(CodeSums(torch.zeros_like(size), torch.zeros_like(before[0])[None]), decay=0.5)
    torch.testing.assert_close(quantizer.quantizers[0].codebook.cluster_size, 0.5 * size[0])


def test_use_and_perplexity():
    counts = torch.tensor([[4.0, 4, 4, 4], [8, 0, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0]])
    use, perplexity = usage(counts)
    torch.testing.assert_close(use, torch.tensor([1.0, 0.25, 0.5, 0.0]))
    torch.testing.assert_close(perplexity, torch.tensor([4.0, 1.0, 2.0, 1.0]))


def test_fitted_prefixes_come_closer_codebook_by_codebook():
    codec = make_codec("hop-320")
    generator = torch.Generator().manual_seed(0)
    codec.init_weights(generator)
    assert not any(bool(stage.codebook.inited) for stage in codec.quantizer.quantizers)
    features = torch.randn(64, 4, codec.config.hidden_size, generator=generator)
    codec.quantizer.fit(features.flatten(0, 1), 10, generator)
    assert all(bool(stage.codebook.inited) for stage in codec.quantizer.quantizers)
    decoded = [codec.quantizer.decode(codec.quantizer.encode(features, k)) for k in range(1, 4)]
    errors = [float((sound - features).detach().square().mean()) for sound in decoded]
    assert errors[2] < errors[1] < errors[0] < float(features.square().mean())
