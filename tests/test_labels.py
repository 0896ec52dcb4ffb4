"""Labels of whole batches: golden files, start_index, and what holds for every conversation."""

import json
from pathlib import Path

import pytest
import torch
from conversations import SYSTEM, assistant, user, workflows
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs.batch import BatchBuilder, BatchOptions
from higgs.chat import ChatBuilder, ChatTokens
from higgs.labels import IGNORE
from higgs.text import load_text_tokenizer

BOS, EOS = 1024, 1025
GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "chat.json").read_text())


@pytest.fixture(scope="module")
def builder() -> BatchBuilder:
    return BatchBuilder(load_text_tokenizer(GOLDEN_FOLDER / "tokenizer"), ChatTokens(), num_codebooks=4)


@pytest.mark.parametrize("mode", ["transformers", "assistant"])
@pytest.mark.parametrize("name", GOLDEN["chats"])
def test_golden_batches_and_labels(builder, name, mode):
    case = GOLDEN["chats"][name]
    chat = ChatBuilder().build(case["conversation"], case["add_generation_prompt"])
    clips = [torch.tensor(slot.item["codes"]) for slot in chat.audio]
    options = BatchOptions(output_labels=True, labels_mode=mode)
    batch = builder.build([chat.text], clips, options, [chat.has_scene])
    assert set(batch) == set(case["transformers"])
    for key, value in (case["transformers"] | case.get(mode, {})).items():
        assert batch[key].int().tolist() == value, key


def test_start_index_counts_the_messages_of_the_conversation(processor, clip_files):
    conversation = workflows(clip_files)["cloning"] + [assistant(url=clip_files[1])]
    arguments = {"tokenize": True, "return_dict": True, "output_labels": True}
    every = processor.apply_chat_template(conversation, **arguments)
    last = processor.apply_chat_template(conversation, start_index=4, **arguments)
    reference = (every.audio_input_ids[0] == EOS).all(-1).nonzero()[0, 0] + 1  # frames of the first clip
    assert (every.audio_labels[0, :reference] != IGNORE).any()
    assert (last.audio_labels[0, :reference] == IGNORE).all()
    assert torch.equal(last.audio_labels[0, reference:], every.audio_labels[0, reference:])
    decode, opened = processor.tokenizer.decode, "<|audio_out_bos|><|audio_eos|><|eot_id|>"
    assert decode(every.labels[every.labels != IGNORE].tolist()) == opened * 2
    assert decode(last.labels[last.labels != IGNORE].tolist()) == opened
    # Message 3 is the reference's: it is trained from 3 on, and given per conversation or as rendered text alike.
    for start, expected in ((3, every), (4, last)):
        for again in (
            processor.apply_chat_template([conversation], start_index=[start], **arguments),
            processor(
                processor.apply_chat_template(conversation),
                audio=[clip_files[0], clip_files[1]],
                output_labels=True,
                start_index=start,
            ),
        ):
            assert all(torch.equal(again[key], expected[key]) for key in expected)


clips = st.lists(st.integers(1, 6), min_size=0, max_size=4)


@settings(max_examples=60)
@given(scene=clips, turns=st.lists(clips.filter(len), max_size=3), start=st.integers(0, 8), prompt=st.booleans())
def test_labels_are_a_subset_with_one_end_per_clip(builder, scene, turns, start, prompt):
    def audio(length: int) -> dict:
        return {"type": "audio", "codes": torch.randint(0, 1024, (4, length))}

    conversation = [SYSTEM]
    if scene:
        conversation.append({"role": "scene", "content": [audio(length) for length in scene]})
    for turn in turns:
        conversation += [user("Hi."), {"role": "assistant", "content": [audio(length) for length in turn]}]
    chat = ChatBuilder().build(conversation, prompt)
    codes = [slot.item["codes"] for slot in chat.audio]
    options = BatchOptions(output_labels=True, start_index=start)
    batch = builder.build([chat.text], codes, options, [chat.has_scene])
    learnt = batch.labels != IGNORE
    assert torch.equal(batch.labels[learnt], batch.input_ids[learnt])
    if not codes:
        assert "audio_labels" not in batch
        return
    heard = batch.audio_labels != IGNORE
    assert torch.equal(batch.audio_labels[heard], batch.audio_input_ids[heard])
    trained = [slot for slot in chat.audio if slot.message >= start and slot.message > bool(scene)]
    assert (batch.audio_labels == BOS).sum() == 0
    assert (batch.audio_labels == EOS).sum(dim=(0, 1)).tolist() == [len(trained)] * 4
    assert heard.sum() == sum(4 * (slot.item["codes"].shape[1] + 1) for slot in trained)
    frames = batch.input_ids == builder.tokenizer.token_to_id("<|AUDIO_OUT|>")
    frames |= batch.input_ids == builder.tokenizer.token_to_id("<|reserved_special_token_6|>")
    assert frames.sum() == batch.audio_input_ids_mask.sum()
    assert not (frames & learnt).any()
