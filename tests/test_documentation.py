"""The public documentation's own snippets, run with nothing changed but the import line, the model's path and the
audio paths (and on a checkpoint of a few thousand weights)."""

import inspect
import re
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT
from infer_cases import make_checkpoint

import higgs

TITLES = {
    "Single-speaker smart voice": ["output_single_speaker_smart_voice.wav"],
    "Multi-speaker smart voice": ["output_multi_speaker_smart_voice.wav"],
    "Zero-shot voice cloning": ["output_zero_shot_voice_cloning.wav"],
    "Multi-speaker voice cloning": ["output_multi_speaker_voice_cloning.wav"],
    "Batched inference": ["output_batched_1.wav", "output_batched_2.wav"],
}
MODEL_ID = "eustlb/higgs-audio-v2-generation-3B-base"


@pytest.fixture(scope="module")
def document() -> str:
    path = PROJECT.parent / "shared" / "reference" / "higgs_audio_v2.md"
    if not path.is_file():
        pytest.skip(f"needs the public documentation at {path}")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), processor, seed=5)


@pytest.fixture(scope="module")
def voice(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    soundfile.write(path, np.random.default_rng(0).normal(scale=0.1, size=12_345), 24000)
    return str(path)


def snippet(document: str, title: str) -> str:
    """The code block under a heading."""
    return re.search(rf"### {re.escape(title)}\n.*?```python\n(.*?)```", document, re.DOTALL)[1]


def examples(document: str) -> list[str]:
    """The interactive examples of the reference part, prompts taken off."""
    blocks = re.findall(r"```python\n(>>> .*?)```", document, re.DOTALL)
    return ["\n".join(line[4:] for line in block.splitlines() if line.startswith((">>>", "..."))) for block in blocks]


def run(code: str, checkpoint: Path, voice: str) -> types.SimpleNamespace:
    code = code.replace("from transformers import", "from higgs import").replace(MODEL_ID, str(checkpoint))
    code = re.sub(r"https://[^\"]*\.(wav|flac)", voice, code)
    assert "http" not in code and "transformers" not in code and "eustlb" not in code
    names: dict[str, object] = {"__name__": "snippet"}
    exec(compile(code, "snippet", "exec"), names)
    return types.SimpleNamespace(**names)


@pytest.mark.parametrize("title", TITLES)
def test_snippets(document: str, checkpoint: Path, voice: str, title: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(snippet(document, title), checkpoint, voice)
    assert sorted(path.name for path in tmp_path.iterdir()) == TITLES[title]
    assert isinstance(result.model, higgs.HiggsAudioV2ForConditionalGeneration)
    for name, waveform in zip(TITLES[title], result.decoded, strict=True):
        samples, rate = soundfile.read(name)
        assert rate == 24000
        assert len(samples) == len(waveform) > 0
    # Greedy from the documented defaults: generated frames follow the prompt's, in codebooks' own codes.
    assert result.outputs.shape[0] == len(TITLES[title])
    assert result.outputs.shape[2] == 8
    assert not result.outputs.requires_grad


def test_the_training_snippet(document: str, checkpoint: Path, voice: str):
    result = run(snippet(document, "Training"), checkpoint, voice)
    assert result.outputs.loss.isfinite()
    assert result.outputs.loss > 0
    gradients = {name: p.grad for name, p in result.model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradients[name].abs().max() > 0 for name in ("text_lm_head.weight", "audio_lm_head.weight"))
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter -= 0.01 * parameter.grad
        assert result.model(**result.inputs).loss < result.outputs.loss


def test_the_examples_of_the_reference_part(document: str, checkpoint: Path, voice: str):
    """The configuration example, and the forward pass of the decoder with and without heads."""
    found = examples(document)
    forwards = [code for code in found if "outputs = model(**inputs)" in code]
    assert len(forwards) >= 1
    for code in forwards:
        result = run(code, checkpoint, voice)
        if hasattr(result.outputs, "logits"):
            assert result.outputs.logits.shape == (*result.inputs["input_ids"].shape, 8 * 1026)
        else:
            assert result.outputs.last_hidden_state.shape[:2] == result.inputs["input_ids"].shape


def test_the_configuration_example(document: str, monkeypatch):
    """Its model is the released 3B one: made on the meta device here, which changes nothing of what is checked."""
    (code,) = [code for code in examples(document) if "configuration = HiggsAudioV2Config()" in code]
    with torch.device("meta"):
        result = run(code, Path("none"), "none")
    assert result.configuration == higgs.HiggsAudioV2Config()
    assert sum(p.numel() for p in result.model.parameters()) > 5e9


def test_every_documented_name_is_there(document: str):
    """Each class and method with an entry of its own in the document."""
    names = set(re.findall(r"\[\[transformers\.(HiggsAudioV2[\w.]+)\]\]", document))
    assert len(names) >= 6
    for name in names:
        target = higgs
        for part in name.split("."):
            target = getattr(target, part)
        assert callable(target), name
    parameters = inspect.signature(higgs.HiggsAudioV2ForConditionalGeneration.generate).parameters
    assert list(parameters)[1:6] == ["inputs", "generation_config", "logits_processor", "stopping_criteria", "streamer"]


FORWARD = [
    "input_ids", "attention_mask", "audio_input_ids", "audio_input_ids_mask", "position_ids", "past_key_values",
    "inputs_embeds", "labels", "audio_labels", "use_cache", "logits_to_keep",
]  # fmt: skip


def test_documented_parameters_by_name_and_place():
    """Positional calls mean what they mean in transformers."""
    transformers = pytest.importorskip("transformers")
    pairs = [
        (higgs.HiggsAudioV2ForConditionalGeneration.forward, transformers.HiggsAudioV2ForConditionalGeneration.forward),
        (higgs.HiggsAudioV2Model.forward, transformers.HiggsAudioV2Model.forward),
        (higgs.HiggsAudioV2Processor.__init__, transformers.HiggsAudioV2Processor.__init__),
        (higgs.HiggsAudioV2Processor.__call__, transformers.HiggsAudioV2Processor.__call__),
        (higgs.HiggsAudioV2Processor.batch_decode, transformers.HiggsAudioV2Processor.batch_decode),
        (higgs.HiggsAudioV2Processor.decode, transformers.HiggsAudioV2Processor.decode),
        (higgs.HiggsAudioV2Processor.build_delay_pattern, transformers.HiggsAudioV2Processor.build_delay_pattern),
        (higgs.HiggsAudioV2Processor.revert_delay_pattern, transformers.HiggsAudioV2Processor.revert_delay_pattern),
        (higgs.HiggsAudioV2Processor.save_audio, transformers.HiggsAudioV2Processor.save_audio),
        (higgs.HiggsAudioV2TokenizerModel.encode, transformers.HiggsAudioV2TokenizerModel.encode),
        (higgs.HiggsAudioV2TokenizerModel.decode, transformers.HiggsAudioV2TokenizerModel.decode),
        (higgs.HiggsAudioV2TokenizerModel.forward, transformers.HiggsAudioV2TokenizerModel.forward),
    ]
    for ours, theirs in pairs:
        mine, other = (
            [p.name for p in inspect.signature(f).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            for f in (ours, theirs)
        )
        assert mine[: len(other)] == other, ours.__qualname__
    assert list(inspect.signature(pairs[0][0]).parameters)[1 : len(FORWARD) + 1] == FORWARD
