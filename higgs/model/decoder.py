"""The DualFFN transformer and its heads.

    text ids   --embed------------------------+
                                              +--> [B, T, C] --DualFFN layers--> norm --> audio head (and text head)
    audio codes --embed per codebook, sum-----+
                  (at the placeholder tokens)

Shapes: B batch, T sequence, F audio frames, K codebooks, V rows per codebook, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.errors import UserError
from higgs.model.ablations import make_layer, split_keys
from higgs.model.attention import additive, causal_mask, packed_mask, right_padded
from higgs.model.cache import StaticKVCache
from higgs.model.config import HiggsAudioV2Config
from higgs.model.dual_ffn import Routing
from higgs.model.layers import RMSNorm, RotaryEmbedding
from higgs.model.loss import decoder_loss
from higgs.model.outputs import DecoderOutput, TransformerOutput


class AudioEmbedding(nn.Module):
    """One table for all codebooks, codebook k in rows k*V to (k+1)*V; a frame is the sum over its codebooks.

    As ablations, the mean instead of the sum, and a linear layer behind it.
    """

    offsets: Tensor

    def __init__(self, config: HiggsAudioV2Config) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size
        self.embed_audio_tokens = nn.Embedding(config.num_codebooks * config.codebook_size, config.hidden_size)
        self.mean = config.audio_embed_mean
        self.projector: nn.Linear | None = None
        if config.audio_embed_projector:
            self.projector = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("offsets", self._offsets(), persistent=False)

    def _offsets(self) -> Tensor:
        return torch.arange(0, self.num_codebooks * self.codebook_size, self.codebook_size)

    def reset_buffers(self, device: torch.device) -> None:
        self.offsets = self._offsets().to(device)

    def forward(self, codes: Tensor) -> Tensor:
        """[..., K] -> [..., C]."""
        embedded = self.embed_audio_tokens(codes + self.offsets)
        frame = embedded.mean(dim=-2) if self.mean else embedded.sum(dim=-2)
        return frame if self.projector is None else self.projector(frame)


class DualFFNTransformer(nn.Module):
    """Embeddings, DualFFN layers and the final norm, without heads."""

    def __init__(self, config: HiggsAudioV2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.embed_audio_tokens = AudioEmbedding(config)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def init_weights(self) -> None:
        """Normal(0, initializer_range) for every matrix, ones for norms, zeros for biases and the padding token."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        if self.config.pad_token_id is not None and self.config.pad_token_id < self.config.vocab_size:
            with torch.no_grad():
                self.embed_tokens.weight[self.config.pad_token_id].zero_()

    def audio_placeholders(self, input_ids: Tensor) -> Tensor:
        """True where a token stands for an audio frame, the delayed tail included: [B, T]."""
        return (input_ids == self.config.audio_token_id) | (input_ids == self.config.audio_delay_token_id)

    def embed(
        self,
        input_ids: Tensor | None,
        audio_input_ids: Tensor | None,
        audio_input_ids_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Input embeddings [B, T, C] and the routing of rows; placeholders take the frames in order.

        `real` [B, T] is 0 at padding that no feed-forward need work on. Raises UserError if the number of placeholders
        differs from the number of valid frames.
        """
        if input_ids is None and inputs_embeds is None:
            if audio_input_ids is None:
                raise UserError("The model needs input_ids, inputs_embeds or audio_input_ids; none was given.")
            return self.embed_audio_tokens(audio_input_ids), Routing.all_audio()
        if input_ids is not None and inputs_embeds is not None:
            raise UserError("input_ids and inputs_embeds say the same thing twice; give one of them.")
        if inputs_embeds is None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
            placeholders = self.audio_placeholders(input_ids)
        else:
            placeholders = self._embedded(inputs_embeds, self.config.audio_token_id)
            if audio_input_ids is not None and int(placeholders.sum()) != _count(audio_input_ids, audio_input_ids_mask):
                # transformers knows the delayed tail by its ids only; here whole clips work from embeddings too.
                placeholders = placeholders | self._embedded(inputs_embeds, self.config.audio_delay_token_id)
        routing = Routing.by_rows(placeholders, real)
        if audio_input_ids is None:
            return inputs_embeds, routing
        frames = audio_input_ids.flatten(0, 1)
        if audio_input_ids_mask is not None:
            frames = frames[audio_input_ids_mask.flatten().bool()]
        if frames.shape[0] != routing.audio_rows.numel():
            raise UserError(
                f"The text has {routing.audio_rows.numel()} audio placeholders, but {frames.shape[0]} audio frames were "
                "given. Build both with the processor from the same conversation."
            )
        audio = self.embed_audio_tokens(frames).to(inputs_embeds.dtype)
        merged = inputs_embeds.flatten(0, 1).index_copy(0, routing.audio_rows, audio)
        return merged.view_as(inputs_embeds), routing

    def _embedded(self, inputs_embeds: Tensor, token: int) -> Tensor:
        """Where embeddings [B, T, C] are those of a token: [B, T]."""
        return (inputs_embeds == self.embed_tokens.weight[token]).all(dim=-1)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.device.type == "cpu" and input_ids.numel() and int(input_ids.max()) >= self.config.vocab_size:
            raise UserError(
                f"Token id {int(input_ids.max())} is beyond the vocabulary of {self.config.vocab_size}. "
                "Use the tokenizer that belongs to this checkpoint."
            )

    def transform(
        self,
        x: Tensor,
        routing: Routing,
        position_ids: Tensor,
        mask: Tensor | None,
        cache: StaticKVCache | None = None,
        keep_all: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs the layers and the final norm over embeddings [B, T, C]; `mask` [B, 1, T, S] is True = may look."""
        rotary = self.rotary_emb(position_ids, like=x)
        if self.config.splits_keys:
            routing = split_keys(routing, x, mask, cache)
        mask = None if mask is None else additive(mask, x.dtype)
        for layer in self.layers:
            if keep_all is not None:
                keep_all.append(x)
            x = layer(x, routing, rotary, mask, cache)
        x = self.norm(x)
        if keep_all is not None:
            keep_all.append(x)
        return x

    def forward(
        self,
        input_ids: Tensor | None = None,
        audio_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_input_ids_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StaticKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Any, ...]:
        """Text ids [B, T] with placeholders, and the audio frames that take their places [B, F, K].

        `attention_mask` [B, T] (with a cache [B, past + T]) is 1 at real tokens, `audio_input_ids_mask` [B, F] is True
        at valid frames, `position_ids` [B, T] default to the column numbers; given without `attention_mask` and cache, a
        restart begins a new piece, which attends to itself alone (packing). A cache, given as `past_key_values` or
        made with `use_cache=True`, is filled and returned. `return_dict=False` gives a tuple.
        """
        if output_attentions:
            raise UserError("Attention weights are never formed here (fused attention); leave output_attentions out.")
        if use_cache is None:
            use_cache = past_key_values is not None
        padding_follows = attention_mask is not None and not use_cache and right_padded(attention_mask)
        real = attention_mask if padding_follows else None
        x, routing = self.embed(input_ids, audio_input_ids, audio_input_ids_mask, inputs_embeds, real)
        batch, new = x.shape[:2]
        if use_cache and past_key_values is None:
            room = max(self.config.max_position_embeddings, new)
            past_key_values = StaticKVCache(self.config, batch, room, x.device, x.dtype)
        cache = past_key_values
        past = 0 if cache is None else cache.length
        mask = None
        if cache is not None:
            mask = cache.begin(new, attention_mask)
        elif attention_mask is not None:
            mask = None if padding_follows else causal_mask(attention_mask)
        elif position_ids is not None:
            mask = packed_mask(position_ids)
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x.device)[None]
        states: list[Tensor] | None = [] if output_hidden_states else None
        x = self.transform(x, routing, position_ids, mask, cache, states)
        if cache is not None:
            cache.end()
        out = TransformerOutput(x, cache, tuple(states) if states is not None else None)
        return out if return_dict else out.to_tuple()


class DualFFNDecoder(nn.Module):
    """The transformer with the audio head and, where text is trained or generated, the text head."""

    def __init__(self, config: HiggsAudioV2Config, use_text_head: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = DualFFNTransformer(config)
        rows = config.num_codebooks * config.codebook_size
        self.audio_lm_head = nn.Linear(config.hidden_size, rows, bias=False)
        self.text_lm_head: nn.Linear | None = None
        if use_text_head:
            self.text_lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self.text_lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def init_weights(self) -> None:
        self.model.init_weights()
        nn.init.normal_(self.audio_lm_head.weight, std=self.config.initializer_range)
        if self.text_lm_head is not None and not self.config.tie_word_embeddings:
            nn.init.normal_(self.text_lm_head.weight, std=self.config.initializer_range)

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., K, V]."""
        return self.audio_lm_head(hidden).unflatten(-1, (self.config.num_codebooks, self.config.codebook_size))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_input_ids: Tensor | None = None,
        audio_input_ids_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StaticKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        audio_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        codebook_weights: Tensor | None = None,
    ) -> DecoderOutput | tuple[Any, ...]:
        """Logits of the audio head [B, T', K*V], and the loss where labels are given.

        `labels` [B, T] and `audio_labels` [B, F, K] are not shifted; -100 is not trained. The loss is the sum over
        codebooks (times `codebook_weights` [K], default ones) of the mean cross-entropy, plus the mean cross-entropy
        of the text, if there is a text head. `logits_to_keep` is a number of last positions (0 for all) or a tensor
        of positions; the loss is of all positions whatever it says.
        """
        out = self.model(
            input_ids=input_ids,
            audio_input_ids=audio_input_ids,
            attention_mask=attention_mask,
            audio_input_ids_mask=audio_input_ids_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden = out.last_hidden_state
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        result = DecoderOutput(
            logits=self.audio_lm_head(kept), past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        if self.text_lm_head is not None:
            result.text_logits = self.text_lm_head(kept)
        if labels is not None or audio_labels is not None:
            if input_ids is None:
                raise UserError("A loss needs input_ids: they tell which positions hold audio frames.")
            placeholders = self.model.audio_placeholders(input_ids)
            sums = decoder_loss(self, hidden, placeholders, labels, audio_labels, audio_input_ids_mask)
            result.codebook_loss, result.text_loss = sums.codebook_loss, sums.text_loss
            result.loss = sums.loss(codebook_weights)
        return result if return_dict else result.to_tuple()


def _count(frames: Tensor, mask: Tensor | None) -> int:
    return frames.shape[0] * frames.shape[1] if mask is None else int(mask.sum())


def embed_step(model: DualFFNTransformer, tokens: Tensor, frames: Tensor, is_audio: Tensor) -> Tensor:
    """Embeds one position per row without waiting for the device: [B], [B, K], [B] bool -> [B, 1, C]."""
    text, audio = F.embedding(tokens, model.embed_tokens.weight), model.embed_audio_tokens(frames)
    return torch.where(is_audio[:, None], audio.to(text.dtype), text)[:, None]
