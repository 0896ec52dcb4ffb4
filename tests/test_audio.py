"""Sound in and out: every kind of source, conversions, errors that name the file."""

import base64
import http.server
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from higgs.audio import load_audio, log_mel, read_audio, resample, save_audio
from higgs.errors import UserError

TONE = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 16000)


@pytest.fixture
def tone_file(tmp_path: Path) -> Path:
    save_audio(tmp_path / "tone.wav", TONE, 16000)
    return tmp_path / "tone.wav"


def test_every_kind_of_source_gives_the_same_samples(tone_file: Path):
    data = tone_file.read_bytes()
    text = base64.b64encode(data).decode()
    expected = load_audio(tone_file, 16000)
    assert expected.dtype == torch.float32 and expected.shape == (8000,)
    torch.testing.assert_close(expected, TONE, atol=1e-4, rtol=0)
    for source in (str(tone_file), tone_file.as_uri(), data, text, f"data:audio/wav;base64,{text}"):
        assert torch.equal(load_audio(source, 16000), expected)
    for source in (TONE, TONE.numpy(), TONE.double().numpy(), TONE[None, None], (TONE * 32768).short().numpy()):
        torch.testing.assert_close(load_audio(source, 16000), TONE, atol=1e-4, rtol=0)


def test_http(tone_file: Path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(tone_file.parent))

        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(load_audio(f"{address}/tone.wav", 16000), load_audio(tone_file, 16000))
        with pytest.raises(UserError, match=r"missing\.wav cannot be downloaded"):
            load_audio(f"{address}/missing.wav", 16000)
        server.shutdown()


def test_odd_but_usable_clips_are_converted(tmp_path: Path):
    soundfile.write(tmp_path / "stereo.wav", torch.stack([TONE, 0.2 * TONE], 1).numpy(), 16000)
    torch.testing.assert_close(load_audio(tmp_path / "stereo.wav", 16000), 0.6 * TONE, atol=1e-4, rtol=0)
    torch.testing.assert_close(load_audio(torch.stack([TONE, 0.2 * TONE], 1), 16000), 0.6 * TONE)
    assert len(load_audio(TONE, 24000, sampling_rate_of_array=8000)) == 24000
    assert read_audio(tmp_path / "stereo.wav").sample_rate == 16000
    eight_bit = ((TONE + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(load_audio(eight_bit, 16000), TONE, atol=0.02, rtol=0)


def test_clipped_sound_is_kept_with_a_warning(tmp_path: Path):
    save_audio(tmp_path / "loud.wav", 4 * TONE, 16000)
    with pytest.warns(UserWarning, match=r"loud\.wav is clipped"):
        assert load_audio(tmp_path / "loud.wav", 16000).abs().max() > 0.99
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(1.99 * TONE, 16000)


def test_errors_name_the_source(tmp_path: Path):
    def check(source, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_audio(source, 16000)

    (tmp_path / "text.wav").write_text("not sound at all")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    broken = TONE.clone()
    broken[[3, 4]] = torch.tensor([float("nan"), float("inf")])
    soundfile.write(tmp_path / "nan.wav", broken.numpy(), 16000, subtype="FLOAT")
    check(tmp_path / "absent.wav", r"absent\.wav does not exist")
    check(tmp_path, "is a folder")
    check(tmp_path / "text.wav", r"text\.wav cannot be read as sound .*ffmpeg")
    check(tmp_path / "empty.wav", r"empty\.wav holds no samples")
    check(tmp_path / "nan.wav", r"nan\.wav holds 2 samples that are NaN or infinite")
    check(broken, "audio array .* holds 2 samples")
    check(torch.zeros(0), "no samples")
    check(b"RIFFnonsense", "12 bytes cannot be read")
    check("data:audio/wav;base64,@@@", "not valid base64")
    check("A" * 200, "base64 audio")
    check(torch.zeros(3, dtype=torch.int64), "int64")
    check(20000 * TONE, "float samples lie in")
    check(torch.zeros(2, 3, 4), "not one clip")
    with pytest.raises(UserError, match="sample rate"):
        load_audio(TONE)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_save_by_suffix(suffix: str, tmp_path: Path):
    path = tmp_path / "new folder" / f"clip{suffix}"
    save_audio(path, TONE[None, None], 16000)
    loaded = read_audio(path)
    assert loaded.sample_rate == 16000
    assert abs(len(loaded.samples) - len(TONE)) < 2500
    assert 0.3 < loaded.samples.abs().max() < 0.6
    assert os.listdir(path.parent) == [path.name]


def test_failed_saves_leave_nothing_and_keep_the_old_file(tmp_path: Path):
    def check(path: Path, waveform: torch.Tensor, message: str) -> None:
        with pytest.raises(UserError, match=message):
            save_audio(path, waveform, 16000)

    save_audio(tmp_path / "a.wav", TONE, 16000)
    before = (tmp_path / "a.wav").read_bytes()
    check(tmp_path / "a.wav", TONE * float("nan"), r"a\.wav.*NaN")
    check(tmp_path / "a.xyz", TONE, "suffix")
    check(tmp_path / "a.wav", torch.stack([TONE, TONE]), "one mono clip")
    with pytest.raises(UserError, match=r"b\.mp3"):
        save_audio(tmp_path / "b.mp3", TONE, 12345)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.wav"]


def test_log_mel_peaks_at_the_tone():
    mel = log_mel(TONE[None], 16000, num_mels=40, window=512, hop=128)
    assert mel.shape == (1, 40, 8000 // 128 + 1)
    assert mel[0, :, 20].argmax() == log_mel(TONE, 16000, num_mels=40, window=512, hop=128)[:, 30].argmax()
    assert 5 < mel[0, :, 20].argmax() < 15
    assert log_mel(TONE[:100], 16000).isfinite().all()


def test_resample_keeps_a_tone_and_leading_dims():
    assert resample(TONE, 16000, 16000) is TONE
    wide = resample(TONE[None, None], 16000, 24000)
    assert wide.shape == (1, 1, 12000)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(12000) / 24000)
    torch.testing.assert_close(wide[0, 0, 500:-500], expected[500:-500], atol=1e-3, rtol=0)
