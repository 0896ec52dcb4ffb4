"""Every mistake of a user is one sentence that names it, status 2, no traceback and no file left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conversations import SYSTEM, assistant, user
from decoder_cases import chat_sizes, make_ours
from infer_cases import Outcome, Runner, make_checkpoint
from tiny import build_hf_codec

TEXT = "text=The sun rises."
CLONE = [SYSTEM, user("One."), assistant(path="voice.wav"), user("Two.")]


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), processor, max_position_embeddings=256, num_hidden_layers=1
    )


@pytest.fixture
def infer(checkpoint, tmp_path, monkeypatch, capsys) -> Runner:
    return Runner(tmp_path, monkeypatch, capsys, checkpoint)


def refused(infer: Runner, said: str, *arguments: str, **options: object) -> Outcome:
    """Runs, and checks that the mistake is named and that nothing is written."""
    before = infer.files()
    outcome = infer(*arguments, **options)
    assert outcome.status == 2, outcome
    lines = outcome.error.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.error
    assert "Traceback" not in outcome.error + outcome.out
    assert said in lines[0], lines[0]
    assert infer.files() == before, "something was written"
    return outcome


def wave(name: str, samples: np.ndarray, rate: int = 24000, subtype: str = "FLOAT") -> None:
    soundfile.write(name, samples, rate, subtype=subtype)


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("There is no config key 'txt'. Did you mean 'text'?", ["txt=Hello"]),
        ("There is no config key 'txt'", [TEXT, "+txt=Hello"]),
        ("There is no config key 'generation.temprature'. Did you mean 'generation.temperature'?",
         [TEXT, "generation.temprature=1"]),
        ("temprature", [TEXT, "+generation.temprature=1"]),
        ("There is no config 'generation/gready'. There are: default, greedy, sample.", [TEXT, "generation=gready"]),
        ("speker", [TEXT, "reference=[{audio: a.wav, speker: A}]"]),
        ("audio", [TEXT, "reference=[{text: One.}]"]),
        ("reference", [TEXT, "reference=a.wav"]),
        ("temperature", [TEXT, "generation.temperature=hot"]),
        ("seed", [TEXT, "seed=abc"]),
        ("seed", [TEXT, "seed=-1"]),
        ("plot", [TEXT, "plot=maybe"]),
        ("text=", ["output=a.wav"]),
        ("either text=", [TEXT, "conversation=talk.json"]),
        ("text is empty", ["text='  '"]),
        ("text is empty", ["text="]),
        ("belong to text=", ["conversation=talk.json", "scene=A street."]),
        ("modality is 'video'", [TEXT, "modality=video"]),
        ("batch_size is 0", [TEXT, "batch_size=0"]),
        ("dtype", [TEXT, "dtype=float12"]),
        ("no device", [TEXT, "device=gpu"]),
        ("'.mid' cannot be written", [TEXT, "output=a.mid"]),
        ("temperature is 0", [TEXT, "generation.do_sample=true", "generation.temperature=0"]),
        ("top_p is 2", [TEXT, "generation.top_p=2"]),
        ("both or neither", [TEXT, "generation.ras_win_len=5"]),
        ("max_new_tokens is 0", [TEXT, "generation.max_new_tokens=0"]),
        ("max_new_tokens=5000 does not fit", [TEXT, "generation.max_new_tokens=5000"]),
        ("control token <|eot_id|>", ["text=Hello <|eot_id|> you"]),
        ("control token <|AUDIO_OUT|>", ["text=Hello <|AUDIO_OUT|> you"]),
        ("Write key=value", ["text"]),
        ("Write key=value", [TEXT, "reference=[{audio: a.wav, text: b]"]),
        ("tokens long, but the model has 256 positions", ["text=" + "many words " * 200]),
        ("Audio file nowhere.wav does not exist", [TEXT, "reference=[{audio: nowhere.wav}]"]),
        ("nowhere.json", ["conversation=nowhere.json"]),
    ],
)  # fmt: skip
def test_on_the_command_line(infer, said: str, arguments: list[str]):
    refused(infer, said, *arguments)


def test_no_checkpoint_is_named(infer):
    refused(infer, "checkpoint", TEXT, checkpoint=None)
    refused(infer, "There is no checkpoint folder at /no/where", TEXT, checkpoint="/no/where")


def test_a_hub_id_that_the_hub_does_not_give(infer, monkeypatch):
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub\nTry again later.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused(infer, "the hub did not give a repository of that name (ConnectionError: no route", TEXT, checkpoint="a/b")


def test_an_output_that_cannot_be_written(infer):
    Path("file").write_text("")
    refused(infer, "file", TEXT, "output=file/a.wav")
    refused(infer, "file", TEXT, "output=file/deep/a.wav")


def test_text_without_a_text_head(infer, processor, tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("silent"), processor)
    make_ours(**chat_sizes(processor)).save_pretrained(folder)
    refused(infer, "text_lm_head.weight", TEXT, "modality=text", checkpoint=folder)


# --------------------------------------------------------------------------------------- conversation files


@pytest.mark.parametrize(
    ("said", "name", "content"),
    [
        ("not valid JSON", "talk.json", '{"messages": ['),
        ("not valid YAML", "talk.yaml", "messages: [a, {b"),
        ("not valid YAML", "talk.yaml", "- role: system\n\t- role: user"),
        ("not valid YAML", "talk.yaml", "!!python/object/apply:os.system ['true']"),
        ("line 2 is not valid JSON", "talk.jsonl", json.dumps({"messages": CLONE[:2]}) + "\n{"),
        ("talk.json", "talk.json", b"\xff\xfe\x00"),
        ("no conversation", "talk.jsonl", "\n\n"),
        ("talk.yaml", "talk.yaml", ""),
        ("talk.json", "talk.json", "[]"),
        ("talk.json", "talk.json", "3"),
        ("talk.json", "talk.json", '"text"'),
        ("talk.json", "talk.json", "null"),
        ("messages", "talk.json", '{"id": "a"}'),
        ("messages", "talk.json", '{"messages": 3}'),
        ("messages", "talk.json", '{"messages": null}'),
        ("empty", "talk.json", '{"messages": []}'),
        ("Message 0", "talk.json", '{"messages": ["hello"]}'),
        ("Message 0", "talk.json", '{"messages": [{"content": "hello"}]}'),
        ("unknown fields: message", "talk.json", '{"id": "a", "messages": [], "message": 1}'),
        ("start_index", "talk.json", '{"messages": [{"role": "system", "content": "a"}], "start_index": "b"}'),
    ],
)
def test_files_that_hold_no_conversation(infer, said: str, name: str, content: str | bytes):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(infer, said, f"conversation={name}")


def message(role: str, *items: object) -> dict:
    return {"role": role, "content": list(items)}


TEXT_ITEM = {"type": "text", "text": "One."}
VOICE = {"type": "audio", "path": "voice.wav"}


@pytest.mark.parametrize(
    ("said", "messages"),
    [
        ("role 'narrator'", [SYSTEM, message("narrator", TEXT_ITEM)]),
        ("begin the conversation with a message of role 'system'", [user("One.")]),
        ("not the first message", [SYSTEM, SYSTEM, user("One.")]),
        ("directly after the system message", [SYSTEM, user("One."), message("scene", TEXT_ITEM), user("Two.")]),
        ("type 'video'", [SYSTEM, message("user", {"type": "video", "url": "a.mp4"})]),
        ("type None", [SYSTEM, message("user", {"text": "One."})]),
        ("str for an item", [SYSTEM, message("user", "One.")]),
        ("no content", [SYSTEM, message("user")]),
        ("no content", [SYSTEM, {"role": "user"}]),
        ("no content", [SYSTEM, {"role": "user", "content": 3}]),
        ("no content", [SYSTEM, {"role": "user", "content": None}]),
        ("has no text", [SYSTEM, message("user", {"type": "text"})]),
        ("has no text", [SYSTEM, message("user", {"type": "text", "text": 3})]),
        ("reads in scene and assistant messages only", [SYSTEM, message("user", VOICE)]),
        ("holds none", [SYSTEM, user("One."), message("assistant", {"type": "audio"}), user("Two.")]),
        ("holds several", [SYSTEM, user("One."), message("assistant", {**VOICE, "url": "voice.wav"}), user("Two.")]),
        ("holds 2 items", [message("system", TEXT_ITEM, TEXT_ITEM), user("One.")]),
    ],
)
def test_conversations_that_are_not(infer, said: str, messages: list):
    """Also where it is the second of two and the first could have been spoken already."""
    wave("voice.wav", np.full(4000, 0.1))
    Path("talk.json").write_text(json.dumps([{"messages": CLONE}, {"messages": messages}]))
    refused(infer, said, "conversation=talk.json", "output=out", "batch_size=1", "generation.max_new_tokens=12")


def test_ids_that_make_no_file_names(infer):
    for ids, said in ((("a/b", "c"), "cannot be part of a file name"), (("a", "a"), "twice"), (("", "c"), "file name")):
        Path("talk.json").write_text(json.dumps([{"id": name, "messages": CLONE[:2]} for name in ids]))
        refused(infer, said, "conversation=talk.json", "output=out")


def test_the_second_prompt_is_too_long(infer):
    long = [SYSTEM, user("many words " * 200)]
    Path("talk.json").write_text(json.dumps([{"messages": CLONE[:2]}, {"messages": long}]))
    refused(infer, "positions", "conversation=talk.json", "output=out", "batch_size=1")
    Path("talk.json").write_text(json.dumps([{"messages": CLONE[:2]}, {"messages": [SYSTEM, user("words " * 22)]}]))
    refused(
        infer, "does not fit", "conversation=talk.json", "output=out", "batch_size=1", "generation.max_new_tokens=150"
    )


# ----------------------------------------------------------------------------------------------------- audio


def nan(name: str) -> None:
    samples = np.full(4000, 0.1, dtype=np.float32)
    samples[100] = np.nan
    wave(name, samples)


def infinite(name: str) -> None:
    samples = np.full(4000, 0.1, dtype=np.float32)
    samples[100] = np.inf
    wave(name, samples)


BAD_AUDIO: dict[str, tuple[str, Callable[[str], object]]] = {
    "not a sound": ("cannot be read as sound", lambda name: Path(name).write_text("hello" * 100)),
    "empty file": ("cannot be read as sound", lambda name: Path(name).write_bytes(b"")),
    "cut off": ("cannot be read as sound", lambda name: Path(name).write_bytes(b"RIFF\x00\x00\x00\x00WAVE")),
    "no samples": ("voice.wav", lambda name: wave(name, np.zeros(0))),
    "NaN": ("voice.wav", nan),
    "infinite": ("voice.wav", infinite),
    "a folder": ("is a folder", lambda name: Path(name).mkdir()),
    "missing": ("does not exist", lambda name: None),
    "too short": ("lasts 1.7 ms", lambda name: wave(name, np.full(40, 0.1))),
}


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_unusable_audio(infer, kind: str):
    said, make = BAD_AUDIO[kind]
    make("voice.wav")
    refused(infer, said, TEXT, "reference=[{audio: voice.wav}]", "output=out")
    # In the second conversation, where the first could have been spoken already.
    Path("talk.json").write_text(json.dumps([{"messages": CLONE[:2]}, {"messages": CLONE}]))
    refused(infer, said, "conversation=talk.json", "output=out", "batch_size=1", "generation.max_new_tokens=12")


def test_an_address_that_cannot_be_reached(infer):
    talk = [SYSTEM, user("One."), assistant(url="http://127.0.0.1:9/voice.wav"), user("Two.")]
    Path("talk.json").write_text(json.dumps(talk))
    refused(infer, "cannot be downloaded", "conversation=talk.json")


# ------------------------------------------------------------------------------------------------ checkpoint


@pytest.fixture
def copy(checkpoint, tmp_path_factory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("copy") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    return folder


@pytest.mark.parametrize(
    "part",
    ["config.json", "model.safetensors", "tokenizer.json", "audio_tokenizer/config.json",
     "audio_tokenizer/model.safetensors", "audio_tokenizer"],
)  # fmt: skip
def test_a_missing_part_of_the_checkpoint(infer, copy: Path, part: str):
    (copy / part).rename(copy / f"{part}.away")
    # The processor's config names where the checkpoint was written; that place is gone too.
    settings = copy / "processor_config.json"
    settings.write_text(settings.read_text().replace(str(copy.parent), "/away").replace("/audio_tokenizer", "/moved"))
    expected = {"model.safetensors": "model.safetensors", "audio_tokenizer": "audio_tokenizer"}.get(
        part, Path(part).name
    )
    refused(infer, expected, TEXT, "output=out/a.wav", checkpoint=copy)


@pytest.mark.parametrize(
    "part",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
     "processor_config.json", "chat_template.jinja", "audio_tokenizer/config.json", "audio_tokenizer/model.safetensors"],
)  # fmt: skip
def test_a_corrupt_part_of_the_checkpoint(infer, copy: Path, part: str):
    content = (copy / part).read_bytes()
    (copy / part).write_bytes(b"{% if" if part.endswith("jinja") else content[: len(content) // 2])
    said = "chat template" if part.endswith("jinja") else Path(part).name
    refused(infer, said, TEXT, "output=out/a.wav", checkpoint=copy)


def test_a_codec_with_another_number_of_codebooks(infer, tmp_path_factory):
    for codebooks, said in ((4, "The codec has 4 codebooks but the decoder 8"),):
        folder = tmp_path_factory.mktemp("codec")
        build_hf_codec(num_codebooks=codebooks).save_pretrained(folder)
        refused(infer, said, TEXT, f"audio_tokenizer={folder}")


def test_a_codec_with_more_codes_than_the_decoder(infer, copy: Path, processor):
    sizes = {**chat_sizes(processor), "codebook_size": 514, "audio_stream_bos_id": 512, "audio_stream_eos_id": 513}
    make_ours(**sizes).save_pretrained(copy)
    refused(infer, "1024 codes per codebook but the decoder only 514", TEXT, checkpoint=copy)


def test_a_tokenizer_of_another_model(infer, copy: Path, processor):
    ids = chat_sizes(processor)
    make_ours(**{**ids, "audio_token_id": ids["audio_token_id"] - 1}).save_pretrained(copy)
    refused(infer, "audio_token_id", TEXT, checkpoint=copy)
    make_ours(**{**ids, "vocab_size": ids["vocab_size"] - 100}).save_pretrained(copy)
    refused(infer, "vocabulary", TEXT, checkpoint=copy)


def test_a_codec_where_the_decoder_should_be(infer, codec_folder):
    refused(infer, "tokenizer", TEXT, checkpoint=codec_folder)
    refused(infer, "describes no codec", TEXT, f"audio_tokenizer={infer.checkpoint}")
