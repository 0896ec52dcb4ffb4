"""Checkpoint folders: what transformers writes loads here and the other way round, bit by bit."""

import json

import pytest
import torch
from checkpoint_cases import load_hf, same_tensors
from decoder_cases import SHAPES, make_batch, make_hf, make_ours
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from higgs import HiggsAudioV2ForConditionalGeneration as Model
from higgs import HiggsAudioV2Model, HiggsAudioV2TokenizerModel, UserError
from higgs.checkpoint import files


@pytest.mark.parametrize("text_head", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decoder_round_trip_through_transformers(shape: str, text_head: bool, tmp_path):
    theirs = make_hf(use_text_head=text_head, **SHAPES[shape])
    theirs.save_pretrained(tmp_path / "hf")
    ours = Model.from_pretrained(tmp_path / "hf", use_text_head=text_head)
    same_tensors(ours.state_dict(), theirs.state_dict())
    assert not ours.training
    ours.save_pretrained(tmp_path / "ours")
    back = load_hf("HiggsAudioV2ForConditionalGeneration", tmp_path / "ours", use_text_head=text_head)
    same_tensors(back.state_dict(), theirs.state_dict())
    batch = make_batch(ours.config, [[5, 3, 4], [9, 1, 6]])
    assert torch.equal(back(**batch).logits, theirs(**batch).logits)
    again = Model.from_pretrained(tmp_path / "ours", use_text_head=text_head)
    assert torch.equal(again(**batch).logits, ours(**batch).logits)
    assert again.config == ours.config


def test_the_text_head_is_read_only_where_asked_for(tmp_path):
    make_hf(use_text_head=True).save_pretrained(tmp_path)
    assert Model.from_pretrained(tmp_path).text_lm_head is None
    assert Model.from_pretrained(tmp_path, use_text_head=True).text_lm_head is not None
    make_hf().save_pretrained(tmp_path / "without")
    with pytest.raises(UserError, match=r"text_lm_head\.weight \[96, 32\] is missing"):
        Model.from_pretrained(tmp_path / "without", use_text_head=True)


@torch.no_grad()
def test_the_bare_transformer_from_either_kind_of_checkpoint(tmp_path):
    theirs = make_hf(use_text_head=True)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.model.save_pretrained(tmp_path / "bare")
    for folder in ("whole", "bare"):
        ours = HiggsAudioV2Model.from_pretrained(tmp_path / folder)
        same_tensors(ours.state_dict(), theirs.model.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    back = load_hf("HiggsAudioV2Model", tmp_path / "ours")
    same_tensors(back.state_dict(), theirs.model.state_dict())


@torch.no_grad()
def test_codec_round_trip_through_transformers(hf_codec, codec_folder, tmp_path):
    ours = HiggsAudioV2TokenizerModel.from_pretrained(codec_folder)
    stored = load_file(codec_folder / "model.safetensors")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    ours.save_pretrained(tmp_path)
    back = load_hf("HiggsAudioV2TokenizerModel", tmp_path)
    same_tensors(back.state_dict(), hf_codec.state_dict())
    again = HiggsAudioV2TokenizerModel.from_pretrained(tmp_path)
    same_tensors(again.state_dict(), ours.state_dict())
    assert again.config == ours.config
    clip = 0.1 * torch.randn(1, 1, 4321, generator=torch.Generator().manual_seed(0))
    codes = hf_codec.encode(clip).audio_codes
    assert torch.equal(back.encode(clip).audio_codes, codes)
    assert torch.equal(again.encode(clip).audio_codes, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_half_and_double_checkpoints_keep_their_dtype(dtype: torch.dtype, tmp_path):
    theirs = make_hf(use_text_head=True).to(dtype)
    theirs.save_pretrained(tmp_path / "hf")
    ours = Model.from_pretrained(tmp_path / "hf", use_text_head=True)
    same_tensors(ours.state_dict(), theirs.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    back = load_hf("HiggsAudioV2ForConditionalGeneration", tmp_path / "ours", use_text_head=True, dtype="auto")
    same_tensors(back.state_dict(), theirs.state_dict())
    assert ours.model.rotary_emb.inv_freq.dtype is torch.float32  # computed, never stored, never rounded


def test_dtype_is_converted_as_asked(tmp_path, codec_folder):
    model = make_ours()
    model.save_pretrained(tmp_path)
    for asked, given in (
        (None, torch.float32),
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        loaded = Model.from_pretrained(tmp_path, dtype=asked)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name].to(given)), name
    for wrong in ("int8", "float99"):
        with pytest.raises(UserError, match=f"'{wrong}' is no floating-point dtype"):
            Model.from_pretrained(tmp_path, dtype=wrong)
    codec = HiggsAudioV2TokenizerModel.from_pretrained(codec_folder, dtype="bfloat16")
    assert {p.dtype for p in codec.parameters()} == {torch.bfloat16}


def test_devices(tmp_path, codec_folder):
    make_ours().save_pretrained(tmp_path)
    for device in (None, "cpu", torch.device("cpu"), "auto"):
        assert Model.from_pretrained(tmp_path, device_map=device).device.type in ("cpu", "cuda", "mps")
    # Everything goes to the device, also what is computed and not stored.
    for model in (
        Model.from_pretrained(tmp_path, device_map="meta"),
        HiggsAudioV2TokenizerModel.from_pretrained(codec_folder, device_map="meta"),
    ):
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    with pytest.raises(UserError, match="'gpu' names no device"):
        Model.from_pretrained(tmp_path, device_map="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            Model.from_pretrained(tmp_path, device_map="cuda")


# ---------------------------------------------------------------------------------------------------- shards


@torch.no_grad()
def test_shards_and_their_index(tmp_path):
    model = make_ours(use_text_head=True)
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 4 and not (tmp_path / "model.safetensors").exists()
    assert {tmp_path / name for name in index["weight_map"].values()} == set(shards)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in model.state_dict().values())
    for shard in shards:
        with safe_open(shard, "pt") as handle:
            names = list(handle.keys())
            assert handle.metadata() == {"format": "pt"}
        assert all(index["weight_map"][name] == shard.name for name in names)
        assert shard.stat().st_size < 20_000 + 2000 or len(names) == 1
    same_tensors(Model.from_pretrained(tmp_path, use_text_head=True).state_dict(), model.state_dict())
    back = load_hf("HiggsAudioV2ForConditionalGeneration", tmp_path, use_text_head=True)
    same_tensors(back.state_dict(), model.state_dict())
    # And what transformers cuts.
    back.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 4
    same_tensors(Model.from_pretrained(tmp_path / "hf", use_text_head=True).state_dict(), model.state_dict())


def test_stale_weights_do_not_stay(tmp_path):
    first, second = make_ours(seed=1), make_ours(seed=2)
    for sizes in ((20_000, 10**9), (10**9, 20_000), (20_000, 40_000)):
        for model, size in zip((first, second), sizes, strict=True):
            (tmp_path / "tokenizer.json").write_text("{}")
            model.save_pretrained(tmp_path, max_shard_bytes=size)
            same_tensors(Model.from_pretrained(tmp_path).state_dict(), model.state_dict())
        count = len(list(tmp_path.glob("*.safetensors")))
        index = tmp_path / "model.safetensors.index.json"
        promised = (
            set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        )
        assert count == len(promised)
        assert (tmp_path / "tokenizer.json").read_text() == "{}", "what others put there is not ours to remove"


@pytest.mark.parametrize("at", [1, 3])
def test_a_save_that_breaks_off_leaves_the_old_checkpoint(at: int, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    old = make_ours(seed=1)
    old.save_pretrained(folder, max_shard_bytes=20_000)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = 0

    def full_disk(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(files, "save_file", full_disk)
    for target in (folder, tmp_path / "fresh"):
        calls = 0
        with pytest.raises(OSError, match="No space left"):
            make_ours(seed=2).save_pretrained(target, max_shard_bytes=20_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "nothing half-written is left beside it"


def test_saving_makes_folders_and_readable_files(tmp_path):
    make_ours().save_pretrained(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        make_ours().save_pretrained(tmp_path / "file" / "b")


def test_non_contiguous_and_shared_weights_are_saved(tmp_path):
    model = make_ours()
    model.audio_lm_head.weight = torch.nn.Parameter(model.audio_lm_head.weight.detach().t().contiguous().t())
    model.save_pretrained(tmp_path)
    same_tensors(Model.from_pretrained(tmp_path).state_dict(), model.state_dict())


@torch.no_grad()
def test_tied_embeddings(tmp_path):
    """One tensor here and after loading; two equal ones in the file, which transformers (it ties nothing) reads."""
    model = make_ours(use_text_head=True, tie_word_embeddings=True)
    assert model.text_lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, use_text_head=True)
    assert loaded.text_lm_head.weight is loaded.model.embed_tokens.weight
    same_tensors(loaded.state_dict(), model.state_dict())
    load_hf("HiggsAudioV2ForConditionalGeneration", tmp_path, use_text_head=True)
    # A file that keeps the pair once.
    stored = load_file(tmp_path / "model.safetensors")
    del stored["text_lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = Model.from_pretrained(tmp_path, use_text_head=True)
    assert loaded.text_lm_head.weight is loaded.model.embed_tokens.weight


@torch.no_grad()
def test_tied_in_the_config_but_two_heads_in_the_file(tmp_path):
    """transformers does not tie whatever the config says; its checkpoint keeps its own text head here as well."""
    theirs = make_hf(use_text_head=True, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, use_text_head=True)
    same_tensors(loaded.state_dict(), theirs.state_dict())
