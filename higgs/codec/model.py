"""The codec: 24 kHz waveform to codes and back, in batches with lengths.

    waveform ─┬─ acoustic encoder ────────────────────────────┐
              └─ 16 kHz ─ HuBERT, mean state ─ semantic enc. ─┴─ fc ─ residual quantizer ─ fc2 ─ acoustic decoder
                                                                              (training) └─ fc1 ─ semantic decoder

A clip's codes and waveform do not depend on the other clips of its batch or on its padding (see `ragged`), up to the
rounding of floating-point sums.

Shapes: B batch, L samples, T frames, K codebooks, C channels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import pad_sequence

from higgs.audio import resample, resampled_length
from higgs.codec.acoustic import AcousticDecoder, AcousticEncoder
from higgs.codec.config import HiggsAudioV2TokenizerConfig
from higgs.codec.hubert import Hubert
from higgs.codec.quantizer import Quantized, ResidualQuantizer
from higgs.codec.ragged import Ragged, conv_length
from higgs.codec.semantic import SemanticDecoder, SemanticEncoder
from higgs.errors import UserError

CPU_GROUP_SECONDS = 1.5  # how much sound is worth coding together on a CPU; see `Ragged.in_groups`
WAVEFORM_LEVEL = 0.1  # what fresh weights expect a waveform's standard deviation to be
TEACHER_PADDING = 160  # samples of silence on either side of what the teacher hears


@dataclass(frozen=True)
class EncoderOutput:
    """Codes [B, K, T], 0 past a row's end, and how many frames [B] of each row are valid."""

    audio_codes: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class DecoderOutput:
    """Waveform [B, 1, L], silent past a row's end, and how many samples [B] of each row are valid."""

    audio_values: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class CodecOutput:
    """Codes [B, K, T] and the waveform decoded from them, cut to the length of the input [B, 1, L]."""

    audio_codes: Tensor
    audio_values: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """A training pass over clips of one length: the waveform [B, 1, L] from what `quantized` holds (None: from the
    features before the quantizer), the `teacher`'s features and the codec's `semantic` estimate of them, [B, C, T]."""

    waveform: Tensor
    quantized: Quantized | None
    teacher: Tensor
    semantic: Tensor


@torch.no_grad()
def encode_clips(codec: "Codec", waveforms: Sequence[Tensor]) -> list[Tensor]:
    """Codes mono clips, each [L] at the codec's rate, in one batch -> codes [K, T] of each, on the CPU."""
    if not waveforms:
        return []
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = pad_sequence(list(waveforms), batch_first=True)[:, None]
    encoded = codec.encode(padded.to(codec.device, codec.dtype), lengths=lengths.to(codec.device))
    codes, frames = encoded.audio_codes.cpu(), encoded.lengths.tolist()
    return [row[:, :length] for row, length in zip(codes, frames, strict=True)]


def decode_prefix(
    codec: "Codec", codes: Tensor, bandwidth: float, length: int, lengths: Tensor | None = None
) -> Tensor:
    """Waveforms [B, 1, length] of the codebooks of codes [B, K, T] (`lengths` [B] frames) that a bandwidth pays for."""
    kept = codes[:, : codec.config.num_codebooks_at(bandwidth)]
    sound = codec.decode(kept, return_dict=False, lengths=lengths)
    return F.pad(sound, (0, max(0, length - sound.shape[-1])))[..., :length]


class Codec(nn.Module):
    """The neural codec of Higgs Audio V2.

    A fresh codec has torch's default weights and empty codebooks: call `init_weights` and `fit_codebooks`, or load a
    checkpoint.
    """

    # May be absent from or extra in a checkpoint: a tensor of the teacher that nothing here computes with.
    optional_keys = ("semantic_model.masked_spec_embed",)

    def __init__(self, config: HiggsAudioV2TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.acoustic_encoder = AcousticEncoder(config.acoustic_model_config)
        self.acoustic_decoder = AcousticDecoder(config.acoustic_model_config)
        self.encoder_semantic = SemanticEncoder(config)
        self.decoder_semantic = SemanticDecoder(config)
        self.semantic_model = Hubert(config.semantic_model_config)
        self.fc = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.semantic_hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.acoustic_model_config.hidden_size)
        self.quantizer = ResidualQuantizer(config)

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def frame_rate(self) -> int:
        return self.config.frame_rate

    @property
    def num_codebooks(self) -> int:
        return self.config.num_quantizers

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def encode(
        self,
        input_values: Tensor,
        bandwidth: float | None = None,
        return_dict: bool = True,
        *,
        lengths: Tensor | None = None,
    ) -> EncoderOutput | Tensor:
        """Codes of a batch of mono clips.

        Args:
            input_values: waveforms [B, 1, L] in -1…1 at `sample_rate`, padded at the end with anything.
            bandwidth: in kbit/s, one of `config.target_bandwidths`; None means the highest, that is all codebooks.
            lengths: samples [B] of each clip; None means that every clip fills L.
            return_dict: False gives the codes alone.

        Raises:
            UserError: where the clips are not mono, too short for one frame, or the bandwidth or lengths do not fit.
        """
        num_codebooks = self.config.num_codebooks_at(bandwidth)
        features = self.embed(input_values, lengths)
        codes = self.quantizer.encode(features.values.transpose(1, 2), num_codebooks)
        codes = Ragged(codes, features.lengths).masked(0)
        if not return_dict:
            return codes
        return EncoderOutput(codes, torch.tensor(features.row_lengths, device=codes.device))

    def decode(
        self, audio_codes: Tensor, return_dict: bool = True, *, lengths: Tensor | None = None
    ) -> DecoderOutput | Tensor:
        """Waveforms [B, 1, T·hop] of codes.

        Args:
            audio_codes: codes [B, K, T] in 0…codebook_size-1; fewer codebooks than `num_codebooks` decode coarsely.
            lengths: frames [B] of each row, past which codes may be anything; None means that every row fills T.
            return_dict: False gives the waveforms alone.

        Raises:
            UserError: where the shape, the lengths or a code does not fit.
        """
        if audio_codes.ndim != 3 or not 1 <= audio_codes.shape[1] <= self.num_codebooks or not audio_codes.shape[2]:
            raise UserError(
                f"Codes must have the shape [batch, 1 to {self.num_codebooks} codebooks, frames]; "
                f"got {tuple(audio_codes.shape)}."
            )
        codes = Ragged.from_batch(audio_codes, lengths)
        indices = codes.masked(0)
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.config.codebook_size:
            raise UserError(
                f"Codes run from {low} to {high}, but the codebooks hold 0 to {self.config.codebook_size - 1}; "
                "revert the delay pattern and drop the stream's begin and end codes before decoding."
            )
        audio = self._run(self._decode, Ragged(indices, codes.lengths), CPU_GROUP_SECONDS * self.frame_rate)
        values = audio.masked()
        if not return_dict:
            return values
        return DecoderOutput(values, torch.tensor(audio.row_lengths, device=values.device))

    def forward(
        self,
        input_values: Tensor,
        audio_codes: Tensor | None = None,
        bandwidth: float | None = None,
        return_dict: bool = True,
        *,
        lengths: Tensor | None = None,
    ) -> CodecOutput | tuple[Tensor, Tensor]:
        """Encode (unless `audio_codes` [B, K, T] are given) and decode clips [B, 1, L]; see `encode` and `decode`."""
        frames = None
        if audio_codes is None:
            encoded = self.encode(input_values, bandwidth, lengths=lengths)
            audio_codes, frames = encoded.audio_codes, encoded.lengths
        elif lengths is not None:
            frames = torch.tensor([min(self.code_length(int(n)), audio_codes.shape[-1]) for n in lengths])
        values = self.decode(audio_codes, return_dict=False, lengths=frames)
        values = Ragged.from_batch(values, None if lengths is None else lengths.clamp(max=values.shape[-1])).masked()
        values = values[..., : input_values.shape[-1]]
        return CodecOutput(audio_codes, values) if return_dict else (audio_codes, values)

    def embed(self, input_values: Tensor, lengths: Tensor | None = None) -> Ragged:
        """The joint features [B, C, T] that are quantized, of waveforms as in `encode`."""
        waveform = self._check_waveform(input_values, lengths)
        return self._run(self._embed, waveform, CPU_GROUP_SECONDS * self.sample_rate)

    def reconstruct(
        self, input_values: Tensor, num_codebooks: int | None = None, quantize: bool = True
    ) -> Reconstruction:
        """The training pass: clips [B, 1, L] of one length through the first `num_codebooks` stages (None: all).

        Codes and distances are computed in float32 whatever autocast asks for.
        """
        waveform = self._check_waveform(input_values, None)
        teacher = self.semantic_features(waveform)
        features, quantized = self._embed(waveform, teacher).values.transpose(1, 2), None
        with torch.autocast(features.device.type, enabled=False):
            if quantize:
                quantized = self.quantizer.quantize(features.to(self.dtype), num_codebooks)
                features = quantized.features
        sound = self.acoustic_decoder(Ragged(self.fc2(features).transpose(1, 2))).values
        length = input_values.shape[-1]
        sound = F.pad(sound, (0, max(0, length - sound.shape[-1])))[..., :length]
        semantic = self.decoder_semantic(Ragged(self.fc1(features).transpose(1, 2))).values
        return Reconstruction(sound, quantized, teacher.values[..., : semantic.shape[-1]], semantic)

    def _run(self, function: Callable[[Ragged], Ragged], batch: Ragged, cpu_limit: float) -> Ragged:
        if batch.values.device.type == "cpu" and not torch.is_grad_enabled():
            return batch.in_groups(function, int(cpu_limit))
        return function(batch)

    def _decode(self, codes: Ragged) -> Ragged:
        features = self.quantizer.decode(codes.values)
        return self.acoustic_decoder(Ragged(self.fc2(features).transpose(1, 2), codes.lengths))

    def _embed(self, waveform: Ragged, teacher: Ragged | None = None) -> Ragged:
        semantic = self.encoder_semantic(self.semantic_features(waveform) if teacher is None else teacher)
        acoustic = self.acoustic_encoder(waveform.pad(*self._acoustic_padding(waveform.row_lengths)))
        # Both branches normally give the same number of frames; the shorter one decides where they do not.
        acoustic, semantic = acoustic.cut(semantic.row_lengths), semantic.cut(acoustic.row_lengths)
        joint = torch.cat([acoustic.values, semantic.values], dim=1)
        return Ragged(self.fc(joint.transpose(1, 2)).transpose(1, 2), semantic.lengths)

    @torch.no_grad()
    def semantic_features(self, waveform: Ragged) -> Ragged:
        """The teacher's features [B, C, T], at the codec's frame rate, of a waveform [B, 1, L]."""
        rates = self.sample_rate, self.config.semantic_sample_rate
        heard = Ragged(
            resample(waveform.masked(), *rates),
            waveform.lengths and tuple(resampled_length(n, *rates) for n in waveform.lengths),
        )
        margin = [TEACHER_PADDING] * len(heard.values)
        return self.semantic_model(heard.pad(margin, margin)).every(max(1, self.config.semantic_downsample_factor))

    def code_length(self, num_samples: int) -> int:
        """Frames that `encode` makes of a clip of `num_samples`; 0 where it is too short."""
        padding = self._acoustic_padding((num_samples,))[0][0]
        acoustic = self.acoustic_encoder.output_length(num_samples + 2 * padding)
        return min(acoustic, self._semantic_length(num_samples))

    @cached_property
    def minimum_samples(self) -> int:
        """The shortest clip that makes a frame."""
        return next(n for n in range(1, 100 * self.config.hop_length) if self.code_length(n) > 0)

    def _semantic_length(self, num_samples: int) -> int:
        length = resampled_length(num_samples, self.sample_rate, self.config.semantic_sample_rate)
        length = self.semantic_model.output_length(length + 2 * TEACHER_PADDING)
        length = -(-length // max(1, self.config.semantic_downsample_factor))
        for stage in self.encoder_semantic.conv_blocks:
            length = conv_length(stage.conv, length)
        return length

    def _acoustic_padding(self, lengths: Iterable[int]) -> tuple[list[int], list[int]]:
        """Silence before and after each clip: half a hop on both sides, where the branches would else disagree."""
        half = self.config.hop_length // 2
        side = [0 if self.acoustic_encoder.output_length(n) == self._semantic_length(n) else half for n in lengths]
        return side, side

    def _check_waveform(self, input_values: Tensor, lengths: Tensor | None) -> Ragged:
        if input_values.ndim != 3 or input_values.shape[1] != 1:
            raise UserError(
                f"Audio must be mono, with the shape [batch, 1, samples]; got {tuple(input_values.shape)}. "
                "Average the channels of stereo clips, or load them with higgs.audio.load_audio."
            )
        waveform = Ragged.from_batch(input_values, lengths)
        for row, samples in enumerate(waveform.row_lengths):
            if samples < self.minimum_samples:
                raise UserError(
                    f"Clip {row} of the batch has {samples} samples; a clip must have at least {self.minimum_samples} "
                    f"({1000 * self.minimum_samples / self.sample_rate:.1f} ms at {self.sample_rate} Hz). "
                    "Leave it out or pad it with silence."
                )
        return waveform

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights to train from; codebooks stay empty until `fit_codebooks` has seen some speech.

        Convolutions on the signal path keep the variance, so that narrow and deep codecs start with a signal; those
        inside residual units start small (0.02, as DAC does), so that the units start as the identity. Waveforms are
        taken for a tenth of full scale and everything between for one, so that neither branch drowns the other.
        `project_out` is the transpose of an orthogonal `project_in`: a stage subtracts exactly what it has coded.
        """
        gains = {id(self.acoustic_encoder.conv1): 1 / WAVEFORM_LEVEL, id(self.acoustic_decoder.conv2): WAVEFORM_LEVEL}
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d):
                fan_in = module.weight.shape[1] * module.weight.shape[2]
                if ".res_unit" in name:
                    std = 0.02
                elif name.startswith("semantic_model"):
                    std = (2 / fan_in) ** 0.5
                else:
                    std = gains.get(id(module), 1.0) * fan_in**-0.5
                _draw_weight(module, std, generator)
            elif isinstance(module, nn.ConvTranspose1d):
                # Every output sample sums kernel/stride = 2 taps of each input channel.
                std = (module.in_channels * module.kernel_size[0] / module.stride[0]) ** -0.5
                _draw_weight(module, std, generator)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range, generator=generator)
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d):
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if hasattr(module, "alpha"):
                nn.init.ones_(module.alpha)
        for layer in (self.fc, self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        for stage in self.quantizer.quantizers:
            nn.init.orthogonal_(stage.project_in.weight, generator=generator)
            stage.project_out.weight.copy_(stage.project_in.weight.T)
            codebook = stage.codebook
            codebook.assign_(torch.zeros_like(codebook.embed), torch.zeros_like(codebook.cluster_size))
            codebook.inited.zero_()

    @torch.no_grad()
    def fit_codebooks(
        self,
        input_values: Tensor,
        lengths: Tensor | None = None,
        iterations: int = 20,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Set every codebook by k-means on what the stages before it leave over of these clips (as in `encode`).

        An untrained codec has no codes otherwise. Returns the number of codes of each codebook in use [K].
        """
        features = self.embed(input_values, lengths)
        valid = features.valid()
        vectors = features.values.transpose(1, 2)
        vectors = vectors.flatten(0, 1) if valid is None else vectors[valid]
        return self.quantizer.fit(vectors, iterations, generator)


def _draw_weight(module: nn.Conv1d | nn.ConvTranspose1d, std: float, generator: torch.Generator | None) -> None:
    values = torch.empty_like(module.weight)
    nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator)
    if is_parametrized(module, "weight"):
        module.weight = values  # sets the length and direction behind it
    else:
        module.weight.copy_(values)
