"""What is wrong with a checkpoint folder is named: the tensor, the file, the key."""

import json
from pathlib import Path

import pytest
import torch
from decoder_cases import make_ours
from safetensors.torch import load_file, save_file

from higgs import HiggsAudioV2ForConditionalGeneration as Model
from higgs import HiggsAudioV2TokenizerModel, UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    make_ours().save_pretrained(tmp_path / "checkpoint", max_shard_bytes=40_000)
    return tmp_path / "checkpoint"


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of the first shard, and the index with them."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_missing_tensor_is_named(folder: Path):
    rewrite(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight \[96, 32\] is missing"):
        Model.from_pretrained(folder)


def test_an_unexpected_tensor_is_named(folder: Path):
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(UserError, match=r"Unexpected tensor extra in .*model-00001"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(95, 32), (96, 31), (96, 32, 1), (96 * 32,), ()])
def test_a_tensor_of_another_shape_is_named(folder: Path, shape: tuple[int, ...]):
    rewrite(folder, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(shape)}))
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight has shape .* but config.json asks for \[96, 32\]"
    ):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_cut_off_file_is_named(folder: Path, keep: int):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model-00002.*cut off"):
        Model.from_pretrained(folder)


def test_a_missing_shard_is_named_with_what_it_holds(folder: Path):
    (folder / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    for shard in sorted(folder.glob("*.safetensors"))[1:]:
        shard.unlink()
    with pytest.raises(UserError, match=r"Shard .*model-00002.* is missing; it should hold \S+ and \d+ more"):
        Model.from_pretrained(folder)


def test_an_index_that_promises_too_much(folder: Path):
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.more.weight"] = "model-00001-of-00003.safetensors"
    value["weight_map"] = dict.fromkeys(value["weight_map"], sorted(folder.glob("*.safetensors"))[0].name)
    index.write_text(json.dumps(value))
    with pytest.raises(UserError, match="promises the tensor"):
        Model.from_pretrained(folder)
    for broken in ('{"weight_map": []}', "{}", '{"weight_map": {}}'):
        index.write_text(broken)
        with pytest.raises(UserError):
            Model.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "config.json is missing"),
        ("", "not valid JSON"),
        ('{"hidden_size": 32,', "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('"text"', "must hold a JSON object"),
        ("\udce9", "not valid JSON"),
        ('{"hidden_size": "wide"}', "hidden_size"),
        ('{"hidden_size": null}', "hidden_size"),
        ('{"hidden_size": 32.5}', "hidden_size"),
        ('{"rope_parameters": {"rope_type": "llama3"}}', "factor"),
        ('{"rope_parameters": "default"}', "rope_parameters"),
        ('{"acoustic_model_config": {}}', "codec"),
        (
            '{"text_config": {}, "audio_num_codebooks": 8}',
            "lacks hidden_size, num_attention_heads, audio_codebook_size",
        ),
        (
            '{"text_config": {"hidden_size": 32}, "audio_num_codebooks": 8, "audio_codebook_size": 16}',
            "lacks num_attention",
        ),
    ],
)
def test_a_malformed_config_is_named(folder: Path, content: str | None, said: str):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=said):
        Model.from_pretrained(folder)


def test_folders_of_the_wrong_kind(folder: Path, codec_folder: Path, tmp_path, processor):
    with pytest.raises(UserError, match="codec"):
        Model.from_pretrained(codec_folder)
    with pytest.raises(UserError, match="describes no codec"):
        HiggsAudioV2TokenizerModel.from_pretrained(folder)
    processor.tokenizer.save(tmp_path / "text")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Model.from_pretrained(tmp_path / "text")
    for path in (tmp_path / "nowhere", folder / "config.json", str(tmp_path / "no" / "where"), "./nowhere", "nowhere"):
        with pytest.raises(UserError, match="no checkpoint folder at"):
            Model.from_pretrained(path)
    for shard in folder.glob("model*"):
        shard.unlink()
    with pytest.raises(UserError, match="holds neither"):
        Model.from_pretrained(folder)


def test_a_broken_generation_config_is_named(folder: Path):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not valid JSON"):
        Model.from_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.0, "do_sample": true}')
    with pytest.raises(UserError, match="temperature"):
        Model.from_pretrained(folder)


def test_nothing_is_unpickled(tmp_path):
    """A model.pth that would run code when unpickled is refused, and has not run it."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "config.json").write_text('{"ratios": [2, 2]}')
    torch.save({"weight": Trap()}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        HiggsAudioV2TokenizerModel.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists()
