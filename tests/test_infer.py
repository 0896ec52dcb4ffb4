"""infer.py and what lies under it: speech from texts and conversations, files under the right names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import soundfile
import torch
import yaml
from conversations import SCENE, SYSTEM, assistant, user
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from infer_cases import PROJECT, Runner, make_checkpoint
from omegaconf import OmegaConf
from tiny import build_hf_codec

from higgs import HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Processor
from higgs.checkpoint.io import load_codec
from higgs.cli import CONFIGS, QUOTED, quote_free_text, to_dataclass
from higgs.data.manifest import Sample
from higgs.inference import InferConfig, speak
from higgs.prompts import ONE_VOICE, QUIET_ROOM, SEVERAL_VOICES, Reference, compose_conversation

TEXT = "The sun rises in the east."


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), processor)


@pytest.fixture
def infer(checkpoint, tmp_path, monkeypatch, capsys) -> Runner:
    return Runner(tmp_path, monkeypatch, capsys, checkpoint)


def read(path: Path | str) -> np.ndarray:
    samples, rate = soundfile.read(path)
    assert rate == 24000
    assert samples.ndim == 1 and len(samples) % 960 == 0
    return samples


def test_as_a_process(checkpoint, tmp_path):
    """Once for real: what a shell hands over, progress on stderr, the report on stdout, status 0; and a mistake."""
    text = "He said: \"It's 5 o'clock, [laugh] isn't it?\" {a: b}, $HOME ${x} = 100% \\ 'done'"
    command = [sys.executable, str(PROJECT / "infer.py"), f"checkpoint={checkpoint}", "device=cpu", "output=a.wav"]
    done = subprocess.run([*command, f"text={text}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a.wav: ") and " s" in done.stdout
    assert "frames/s" in done.stderr and "real-time factor" in done.stderr and "first frame" in done.stderr
    assert len(read(tmp_path / "a.wav"))
    wrong = subprocess.run([*command, "txt=Hello"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: There is no config key 'txt'. Did you mean 'text'?"
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_it_says_what_generate_says(infer, checkpoint):
    """The file is what the documented calls give, to the rounding of 16 bits."""
    infer.good(f"text={TEXT}", "output=a.wav")
    processor = HiggsAudioV2Processor.from_pretrained(checkpoint)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(checkpoint)
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": ONE_VOICE}]},
        {"role": "scene", "content": [{"type": "text", "text": QUIET_ROOM}]},
        user(TEXT),
    ]
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    waveform = processor.decode(model.generate(**inputs))
    np.testing.assert_allclose(read("a.wav"), waveform.clamp(-1, 1).numpy(), atol=1 / 32000)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats(infer, suffix: str):
    infer.good(f"text={TEXT}", f"output=deep/folder/a.{suffix}", "generation.max_new_tokens=20")
    info = soundfile.info(f"deep/folder/a.{suffix}")
    assert (info.samplerate, info.channels) == (24000, 1)
    assert list(infer.files()) == ["deep", "deep/folder", f"deep/folder/a.{suffix}"]


def test_a_folder_as_output(infer):
    infer.good(f"text={TEXT}", "output=out", "generation.max_new_tokens=20")
    assert list(infer.files()) == ["out", "out/output.wav"]


def test_a_picture_beside_the_sound(infer):
    infer.good(f"text={TEXT}", "output=a.flac", "plot=true", "generation.max_new_tokens=20")
    assert sorted(infer.files()) == ["a.flac", "a.png"]
    assert Path("a.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_seed_makes_sampling_reproducible(infer):
    how = (f"text={TEXT}", "generation=sample", "generation.max_new_tokens=12")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        infer.good(*how, f"seed={seed}", f"output={name}.wav")
    files = infer.files()
    assert files["a.wav"] == files["b.wav"] != files["c.wav"]
    for name, seed in (("d", 1), ("e", 2)):
        infer.good(*how, "generation=greedy", f"seed={seed}", f"output={name}.wav")
    assert infer.files()["d.wav"] == infer.files()["e.wav"]


def test_a_run_that_is_cut_off_says_so(infer):
    assert "cut off" in infer.good(f"text={TEXT}", "output=a.wav", "generation.max_new_tokens=12").out
    assert "cut off" not in infer.good(f"text={TEXT}", "output=a.wav").out
    nothing = infer(f"text={TEXT}", "output=b.wav", "generation.max_new_tokens=3")
    assert nothing.status == 2 and "No sound was generated" in nothing.error and not Path("b.wav").exists()


# ------------------------------------------------------------------------------------------- conversations


def conversations(clip_files: list[str]) -> list[dict]:
    """Three, of different lengths, one with a voice to clone."""
    return [
        {"id": "short", "messages": [SYSTEM, SCENE, user("Hi.")]},
        {"id": "clone", "messages": [SYSTEM, user("One."), assistant(url=clip_files[0]), user("Two, three, four.")]},
        {"messages": [SYSTEM, user("The sun rises in the east and sets in the west.")], "start_index": 0},
    ]


@pytest.mark.parametrize("suffix", ["yaml", "json", "jsonl"])
def test_many_conversations_of_each_kind_of_file(infer, clip_files, suffix: str):
    many = conversations(clip_files)
    file = Path(f"talk.{suffix}")
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, many)) + "\n\n")
    else:
        file.write_text(yaml.safe_dump(many) if suffix == "yaml" else json.dumps(many))
    infer.good(f"conversation={file}", "output=out", "batch_size=2", "generation.max_new_tokens=12")
    infer.good(f"conversation={file}", "output=each.flac", "generation.max_new_tokens=12")
    names = {"short", "clone", "002"}
    sounds = {*(f"out/{name}.wav" for name in names), *(f"each_{name}.flac" for name in names)}
    assert set(infer.files()) == {file.name, "out", *sounds}


def test_batches_of_any_size_say_the_same(infer, clip_files):
    """Row i draws with seed + i whatever the batches are; codes are equal, sound is to the rounding of 16 bits."""
    Path("talk.json").write_text(json.dumps(conversations(clip_files)))
    for size in (1, 2, 3):
        infer.good("conversation=talk.json", f"output={size}", f"batch_size={size}", "generation=sample")
    for name in ("short", "clone", "002"):
        for size in (2, 3):
            np.testing.assert_allclose(read(f"1/{name}.wav"), read(f"{size}/{name}.wav"), atol=1 / 30000)
    assert len({len(read(f"1/{name}.wav")) for name in ("short", "clone", "002")}) > 1


@pytest.mark.parametrize("suffix", ["yaml", "json", "jsonl"])
@pytest.mark.parametrize("bare", [False, True])
def test_one_conversation(infer, clip_files, suffix: str, bare: bool):
    messages = conversations(clip_files)[1]["messages"]
    value = messages if bare else {"id": "name", "messages": messages}
    Path(f"talk.{suffix}").write_text(yaml.safe_dump(value) if suffix == "yaml" else json.dumps(value))
    infer.good(f"conversation=talk.{suffix}", "output=a.wav", "generation.max_new_tokens=20")
    assert sorted(infer.files()) == ["a.wav", f"talk.{suffix}"]
    infer.good(f"conversation=talk.{suffix}", "output=out", "generation.max_new_tokens=20")
    assert set(infer.files()) > {f"out/{'000' if bare else 'name'}.wav"}


def test_audio_paths_are_relative_to_the_file(infer, clip_files):
    Path("deep").mkdir()
    Path("deep/voice.wav").write_bytes(Path(clip_files[0]).read_bytes())
    for key in ("url", "path"):
        talk = [SYSTEM, user("One."), assistant(**{key: "voice.wav"}), user("Two.")]
        Path("deep/talk.yaml").write_text(yaml.safe_dump(talk))
        infer.good("conversation=deep/talk.yaml", f"output={key}.wav", "generation.max_new_tokens=20")
    assert infer.files()["url.wav"] == infer.files()["path.wav"]


def test_the_shipped_examples(infer):
    """They all speak; the paths to their reference voices hold."""
    examples = sorted((PROJECT / "examples").glob("*.*"))
    assert len(examples) >= 5
    for example in examples:
        infer.good(f"conversation={example}", f"output={example.stem}", "generation.max_new_tokens=14")
        assert len(list(Path(example.stem).glob("*.wav"))) == (2 if example.suffix == ".jsonl" else 1)


@pytest.mark.parametrize("text", ["[SPEAKER0] Hi! [SPEAKER1] Oh.", "Hi!"])
def test_references_from_the_command_line(infer, clip_files, text: str):
    with_text = f"{{audio: {clip_files[0]}, text: 'One, two.'}}"
    without = f"{{audio: {clip_files[1]}, speaker: SPEAKER1}}"
    results = {}
    for name, reference in {"pair": [with_text], "scene": [without], "both": [with_text, without], "none": []}.items():
        infer.good(
            f"text={text}",
            f"reference=[{','.join(reference)}]",
            f"output={name}.wav",
            "scene=A quiet, small room.",
            "generation.max_new_tokens=14",
        )
        results[name] = infer.files()[f"{name}.wav"]
    assert len(set(results.values())) == 4, "a reference changes what is said"


def test_hydras_own_flags_work(infer):
    assert "generation:" in infer.good("--cfg", "job").out
    assert "checkpoint" in infer.good("--help").out
    assert infer.files() == {}


@pytest.mark.parametrize("codebooks", [1, 4])
def test_another_number_of_codebooks(infer, processor, tmp_path_factory, codebooks: int):
    """All the way, with fewer codes as well."""
    size = 256
    codec = tmp_path_factory.mktemp("codec")
    build_hf_codec(codebooks, size).save_pretrained(codec)
    other = HiggsAudioV2Processor(
        tokenizer=processor.tokenizer, audio_tokenizer=load_codec(codec), audio_stream_bos_id=size,
        audio_stream_eos_id=size + 1,
    )  # fmt: skip
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), other)
    how = (f"text={TEXT}", "output=a.wav", "plot=true", "generation.max_new_tokens=20", "dtype=bfloat16")
    outcome = infer(*how, checkpoint=folder)
    assert outcome.status == 0, outcome.error
    assert len(read("a.wav")) and Path("a.png").is_file()


def test_the_conversation_that_text_and_references_describe():
    def composed(**given: object) -> list:
        given["references"] = given.pop("reference", ())
        return compose_conversation(**given)

    plain = composed(text=TEXT)
    assert plain == [
        {"role": "system", "content": [{"type": "text", "text": ONE_VOICE}]},
        {"role": "scene", "content": [{"type": "text", "text": QUIET_ROOM}]},
        user(TEXT),
    ]
    dialogue = composed(text="[SPEAKER0] Hi! [SPEAKER1] Oh.", scene="A street.")
    assert dialogue[0]["content"][0]["text"] == SEVERAL_VOICES
    assert [item["text"] for item in dialogue[1]["content"]] == [
        "A street.",
        "SPEAKER0: feminine",
        "SPEAKER1: masculine",
    ]
    voices = [Reference("a.wav", "One."), Reference("b.wav", "Two.", "SPEAKER1")]
    cloned = composed(text="[SPEAKER0] Hi! [SPEAKER1] Oh.", reference=voices, system="Speak.")
    assert cloned[0]["content"][0]["text"] == "Speak."
    assert len(cloned[1]["content"]) == 1, "voices that are heard need no description"
    assert [message["role"] for message in cloned] == [
        "system",
        "scene",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert cloned[2]["content"][0]["text"] == "[SPEAKER0] One."
    assert cloned[4]["content"][0]["text"] == "[SPEAKER1] Two."
    assert cloned[5]["content"] == [{"type": "audio", "url": "b.wav"}]
    in_scene = composed(text="Hi!", reference=[Reference("a.wav")])
    assert in_scene[1]["content"][1:] == [{"type": "text", "text": "SPEAKER0:"}, {"type": "audio", "url": "a.wav"}]
    assert composed(text="（Hi）[laugh]", normalize=True)[-1] == user("Hi <SE>[Laughter]</SE>")


# ------------------------------------------------------------------------------------ audio that is converted


def test_usable_audio_is_converted(infer):
    """Stereo, 8 kHz, clipped, 8 bit, another format: all speak; the same sound in another form says nearly the same."""
    rng = np.random.default_rng(0)
    tone = 0.3 * np.sin(np.arange(24000) * 0.05) + rng.normal(scale=0.01, size=24000)
    sounds = {
        "mono.wav": (tone, 24000, None),
        "stereo.wav": (np.stack((tone, tone), 1), 24000, None),
        "five.wav": (np.stack([tone] * 5, 1), 24000, None),
        "low.wav": (tone[::3], 8000, None),
        "high.flac": (tone, 48000, None),
        "clipped.wav": (np.clip(tone * 20, -1, 1), 24000, None),
        "eight.wav": (tone, 24000, "PCM_U8"),
        "float.wav": (tone, 24000, "DOUBLE"),
        "voice.ogg": (tone, 24000, None),
    }
    jobs = []
    for name, (samples, rate, subtype) in sounds.items():
        soundfile.write(name, samples, rate, subtype=subtype)
        jobs.append({"id": name, "messages": [SYSTEM, user("One."), assistant(path=name), user(TEXT)]})
    Path("talk.json").write_text(json.dumps(jobs))
    said = infer.good("conversation=talk.json", "output=out", "batch_size=3", "generation.max_new_tokens=12").error
    assert "clipped.wav is clipped" in said and "warnings.warn" not in said
    files = infer.files()
    assert len([name for name in files if name.startswith("out/")]) == len(sounds)
    assert files["out/stereo.wav.wav"] == files["out/mono.wav.wav"] == files["out/five.wav.wav"]


# ------------------------------------------------------------------------------------------------ text mode


def test_modality_text_lets_the_model_write(infer, processor, tmp_path_factory):
    """A head that likes to open audio: what it wrote is in the report, what it said in the file."""
    folder = make_checkpoint(tmp_path_factory.mktemp("talkative"), processor, seed=1)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True)
    with torch.no_grad():
        model.text_lm_head.weight[model.config.audio_bos_token_id] *= 3
    model.save_pretrained(folder)
    outcome = infer(f"text={TEXT}", "modality=text", "output=a.wav", "generation.max_new_tokens=80", checkpoint=folder)
    assert outcome.status == 0, outcome.error
    assert "text: " in outcome.out
    assert len(read("a.wav"))
    assert "<|" not in outcome.out


def test_speak_from_python(checkpoint):
    """Without files: what training uses to hear itself."""
    processor = HiggsAudioV2Processor.from_pretrained(checkpoint)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(checkpoint)
    jobs = [Sample(str(i), [SYSTEM, user("One " * (i + 1))]) for i in range(3)]
    spoken = list(speak(model, processor, jobs, batch_size=2, progress=False, max_new_tokens=20))
    assert [speech.name for speech in spoken] == ["0", "1", "2"]
    for speech in spoken:
        assert speech.codes.shape[0] == 8
        assert speech.waveform.shape == (speech.codes.shape[1] * 960,)
        assert not speech.waveform.requires_grad


# ------------------------------------------------------------------------------------------ text as it comes


def arrives(text: str) -> object:
    arguments = quote_free_text(["checkpoint=x", f"text={text}"], {"text", "scene", "system"})
    return to_dataclass(InferConfig, hydra.compose("infer", arguments)).text


@pytest.mark.parametrize(
    "text",
    [
        "a, b: c",
        "[SPEAKER0] Hi! [SPEAKER1] {oh}",
        "It's \"quoted\", isn't it?",
        '"Hooray!" he said. "It\'s here!"',
        "'tis the night; 'twas day'",
        "C:\\path\\",
        "ends in \\\\",
        "\\'",
        "\\\\'",
        "${interpolation} $x \\${y} \\\\${z}",
        "= = ( ) % ~ @ # !",
        "line one\nline two\ttab",
        "null and void",
        "true",
        "1e-5",
        "  padded  ",
        "太阳从东方升起。",
        "'",
        '"',
        "''' \"\"\"",
    ],
)
def test_text_arrives_as_it_was_typed(text: str):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert arrives(text) == text


def test_any_text_arrives_as_it_was_typed():
    # Characters that Hydra's or OmegaConf's grammar gives a meaning are drawn more often than others.
    pieces = st.sampled_from(list("'\"\\$[](){},:=~@%# \nab") + ["${", "\\'", "}"])
    others = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=4)

    parser = OverridesParser.create()

    @settings(max_examples=400)
    @given(st.lists(pieces | others, min_size=1, max_size=12).map("".join))
    def check(text: str) -> None:
        if text.strip() in ("", "???") or text == "null" or re.fullmatch(QUOTED, text):
            return  # said to be no text, or one quoted string, which Hydra unwraps
        (argument,) = quote_free_text([f"text={text}"], {"text"})
        # The two grammars that a value passes: Hydra's of overrides, OmegaConf's of interpolations.
        assert OmegaConf.create({"text": parser.parse_override(argument).value()}).text == text

    check()


def test_a_quoted_value_is_unwrapped_and_other_keys_stay():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert arrives("'a, b'") == "a, b"
    assert quote_free_text(["text='a, b'", "output=a.wav", "text=null", "text="], {"text"}) == [
        "text='a, b'", "output=a.wav", "text=null", "text=",
    ]  # fmt: skip
