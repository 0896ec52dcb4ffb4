"""Text tokenizers: ids as transformers gives them, round trips, saving, and what is said when files are missing."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CORPUS, build_tokenizer

from higgs.errors import UserError
from higgs.text import (
    SPECIAL_TOKENS,
    HFTokenizer,
    SentencePieceTokenizer,
    load_text_tokenizer,
    train_sentencepiece,
)
from higgs.transcript import normalize_transcript

TEXTS = (
    "",
    "Plain words, and 1234 numbers.",
    " spaces  around\n\nand lines\n",
    "naïve café — 日本語 🎵",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nHello<|eot_id|>",
    "a <|AUDIO_OUT|> <|AUDIO|>b<|reserved_special_token_6|>\t<|scene_desc_start|>\nx\n<|scene_desc_end|>",
)
text_with_tokens = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=8), st.sampled_from(SPECIAL_TOKENS)
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def pieces() -> SentencePieceTokenizer:
    return train_sentencepiece(CORPUS, vocab_size=400)


@pytest.fixture(scope="module")
def byte_pairs(tokenizer_folder) -> HFTokenizer:
    return HFTokenizer.from_folder(tokenizer_folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(tokenizer_folder, byte_pairs, text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    assert byte_pairs.encode(text) == theirs.encode(text, add_special_tokens=False)
    begins = text.startswith(theirs.bos_token)
    assert byte_pairs.encode(text, add_special_tokens=True) == theirs.encode(text, add_special_tokens=not begins)
    assert byte_pairs.pad_token_id == theirs.pad_token_id
    assert byte_pairs.vocab_size == len(theirs)


@given(text=text_with_tokens)
def test_decoding_gives_the_text_back(byte_pairs, pieces, text):
    for tokenizer in (byte_pairs, pieces):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(text=text_with_tokens)
def test_special_tokens_are_single_ids(byte_pairs, pieces, text):
    for tokenizer in (byte_pairs, pieces):
        ids = tokenizer.encode(text)
        for token in SPECIAL_TOKENS:
            assert ids.count(tokenizer.token_to_id(token)) == text.count(token)


def test_bos_is_added_once(byte_pairs, pieces):
    for tokenizer in (byte_pairs, pieces):
        bos = tokenizer.token_to_id(tokenizer.bos_token)
        assert tokenizer.encode("hello", add_special_tokens=True) == [bos, *tokenizer.encode("hello")]
        assert tokenizer.encode(tokenizer.bos_token + "hello", add_special_tokens=True).count(bos) == 1


def test_skipping_special_tokens(byte_pairs, pieces):
    for tokenizer in (byte_pairs, pieces):
        ids = tokenizer.encode("one<|eot_id|>\ntwo<|AUDIO_OUT|>")
        assert tokenizer.decode(ids, skip_special_tokens=True) == "one\ntwo"


def test_saving_and_loading(byte_pairs, pieces, tmp_path):
    for tokenizer, name in ((byte_pairs, "hf"), (pieces, "sp")):
        tokenizer.save(tmp_path / name)
        loaded = load_text_tokenizer(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
            tokenizer.bos_token,
            tokenizer.eos_token,
            tokenizer.pad_token,
        )
        assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_transformers_loads_what_is_saved(byte_pairs, tmp_path):
    transformers = pytest.importorskip("transformers")
    byte_pairs.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(text, add_special_tokens=False) for text in TEXTS] == [byte_pairs.encode(t) for t in TEXTS]
    assert theirs.pad_token == byte_pairs.pad_token


def test_names_given_as_objects_and_tokens_added_by_the_config(tmp_path):
    build_tokenizer(tmp_path)
    size = HFTokenizer.from_folder(tmp_path).vocab_size
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "<|begin_of_text|>", "special": True}
    del config["pad_token"]
    config["added_tokens_decoder"] = {str(size): {"content": "<|new|>", "special": True, "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = HFTokenizer.from_folder(tmp_path)
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer.encode("<|new|>") == [size]
    config["added_tokens_decoder"] = {"3": {"content": "<|other|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="other"):
        HFTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["hello world", "a", "日本 語 の テスト"])
def test_training_on_very_little_text(text):
    tokenizer = train_sentencepiece([text], vocab_size=8000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(tokenizer.has_token(token) for token in SPECIAL_TOKENS)


def test_training_is_deterministic_and_keeps_long_lines():
    long = " ".join(f"word{i}" for i in range(2000))
    first, second = (train_sentencepiece([long], vocab_size=400) for _ in range(2))
    assert first.model == second.model
    assert first.has_token("d")  # the long line was read, not dropped


def test_training_errors_say_what_to_do():
    with pytest.raises(UserError, match="raise it"):
        train_sentencepiece(["hello"], vocab_size=50)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([" ", "\n"])


def test_missing_and_broken_files_are_named(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match="does not exist"):
        load_text_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"tokenizer\.json.*tokenizer\.model"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_text_tokenizer(tmp_path)
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="pad token"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(UserError, match="not valid JSON"):
        load_text_tokenizer(tmp_path)


def test_unknown_token_is_named(byte_pairs, pieces):
    for tokenizer in (byte_pairs, pieces):
        assert not tokenizer.has_token("<|nothing|>")
        with pytest.raises(UserError, match="nothing"):
            tokenizer.token_to_id("<|nothing|>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", "hello."),
        ("hello!", "hello!"),
        ("  a \t b\n\n\nc ", "a b\nc."),
        ("你好，世界。", "你好, 世界."),
        ("“so” 「it」 is…", '"so" "it" is...'),
        ("call (me) now", "call me now."),
        ("72°F or 22°C", "72 degrees Fahrenheit or 22 degrees Celsius."),
        ("ha [laugh]", "ha <SE>[Laughter]</SE>"),
        ("[humming start] la [humming end]", "<SE_s>[Humming]</SE_s> la <SE_e>[Humming]</SE_e>"),
        ("[sing start]x[sing end][music][music start]", "<SE_s>[Singing]</SE_s>x<SE_e>[Singing]</SE_e>"
         "<SE>[Music]</SE><SE_s>[Music]</SE_s>."),
        ("[SPEAKER0] hi [cough][applause][cheering]", "[SPEAKER0] hi <SE>[Cough]</SE><SE>[Applause]</SE>"
         "<SE>[Cheering]</SE>"),
        (" \n ", ""),
    ],
)  # fmt: skip
def test_transcript_normalisation(text, expected):
    assert normalize_transcript(text) == expected
    assert normalize_transcript(expected) == expected
