"""The documented classes: the plain networks plus `from_pretrained`, `save_pretrained` and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from higgs.checkpoint.decoder import EMBEDDING, TEXT_HEAD, config_from_boson, is_boson_config, key_map
from higgs.checkpoint.files import SHARD_BYTES, stored_tensors
from higgs.checkpoint.io import fill_module, load_codec, pick_device, pick_dtype, save_codec, save_module
from higgs.checkpoint.meta import on_meta
from higgs.codec import Codec, HiggsAudioV2TokenizerConfig
from higgs.errors import UserError
from higgs.folders import CONFIG, read_json, resolve_folder
from higgs.generation.config import GenerationConfig
from higgs.generation.generator import GenerationOutput, LogitsProcessor, StoppingCriterion, generate
from higgs.model.config import HiggsAudioV2Config
from higgs.model.decoder import DualFFNDecoder, DualFFNTransformer
from higgs.text import load_text_tokenizer

GENERATION_CONFIG = "generation_config.json"


def read_decoder_config(folder: Path) -> tuple[HiggsAudioV2Config, dict[str, Any]]:
    """The decoder's config from a folder of either format, and the file's contents."""
    values = read_json(folder / CONFIG)
    if is_boson_config(values):
        has_tokenizer = (folder / "tokenizer.json").is_file()
        token_to_id = load_text_tokenizer(folder).token_to_id if has_tokenizer else None
        return HiggsAudioV2Config.from_dict(config_from_boson(values, token_to_id)), values
    if "acoustic_model_config" in values:
        raise UserError(f"{folder} holds a codec, not a decoder. Give the folder of the language model.")
    return HiggsAudioV2Config.from_dict(values), values


class HiggsAudioV2Model(DualFFNTransformer):
    """The bare DualFFN transformer, without heads. Built from a config, its weights are random."""

    def __init__(self, config: HiggsAudioV2Config) -> None:
        super().__init__(config)
        if not self.norm.weight.is_meta:
            self.init_weights()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device_map: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Loads a bare transformer, or the transformer of a checkpoint with heads, from a folder or hub id.

        `dtype` None keeps the stored dtype, "auto" takes the config's. Raises UserError naming what is wrong.
        """
        folder = resolve_folder(path)
        config, values = read_decoder_config(folder)
        with on_meta():
            model = cls(config)
        names = key_map(use_text_head=False, strip_to_backbone=True)
        fill_module(model, stored_tensors(folder), names, pick_dtype(dtype, values), pick_device(device_map))
        return model.eval()

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Writes a folder that this class and transformers' class of the same name load."""
        save_module(self, folder, {**self.config.to_dict(), "architectures": ["HiggsAudioV2Model"]}, max_shard_bytes)


class HiggsAudioV2ForConditionalGeneration(DualFFNDecoder):
    """The DualFFN transformer with its audio head and, with `use_text_head`, its text head."""

    def __init__(self, config: HiggsAudioV2Config, use_text_head: bool = False) -> None:
        super().__init__(config, use_text_head)
        self.generation_config = GenerationConfig()
        if not self.audio_lm_head.weight.is_meta:
            self.init_weights()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device_map: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        use_text_head: bool = False,
    ) -> Self:
        """Loads a checkpoint of the Hugging Face or the original format from a folder or hub id.

        `device_map` is a device or "auto" (the GPU where there is one). `dtype` None keeps the stored dtype, "auto"
        takes the config's. The text head is read only where it is asked for. Raises UserError naming the tensor that
        is missing, unexpected or of another shape.
        """
        folder = resolve_folder(path)
        config, values = read_decoder_config(folder)
        with on_meta():
            model = cls(config, use_text_head)
        dtype, device = pick_dtype(dtype, values), pick_device(device_map)
        tensors = stored_tensors(folder)
        if use_text_head and config.tie_word_embeddings and EMBEDDING in tensors:
            tensors.setdefault(TEXT_HEAD, tensors[EMBEDDING])
        fill_module(model, tensors, key_map(use_text_head), dtype, device)
        if use_text_head and config.tie_word_embeddings:
            # transformers ties nothing, whatever the config says: a head of its own in the file stays one.
            embedding = model.model.embed_tokens.weight
            if torch.equal(model.text_lm_head.weight, embedding):
                model.text_lm_head.weight = embedding
        if (folder / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_dict(read_json(folder / GENERATION_CONFIG))
        return model.eval()

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Writes a folder that this class and transformers' class of the same name load, in shards where it is large."""
        config = {**self.config.to_dict(), "architectures": ["HiggsAudioV2ForConditionalGeneration"]}
        ids = {name: getattr(self.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {**ids, **self.generation_config.to_dict()}
        save_module(self, folder, config, max_shard_bytes, {GENERATION_CONFIG: generation})

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | None = None,
        streamer: object | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_input_ids: Tensor | None = None,
        audio_input_ids_mask: Tensor | None = None,
        use_cache: bool | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> GenerationOutput | Tensor:
        """Continues prompts; the processor's output is what to pass: `model.generate(**inputs, max_new_tokens=1000)`.

        Returns the audio frames [B, F, K], the prompt's included, for `processor.batch_decode`; with
        `return_dict_in_generate=True` a `GenerationOutput`, which also holds the text ids. `options` are fields of
        `GenerationConfig` and override `generation_config`, which defaults to the checkpoint's.

        `logits_processor`: callables `(input_ids [B, T], scores [B*K, V]) -> scores`, applied between the delay
        pattern and the temperature. `stopping_criteria`: callables `(input_ids, scores) -> bool or [B]`. `streamer`:
        gets `put(token ids)` for the prompt and each step and `end()`, and, where it has the method,
        `put_frames(frames [B, K], is_frame [B])`. Options that audio codes rule out (beam search, assistant models)
        are a UserError.
        """
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise UserError("generate needs input_ids: pass the processor's output as model.generate(**inputs).")
        if max_length is not None:
            if max_length <= input_ids.shape[1]:
                raise UserError(
                    f"max_length={max_length} leaves no room after a prompt of {input_ids.shape[1]} tokens."
                )
            options.setdefault("max_new_tokens", max_length - input_ids.shape[1])
        options.pop("pad_token_id", None)  # what follows a row's end is frames of the stream's own EOS code
        how = generation_config or self.generation_config
        if not isinstance(how, GenerationConfig):
            how = GenerationConfig.from_dict(how.to_dict())  # that of transformers
        how = how.updated(**options)
        out = generate(
            self,
            input_ids,
            attention_mask,
            audio_input_ids,
            audio_input_ids_mask,
            how,
            as_list(logits_processor),
            as_list(stopping_criteria),
            streamer,
            self.config.use_cache if use_cache is None else use_cache,
        )
        return out if how.return_dict_in_generate else out.audio_sequences


def as_list(given: Any) -> list:
    """One callable or a list of them (transformers' lists are callable themselves) as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


class HiggsAudioV2TokenizerModel(Codec):
    """The neural codec. Built from a config, its weights are random and its codebooks empty (`fit_codebooks`)."""

    def __init__(self, config: HiggsAudioV2TokenizerConfig) -> None:
        super().__init__(config)
        if not self.fc.weight.is_meta:
            self.init_weights()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device_map: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Loads a codec of the Hugging Face or the original format from a folder or hub id."""
        return load_codec(path, device_map, dtype, kind=cls)

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Writes a folder that this class and transformers' class of the same name load."""
        save_codec(self, folder, max_shard_bytes)
