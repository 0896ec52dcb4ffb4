"""Sound in and out: load, resample, save, log-mel. The only file that touches sound files or torchaudio.

Sound files go through soundfile; torchaudio (which no longer moves) lends its resampler and mel filters.
Shapes: L samples, C channels, M mel bands, T mel frames.
"""

import base64
import binascii
import io
import math
import os
import re
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks
from torchaudio.functional import resample as sinc_resample

from higgs.errors import UserError

AudioSource = str | os.PathLike | bytes | np.ndarray | Tensor

# suffix -> (libsndfile format, subtype)
FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
FULL_SCALE = 0.999  # at or above this a sample counts as clipped
CLIPPED_SHARE = 0.001  # a clip with a larger share of such samples is reported
DOWNLOAD_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class Waveform:
    """Mono float32 `samples` [L], nominally in -1…1, at `sample_rate` Hz."""

    samples: Tensor
    sample_rate: int


@dataclass(frozen=True)
class SoundInfo:
    """What a sound file says about itself: samples per channel, and its rate in Hz."""

    samples: int
    sample_rate: int

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate


def sound_info(path: str | os.PathLike) -> SoundInfo:
    """Length and rate of a sound file, from its header. UserError where it cannot be read or holds nothing."""
    name = _name_of(path)
    try:
        info = soundfile.info(_existing_file(path, name))
    except (OSError, soundfile.LibsndfileError) as error:
        raise _unreadable(name, error) from error
    if info.frames < 1:
        raise UserError(f"{name} holds no samples; give a clip with sound in it.")
    return SoundInfo(info.frames, info.samplerate)


def load_part(path: str | os.PathLike, sample_rate: int, start: float, duration: float) -> Tensor:
    """Part of a sound file as mono float32 [L] at `sample_rate` Hz; `start` and `duration` in seconds.

    Only that part is read, and clipping is not reported. The result is shorter where the file ends before, and an error
    where nothing is left. UserError as in `load_audio`.
    """
    name = _name_of(path)
    try:
        with soundfile.SoundFile(_existing_file(path, name)) as file:
            rate = file.samplerate
            file.seek(min(round(start * rate), file.frames))
            samples = file.read(math.ceil(duration * rate), dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise _unreadable(name, error) from error
    return resample(_mono(torch.from_numpy(samples).T, name), rate, sample_rate)


def load_audio(
    source: AudioSource, sample_rate: int | None = None, *, sampling_rate_of_array: int | None = None
) -> Tensor:
    """Load any kind of audio as mono float32 [L] at `sample_rate` Hz (None: at its own rate).

    Args:
        source: a file path, an http(s) or file URL, base64 text (with or without a `data:` prefix), the bytes of a
            sound file, or samples as an array or tensor [L], [C, L] or [L, C]; integer samples are scaled to -1…1.
        sampling_rate_of_array: the rate of `source` where it is an array; None means it is at `sample_rate` already.

    Raises:
        UserError: naming the source, where it is missing, unreadable, empty or holds non-finite samples.
    """
    rate = sample_rate if sampling_rate_of_array is None else sampling_rate_of_array
    waveform = read_audio(source, sampling_rate_of_array=rate)
    return waveform.samples if sample_rate is None else resample(waveform.samples, waveform.sample_rate, sample_rate)


def read_audio(source: AudioSource, *, sampling_rate_of_array: int | None = None) -> Waveform:
    """As `load_audio`, at the source's own sample rate, which is returned beside the samples."""
    name = _name_of(source)
    if isinstance(source, np.ndarray | Tensor):
        if sampling_rate_of_array is None:
            raise UserError(f"The sample rate of {name} is unknown; pass sampling_rate_of_array=… in Hz.")
        channels, rate = _channels_of_array(source, name), sampling_rate_of_array
    else:
        channels, rate = _decode_file(source, name)
    mono = _mono(channels, name)
    share = float((channels.abs() >= FULL_SCALE).float().mean())
    if share > CLIPPED_SHARE:
        warnings.warn(
            f"{name} is clipped: {share:.1%} of its samples are at full scale. It is used as it is.", stacklevel=2
        )
    return Waveform(mono, int(rate))


def _mono(channels: Tensor, name: str) -> Tensor:
    """The mean [L] of channels [C, L], which must be finite."""
    if not channels.numel():
        raise UserError(f"{name} holds no samples; give a clip with sound in it.")
    broken = int((~channels.isfinite()).sum())
    if broken:
        raise UserError(f"{name} holds {broken} samples that are NaN or infinite; repair or re-export the clip.")
    return channels.mean(dim=0)


def resample(waveform: Tensor, orig: int, new: int) -> Tensor:
    """Band-limited resampling of [..., L] from `orig` to `new` Hz (windowed sinc); the result has ceil(L·new/orig)."""
    return waveform if orig == new else sinc_resample(waveform, orig, new)


def resampled_length(length: int, orig: int, new: int) -> int:
    """Number of samples that `resample` makes of `length` samples."""
    if orig == new:
        return length
    divisor = math.gcd(orig, new)
    # The float32 rounding (which shows beyond 2^24 samples) is the resampler's own.
    return int(torch.ceil(torch.as_tensor((new // divisor) * length / (orig // divisor))))


def save_audio(path: str | os.PathLike, waveform: Tensor | np.ndarray, sample_rate: int) -> None:
    """Write mono samples [L] (leading dims of 1 are dropped) as .wav, .flac (16 bit), .ogg or .mp3, by suffix.

    The file appears only once it is complete; folders that are missing are made. Samples beyond -1…1 are clipped.
    """
    path = Path(path)
    data = encode_audio(waveform, sample_rate, path.suffix.lower(), f"Cannot write {path}: ")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def encode_audio(waveform: Tensor | np.ndarray, sample_rate: int, suffix: str = ".flac", fault: str = "") -> bytes:
    """The bytes of a sound file of mono samples [L], as `save_audio` writes it. An error begins with `fault`."""
    if suffix not in FORMATS:
        raise UserError(f"{fault}the suffix must be one of {', '.join(FORMATS)}.")
    samples = torch.as_tensor(waveform).detach().float().cpu()
    if samples.numel() != samples.shape[-1]:
        raise UserError(f"{fault}expected one mono clip [L], got shape {tuple(samples.shape)}.")
    if not samples.isfinite().all():
        raise UserError(f"{fault}the waveform holds NaN or infinite samples.")
    file_format, subtype = FORMATS[suffix]
    buffer = io.BytesIO()
    try:
        soundfile.write(
            buffer, samples.reshape(-1).clamp(-1.0, 1.0).numpy(), sample_rate, subtype=subtype, format=file_format
        )
    except soundfile.LibsndfileError as error:
        raise UserError(f"{fault}{error}.") from error
    return buffer.getvalue()


def log_mel(
    waveform: Tensor,
    sample_rate: int,
    *,
    num_mels: int = 80,
    window: int = 1024,
    hop: int = 256,
    floor: float = 1e-5,
) -> Tensor:
    """Log10 mel magnitudes [..., M, T] of a waveform [..., L]; `window` and `hop` in samples, `floor` in magnitude."""
    batch, length = waveform.shape[:-1], waveform.shape[-1]
    spectrum = torch.stft(
        waveform.reshape(-1, length),
        n_fft=window,
        hop_length=hop,
        window=torch.hann_window(window, device=waveform.device, dtype=waveform.dtype),
        # Reflection needs more than half a window of samples; shorter clips are framed over silence.
        pad_mode="reflect" if length > window // 2 else "constant",
        return_complex=True,
    ).abs()
    mel = mel_filters(num_mels, window, sample_rate).to(spectrum).T @ spectrum
    return mel.clamp_min(floor).log10().reshape(*batch, num_mels, -1)


@lru_cache(maxsize=32)
def mel_filters(num_mels: int, window: int, sample_rate: int) -> Tensor:
    """Triangular mel filters [window // 2 + 1, M], each of area one, up to half of `sample_rate`. Do not change them.

    Where the mels outnumber the bins at low frequencies, some filters hold no bin and are zero.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filterbank")
        return melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, num_mels, sample_rate, norm="slaney")


def _name_of(source: AudioSource) -> str:
    """What error messages call the source."""
    if isinstance(source, np.ndarray | Tensor):
        return f"The audio array of shape {tuple(source.shape)}"
    if isinstance(source, bytes | bytearray):
        return f"The audio of {len(source)} bytes"
    if isinstance(source, str) and (source.startswith("data:") or _is_base64(source)):
        return f"The base64 audio ({len(source)} characters)"
    return f"Audio file {os.fspath(source)}"


def _decode_file(source: str | os.PathLike | bytes, name: str) -> tuple[Tensor, int]:
    """The channels [C, L] and the sample rate of an encoded sound file, wherever it is."""
    if isinstance(source, str) and source.startswith("file://"):
        source = urllib.request.url2pathname(source.removeprefix("file://"))
    if isinstance(source, bytes | bytearray):
        handle = io.BytesIO(source)
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        handle = io.BytesIO(_download(source))
    elif isinstance(source, str) and (
        source.startswith("data:") or (not os.path.exists(source) and _is_base64(source))
    ):
        text = source.partition(",")[2] if source.startswith("data:") else source
        try:
            handle = io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
        except binascii.Error as error:
            raise UserError(f"{name} is not valid base64 ({error}); encode the bytes of a sound file.") from error
    else:
        handle = _existing_file(source, name)
    try:
        samples, rate = soundfile.read(handle, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise _unreadable(name, error) from error
    return torch.from_numpy(samples).T, rate


def _existing_file(path: str | os.PathLike, name: str) -> str:
    if not os.path.exists(path):
        raise UserError(f"{name} does not exist; check the path.")
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder; give the path of one sound file.")
    return os.fspath(path)


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} cannot be read as sound ({error}); convert it to wav, flac, ogg or mp3, "
        "for example with `ffmpeg -i input output.wav`."
    )


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "higgs"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(
            f"Audio file {url} cannot be downloaded ({error}); check the address, or use a file."
        ) from error


def _is_base64(text: str) -> bool:
    """Whether a string looks like raw base64 rather than a path: long, no dot, and only base64 characters."""
    return len(text) >= 64 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text) is not None


def _channels_of_array(array: np.ndarray | Tensor, name: str) -> Tensor:
    """Float32 channels [C, L] of samples given as [L], [C, L] or [L, C], with leading dims of 1 allowed."""
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.dtype == np.uint8:  # 8-bit sound is unsigned, with silence at 128
        array = (array.astype(np.float32) - 128.0) / 128.0
    elif array.dtype in (np.int8, np.int16, np.int32):
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    elif not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"{name} has samples of type {array.dtype}; give float samples in -1…1, or int16 samples.")
    samples = torch.from_numpy(np.array(array, dtype=np.float32))
    while samples.ndim > 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim not in (1, 2):
        raise UserError(f"{name} is not one clip; give one clip as [samples] or [channels, samples].")
    if samples.numel() and samples.abs().max() > 8.0 and samples.isfinite().all():
        raise UserError(
            f"{name} reaches {samples.abs().max():.0f}, but float samples lie in -1…1; "
            "divide by full scale (32768 for 16-bit sound) or pass the integers themselves."
        )
    samples = samples.reshape(1, -1) if samples.ndim == 1 else samples
    return samples.T if samples.shape[0] > samples.shape[1] > 0 else samples
