"""Text mode: the model writes text, opens audio itself and goes back to text, also in batches of mixed rows."""

from dataclasses import replace

import pytest
import torch
from decoder_cases import make_batch, make_ours, tame_eos
from generation_cases import CODES, PROMPTS, SETTINGS, check_against_reference

from higgs import GenerationConfig, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, UserError
from higgs.generation import choose, prefill
from higgs.generation.state import initial_state
from higgs.model import StaticKVCache


def scripted_model() -> HiggsAudioV2ForConditionalGeneration:
    """A model that follows a script written into its weights: layers that add nothing, one-hot embeddings, heads that
    map each token or frame to its successor.

    Text: 1 2 <audio> 3 4 <eot>; after 10 an audio of its own. Frames (2 codebooks of 4 codes): 0 1 2, then the end.
    """
    vocab, codes = 24, 6
    config = HiggsAudioV2Config(
        vocab_size=vocab, hidden_size=48, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=20, bos_token_id=0, eos_token_id=21,
        audio_bos_token_id=17, audio_token_id=18, audio_delay_token_id=19, num_codebooks=2, codebook_size=codes,
        audio_stream_bos_id=4, audio_stream_eos_id=5,
    )  # fmt: skip
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).eval()
    bos, eos, opener, end = 4, 5, 17, 21
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if type(module).__name__ == "RMSNorm":
                module.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, :vocab] = torch.eye(vocab)
        model.model.embed_audio_tokens.embed_audio_tokens.weight[:, vocab : vocab + 2 * codes] = torch.eye(2 * codes)
        for token, following in {1: 2, 2: opener, 3: 4, 4: end, 10: opener}.items():
            model.text_lm_head.weight[following, token] = 1.0
        # After a frame of ends the text goes on with 3. The placeholders are likelier still, and must not be written.
        for k in range(2):
            model.text_lm_head.weight[3, vocab + k * codes + eos] = 1.0
            model.text_lm_head.weight[[18, 19], vocab + k * codes + eos] = 2.0
            for code, following in {bos: 0, 0: 1, 1: 2, 2: eos, eos: eos}.items():
                model.audio_lm_head.weight[k * codes + following, vocab + k * codes + code] = 1.0
    return model


SCRIPT_FRAMES = [[4, 4], [0, 4], [1, 0], [2, 1], [5, 2], [5, 5]]


def test_the_model_writes_text_opens_audio_and_goes_back_to_text():
    """A batch whose rows are in three modes: text to audio to text, audio at once, text that ends without audio."""
    model = scripted_model()
    rows = [[7, 1], [7, 8, 9, 17], [4], [10], [1, 2, 17]]
    width = max(map(len, rows))
    ids = torch.tensor([[20] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, return_dict_in_generate=True)
    audio = [18, 18, 18, 18, 19, 19]
    script = [
        [2, 17, *audio, 3, 4, 21],
        [*audio[:5], 21],
        [21],
        [17, *audio, 3, 4, 21],
        [*audio[:5], 21],
    ]
    longest = max(map(len, script))
    assert out.sequences[:, width:].tolist() == [row + [21] * (longest - len(row)) for row in script]
    frames = [SCRIPT_FRAMES, SCRIPT_FRAMES, [], SCRIPT_FRAMES, SCRIPT_FRAMES]
    assert out.audio_sequences.tolist() == [row + [[5, 5]] * (6 - len(row)) for row in frames]
    assert out.audio_sequences_mask.sum(1).tolist() == [6, 6, 0, 6, 6]
    check_against_reference(model, {"input_ids": ids, "attention_mask": mask}, GenerationConfig(max_new_tokens=20))


def test_text_is_cut_where_the_steps_end():
    model = scripted_model()
    ids = torch.tensor([[1]])
    for steps, tokens, frames in (
        (1, [2], 0),
        (2, [2, 17], 0),
        (3, [2, 17, 18], 1),
        (8, [2, 17, 18, 18, 18, 18, 19, 19], 6),
    ):
        out = model.generate(input_ids=ids, max_new_tokens=steps, return_dict_in_generate=True)
        assert out.sequences[0, 1:].tolist() == tokens
        assert out.audio_sequences.shape[1] == frames


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_random_text_mode_equals_the_slow_reference(setting: str, kind: torch.dtype):
    """Random weights, a head that likes to open audio: several clips and texts by turns within one row."""
    model = make_ours(seed=6, use_text_head=True, num_codebooks=3, **CODES).to(kind)
    with torch.no_grad():
        model.text_lm_head.weight[model.config.audio_bos_token_id] *= 2.5
        model.text_lm_head.weight[model.config.audio_token_id] *= 4  # never written all the same
    tame_eos(model, 1.2)
    texts = make_batch(model.config, [*PROMPTS, [7, 2, 5]], open_audio=True)
    # Three rows end in text, two have opened audio; text rows lose their last token.
    ids, mask = texts["input_ids"].clone(), texts["attention_mask"].clone()
    for row in (0, 2, 4):
        ids[row] = torch.cat((ids.new_full((1,), model.config.pad_token_id), ids[row, :-1]))
        mask[row] = torch.cat((mask.new_zeros(1), mask[row, :-1]))
    batch = {**texts, "input_ids": ids, "attention_mask": mask}
    how = replace(SETTINGS[setting], max_new_tokens=40)
    counts = check_against_reference(model, batch, how)
    assert any(frames for _, frames in (counts[0], counts[2], counts[4])), "no text row ever opened audio"
    assert any(frames < tokens - 1 for tokens, frames in (counts[0], counts[2], counts[4])), "no text was written"
    alone = {name: value[:1] for name, value in batch.items()}
    assert check_against_reference(model, alone, how) == counts[:1]


def test_text_needs_a_text_head():
    model = make_ours()
    with pytest.raises(UserError, match="use_text_head=True"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2)


def test_a_row_that_writes_text_keeps_its_window():
    """What is drawn for it beside the text is no frame; counting it would redraw codes that were never said."""
    model = make_ours(seed=6, use_text_head=True, num_codebooks=3, **CODES)
    batch = make_batch(model.config, [[4, 5, 3], [4, 5, 3]])
    ids = batch["input_ids"]
    ids[1, -1] = model.config.audio_bos_token_id
    state = initial_state(model.config, **batch, seeds=torch.zeros(2, dtype=torch.long), window=4)
    assert state.speaking.tolist() == [False, True]
    hidden = prefill(model, StaticKVCache(model.config, 2, 64), **batch)
    how = replace(SETTINGS["greedy"], ras_win_len=4, ras_win_max_num_repeat=2)
    after = choose(model.config, model.audio_logits(hidden), state, 0, how, model.text_lm_head(hidden)).state
    assert torch.equal(after.window[0], state.window[0])
    assert torch.equal(after.window[1, :-1], state.window[1, 1:])
    assert torch.equal(after.window[1, -1], after.frame[1])
