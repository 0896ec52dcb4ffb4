"""HiggsAudioV2Processor: conversations and audio in, tensors for the decoder out; and generated codes back to sound.

Shapes: B batch, T tokens, F delayed audio frames, K codebooks, L samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from higgs import delay
from higgs.audio import load_audio, save_audio
from higgs.batch import BatchBuilder, BatchFeature, BatchOptions, LabelsMode
from higgs.chat import ChatRenderer, ChatTokens, Conversation, Modality, RenderedChat
from higgs.chat_template import choose_renderer, own_template
from higgs.checkpoint.files import staged_folder
from higgs.checkpoint.io import load_codec, save_codec
from higgs.codec import Codec, encode_clips
from higgs.errors import UserError
from higgs.folders import read_json, resolve_folder, write_json
from higgs.inputs import AudioFeatureExtractor, read_audio_item
from higgs.text import TextTokenizer, load_text_tokenizer

__all__ = ["AudioFeatureExtractor", "BatchFeature", "HiggsAudioV2Processor"]

CONFIG_FILE, TEMPLATE_FILE, CODEC_FOLDER = "processor_config.json", "chat_template.jinja", "audio_tokenizer"
PLAIN_FIELDS = (
    "audio_token",
    "audio_bos_token",
    "audio_eos_token",
    "audio_delay_token",
    "audio_stream_bos_id",
    "audio_stream_eos_id",
)
Audio = np.ndarray | Tensor | str | Path


class HiggsAudioV2Processor:
    """Text tokenizer, codec and chat format in one.

    Args:
        feature_extractor: settings of the audio front end; None takes the codec's sample rate.
        tokenizer: text tokenizer (see `higgs.text`).
        audio_tokenizer: the codec.
        chat_template: Jinja text of the chat format; None means the released one. A template that follows the
            released format is rendered by `higgs.chat.ChatBuilder`, which also takes assistant text.
        audio_token: placeholder of one delayed audio frame in the text.
        audio_bos_token, audio_eos_token: open and close a clip in the text.
        audio_delay_token: placeholder of the last K - 1 frames of a clip.
        audio_stream_bos_id, audio_stream_eos_id: the codes before and after a clip's own.
    """

    def __init__(
        self,
        feature_extractor: AudioFeatureExtractor | None = None,
        tokenizer: TextTokenizer | None = None,
        audio_tokenizer: Codec | None = None,
        chat_template: str | None = None,
        audio_token: str = "<|AUDIO_OUT|>",
        audio_bos_token: str = "<|audio_out_bos|>",
        audio_eos_token: str = "<|audio_eos|>",
        audio_delay_token: str = "<|reserved_special_token_6|>",
        audio_stream_bos_id: int = 1024,
        audio_stream_eos_id: int = 1025,
    ) -> None:
        if tokenizer is None or audio_tokenizer is None:
            raise UserError("A processor needs a text tokenizer and a codec; pass tokenizer=… and audio_tokenizer=….")
        rate = audio_tokenizer.sample_rate
        self.feature_extractor = feature_extractor or AudioFeatureExtractor(sampling_rate=rate)
        if self.feature_extractor.sampling_rate != rate:
            raise UserError(
                f"The feature extractor is set to {self.feature_extractor.sampling_rate} Hz but the codec works at "
                f"{rate} Hz; use those of one checkpoint."
            )
        if not audio_tokenizer.config.codebook_size <= audio_stream_bos_id != audio_stream_eos_id:
            raise UserError(
                f"audio_stream_bos_id={audio_stream_bos_id} and audio_stream_eos_id={audio_stream_eos_id} must differ "
                f"and lie past the codec's {audio_tokenizer.config.codebook_size} codes."
            )
        self.tokenizer = tokenizer
        self.audio_tokenizer = audio_tokenizer
        self.tokens = ChatTokens(
            bos=tokenizer.bos_token or "",
            audio_bos=audio_bos_token,
            audio=audio_token,
            audio_eos=audio_eos_token,
            delay=audio_delay_token,
        )
        self.audio_token, self.audio_bos_token = audio_token, audio_bos_token
        self.audio_eos_token, self.audio_delay_token = audio_eos_token, audio_delay_token
        self.audio_token_id = tokenizer.token_to_id(audio_token)
        self.audio_bos_token_id = tokenizer.token_to_id(audio_bos_token)
        self.audio_eos_token_id = tokenizer.token_to_id(audio_eos_token)
        self.audio_delay_token_id = tokenizer.token_to_id(audio_delay_token)
        self.audio_stream_bos_id, self.audio_stream_eos_id = audio_stream_bos_id, audio_stream_eos_id
        self.batch_builder = BatchBuilder(
            tokenizer, self.tokens, self.num_codebooks, audio_stream_bos_id, audio_stream_eos_id
        )
        self.chat_template = chat_template or own_template(self.tokens)
        self.renderer(self.chat_template)  # a broken template is reported now

    @property
    def num_codebooks(self) -> int:
        return self.audio_tokenizer.num_codebooks

    # ------------------------------------------------------------------ conversations and texts to tensors

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        modality: Modality = "audio",
        output_labels: bool = False,
        labels_mode: LabelsMode = "assistant",
        start_index: int | Sequence[int] = 0,
        padding: bool | str = True,
        padding_side: str = "left",
    ) -> str | list[str] | Tensor | BatchFeature:
        """Render one conversation or a list of them and, with `tokenize`, load and code their audio.

        Returns the text (a list of texts for a list), with `tokenize` the `input_ids` [B, T], with `return_dict` as
        well everything `__call__` returns. `modality` is what the generation prompt asks for: "audio" opens a clip,
        "text" leaves it to the model. `sampling_rate` must be the codec's (audio is converted to it while loading).
        `start_index`, per conversation or for all, is the first message whose assistant turns are trained; the other
        arguments are those of `__call__`. UserError names what is wrong with a conversation.
        """
        if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
            raise UserError("Give a conversation (a list of messages) or a list of conversations, none of them empty.")
        batched = isinstance(conversation[0], Sequence)
        renderer = self.renderer(chat_template or self.chat_template)
        conversations = conversation if batched else [conversation]
        chats = [renderer.build(one, add_generation_prompt, modality) for one in conversations]
        if not tokenize:
            return [chat.text for chat in chats] if batched else chats[0].text
        if sampling_rate not in (None, self.feature_extractor.sampling_rate):
            raise UserError(
                f"The codec works at {self.feature_extractor.sampling_rate} Hz; leave sampling_rate={sampling_rate} "
                "out. Audio at other rates is converted."
            )
        options = BatchOptions(output_labels, labels_mode, start_index, padding, padding_side, return_tensors)
        texts, scenes = [chat.text for chat in chats], [chat.has_scene for chat in chats]
        batch = self.batch_builder.build(texts, self._code_items(chats), options, scenes)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Audio | Sequence[Audio] | None = None,
        output_labels: bool = False,
        labels_mode: LabelsMode = "assistant",
        start_index: int | Sequence[int] = 0,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Tokenize rendered texts and code the clips behind their audio placeholders.

        Args:
            text: one text or several; a bos is put before those that lack one if the tokenizer wants it.
            audio: one clip or the clips of all texts in order: arrays [L], or whatever `higgs.audio.load_audio` takes.
            output_labels: add `labels` [B, T] and `audio_labels` [B, F, K], -100 where nothing is learnt.
            labels_mode: "assistant" trains assistant turns, and per clip and codebook its codes and one end code;
                "transformers" gives that library's labels: all text, all clips, no end code.
            start_index: per text or for all; assistant messages before it are context. It counts messages, system 0;
                a scene in the system turn counts as message 1.
            sampling_rate: of arrays in `audio`, in Hz; None means the codec's.
            padding, padding_side: pad texts to the longest, on this side.

        Returns:
            `input_ids`, `attention_mask` int64 [B, T]; if there is audio, `audio_input_ids` int64 [B, F, K] (each
            row's clips, delayed, one after the other, stream EOS behind) and `audio_input_ids_mask` bool [B, F].

        Raises:
            UserError: clips and placeholders differ in number, a clip is unusable, an option is unknown.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(one, str) for one in texts):
            raise UserError("The text must be a string or a list of strings, at least one.")
        if audio is None:
            clips = []
        elif isinstance(audio, np.ndarray | Tensor | str | Path):
            clips = [audio]
        else:
            clips = list(audio)
            if clips and isinstance(clips[0], int | float):  # samples as a plain list
                clips = [np.asarray(clips, dtype=np.float32)]
        rate = self.feature_extractor.sampling_rate
        waveforms = [load_audio(clip, rate, sampling_rate_of_array=sampling_rate or rate) for clip in clips]
        options = BatchOptions(output_labels, labels_mode, start_index, padding, padding_side, return_tensors)
        return self.batch_builder.build(texts, self.encode_audio(waveforms), options)

    def renderer(self, chat_template: str) -> ChatRenderer:
        """What renders conversations by this template."""
        named = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        named["pad_token"] = self.tokenizer.pad_token
        names = tuple((name, token) for name, token in named.items() if token is not None)
        return choose_renderer(chat_template, self.tokens, names)

    def get_audio_tokens(self, num_audio_tokens: int) -> str:
        """The placeholders of a clip of `num_audio_tokens` delayed frames."""
        tail = self.num_codebooks - 1
        return self.audio_token * (num_audio_tokens - tail) + self.audio_delay_token * tail

    def encode_audio(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Code mono clips, each [L] at the codec's rate, in one batch -> codes [K, T] of each, on the CPU."""
        return encode_clips(self.audio_tokenizer, waveforms)

    def _code_items(self, chats: Sequence[RenderedChat]) -> list[Tensor]:
        """Codes [K, T] of every audio item, in order; those given as waveforms are coded in one batch."""
        rate = self.feature_extractor.sampling_rate
        clips = [
            read_audio_item(slot.item, rate, f"Audio in message {slot.message}")
            for chat in chats
            for slot in chat.audio
        ]
        places = [slot.message for chat in chats for slot in chat.audio]
        least = self.audio_tokenizer.minimum_samples
        for clip, message in zip(clips, places, strict=True):
            if clip.is_floating_point() and len(clip) < least:
                raise UserError(
                    f"Audio in message {message} lasts {1000 * len(clip) / rate:.1f} ms; the codec needs at least "
                    f"{1000 * least / rate:.1f} ms. Leave it out or pad it with silence."
                )
        coded = iter(self.encode_audio([clip for clip in clips if clip.is_floating_point()]))
        return [next(coded) if clip.is_floating_point() else self._check_codes(clip) for clip in clips]

    def _check_codes(self, codes: Tensor) -> Tensor:
        size = self.audio_tokenizer.config.codebook_size
        fits = codes.ndim == 2 and len(codes) == self.num_codebooks
        if not fits or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size):
            raise UserError(
                f"Codes must be [{self.num_codebooks} codebooks, frames] of 0 to {size - 1}; got shape "
                f"{tuple(codes.shape)}. Code the clip with this checkpoint's codec."
            )
        return codes

    # ------------------------------------------------------------------ generated codes to sound

    def build_delay_pattern(self, input_ids: Tensor) -> Tensor:
        """Codes [B, K, T] -> delayed [B, K, T + K - 1]; see `higgs.delay`."""
        return delay.build_delay_pattern(input_ids, self.audio_stream_bos_id, self.audio_stream_eos_id)

    def revert_delay_pattern(self, input_ids: Tensor) -> Tensor:
        """Delayed frames [F, K] -> [F - K + 1, K]; see `higgs.delay`."""
        return delay.revert_delay_pattern(input_ids)

    def generated_codes(self, audio_input_ids: Tensor) -> list[Tensor]:
        """The codes [K, T] of the last clip of each row of generated frames [B, F, K] (`higgs.delay.generated_codes`),
        stray stream codes clipped into the codec's range."""
        if audio_input_ids.ndim != 3 or audio_input_ids.shape[-1] != self.num_codebooks:
            raise UserError(
                f"Codes to decode must be [batch, frames, {self.num_codebooks} codebooks]; got "
                f"{tuple(audio_input_ids.shape)}."
            )
        largest = min(self.audio_stream_bos_id, self.audio_tokenizer.config.codebook_size) - 1
        bos, eos = self.audio_stream_bos_id, self.audio_stream_eos_id
        return [delay.generated_codes(row, bos, eos).clamp(0, largest) for row in audio_input_ids]

    @torch.no_grad()
    def batch_decode(self, audio_input_ids: Tensor) -> list[Tensor]:
        """Waveforms, float32 [L] on the CPU, of generated frames [B, F, K]; see `generated_codes`. A row without a
        complete frame gives an empty waveform."""
        rows = self.generated_codes(audio_input_ids)
        waveforms = [torch.zeros(0)] * len(rows)
        sounding = [place for place, codes in enumerate(rows) if codes.shape[1]]
        if sounding:
            device = self.audio_tokenizer.device
            lengths = torch.tensor([rows[place].shape[1] for place in sounding], device=device)
            padded = pad_sequence([rows[place].T for place in sounding], batch_first=True).transpose(1, 2)
            decoded = self.audio_tokenizer.decode(padded.to(device), lengths=lengths)
            values = decoded.audio_values.float().cpu()
            for place, row, length in zip(sounding, values, decoded.lengths.tolist(), strict=True):
                waveforms[place] = row[0, :length].clone()
        return waveforms

    def decode(self, audio_input_ids: Tensor) -> Tensor:
        """The waveform [L] of one generated sequence [1, F, K]."""
        if audio_input_ids.shape[0] != 1:
            raise UserError(f"decode takes one sequence, got {audio_input_ids.shape[0]}; use batch_decode.")
        return self.batch_decode(audio_input_ids)[0]

    def save_audio(
        self,
        audio: Tensor | np.ndarray | Sequence[Tensor | np.ndarray],
        saving_path: str | Path | Sequence[str | Path],
        sampling_rate: int | None = None,
    ) -> None:
        """Write waveforms [L] to as many files (wav, flac, ogg, mp3 by suffix), at the codec's rate by default."""
        waveforms = [audio] if isinstance(audio, Tensor | np.ndarray) else list(audio)
        paths = [saving_path] if isinstance(saving_path, str | Path) else list(saving_path)
        if len(waveforms) != len(paths):
            raise UserError(f"There are {len(waveforms)} waveforms but {len(paths)} paths; give one path per waveform.")
        for waveform, path in zip(waveforms, paths, strict=True):
            save_audio(path, torch.as_tensor(waveform), sampling_rate or self.feature_extractor.sampling_rate)

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device_map: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        audio_tokenizer: str | Path | Codec | None = None,
    ) -> "HiggsAudioV2Processor":
        """Load from a checkpoint folder.

        The codec is, in this order: `audio_tokenizer` (a folder or a codec), the folder `audio_tokenizer/` inside the
        checkpoint, what `processor_config.json` names (relative paths count from the checkpoint). `device_map` and
        `dtype` are the codec's.
        """
        folder = resolve_folder(path)
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        settings = config.get("feature_extractor")
        if settings is None and (folder / "preprocessor_config.json").is_file():
            settings = read_json(folder / "preprocessor_config.json")
        tokenizer = load_text_tokenizer(folder)
        if audio_tokenizer is None or isinstance(audio_tokenizer, str | Path):
            source = _codec_source(folder, config, audio_tokenizer)
            audio_tokenizer = load_codec(source, device_map=device_map, dtype=dtype)
        return cls(
            AudioFeatureExtractor.from_dict(settings) if settings else None,
            tokenizer,
            audio_tokenizer,
            _read_template(folder),
            **{name: config[name] for name in PLAIN_FIELDS if name in config},
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the text tokenizer, the chat template, `processor_config.json` and the codec (in `audio_tokenizer/`),
        in the layout that transformers reads."""
        config: dict[str, Any] = {name: getattr(self, name) for name in PLAIN_FIELDS}
        config["audio_tokenizer"] = {
            "audio_tokenizer_class": "HiggsAudioV2TokenizerModel",
            # Absolute, because transformers takes a relative name for one on the hub. Here the folder beside goes first,
            # so that a checkpoint may move.
            "audio_tokenizer_name_or_path": str(Path(path).absolute() / CODEC_FOLDER),
        }
        config["feature_extractor"] = self.feature_extractor.to_dict()
        config["processor_class"] = type(self).__name__
        with staged_folder(path) as folder:
            self.tokenizer.save(folder)
            (folder / TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
            write_json(folder / CONFIG_FILE, config)
            save_codec(self.audio_tokenizer, folder / CODEC_FOLDER)


def _codec_source(folder: Path, config: dict[str, Any], given: str | Path | None) -> str | Path:
    """The folder (or hub id) of a checkpoint's codec."""
    if given is not None:
        return given
    if (folder / CODEC_FOLDER).is_dir():
        return folder / CODEC_FOLDER
    name = config.get("audio_tokenizer", {}).get("audio_tokenizer_name_or_path")
    if name is None:
        raise UserError(
            f"The checkpoint {folder} names no codec; pass audio_tokenizer=…, or put the codec's folder at "
            f"{folder / CODEC_FOLDER}."
        )
    if (folder / name).is_dir():
        return folder / name
    if Path(name).is_absolute():
        raise UserError(
            f"The codec of {folder} should lie at {name}, which is not a folder; pass audio_tokenizer=…, or put the "
            f"codec's folder at {folder / CODEC_FOLDER}."
        )
    return name


def _read_template(folder: Path) -> str | None:
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return read_json(config).get("chat_template") if config.is_file() else None
