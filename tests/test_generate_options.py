"""What callers of `generate` may give: streamers, processors, criteria, configs; and what is refused."""

import pytest
import torch
from decoder_cases import make_batch, make_ours, tame_eos
from generation_cases import CODES, PROMPTS
from torch import Tensor

from higgs import GenerationConfig, HiggsAudioV2ForConditionalGeneration, UserError


class Recorder:
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.frames: list[tuple[Tensor, Tensor]] = []
        self.ended = 0

    def put(self, tokens: Tensor) -> None:
        self.tokens.append(tokens)

    def put_frames(self, frames: Tensor, is_frame: Tensor) -> None:
        self.frames.append((frames, is_frame))

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_sees_everything_as_it_comes():
    model = make_ours(seed=2, num_codebooks=4, **CODES)
    batch = make_batch(model.config, PROMPTS, open_audio=True)
    streamer = Recorder()
    out = model.generate(**batch, max_new_tokens=15, streamer=streamer, return_dict_in_generate=True)
    assert streamer.ended == 1
    assert torch.equal(streamer.tokens[0], batch["input_ids"])
    assert torch.equal(torch.stack(streamer.tokens[1:], 1), out.sequences[:, batch["input_ids"].shape[1] :])
    first = batch["audio_input_ids"].shape[1]
    assert torch.equal(torch.stack([frames for frames, _ in streamer.frames], 1), out.audio_sequences[:, first:])
    assert torch.equal(torch.stack([mask for _, mask in streamer.frames], 1), out.audio_sequences_mask[:, first:])


def test_a_plain_streamer_of_transformers_works():
    class Plain:
        put = Recorder.put
        end = Recorder.end
        __init__ = Recorder.__init__

    model, streamer = make_ours(num_codebooks=2, **CODES), Plain()
    model.generate(**make_batch(model.config, [[5]], open_audio=True), max_new_tokens=4, streamer=streamer)
    assert len(streamer.tokens) == 5 and streamer.ended == 1


def test_logits_processors_act_between_forcing_and_sampling():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper

    model = make_ours(num_codebooks=4, **CODES)
    batch = make_batch(model.config, [[5], [7]], open_audio=True)
    seen = []

    def only_even(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((input_ids.shape, scores.shape, scores.isinf().sum().item()))
        odd = torch.arange(scores.shape[-1]) % 2 == 1
        keep_some = (scores.isinf() | odd).all(-1, keepdim=True)  # forced to an odd code: leave it
        return scores.masked_fill(odd & ~keep_some, -float("inf"))

    out = model.generate(**batch, max_new_tokens=10, logits_processor=[only_even])
    assert ((out % 2 == 0) | (out >= 64)).all()
    assert [ids[1] for ids, _, _ in seen] == [batch["input_ids"].shape[1] + step for step in range(10)]
    assert all(shape == (8, 66) for _, shape, _ in seen)
    assert seen[0][2] == 8 * 65, "in the first frame every codebook is forced to begin"
    plain = model.generate(**batch, max_new_tokens=10, do_sample=True, temperature=0.5, seed=1)
    warped = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    assert torch.equal(
        plain, model.generate(**batch, max_new_tokens=10, do_sample=True, logits_processor=warped, seed=1)
    )


def test_stopping_criteria_stop_all_or_some_rows():
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    model = make_ours(num_codebooks=4, **CODES)
    tame_eos(model, 0.1)
    batch = make_batch(model.config, [[5], [7]], open_audio=True)
    prompt = batch["input_ids"].shape[1]
    free = model.generate(**batch, max_new_tokens=12)
    assert free.shape[1] == 12
    stop = StoppingCriteriaList([MaxLengthCriteria(prompt + 5)])
    assert torch.equal(model.generate(**batch, max_new_tokens=12, stopping_criteria=stop), free[:, :5])

    def first_row_after_three(input_ids: Tensor, scores: object) -> Tensor:
        assert scores is not None
        return torch.tensor([input_ids.shape[1] >= prompt + 3, False])

    how = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(**batch, **how, stopping_criteria=[first_row_after_three])
    assert torch.equal(out.audio_sequences[0, :3], free[0, :3])
    assert (out.audio_sequences[0, 3:] == model.config.audio_stream_eos_id).all()
    assert torch.equal(out.audio_sequences[1], free[1])
    assert out.audio_sequences_mask.sum(1).tolist() == [3, 12]
    assert model.generate(**batch, max_new_tokens=12, stopping_criteria=[lambda ids, scores: True]).shape[1] == 1


def test_the_checkpoints_generation_config_is_used(tmp_path):
    model = make_ours(num_codebooks=2, **CODES)
    model.generation_config = GenerationConfig(
        max_new_tokens=9, do_sample=True, temperature=0.7, top_k=5, top_p=0.8, ras_win_len=4, ras_win_max_num_repeat=2
    )
    model.save_pretrained(tmp_path)
    loaded = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path)
    # The file names the model's own end of turn where the config left it open.
    assert loaded.generation_config == model.generation_config.updated(eos_token_id=model.config.eos_token_id)
    batch = make_batch(model.config, [[5], [7]], open_audio=True)
    settings = {name: value for name, value in vars(model.generation_config).items() if value is not None}
    expected = make_ours(num_codebooks=2, **CODES).generate(**batch, **settings, seed=3)
    assert torch.equal(loaded.generate(**batch, seed=3), expected)
    # Arguments go before it, a config that is passed takes its place.
    assert loaded.generate(**batch, seed=3, max_new_tokens=4).shape[1] == 4
    greedy = loaded.generate(**batch, generation_config=GenerationConfig(max_new_tokens=6))
    assert torch.equal(greedy, make_ours(num_codebooks=2, **CODES).generate(**batch, max_new_tokens=6))
    # transformers reads the file too.
    import transformers

    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.temperature, theirs.top_k, theirs.ras_win_len, theirs.eos_token_id) == (0.7, 5, 4, 82)


def test_without_max_new_tokens_the_positions_are_the_limit():
    model = make_ours(num_codebooks=2, max_position_embeddings=40, **CODES)
    tame_eos(model, 0.0)
    batch = make_batch(model.config, [[9], [5]], open_audio=True)
    assert model.generate(**batch).shape[1] == 30
    assert model.generate(**batch, max_length=15).shape[1] == 5
    with pytest.raises(UserError, match=r"max_new_tokens=31 does not fit.*at most 30"):
        model.generate(**batch, max_new_tokens=31)
    with pytest.raises(UserError, match=r"41 tokens long.*40 positions"):
        model.generate(**make_batch(model.config, [[40]], open_audio=True))


REFUSED = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "assistant_model": object(),
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6,
    "prefix_allowed_tokens_fn": print,
    "negative_prompt_ids": torch.tensor([[1]]),
    "negative_prompt_attention_mask": torch.tensor([[1]]),
    "custom_generate": "some/repository",
    "synced_gpus": True,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "guidance_scale": 3.0,
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_audio_codes_rule_out_is_refused(option: str):
    model = make_ours()
    batch = make_batch(model.config, [[5]], open_audio=True)
    with pytest.raises(UserError, match=f"{option}="):
        model.generate(**batch, max_new_tokens=2, **{option: REFUSED[option]})


def test_the_off_values_of_refused_options_are_accepted():
    model = make_ours()
    batch = make_batch(model.config, [[5]], open_audio=True)
    off = {"num_beams": 1, "assistant_model": None, "synced_gpus": False, "repetition_penalty": 1.0, "use_cache": True}
    off |= {"min_length": 0, "stop_strings": None, "pad_token_id": model.config.pad_token_id, "temperature": 0.0}
    assert torch.equal(model.generate(**batch, max_new_tokens=3, **off), model.generate(**batch, max_new_tokens=3))


def test_an_unknown_argument_is_a_type_error():
    model = make_ours()
    with pytest.raises(TypeError, match="max_new_token"):
        model.generate(**make_batch(model.config, [[5]], open_audio=True), max_new_token=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0, "do_sample": True}, "do_sample=False"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"ras_win_len": 3}, "both or neither"),
        ({"ras_win_len": 0, "ras_win_max_num_repeat": 2}, "at least 1"),
        ({"seed": -1}, "seed"),
        ({"attention_mask": torch.ones(1, 3)}, "same shape"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "padded on the left"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"audio_input_ids": torch.zeros(1, 2, 3, dtype=torch.long)}, "3 codebooks"),
        ({"audio_input_ids": torch.zeros(1, 2, 8, dtype=torch.long)}, "0 audio placeholders, but 2"),
        (
            {"audio_input_ids": torch.zeros(1, 2, 8, dtype=torch.long), "audio_input_ids_mask": torch.ones(1, 3)},
            "audio_input_ids_mask must be",
        ),
    ],
)
def test_mistakes_are_named(options: dict, said: str):
    model = make_ours()
    batch = make_batch(model.config, [[5]], open_audio=True)
    with pytest.raises(UserError, match=said):
        model.generate(**{**batch, "max_new_tokens": 4, **options})
    with pytest.raises(UserError, match="input_ids"):
        model.generate()


@pytest.mark.parametrize("open_audio", [True, False])
def test_without_a_cache_the_same_comes_out(open_audio: bool) -> None:
    model = make_ours(use_text_head=True)
    batch = make_batch(model.config, [[5, 6, 4], [7]], open_audio=open_audio)
    how = {"max_new_tokens": 20, "do_sample": True, "seed": 3, "return_dict_in_generate": True}
    cached, plain = (model.generate(**batch, **how, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.audio_sequences, plain.audio_sequences)
    assert torch.equal(cached.sequences, plain.sequences)
    model.config.use_cache = False  # the config's setting is the default
    assert torch.equal(model.generate(**batch, **how).sequences, plain.sequences)


def test_own_end_tokens_stop_the_text() -> None:
    model = make_ours(use_text_head=True)
    batch = make_batch(model.config, [[5, 6, 4]], open_audio=False)
    start, how = batch["input_ids"].shape[1], {"max_new_tokens": 12, "return_dict_in_generate": True}
    first = int(model.generate(**batch, **how).sequences[0, start])
    assert first not in model.config.eos_token_ids
    written = model.generate(**batch, **how, eos_token_id=[first]).sequences[0, start:]
    assert written.tolist() == [first]
