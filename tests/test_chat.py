"""Chat format: the builder against its own template in transformers, spans, labels, errors, golden file."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CORPUS

from higgs.chat import ChatBuilder, ChatTokens, expand_audio
from higgs.chat_template import JinjaChat, choose_renderer, own_template
from higgs.errors import UserError
from higgs.labels import IGNORE, assistant_spans, audio_labels, span_mask
from higgs.text import HFTokenizer, load_text_tokenizer, train_sentencepiece

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat.json").read_text())
NAMES = (("bos_token", "<|begin_of_text|>"),)
SYSTEM = {"role": "system", "content": "Generate audio."}
USER = {"role": "user", "content": "Hello."}
AUDIO = {"type": "audio", "url": "a.wav"}
BUILDER = ChatBuilder()

words = st.text(st.sampled_from("ab .:\n\tS[]é日"), max_size=8)
text_items = words.map(lambda text: {"type": "text", "text": text})
mixed = st.lists(text_items | st.just(AUDIO), min_size=1, max_size=5)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict]:
    messages = [{"role": "system", "content": draw(words | text_items.map(lambda item: [item]))}]
    if draw(st.booleans()):
        messages.append({"role": "scene", "content": draw(words | mixed)})
    for assistant in draw(st.lists(st.booleans(), max_size=5)):
        if assistant:
            messages.append({"role": "assistant", "content": draw(words | mixed)})
        else:
            texts = draw(words | st.lists(text_items, min_size=1, max_size=3))
            messages.append({"role": "user", "content": texts})
    return messages


def audio_items(conversation: list[dict]) -> list[tuple[int, dict]]:
    return [
        (index, item)
        for index, message in enumerate(conversation)
        for item in message["content"]
        if not isinstance(item, str) and item["type"] == "audio"
    ]


def placeholders(text: str) -> int:
    return text.count(ChatTokens().audio)


@pytest.fixture(scope="module", params=["tokenizer.json", "sentencepiece"])
def tokenizer(request, tokenizer_folder):
    if request.param == "sentencepiece":
        return train_sentencepiece(CORPUS, vocab_size=400)
    return HFTokenizer.from_folder(tokenizer_folder)


def test_documented_layout():
    scene = [
        {"type": "text", "text": " Quiet room. "},
        {"type": "text", "text": "SPEAKER0:"},
        AUDIO,
        {"type": "text", "text": "SPEAKER1:"},
        AUDIO,
    ]
    text = BUILDER.render([SYSTEM, {"role": "scene", "content": scene}, USER], add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGenerate audio.\n\n<|scene_desc_start|>\n"
        "Quiet room.\n\nSPEAKER0: <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>\n"
        "SPEAKER1: <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>\n<|scene_desc_end|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
    )


def test_assistant_text_and_mixed_content_keep_their_order():
    answer = {
        "role": "assistant",
        "content": [{"type": "text", "text": " Sure: "}, AUDIO, {"type": "text", "text": "Bye"}],
    }
    text = BUILDER.render([SYSTEM, USER, answer])
    assert text.endswith("\n\nSure:<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>Bye<|eot_id|>")
    assert BUILDER.render([SYSTEM, USER, {"role": "assistant", "content": "Hi"}]).endswith("\n\nHi<|eot_id|>")
    assert BUILDER.render([SYSTEM, USER], True, modality="text").endswith("assistant<|end_header_id|>\n\n")


@given(conversations())
def test_every_audio_item_has_its_placeholder(conversation):
    chat = BUILDER.build(conversation)
    assert chat == BUILDER.build(conversation)
    assert placeholders(chat.text) == len(chat.audio)
    assert [(slot.message, slot.item) for slot in chat.audio] == audio_items(conversation)
    assert chat.has_scene == (len(conversation) > 1 and conversation[1]["role"] == "scene")
    assert BUILDER.render(conversation, add_generation_prompt=True).startswith(chat.text)


@settings(max_examples=150)
@given(conversations(), st.booleans(), st.sampled_from(["audio", "text"]))
def test_template_in_transformers_renders_the_same(conversation, prompt, modality):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template(
        [conversation],
        chat_template=own_template(),
        add_generation_prompt=prompt,
        bos_token="<|begin_of_text|>",
        modality=modality,
    )
    assert rendered[0] == BUILDER.render(conversation, prompt, modality)


@given(conversations())
def test_foreign_templates_are_rendered_as_transformers_does(conversation):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if m.content is string %}\n{{ m.role }}: {{ m.content }}\n"
        "    {% else %}\n{% for i in m.content %}{{ i.text or '<|AUDIO_OUT|>' }}{% break %}{% endfor %}\n"
        "    {% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    rendered, _ = utils.render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=True, bos_token="<|begin_of_text|>"
    )
    renderer = choose_renderer(template, ChatTokens(), NAMES)
    assert isinstance(renderer, JinjaChat)
    assert renderer.build(conversation, add_generation_prompt=True).text == rendered[0]


def test_a_template_of_the_released_format_is_recognised():
    assert isinstance(choose_renderer(own_template(), ChatTokens(), NAMES), ChatBuilder)
    changed = own_template().replace("'\\n\\n<|scene_desc_start|>\\n'", "'<|scene_desc_start|>\\n'")
    assert changed != own_template()
    assert isinstance(choose_renderer(changed, ChatTokens(), NAMES), JinjaChat)
    other = ChatTokens(audio="<|sound|>")
    assert "<|sound|>" in own_template(other) and isinstance(
        choose_renderer(own_template(other), other, NAMES), ChatBuilder
    )


def test_template_errors_arrive_as_user_errors():
    with pytest.raises(UserError, match="not valid Jinja"):
        choose_renderer("{% if %}", ChatTokens(), NAMES)
    with pytest.raises(UserError, match="Begin the conversation"):
        JinjaChat(own_template(), dict(NAMES)).build([USER])
    with pytest.raises(UserError, match="cannot render"):  # the sandbox keeps templates from reaching out
        JinjaChat("{{ ''.__class__.__mro__ }}", {}).build([USER])
    with pytest.raises(UserError, match="cannot render"):
        JinjaChat("{{ messages.append(1) }}", {}).build([USER])


scene = {"role": "scene", "content": "Quiet."}
item = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "empty"),
        ("hello", "list of messages"),
        (["hello"], "Message 0 is not of the form"),
        ([{"content": "x"}], "Message 0 is not of the form"),
        ([USER], "begin the conversation with a message of role 'system'"),
        ([SYSTEM, USER, SYSTEM], r"Message 2 \(system\) is not the first"),
        ([SYSTEM, USER, scene], r"Message 2 \(scene\) must come directly after the system message"),
        ([SYSTEM, scene, scene], r"Message 2 \(scene\)"),
        ([SYSTEM, {"role": "narrator", "content": "x"}], "Message 1 has the role 'narrator'; use one of"),
        ([{"role": "system", "content": [item, item]}], "Message 0 .* 2 items"),
        ([{"role": "system", "content": [AUDIO]}], r"Message 0 \(system\) holds audio"),
        ([SYSTEM, {"role": "user", "content": [AUDIO]}], r"Message 1 \(user\) holds audio"),
        ([SYSTEM, {"role": "user", "content": []}], "Message 1 .* no content"),
        ([SYSTEM, {"role": "user"}], "Message 1 .* no content"),
        ([SYSTEM, {"role": "user", "content": [{"type": "image"}]}], "Message 1 .*item 0, has the type 'image'"),
        ([SYSTEM, {"role": "user", "content": ["x"]}], "Message 1 .*item 0, has str"),
        ([SYSTEM, {"role": "user", "content": [item, {"type": "text"}]}], "Message 1 .*item 1, has no text"),
        ([SYSTEM, {"role": "user", "content": "x<|eot_id|>"}], r"Message 1 .*<\|eot_id\|>"),
        ([SYSTEM, {"role": "user", "content": "<|AUDIO_OUT|>"}], r"Message 1 .*<\|AUDIO_OUT\|>"),
    ],
)
def test_errors_name_the_message(conversation, message):
    with pytest.raises(UserError, match=message):
        BUILDER.build(conversation)


def test_scene_tags_written_into_the_system_text_are_kept():
    text = "Speak.\n\n<|scene_desc_start|>\nQuiet.\n<|scene_desc_end|>"
    as_message = BUILDER.render([{"role": "system", "content": "Speak."}, scene, USER])
    assert BUILDER.render([{"role": "system", "content": text}, USER]) == as_message


def test_expanding_placeholders():
    tokens = ChatTokens(audio="A", delay="D")
    assert expand_audio("x A y A", [1, 3], num_codebooks=3, tokens=tokens) == "x AAADD y AAAAADD"
    assert expand_audio("A", [1], num_codebooks=1, tokens=tokens) == "AAA"
    with pytest.raises(UserError, match=r"2 audio placeholders .* 1 clips"):
        expand_audio("A A", [1], num_codebooks=3, tokens=tokens)


@given(conversation=conversations(), start_index=st.integers(0, 7), prompt=st.booleans())
def test_spans_are_the_assistant_messages(tokenizer, conversation, start_index, prompt):
    chat = BUILDER.build(conversation, add_generation_prompt=prompt)
    ids = tokenizer.encode(chat.text)
    spans = assistant_spans(ids, tokenizer, start_index=start_index, has_scene=chat.has_scene)
    expected = [i for i, message in enumerate(conversation) if message["role"] == "assistant" and i >= start_index]
    assert [span.message for span in spans] == expected
    mask = span_mask(spans, len(ids))
    assert mask.sum() == sum(span.stop - span.start for span in spans)
    for span in spans:
        assert 0 < span.start < span.stop <= len(ids)
        content = BUILDER.parse(conversation)[span.message].items
        text = "".join(part.text if part.text is not None else ChatTokens().audio_slot for part in content)
        assert tokenizer.decode(ids[span.start : span.stop]) == text + "<|eot_id|>"
    # Without being told, a scene message is recognised by its tags.
    assert spans == assistant_spans(ids, tokenizer, start_index=start_index)


def test_spans_in_text_of_the_original(tokenizer):
    """Messages of one turn joined by <|eom_id|>, each with a header of its own."""
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\none<|eom_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nopen"
    )
    ids = tokenizer.encode(text)
    spans = assistant_spans(ids, tokenizer)
    assert [tokenizer.decode(ids[span.start : span.stop]) for span in spans] == ["one<|eom_id|>", "two<|eot_id|>"]
    assert [span.message for span in spans] == [1, 2]
    assert assistant_spans(ids[: ids.index(tokenizer.token_to_id("<|start_header_id|>")) + 1], tokenizer) == []


def test_audio_labels_hold_each_code_and_one_end():
    frames = torch.tensor([[8, 8], [1, 8], [2, 3], [9, 4], [9, 9], [9, 9]])
    expected = [[IGNORE, IGNORE], [1, IGNORE], [2, 3], [9, 4], [IGNORE, 9], [IGNORE, IGNORE]]
    assert audio_labels(frames, bos=8, eos=9).tolist() == expected


@pytest.mark.parametrize("name", GOLDEN["chats"])
def test_golden_text_and_ids(name):
    case = GOLDEN["chats"][name]
    chat = BUILDER.build(case["conversation"], case["add_generation_prompt"])
    assert chat.text == case["text"]
    tokenizer = load_text_tokenizer(Path(__file__).parent / "golden" / "tokenizer")
    codes = [torch.tensor(slot.item["codes"]) for slot in chat.audio]
    text = expand_audio(chat.text, [clip.shape[1] for clip in codes], 4, ChatTokens())
    assert tokenizer.encode(text) == case["transformers"]["input_ids"][0]
