"""Residual vector quantization (SoundStream, arXiv 2107.03312, algorithm 1) by Euclidean codebooks.

Each stage quantizes what the stages before it left over, in a narrow code space of its own: project in, take the
nearest code, project out, subtract. Parameter and buffer names are those of the public checkpoints; `cluster_size`
and `embed_avg` are the moving averages that training keeps of each code.

Shapes: B batch, T frames, K codebooks, C channels, N vectors, D width of the code space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.codec.config import HiggsAudioV2TokenizerConfig


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
