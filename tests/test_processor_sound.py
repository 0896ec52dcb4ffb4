"""The processor's way back to sound, and its files, both against transformers."""

import copy
import json

import numpy as np
import pytest
import soundfile
import torch
from conversations import SYSTEM, workflows

from higgs.delay import wrap_and_delay
from higgs.errors import UserError
from higgs.processor import AudioFeatureExtractor, BatchFeature, HiggsAudioV2Processor

BOS, EOS, HOP, RATE = 1024, 1025, 960, 24000


def test_decoding_is_that_of_transformers(processor, hf_processor):
    clips = [torch.randint(0, 1024, (8, length), generator=torch.Generator().manual_seed(length)) for length in (3, 7)]
    frames = [wrap_and_delay(clip, BOS, EOS) for clip in clips]
    rows = torch.full((2, 1 + len(frames[1]), 8), EOS)
    for row, clip in zip(rows, frames, strict=True):
        row[: len(clip)] = clip
    ours = processor.batch_decode(rows)
    for waveform, expected in zip(ours, hf_processor.batch_decode(rows), strict=True):
        assert waveform.shape == expected.shape and waveform.dtype == torch.float32
        torch.testing.assert_close(waveform, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(processor.decode(rows[:1]), ours[0], atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="batch_decode"):
        processor.decode(rows)


def test_rows_are_decoded_from_their_own_last_clip(processor):
    first, second = (torch.randint(0, 1024, (8, n), generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    both = torch.cat([wrap_and_delay(first, BOS, EOS), wrap_and_delay(second, BOS, EOS)])
    rows = torch.full((3, len(both), 8), EOS)
    rows[0] = both
    rows[1, : 2 + 4 + 7] = wrap_and_delay(first, BOS, EOS)  # ends long before the others' last clip begins
    waveforms = processor.batch_decode(rows)
    assert [len(waveform) for waveform in waveforms] == [2 * HOP, 4 * HOP, 0]
    torch.testing.assert_close(waveforms[1], processor.decode(rows[1:2]), atol=1e-6, rtol=0)


def test_unfinished_frames_and_stray_stream_codes(processor):
    codes = torch.randint(0, 1024, (8, 6), generator=torch.Generator().manual_seed(3))
    frames = wrap_and_delay(codes, BOS, EOS)
    assert len(processor.decode(frames[None, : 1 + 7])) == 0  # not one frame in which every codebook has spoken
    assert len(processor.decode(frames[None, : 1 + 7 + 2])) == 2 * HOP
    codes[2, 1], codes[5, 4] = BOS, EOS  # drawn by accident in the middle; one codebook that ends early
    kept = processor.generated_codes(wrap_and_delay(codes, BOS, EOS)[None])[0]
    assert kept.shape == (8, 4) and kept[2, 1] == 1023
    assert len(processor.decode(wrap_and_delay(codes, BOS, EOS)[None])) == 4 * HOP
    with pytest.raises(UserError, match="8 codebooks"):
        processor.batch_decode(frames[None, :, :4])


def test_delay_methods(processor, hf_processor):
    codes = torch.randint(0, 1024, (2, 8, 5))
    delayed = processor.build_delay_pattern(codes)
    assert torch.equal(delayed, hf_processor.build_delay_pattern(codes))
    assert torch.equal(processor.revert_delay_pattern(delayed[0].T), codes[0].T)
    assert processor.get_audio_tokens(12) == hf_processor.get_audio_tokens(12)


def test_saving_audio(processor, tmp_path):
    waveforms = [torch.linspace(-0.5, 0.5, 480), torch.zeros(240)]
    processor.save_audio(waveforms, [tmp_path / "a.wav", str(tmp_path / "b.flac")])
    processor.save_audio(waveforms[:1], str(tmp_path / "c.wav"))
    processor.save_audio(waveforms[0], tmp_path / "d.wav", sampling_rate=16000)
    sound, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == RATE and np.abs(sound - waveforms[0].numpy()).max() < 1e-4
    assert soundfile.info(tmp_path / "d.wav").samplerate == 16000
    with pytest.raises(UserError, match="2 waveforms but 1 paths"):
        processor.save_audio(waveforms, tmp_path / "e.wav")


def test_transformers_loads_what_is_saved(processor, clip_files, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    processor.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)  # transformers looks for the codec from the working folder
    hf_processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    conversation = workflows(clip_files)["cloning"]
    arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "sampling_rate": RATE}
    expected = hf_processor.apply_chat_template(copy.deepcopy(conversation), **arguments)
    batch = HiggsAudioV2Processor.from_pretrained(tmp_path).apply_chat_template(conversation, **arguments)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_loading_what_transformers_saves(processor, hf_processor, clip_files, codec_folder, tmp_path):
    hf_processor.save_pretrained(tmp_path)
    conversation = workflows(clip_files)["cloning"]
    expected = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["audio_tokenizer"]["audio_tokenizer_name_or_path"] == str(codec_folder)

    def same(**arguments) -> bool:
        loaded = HiggsAudioV2Processor.from_pretrained(tmp_path, device_map="cpu", **arguments)
        batch = loaded.apply_chat_template(conversation, tokenize=True, return_dict=True)
        return all(torch.equal(batch[key], expected[key]) for key in expected)

    assert same()
    assert same(audio_tokenizer=processor.audio_tokenizer)
    config["audio_tokenizer"]["audio_tokenizer_name_or_path"] = "/moved/away"
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"/moved/away.*audio_tokenizer"):
        HiggsAudioV2Processor.from_pretrained(tmp_path)
    assert same(audio_tokenizer=codec_folder)
    (tmp_path / "audio_tokenizer").symlink_to(codec_folder)
    assert same()
    (tmp_path / "audio_tokenizer").rename(tmp_path / "codec")
    config["audio_tokenizer"]["audio_tokenizer_name_or_path"] = "codec"
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    assert same()
    del config["audio_tokenizer"]
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names no codec"):
        HiggsAudioV2Processor.from_pretrained(tmp_path)


def test_settings_are_read_back(processor, tmp_path):
    changed = HiggsAudioV2Processor(
        tokenizer=processor.tokenizer,
        audio_tokenizer=processor.audio_tokenizer,
        chat_template="{{ bos_token }}{{ messages[0].content }}",
        audio_token="<|AUDIO|>",
        audio_bos_token="<|audio_bos|>",
        audio_delay_token="<|eom_id|>",
        audio_stream_bos_id=2000,
        audio_stream_eos_id=2001,
    )
    changed.save_pretrained(tmp_path)
    loaded = HiggsAudioV2Processor.from_pretrained(tmp_path, audio_tokenizer=processor.audio_tokenizer)
    assert loaded.apply_chat_template([{"role": "x", "content": "y"}]) == "<|begin_of_text|>y"
    batch = loaded(text="<|AUDIO|>", audio=np.zeros(2 * HOP, dtype=np.float32))
    assert (batch.audio_input_ids[0, 0] == 2000).all() and (batch.audio_input_ids[0, -1] == 2001).all()
    assert batch.input_ids[0, -1] == loaded.tokenizer.token_to_id("<|eom_id|>") == loaded.audio_delay_token_id
    assert loaded.feature_extractor == AudioFeatureExtractor(sampling_rate=RATE)
    per_call = loaded.apply_chat_template([SYSTEM], chat_template="{{ messages | length }}")
    assert per_call == "1"


def test_batch_feature():
    batch = BatchFeature(ids=torch.tensor([1]), sound=torch.tensor([0.5]), name="x")
    assert batch.to("cpu", torch.float64) is batch
    assert batch.sound.dtype == torch.float64
    assert batch["ids"].dtype == torch.int64 and batch.ids is batch["ids"]
    assert batch.to(dtype=torch.bfloat16).sound.dtype == torch.bfloat16
    assert batch.to(device="meta").ids.is_meta
    assert {**batch}["name"] == "x"
    with pytest.raises(AttributeError, match="it holds ids"):
        _ = batch.nothing
