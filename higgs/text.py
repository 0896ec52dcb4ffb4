"""Text tokenizers behind one small protocol: a Hugging Face `tokenizer.json`, or a SentencePiece model.

No token id is written down anywhere: ids are asked for by the token's name. Texts are `str`, ids plain Python ints.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from higgs.errors import UserError
from higgs.folders import read_json

# Every control token of the chat format (SPEC 1 and 4), in the order of the released vocabulary.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio_out_bos|>",
    "<|reserved_special_token_6|>",  # marks the last K - 1 delayed frames of a clip
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
    "<|scene_desc_start|>",
    "<|scene_desc_end|>",
)
HF_FILE, SENTENCEPIECE_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
DEFAULT_NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class TextTokenizer(Protocol):
    """What the chat side needs of a text tokenizer. Special tokens are recognised inside texts."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str

    @property
    def vocab_size(self) -> int: ...  # highest id + 1, the rows an embedding needs
    @property
    def pad_token_id(self) -> int: ...
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...
    def has_token(self, token: str) -> bool: ...
    def token_to_id(self, token: str) -> int: ...
    def save(self, folder: str | Path) -> None: ...


class _NamedTokens:
    """What both tokenizers share: the three named tokens, and ids looked up by name."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str
    config: dict[str, Any]

    def _read_names(self, config: dict[str, Any], defaults: dict[str, str]) -> None:
        names = {name: _token_text(config.get(name)) or defaults.get(name) for name in DEFAULT_NAMES}
        self.config = dict(config)
        self.bos_token, self.eos_token = names["bos_token"], names["eos_token"]
        # Without a pad token the released model pads with its end-of-sequence token.
        pad = names["pad_token"] or self.eos_token
        if pad is None:
            raise UserError(f"The text tokenizer names neither a pad token nor an eos token; add one to {CONFIG_FILE}.")
        self.pad_token = pad

    def find(self, token: str) -> int | None:
        raise NotImplementedError

    def has_token(self, token: str) -> bool:
        return self.find(token) is not None

    def token_to_id(self, token: str) -> int:
        """The id of one token by its exact name. UserError if the vocabulary lacks it."""
        found = self.find(token)
        if found is None:
            raise UserError(
                f"The text tokenizer has no token {token!r}; use the tokenizer that belongs to the model, or train one "
                "with higgs.text.train_sentencepiece, which adds every token of the chat format."
            )
        return found

    @property
    def pad_token_id(self) -> int:
        return self.token_to_id(self.pad_token)

    def _save_config(self, folder: Path, **fields: str) -> None:
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        config = self.config | {name: token for name, token in names.items() if token is not None} | fields
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


class HFTokenizer(_NamedTokens):
    """A `tokenizer.json`, giving the ids that transformers' AutoTokenizer gives for it.

    `config` is the content of `tokenizer_config.json`: the names of bos, eos and pad, and tokens added on top of the
    file (`added_tokens_decoder`); the rest is kept for saving.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        config = config or {}
        self.tokenizer = tokenizer
        # A file may carry the padding and truncation of whoever saved it; batches are padded by the processor.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda entry: int(entry[0]))
        for token_id, entry in added:
            if tokenizer.token_to_id(entry["content"]) is None:
                token = tokenizers.AddedToken(**{key: entry[key] for key in ADDED_TOKEN_FIELDS if key in entry})
                tokenizer.add_special_tokens([token]) if entry.get("special") else tokenizer.add_tokens([token])
            if tokenizer.token_to_id(entry["content"]) != int(token_id):
                raise UserError(
                    f"{CONFIG_FILE} gives token {entry['content']!r} the id {token_id}, {HF_FILE} gives it "
                    f"{tokenizer.token_to_id(entry['content'])}; take both files from the same checkpoint."
                )
        self._read_names(config, defaults={})
        for token in filter(None, (self.bos_token, self.eos_token, self.pad_token)):
            self.token_to_id(token)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "HFTokenizer":
        path = Path(folder) / HF_FILE
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a missing and for a broken file
            raise UserError(f"Cannot read the text tokenizer {path}: {error}. Download the file again.") from error
        # Older checkpoints keep the names of the special tokens in a file of their own.
        named = _read_optional(Path(folder) / "special_tokens_map.json")
        given = {key: value for key, value in _read_config(Path(folder)).items() if value is not None}
        return cls(tokenizer, named | given)

    @property
    def vocab_size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def find(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """`add_special_tokens` lets the file's post-processor add its tokens (Llama 3: bos), but never a second bos to
        a text that begins with one."""
        if self.bos_token is not None and text.startswith(self.bos_token):
            add_special_tokens = False
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers' AutoTokenizer loads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / HF_FILE))
        self._save_config(folder, tokenizer_class=self.config.get("tokenizer_class", "PreTrainedTokenizerFast"))


class SentencePieceTokenizer(_NamedTokens):
    """A SentencePiece model. `decode(encode(text)) == text` for every text without U+2581, which SentencePiece itself
    uses for the space; newlines and blanks are kept, and characters unseen in training fall back to bytes."""

    def __init__(self, model: bytes, config: dict[str, Any] | None = None) -> None:
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._read_names(config or {}, defaults=DEFAULT_NAMES)
        # What `skip_special_tokens` leaves out. The model's own kinds do not tell: its newline is user-defined as well.
        self._special = {self.find(token) for token in SPECIAL_TOKENS} - {None}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "SentencePieceTokenizer":
        path = Path(folder) / SENTENCEPIECE_FILE
        try:
            return cls(path.read_bytes(), _read_config(Path(folder)))
        except (OSError, RuntimeError) as error:
            raise UserError(f"Cannot read the SentencePiece model {path}: {error}. Train or copy it again.") from error

    @property
    def vocab_size(self) -> int:
        return self.processor.get_piece_size()

    def find(self, token: str) -> int | None:
        found = self.processor.piece_to_id(token)
        return found if self.processor.id_to_piece(found) == token else None  # an unknown piece gets the id of <unk>

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids = self.processor.encode(text)
        if add_special_tokens and self.bos_token is not None and not text.startswith(self.bos_token):
            ids = [self.token_to_id(self.bos_token), *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        kept = [int(i) for i in ids if not (skip_special_tokens and i in self._special)]
        return self.processor.decode(kept)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` and `tokenizer_config.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE_FILE).write_bytes(self.model)
        self._save_config(folder)


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """The text tokenizer in a folder: `tokenizer.json` if it has one, else `tokenizer.model`."""
    folder = Path(folder)
    if (folder / HF_FILE).is_file():
        return HFTokenizer.from_folder(folder)
    if (folder / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer.from_folder(folder)
    what = "has no text tokenizer" if folder.is_dir() else "does not exist"
    raise UserError(f"The folder {folder} {what}; put {HF_FILE} (with {CONFIG_FILE}) or {SENTENCEPIECE_FILE} there.")


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | Path | None = None,
    vocab_size: int = 4096,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    character_coverage: float = 0.9995,
    num_threads: int = 1,
) -> SentencePieceTokenizer:
    """Train a unigram model on `texts` and, given a `folder`, save it there. Same texts, same model: one thread,
    because the sums of several arrive in any order.

    `vocab_size` is an upper bound (a small corpus gives fewer pieces); 256 of it are bytes. Nothing is normalised, so
    that decoding gives back what was encoded: spaces as they are, newline as a symbol of its own.
    """
    special = set(special_tokens)
    lines = [line for text in texts for line in text.splitlines() if line.strip() and line.strip() not in special]
    if not lines:
        raise UserError("There is no text to train the tokenizer on; give at least one line that is not blank.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=[*special_tokens, "\n"],
            unk_id=0,
            bos_id=-1,  # bos, eos and pad are among the special tokens, under the names of the chat format
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=max(
                4192, *(len(line.encode()) + 1 for line in lines)
            ),  # longer ones are dropped silently
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "smaller than required_chars" not in str(error):
            raise
        raise UserError(
            f"vocab_size={vocab_size} is too small for the {len(special_tokens)} special tokens, 256 bytes and the "
            f"characters of these texts; raise it. ({error})"
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _token_text(entry: str | dict[str, Any] | None) -> str | None:
    """A token in a config is a plain string, or an object with its `content`."""
    return entry["content"] if isinstance(entry, dict) else entry


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_optional(folder / CONFIG_FILE)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
