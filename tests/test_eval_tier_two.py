"""Judges that load other people's networks, with tiny random weights; DNSMOS with its real ones."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.audio import load_audio
from higgs.errors import UserError
from higgs.eval.judges.base import Word
from higgs.eval.judges.ctc import CTC
from higgs.eval.judges.dnsmos import DNSMOS
from higgs.eval.judges.utmos import UTMOS
from higgs.eval.judges.wavlm import WavLM
from higgs.eval.judges.whisper import Whisper, words_of

transformers = pytest.importorskip("transformers")
CONVS = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **CONVS}


@pytest.fixture(scope="module")
def clips(shared_data: Path) -> list[Tensor]:
    """Speech of different lengths at 16 kHz."""
    whole = load_audio(shared_data / "ljspeech" / "LJ001-0001.flac", 16000)
    return [whole[:16000], whole[20000:64000], whole[30000:50001]]


def moved(kind: type[nn.Module], config: object) -> nn.Module:
    """A network with larger weights, always the same, so that it says different things of different clips."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


# ---------------------------------------------------------------------------------------------- recognisers


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> "transformers.Wav2Vec2Processor":
    folder = tmp_path_factory.mktemp("letters")
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJ"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    return transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000, do_normalize=True, return_attention_mask=False),
        transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
def test_ctc_hears_what_transformers_hears(tmp_path: Path, clips: list[Tensor], letters, kind: str):
    config = getattr(transformers, f"{kind}Config")(vocab_size=15, pad_token_id=0, **SIZES)
    model = moved(getattr(transformers, f"{kind}ForCTC"), config)
    with torch.no_grad():  # all letters alike on average, so that the text changes with the sound
        model.lm_head.bias -= model(clips[1][None]).logits.mean((0, 1))
    model.save_pretrained(tmp_path)
    letters.save_pretrained(tmp_path)
    judge = CTC(str(tmp_path))
    assert [one.text for one in judge.transcribe([torch.zeros(0), torch.zeros(399)])] == ["", ""]
    heard = judge.transcribe(clips)
    for clip, transcript in zip(clips, heard, strict=True):
        inputs = letters(clip.numpy(), sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            theirs = letters.batch_decode(model(**inputs).logits.argmax(-1))[0]
        assert transcript.text == theirs.strip() and theirs
        assert " ".join(word.text for word in transcript.words).split() == theirs.split()
        times = [time for word in transcript.words for time in (word.start, word.end)]
        assert times == sorted(times) and times[-1] <= len(clip) / 16000
    assert heard == [judge.transcribe([clip])[0] for clip in clips] and len({one.text for one in heard}) > 1
    assert judge.describe()["name"] == "ctc" and len(judge.describe()["sha256"]) == 64


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("whisper")
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(models.BPE(alphabet, []))
    bytes_alone.pre_tokenizer, bytes_alone.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"]
    special += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", *(f"<|{n * 0.02:.2f}|>" for n in range(1501))]
    bytes_alone.add_special_tokens(special)
    bytes_alone.save(str(folder / "tokenizer.json"))
    tokenizer = transformers.WhisperTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer.json")), language="english", task="transcribe",
        unk_token="<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in special[:9]}
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=80, max_target_positions=64,
        decoder_start_token_id=ids["<|startoftranscript|>"], eos_token_id=256, pad_token_id=256, bos_token_id=256,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = moved(transformers.WhisperForConditionalGeneration, config)
    model.generation_config = transformers.GenerationConfig(
        lang_to_id={"<|en|>": ids["<|en|>"]}, task_to_id={"transcribe": ids["<|transcribe|>"]}, is_multilingual=True,
        no_timestamps_token_id=ids["<|notimestamps|>"], prev_sot_token_id=ids["<|startofprev|>"], max_length=24,
        decoder_start_token_id=ids["<|startoftranscript|>"], eos_token_id=256, pad_token_id=256, bos_token_id=256,
        suppress_tokens=list(range(257, len(tokenizer))), begin_suppress_tokens=[], return_timestamps=False,
    )  # fmt: skip
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lengths(shared_data: Path) -> list[Tensor]:
    """Clips of 2, 37, 6.25, 0 and 41 s."""
    files = [shared_data / "ljspeech" / f"LJ001-{number:04}.flac" for number in range(1, 8)]
    whole = torch.cat([load_audio(file, 16000) for file in files])
    return [whole[:32000], whole[: 37 * 16000], whole[40000:140000], whole[:0], whole[32000 : 43 * 16000]]


def test_whisper_hears_what_transformers_hears(whisper_folder: Path, lengths: list[Tensor]):
    judge = Whisper(str(whisper_folder), batch_size=2)
    heard = judge.transcribe(lengths)
    pipeline = transformers.pipeline("automatic-speech-recognition", str(whisper_folder), device="cpu")
    pipeline.generation_config.num_beams = 1  # it would search with five
    for clip, transcript in zip(lengths, heard, strict=True):
        long = len(clip) > 30 * 16000
        sound = {"raw": clip.numpy(), "sampling_rate": 16000}
        options = {"language": "english", "task": "transcribe"}
        theirs = pipeline(sound, return_timestamps=long, generate_kwargs=options)["text"] if len(clip) else ""
        assert transcript.text == theirs.strip() and transcript.words == [] and bool(theirs) == bool(len(clip))
    assert heard == [judge.transcribe([clip])[0] for clip in lengths] and len({one.text for one in heard}) > 3
    assert judge.describe()["language"] == "english"


def test_whisper_tells_when_words_were_said(whisper_folder: Path, lengths: list[Tensor]):
    plain, timed = Whisper(str(whisper_folder), words=False), Whisper(str(whisper_folder))
    plain.load()
    timed.load()
    for judge in (plain, timed):
        judge._model.generation_config.alignment_heads = [[0, 0], [0, 1]]
    heard = timed.transcribe(lengths)
    assert [one.text for one in heard] == [one.text for one in plain.transcribe(lengths)]
    assert heard == [timed.transcribe([clip])[0] for clip in lengths]
    for clip, transcript in zip(lengths, heard, strict=True):
        assert " ".join(word.text for word in transcript.words).split() == transcript.text.split()
        assert all(0 <= word.start <= word.end <= len(clip) / 16000 for word in transcript.words)
    assert max(word.end for word in heard[1].words) > 30  # the second window counts from its own start


def test_tokens_become_words_with_times():
    names = ["<|0.00|>", "ĠThe", "Ġsun", "set", "Ġis", "<|2.00|>", "<|2.00|>", "Ġred", ".", "<|endoftext|>"]
    is_text = [not name.startswith("<") for name in names]
    times = [0.0, 0.1, 0.3, 0.5, 0.9, 1.2, 2.0, 2.1, 2.4, 2.4]

    def decode(tokens: list[int]) -> str:
        return "".join(names[token] for token in tokens).replace("Ġ", " ")

    expected = [Word("The", 0.1, 0.3), Word("sunset", 0.3, 0.9), Word("is", 0.9, 1.2), Word("red.", 2.1, 2.9)]
    assert words_of(range(10), names, is_text, times, 2.9, decode) == expected
    assert words_of(range(10), names, is_text, times, 9.0, decode)[-1] == Word("red.", 2.1, 3.4)
    assert words_of([], [], [], [], 1.0, decode) == []


# -------------------------------------------------------------------------------------------------- speakers


def test_wavlm_embeds_as_transformers_does(tmp_path: Path, clips: list[Tensor]):
    config = transformers.WavLMConfig(
        **SIZES, tdnn_dim=(16, 16, 24), tdnn_kernel=(5, 3, 1), tdnn_dilation=(1, 2, 1), xvector_output_dim=12,
        num_buckets=32, max_bucket_distance=80,
    )  # fmt: skip
    model = moved(transformers.WavLMForXVector, config)
    model.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(tmp_path)
    judge = WavLM(str(tmp_path))
    ours = judge.embed(clips)
    least = 400 + 9 * 320  # two windows of 1 + 4 + 4 frames
    assert judge.embed([clips[0][:least]]).isfinite().all()
    with pytest.raises(UserError, match=r"0\.20 s"):
        judge.embed([clips[0][: least - 1]])
    for clip, embedding in zip(clips, ours, strict=True):
        with torch.no_grad():
            theirs = model(**extractor(clip.numpy(), sampling_rate=16000, return_tensors="pt")).embeddings[0]
        torch.testing.assert_close(embedding, F.normalize(theirs, dim=0))
    torch.testing.assert_close(ours, torch.cat([judge.embed([clip]) for clip in clips]))
    assert ours.shape == (3, 12) and not torch.allclose(ours[0], ours[1], atol=1e-3)


@pytest.mark.parametrize("judge", [Whisper, CTC, WavLM])
def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path, judge: type):
    with pytest.raises(UserError, match="cannot be loaded as"):
        judge(str(tmp_path)).load()


@pytest.mark.parametrize(("absent", "judge"), [
    ("transformers", Whisper()), ("transformers", CTC()), ("transformers", WavLM()), ("onnxruntime", DNSMOS()),
])  # fmt: skip
def test_without_its_packages_a_judge_says_what_to_install(monkeypatch: pytest.MonkeyPatch, absent: str, judge):
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, "speechmos.dnsmos", raising=False)
    with pytest.raises(UserError, match=f"{absent}.*pip install"):
        judge.load()


def test_a_model_of_the_hub_is_known_by_its_commit_and_judges_in_single_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clips: list[Tensor]
):
    """A cache as the hub's client lays it out, without a network."""
    config = transformers.WavLMConfig(
        **SIZES, tdnn_dim=(16, 24), tdnn_kernel=(5, 1), tdnn_dilation=(1, 1), xvector_output_dim=12
    )
    repository = tmp_path / "models--some--voices"
    model = moved(transformers.WavLMForXVector, config).half()
    model.save_pretrained(repository / "snapshots" / "abc123")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    judge = WavLM("some/voices")
    assert judge.describe() == {"name": "wavlm x-vector", "model": "some/voices", "revision": "abc123"}
    embeddings = judge.embed(clips)
    torch.testing.assert_close(embeddings, WavLM(str(repository / "snapshots" / "abc123")).embed(clips))
    assert embeddings.dtype == torch.float32 and judge._model.dtype == torch.float32
    with pytest.raises(UserError, match=r"some/thing cannot be loaded"):
        WavLM("some/thing").describe()


# --------------------------------------------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def utmos_parts() -> tuple[dict[str, Tensor], nn.Module]:
    """The public file's names with tiny tensors, and the wav2vec2 of transformers that they were taken from."""
    config = transformers.Wav2Vec2Config(**{**SIZES, "hidden_size": 64, "num_attention_heads": 1})
    ssl = moved(transformers.Wav2Vec2Model, config)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {"wav2vec2.mask_emb": torch.zeros(64)}
    for name, value in ssl.state_dict().items():
        for old, new in (
            ("feature_extractor.conv_layers.0.layer_norm.", "feature_extractor.conv_layers.0.2."),
            ("feature_projection.layer_norm.", "layer_norm."), ("feature_projection.projection.", "post_extract_proj."),
            ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "encoder.pos_conv.0.weight_g"),
            ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", "encoder.pos_conv.0.weight_v"),
            ("encoder.pos_conv_embed.conv.bias", "encoder.pos_conv.0.bias"), (".conv.weight", ".0.weight"),
            (".attention.", ".self_attn."), (".feed_forward.intermediate_dense.", ".fc1."),
            (".feed_forward.output_dense.", ".fc2."),
        ):  # fmt: skip
            name = name.replace(old, new)
        if "encoder.layers" in name and "final" not in name:
            name = name.replace(".layer_norm.", ".self_attn_layer_norm.")
        if name != "masked_spec_embed":
            tensors[f"wav2vec2.{name}"] = value.clone()
    blstm = nn.LSTM(64 + 6 + 5, 8, batch_first=True, bidirectional=True)
    projection = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1))
    tensors |= {
        "domain_emb": torch.randn(1, 6, generator=generator),
        "judge_emb": torch.randn(1, 5, generator=generator),
    }
    tensors |= {f"blstm.{name}": value for name, value in blstm.state_dict().items()}
    tensors |= {f"projection.{name}": value for name, value in projection.state_dict().items()}

    class Reference(nn.Module):
        """The published network, clip by clip."""

        @torch.no_grad()
        def forward(self, clip: Tensor) -> float:
            frames = ssl(clip[None]).last_hidden_state
            told = torch.cat([tensors["domain_emb"], tensors["judge_emb"]], 1)[:, None].expand(1, frames.shape[1], -1)
            return float(projection(blstm(torch.cat([frames, told], 2))[0]).mean() * 2 + 3)

    return tensors, Reference()


def test_utmos_scores_as_the_published_network_would(tmp_path: Path, clips: list[Tensor], utmos_parts):
    tensors, reference = utmos_parts
    torch.save(tensors, tmp_path / "utmos.pt")
    judge = UTMOS(str(tmp_path / "utmos.pt"), batch_size=2)
    ours = [score["utmos"] for score in judge.score(clips)]
    assert ours == pytest.approx([reference(clip) for clip in clips], abs=1e-4)
    assert len({round(score, 4) for score in ours}) == 3  # so that equal scores prove something
    assert ours == pytest.approx([judge.score([clip])[0]["utmos"] for clip in clips], abs=1e-5)
    assert judge.describe()["file"] == "utmos.pt"


@pytest.mark.parametrize(("change", "told"), [
    (lambda t: t.pop("blstm.weight_hh_l0"), "blstm.weight_hh_l0"),
    (lambda t: t.pop("wav2vec2.encoder.layers.1.fc1.bias"), "intermediate_dense"),
    (lambda t: t.update(more=torch.zeros(1)), "more"),
    (lambda t: t.update({"projection.2.bias": torch.zeros(2)}), "projection"),
])  # fmt: skip
def test_other_weights_of_utmos_are_told(tmp_path: Path, utmos_parts, change, told: str):
    tensors = dict(utmos_parts[0])
    change(tensors)
    torch.save(tensors, tmp_path / "utmos.pt")
    with pytest.raises(UserError, match=told):
        UTMOS(str(tmp_path / "utmos.pt")).load()


def test_utmos_refuses_a_clip_too_short_for_a_frame(tmp_path: Path, utmos_parts):
    torch.save(utmos_parts[0], tmp_path / "utmos.pt")
    with pytest.raises(UserError, match="25 ms"):
        UTMOS(str(tmp_path / "utmos.pt")).score([torch.zeros(399)])


def test_a_missing_file_of_utmos_says_where_it_is(tmp_path: Path):
    with pytest.raises(UserError, match="SpeechMOS"):
        UTMOS(str(tmp_path / "none.pt")).load()


def test_dnsmos_is_that_of_its_package_and_hears_noise(clips: list[Tensor]):
    package = pytest.importorskip("speechmos.dnsmos")
    noise = torch.randn(clips[1].shape, generator=torch.Generator().manual_seed(0))
    ladder = [clips[1] + level * noise for level in (0, 0.01, 0.1)]
    scores = DNSMOS().score(ladder)
    theirs = package.run(clips[1].numpy(), 16000)
    assert scores[0] == pytest.approx(
        {f"dnsmos_{n}": float(theirs[f"{n}_mos"]) for n in ("sig", "bak", "ovrl", "p808")}
    )
    for name in ("dnsmos_ovrl", "dnsmos_bak", "dnsmos_p808"):
        values = [score[name] for score in scores]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.5
    assert scores[0] == DNSMOS().score([clips[1]])[0]


def test_dnsmos_from_a_folder_of_ones_own(tmp_path: Path, clips: list[Tensor]):
    import onnx
    from onnx import TensorProto, helper

    with pytest.raises(UserError, match="lacks sig_bak_ovr"):
        DNSMOS(str(tmp_path)).load()
    for file, inputs, out in (("sig_bak_ovr.onnx", [1, None], 3), ("model_v8.onnx", [1, None, 120], 1)):
        # The mean of the input's squares, times 1, 2, 3.
        axes = helper.make_tensor("axes", TensorProto.INT64, [len(inputs) - 1], list(range(1, len(inputs))))
        scale = helper.make_tensor("scale", TensorProto.FLOAT, [1, out], [float(n + 1) for n in range(out)])
        shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 1])
        nodes = [
            helper.make_node("Mul", ["input_1", "input_1"], ["square"]),
            helper.make_node("ReduceMean", ["square", "axes"], ["mean"]),
            helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
            helper.make_node("Mul", ["flat", "scale"], ["output"]),
        ]
        graph = helper.make_graph(
            nodes, "tiny", [helper.make_tensor_value_info("input_1", TensorProto.FLOAT, inputs)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, out])], [axes, scale, shape],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, tmp_path / file)
    judge = DNSMOS(str(tmp_path))
    loud, quiet = judge.score([0.9 * torch.ones(16000), 0.1 * torch.ones(16000)])
    assert loud["dnsmos_sig"] == pytest.approx(-0.08397278 * 0.81**2 + 1.22083953 * 0.81 + 0.0052439, abs=1e-3)
    assert loud["dnsmos_sig"] > quiet["dnsmos_sig"]
