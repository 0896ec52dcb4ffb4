"""The processor's tensors against those of transformers, on the same tiny codec and tokenizer; what it refuses."""

import base64
import copy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conversations import SCENE, SYSTEM, assistant, user, workflows
from tiny import CORPUS, build_hf_codec

from higgs.checkpoint.io import load_codec
from higgs.delay import wrap_and_delay
from higgs.errors import UserError
from higgs.labels import IGNORE
from higgs.processor import AudioFeatureExtractor, HiggsAudioV2Processor
from higgs.text import HFTokenizer, train_sentencepiece

BOS, EOS, HOP, RATE = 1024, 1025, 960, 24000
NAMES = ("single", "cloning", "scene_cloning", "batch", "training")


@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_transformers(processor, hf_processor, clip_files, name):
    conversation = workflows(clip_files)[name]
    for prompt in (False, True):
        expected = hf_processor.apply_chat_template(copy.deepcopy(conversation), add_generation_prompt=prompt)
        assert processor.apply_chat_template(conversation, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_transformers(processor, hf_processor, clip_files, name):
    conversation = workflows(clip_files)[name]
    arguments = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "sampling_rate": RATE,
        "return_tensors": "pt",
        "output_labels": True,
    }
    expected = hf_processor.apply_chat_template(copy.deepcopy(conversation), **arguments)
    batch = processor.apply_chat_template(conversation, labels_mode="transformers", **arguments)
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype, key
    ids = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    assert torch.equal(ids, expected["input_ids"])


def test_texts_and_arrays_are_processed_as_in_transformers(processor, hf_processor, waveforms):
    text = ["Plain <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|> text", "<|AUDIO_OUT|><|AUDIO_OUT|> and more of it"]
    expected = hf_processor(text=list(text), audio=list(waveforms), return_tensors="pt")
    batch = processor(text=text, audio=waveforms, return_tensors="pt")
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


def test_batches_code_clips_as_one_by_one(processor, waveforms):
    clips = [torch.from_numpy(waveform) for waveform in waveforms]
    together = processor.encode_audio(clips)
    for codes, clip in zip(together, clips, strict=True):
        assert torch.equal(codes, processor.encode_audio([clip])[0])


def test_every_kind_of_audio_item_gives_the_same_clip(processor, clip_files, waveforms):
    codes = processor.encode_audio([torch.from_numpy(waveforms[0])])[0]
    encoded = base64.b64encode(Path(clip_files[0]).read_bytes()).decode()
    sources = [
        {"url": clip_files[0]},
        {"path": clip_files[0]},
        {"audio": clip_files[0]},
        {"audio": waveforms[0]},
        {"audio": waveforms[0].tolist()},
        {"array": torch.from_numpy(waveforms[0]), "sampling_rate": RATE},
        {"base64": encoded},
        {"base64": f"data:audio/wav;base64,{encoded}"},
        {"codes": codes},
        {"codes": codes.tolist(), "url": None},
    ]
    conversations = [[SYSTEM, user("Hi."), assistant(**source)] for source in sources]
    batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
    assert torch.equal(batch.audio_input_ids[0], wrap_and_delay(codes, BOS, EOS))
    for key, value in batch.items():
        assert (value == value[:1]).all(), key


def test_arrays_at_another_rate_are_converted(processor, waveforms):
    slow = assistant(array=waveforms[2][::2].copy(), sampling_rate=RATE // 2)
    batch = processor.apply_chat_template([SYSTEM, user("Hi."), slow], tokenize=True, return_dict=True)
    assert batch.audio_input_ids.shape[1] == 5 + 2 + 8 - 1
    text = "<|AUDIO_OUT|>"
    given_here = processor(text=text, audio=waveforms[2][::2].copy(), sampling_rate=RATE // 2)
    assert torch.equal(given_here.audio_input_ids, batch.audio_input_ids)


def test_rows_without_audio_in_a_batch(processor, clip_files):
    flows = workflows(clip_files)
    batch = processor.apply_chat_template(
        [flows["single"], flows["cloning"]], tokenize=True, return_dict=True, output_labels=True
    )
    assert not batch.audio_input_ids_mask[0].any() and (batch.audio_input_ids[0] == EOS).all()
    assert (batch.audio_labels[0] == IGNORE).all()
    alone = processor.apply_chat_template(flows["cloning"], tokenize=True, return_dict=True, output_labels=True)
    for key in ("audio_input_ids", "audio_input_ids_mask", "audio_labels"):
        assert torch.equal(batch[key][1:], alone[key]), key


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_rows(processor, clip_files, side):
    rows = workflows(clip_files)["batch"]
    arguments = {"tokenize": True, "return_dict": True, "output_labels": True}
    batch = processor.apply_chat_template(rows, padding_side=side, **arguments)
    for place, row in enumerate(rows):
        alone = processor.apply_chat_template(row, **arguments)
        kept, heard = batch.attention_mask[place].bool(), batch.audio_input_ids_mask[place]
        assert torch.equal(batch.input_ids[place, kept], alone.input_ids[0])
        assert torch.equal(batch.labels[place, kept], alone.labels[0])
        assert (batch.labels[place, ~kept] == IGNORE).all()
        assert (batch.input_ids[place, ~kept] == processor.tokenizer.pad_token_id).all()
        assert torch.equal(batch.audio_input_ids[place, heard], alone.audio_input_ids[0])
        assert (batch.audio_input_ids[place, ~heard] == EOS).all()
        assert (batch.audio_labels[place, ~heard] == IGNORE).all()
    shorter = int(batch.attention_mask.sum(1).argmin())
    assert batch.attention_mask[shorter, 0 if side == "left" else -1] == 0


def test_a_sentencepiece_tokenizer_does_as_well(codec_folder, tmp_path):
    processor = HiggsAudioV2Processor(
        tokenizer=train_sentencepiece(CORPUS, vocab_size=400), audio_tokenizer=load_codec(codec_folder)
    )
    codes = torch.arange(24).reshape(8, 3)
    conversation = [SYSTEM, SCENE, user("Hi."), assistant(codes=codes)]
    processor.save_pretrained(tmp_path / "saved")
    loaded = HiggsAudioV2Processor.from_pretrained(tmp_path / "saved")
    first, second = (
        one.apply_chat_template(conversation, tokenize=True, return_dict=True, output_labels=True)
        for one in (processor, loaded)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert processor.tokenizer.decode(first.labels[0][first.labels[0] != IGNORE].tolist()) == (
        "<|audio_out_bos|><|audio_eos|><|eot_id|>"
    )


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_other_numbers_of_codebooks(tokenizer_folder, num_codebooks, tmp_path):
    transformers = pytest.importorskip("transformers")
    build_hf_codec(num_codebooks).save_pretrained(tmp_path)
    processor = HiggsAudioV2Processor(
        tokenizer=HFTokenizer.from_folder(tokenizer_folder), audio_tokenizer=load_codec(tmp_path)
    )
    hf_processor = transformers.HiggsAudioV2Processor(
        transformers.DacFeatureExtractor(sampling_rate=RATE, hop_length=1),
        transformers.AutoTokenizer.from_pretrained(tokenizer_folder),
        transformers.HiggsAudioV2TokenizerModel.from_pretrained(tmp_path),
    )
    noise = np.random.default_rng(1).normal(scale=0.1, size=4 * HOP).astype(np.float32)
    expected = hf_processor(text=["a<|AUDIO_OUT|>"], audio=[noise], return_tensors="pt")
    batch = processor(text="a<|AUDIO_OUT|>", audio=noise)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert batch.audio_input_ids.shape == (1, 4 + 2 + num_codebooks - 1, num_codebooks)
    expected_sound = hf_processor.decode(batch.audio_input_ids)
    torch.testing.assert_close(processor.decode(batch.audio_input_ids), expected_sound, atol=1e-5, rtol=0)


def test_real_speech(processor, shared_data):
    """A real clip at another rate, through the codec and back: as long as it was, to within a frame."""
    path = shared_data / "ljspeech" / "LJ001-0002.flac"
    info = soundfile.info(path)
    batch = processor.apply_chat_template(
        [SYSTEM, user("x"), assistant(path=str(path))], tokenize=True, return_dict=True
    )
    waveform = processor.batch_decode(batch.audio_input_ids)[0]
    assert abs(len(waveform) - info.frames / info.samplerate * RATE) <= HOP


def test_wrong_input_is_named(processor, clip_files, waveforms):
    apply = processor.apply_chat_template
    with pytest.raises(TypeError, match="tokenise"):
        apply([SYSTEM], tokenise=True)
    with pytest.raises(UserError, match="list of conversations"):
        apply([])
    with pytest.raises(UserError, match="24000 Hz"):
        apply([SYSTEM], tokenize=True, sampling_rate=16000)
    with pytest.raises(UserError, match="return_tensors='np'"):
        apply([SYSTEM], tokenize=True, return_tensors="np")
    with pytest.raises(UserError, match="labels_mode"):
        apply([SYSTEM], tokenize=True, labels_mode="all")
    with pytest.raises(UserError, match="padding"):
        apply([SYSTEM], tokenize=True, padding_side="both")
    with pytest.raises(UserError, match="modality"):
        apply([SYSTEM], add_generation_prompt=True, modality="video")
    with pytest.raises(UserError, match="differ in length"):
        apply([[SYSTEM], [SYSTEM, user("x")]], tokenize=True, padding=False)
    with pytest.raises(UserError, match="start_index has 2"):
        apply([SYSTEM], tokenize=True, start_index=[0, 1])
    with pytest.raises(UserError, match=r"Audio in message 1: .*nowhere\.wav"):
        apply([SYSTEM, assistant(url="nowhere.wav")], tokenize=True)
    with pytest.raises(UserError, match=r"message 1 must hold one of .* none"):
        apply([SYSTEM, assistant()], tokenize=True)
    with pytest.raises(UserError, match=r"several \(url, path\)"):
        apply([SYSTEM, assistant(url="a", path="b")], tokenize=True)
    with pytest.raises(UserError, match="8 codebooks"):
        apply([SYSTEM, assistant(codes=torch.zeros(4, 3))], tokenize=True)
    with pytest.raises(UserError, match="0 to 1023"):
        apply([SYSTEM, assistant(codes=torch.full((8, 3), BOS))], tokenize=True)
    with pytest.raises(UserError, match=r"\[1, 0\] audio placeholders .* 2 clips"):
        processor(text=["<|AUDIO_OUT|>", ""], audio=waveforms[:2])
    with pytest.raises(UserError, match="0 clips"):
        processor(text="<|AUDIO_OUT|>")
    with pytest.raises(UserError, match="string or a list"):
        processor(text=[1])
    with pytest.raises(TypeError, match="audios"):
        processor(text="x", audios=waveforms)


def test_parts_that_do_not_fit_are_named(processor):
    parts = {"tokenizer": processor.tokenizer, "audio_tokenizer": processor.audio_tokenizer}
    with pytest.raises(UserError, match="16000 Hz but the codec works at 24000"):
        HiggsAudioV2Processor(AudioFeatureExtractor(sampling_rate=16000), **parts)
    with pytest.raises(UserError, match="1024 codes"):
        HiggsAudioV2Processor(**parts, audio_stream_bos_id=1000)
    with pytest.raises(UserError, match="no token '<nope>'"):
        HiggsAudioV2Processor(**parts, audio_delay_token="<nope>")
    with pytest.raises(UserError, match="text tokenizer and a codec"):
        HiggsAudioV2Processor(tokenizer=processor.tokenizer)
    with pytest.raises(UserError, match="feature_size"):
        AudioFeatureExtractor(feature_size=2)


def test_a_clip_too_short_to_code_is_named_with_its_message(processor) -> None:
    conversation = [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": [{"type": "audio", "array": [0.1] * 60}]},
        {"role": "user", "content": "Two."},
    ]
    with pytest.raises(UserError, match=r"message 2 lasts 2\.5 ms"):
        processor.apply_chat_template(conversation, tokenize=True)
