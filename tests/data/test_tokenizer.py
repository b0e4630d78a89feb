"""The tokenizer: its folder loads with transformers as it is, its template is what training and rollouts encode."""

from __future__ import annotations

import json

import pytest

from r1mega.config.errors import UserError
from r1mega.data.tokenizer import (
    ANSWER,
    ASSISTANT,
    BOS,
    END_ANSWER,
    END_THINK,
    EOS,
    PAD,
    SPECIAL,
    TAGS,
    THINK,
    USER,
    copy_tokenizer,
    encode_prompt,
    encode_sample,
    load_tokenizer,
    make_response,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = [
    "Question: What is 12 + 34 - 5 ?\nReasoning: 12 + 34 = 46, 46 - 5 = 41\nAnswer: 41\n",
    "def f(x):\n    return x + 1\n",
] * 20
QUESTION = "What is 12 + 34?\nThink, please."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, path, vocab_size=350)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def hugging_face(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_ids_of_the_conversation_tokens(tokenizer):
    assert [tokenizer.token_id(token) for token in (*SPECIAL, *TAGS)] == list(range(9))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert 265 < tokenizer.vocab_size <= 350
    with pytest.raises(UserError, match="has the token <nothing>"):
        tokenizer.token_id("<nothing>")


@pytest.mark.parametrize(
    "text", ["", "Hi there,\n\n  x = 10 - 3", "naïve — 你好 🙂", "\t\r\n\x00 \u2028", " 1 + 2 = 3 ", "<think>a</think>"]
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


def test_decoding_leaves_special_tokens_out_and_keeps_tags(tokenizer):
    ids, _ = encode_sample(tokenizer, "Q", make_response("R", "A"))
    assert tokenizer.decode(ids) == "Q<think>R</think><answer>A</answer>"
    assert tokenizer.decode(ids, skip_special=False) == f"{BOS}{USER}Q{ASSISTANT}{THINK}R{END_THINK}{ANSWER}A{END_ANSWER}{EOS}"


def test_digits_stand_alone_and_a_sign_between_numbers_is_one_token(tokenizer, tmp_path):
    def pieces(tokenizer, text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert pieces(tokenizer, "12 + 34") == ["1", "2", " + ", "3", "4"]
    whole = train_tokenizer(["x 2024 y"] * 20, tmp_path, vocab_size=300, split_digits=False)
    assert " 2024" in pieces(whole, "x 2024 y")
    split = train_tokenizer(["x 2024 y"] * 20, tmp_path, vocab_size=300, split_digits=True)
    assert pieces(split, "2024") == ["2", "0", "2", "4"]


def test_transformers_loads_the_folder_and_agrees(tokenizer, hugging_face):
    for text in ("12 + 34 = 46", "  return x\n", make_response("a", "b"), "你好"):
        assert hugging_face.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (hugging_face.bos_token, hugging_face.eos_token, hugging_face.pad_token) == (BOS, EOS, PAD)
    assert len(hugging_face) == tokenizer.vocab_size
    assert hugging_face.decode([6, 1], skip_special_tokens=True) == END_THINK


def test_transformers_loads_it_beside_a_deepseek_config(tokenizer, folder, tmp_path):
    from transformers import AutoTokenizer

    copy_tokenizer(folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("x 12 + 34") == tokenizer.encode("x 12 + 34")


def test_template_equals_encode_prompt(tokenizer, hugging_face):
    messages = [{"role": "user", "content": QUESTION}]
    ids = hugging_face.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == encode_prompt(tokenizer, QUESTION)
    assert hugging_face.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).endswith(ASSISTANT + THINK)
    assert ids[0] == 0 and ids[1] == 3 and ids[-2:] == [4, 5]


def test_template_equals_encode_sample(tokenizer, hugging_face):
    response = make_response("12 + 34 = 46", "46")
    ids, mask = encode_sample(tokenizer, QUESTION, response)
    for content in (response, THINK + response):
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": content}]
        assert hugging_face.apply_chat_template(messages)["input_ids"] == ids
    num_prompt = len(encode_prompt(tokenizer, QUESTION))
    assert mask == [0] * num_prompt + [1] * (len(ids) - num_prompt)
    assert ids[num_prompt:] == [*tokenizer.encode(response), tokenizer.eos_id]


def test_earlier_turns_keep_what_follows_the_reasoning(hugging_face):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": make_response("long thought", "1")},
        {"role": "user", "content": "two"},
    ]
    text = hugging_face.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == f"{BOS}Be brief.{USER}one{ASSISTANT}{ANSWER}1{END_ANSWER}{EOS}{USER}two{ASSISTANT}{THINK}"
    plain = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "no tags"}]
    assert hugging_face.apply_chat_template(plain, tokenize=False) == f"{BOS}{USER}one{ASSISTANT}no tags{EOS}"


def test_training_is_deterministic_and_the_hash_follows_the_content(folder, tmp_path):
    train_tokenizer(TEXTS, tmp_path / "again", vocab_size=350)
    train_tokenizer(TEXTS, tmp_path / "smaller", vocab_size=300)
    assert tokenizer_hash(tmp_path / "again") == tokenizer_hash(folder) == load_tokenizer(folder).hash
    assert tokenizer_hash(tmp_path / "smaller") != tokenizer_hash(folder)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="has a tokenizer.json; got none"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match=r"tokenizer\.json: a tokenizer.json of the tokenizers library"):
        load_tokenizer(tmp_path)
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="a tokenizer has the token"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="265 entries; got 200; use at least 265"):
        train_tokenizer(TEXTS, tmp_path, vocab_size=200)
