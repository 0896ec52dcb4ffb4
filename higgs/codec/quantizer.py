"""Residual vector quantization (SoundStream, arXiv 2107.03312, algorithm 1) by Euclidean codebooks.

Each stage quantizes what the stages before it left over, in a narrow code space of its own: project in, take the
nearest code, project out, subtract. Parameter and buffer names are those of the public checkpoints; `cluster_size`
and `embed_avg` are the moving averages that training keeps of each code.

Codebooks learn without gradient (van den Oord et al., arXiv 1711.00937, appendix A): `quantize` gives what a step has
seen, `update_` moves the codes once the step is known to be sound. What goes into `update_` is a sum over vectors, so
that several processes may add up theirs first.

Shapes: B batch, T frames, K codebooks, C channels, N vectors, D width of the code space.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.codec.config import HiggsAudioV2TokenizerConfig

MIN_COUNT = 1e-5  # a moving count at or under it says nothing about where the code should be


@dataclass(frozen=True)
class Quantized:
    """What the first k stages made of a batch of features [B, T, C] in training.

    `features` [B, T, C] carry the straight-through gradient; `commitment` [k] is each stage's mean squared distance
    of its vectors to their codes, which moves the vectors alone; `vectors` [k, N, D] (without gradient) and `codes`
    [B, k, T] are what `code_sums` counts.
    """

    features: Tensor
    codes: Tensor
    commitment: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class CodeSums:
    """How many vectors took each code of k stages, `counts` [k, size], and their sums [k, size, D]."""

    counts: Tensor
    sums: Tensor

    def __add__(self, other: "CodeSums") -> "CodeSums":
        return CodeSums(self.counts + other.counts, self.sums + other.sums)


class Codebook(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("inited", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed", torch.zeros(size, width))
        self.register_buffer("embed_avg", torch.zeros(size, width))

    def encode(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code [...] of each vector [..., D]."""
        return nearest(vectors.flatten(0, -2), self.embed).view(vectors.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.embed)

    @torch.no_grad()
    def assign_(self, centroids: Tensor, counts: Tensor) -> None:
        """Take over centroids [size, D] of `counts` [size] vectors each."""
        self.embed.copy_(centroids)
        self.embed_avg.copy_(centroids * counts[:, None])
        self.cluster_size.copy_(counts)
        self.inited.fill_(1.0)

    @torch.no_grad()
    def update_(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Exponential moving averages of counts [size] and sums [size, D]; a code is the mean of what it stands for.

        A code that has stood for nothing stays where it is.
        """
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - decay)
        self.embed_avg.lerp_(sums.to(self.embed_avg), 1 - decay)
        mean = self.embed_avg / self.cluster_size[:, None]
        self.embed.copy_(torch.where(self.cluster_size[:, None] > MIN_COUNT, mean, self.embed))

    @torch.no_grad()
    def replace_(self, vectors: Tensor, below: float, generator: torch.Generator) -> Tensor:
        """Move the codes whose moving count is under `below` to random ones of vectors [N, D]; returns how many.

        A moved code starts with the mean count, so that it has some time to find its vectors.
        """
        order = torch.randperm(len(vectors), generator=generator)
        order = order.repeat(-(-len(self.embed) // len(order)))[: len(self.embed)].to(vectors.device)
        dead = self.cluster_size < below
        count = torch.where(dead, self.cluster_size.mean(), self.cluster_size)
        chosen = vectors[order].to(self.embed)
        self.embed.copy_(torch.where(dead[:, None], chosen, self.embed))
        self.embed_avg.copy_(torch.where(dead[:, None], chosen * count[:, None], self.embed_avg))
        self.cluster_size.copy_(count)
        return dead.sum()


class VectorQuantizer(nn.Module):
    """One stage, on features [B, T, C]."""

    def __init__(self, config: HiggsAudioV2TokenizerConfig) -> None:
        super().__init__()
        self.codebook = Codebook(config.codebook_size, config.codebook_dim)
        self.project_in = nn.Linear(config.hidden_size, config.codebook_dim)
        self.project_out = nn.Linear(config.codebook_dim, config.hidden_size)

    def encode(self, features: Tensor) -> Tensor:
        return self.codebook.encode(self.project_in(features))

    def decode(self, codes: Tensor) -> Tensor:
        return self.project_out(self.codebook.decode(codes))

    def quantize(self, features: Tensor) -> Quantized:
        """One stage of `ResidualQuantizer.quantize`, without the dimension k."""
        vectors = self.project_in(features)
        with torch.no_grad():
            codes = self.codebook.encode(vectors)
            nearest_codes = self.codebook.decode(codes)
        commitment = F.mse_loss(vectors, nearest_codes)
        # The value is the code, the gradient that of the vector.
        passed = vectors + (nearest_codes - vectors).detach()
        return Quantized(self.project_out(passed), codes, commitment, vectors.detach().flatten(0, -2))


class ResidualQuantizer(nn.Module):
    def __init__(self, config: HiggsAudioV2TokenizerConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(VectorQuantizer(config) for _ in range(config.num_quantizers))

    def encode(self, features: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Codes [B, K, T] of features [B, T, C], by the first `num_codebooks` stages (None: all)."""
        residual, codes = features, []
        for stage in self.quantizers[:num_codebooks]:
            codes.append(stage.encode(residual))
            residual = residual - stage.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Features [B, T, C] of codes [B, K, T]; fewer codebooks than the codec has are allowed."""
        stages = self.quantizers[: codes.shape[1]]
        return sum(stage.decode(row) for stage, row in zip(stages, codes.unbind(1), strict=True))

    def quantize(self, features: Tensor, num_codebooks: int | None = None) -> Quantized:
        """Quantize features [B, T, C] by the first `num_codebooks` stages (None: all), to train on.

        The gradient passes straight through inside each stage's code space and along the residual, as in DAC.
        """
        residual, stages = features, []
        for stage in self.quantizers[:num_codebooks]:
            stages.append(stage.quantize(residual))
            residual = residual - stages[-1].features
        return Quantized(
            features=sum(stage.features for stage in stages),
            codes=torch.stack([stage.codes for stage in stages], dim=1),
            commitment=torch.stack([stage.commitment for stage in stages]),
            vectors=torch.stack([stage.vectors for stage in stages]),
        )

    def update_(self, seen: CodeSums, decay: float = 0.99) -> None:
        """Move the codes of the first k stages, in place, by what all processes together have seen in a step."""
        for stage, counts, sums in zip(self.quantizers, seen.counts, seen.sums, strict=False):
            stage.codebook.update_(counts, sums, decay)

    def replace_(self, vectors: Tensor, below: float, generator: torch.Generator) -> Tensor:
        """Revive the dead codes of the first k stages from vectors [k, N, D]; returns how many [k]."""
        stages = zip(self.quantizers, vectors, strict=False)
        return torch.stack([stage.codebook.replace_(own, below, generator) for stage, own in stages])

    @torch.no_grad()
    def fit(self, features: Tensor, iterations: int, generator: torch.Generator | None = None) -> Tensor:
        """Set every codebook by k-means on features [N, C]; returns how many codes of each are in use [K]."""
        residual, used = features, []
        for stage in self.quantizers:
            vectors = stage.project_in(residual)
            size = stage.codebook.embed.shape[0]
            centroids = kmeans(vectors, size, iterations, generator)
            codes = nearest(vectors, centroids)
            stage.codebook.assign_(centroids, torch.bincount(codes, minlength=size).to(centroids))
            residual = residual - stage.decode(codes)
            used.append(codes.unique().numel())
        return torch.tensor(used)


def code_sums(quantized: Quantized, size: int) -> CodeSums:
    """Counts and sums over the vectors of a batch, of codebooks of `size` codes."""
    k, _, width = quantized.vectors.shape
    codes = quantized.codes.transpose(0, 1).flatten(1)
    counts = quantized.vectors.new_zeros(k, size)
    sums = quantized.vectors.new_zeros(k, size, width)
    for stage in range(k):
        counts[stage] = torch.bincount(codes[stage], minlength=size)
        sums[stage].index_add_(0, codes[stage], quantized.vectors[stage])
    return CodeSums(counts, sums)


def usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Share of codes used and perplexity of counts [..., size], both [...].

    The perplexity is exp of the entropy: `size` where all codes are met equally often, 1 where it is always the same.
    """
    shares = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return (counts > 0).float().mean(-1), torch.special.entr(shares).sum(-1).exp()


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index [N] of the code [size, D] with the least squared distance |x|² − 2x·c + |c|² to each vector [N, D].

    |x|² decides nothing, but is kept so that ties fall as they do in the public implementations.
    """
    lengths = vectors.square().sum(1, keepdim=True)
    return (lengths - 2 * vectors @ codes.T + codes.square().sum(1)).argmin(dim=1)


def kmeans(vectors: Tensor, size: int, iterations: int, generator: torch.Generator | None = None) -> Tensor:
    """Centroids [size, D] of vectors [N, D], by Lloyd's algorithm from randomly picked vectors.

    A cluster that runs empty moves to one of the vectors that are served worst. Where there are fewer vectors than
    centroids, each vector is a centroid and the rest are unused copies. The same generator state gives the same result.
    """
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    if len(vectors) <= size:
        return vectors[order].repeat(-(-size // len(vectors)), 1)[:size]
    centroids = vectors[order[:size]].clone()
    for _ in range(iterations):
        codes = nearest(vectors, centroids)
        counts = torch.bincount(codes, minlength=size)
        sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)
        empty = counts == 0
        worst = (vectors - centroids[codes]).square().sum(1).topk(int(empty.sum())).indices
        centroids = sums / counts.clamp_min(1)[:, None].to(sums)
        centroids[empty] = vectors[worst]
    return centroids
