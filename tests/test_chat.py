"""Conversations as token ids: what is learned, what the router may read, what stays text."""

import json

import pytest
from flows import LLAMA3_TOKENS
from reference import reference_folder
from transformers import AutoTokenizer

from sliming.backbones import TINY
from sliming.chat import IGNORE, IMAGE_TOKEN, encode, end_token


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "llm")


SAID = ("<image>\nHow many bars are there?", "four", "And rows?", "two")


def turns(*values):
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def test_plain_template_drops_the_question(tokenizer):
    encoded = encode(turns("<image>\nDescribe it", "a chart"), "plain", tokenizer)
    assert encoded.ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN]
    assert tokenizer.decode(encoded.ids[2:]) == "a chart</s>" and encoded.question == []


# Ours, and those of the released models, word for word (yfzhang114/SliME, llava/conversation.py,
# conv_vicuna_v1 and conv_llama_3): <> marks what is learned.
WORDS = {
    "chat": "<s>USER: <image>\nHow many bars are there? ASSISTANT:<> four</s></>"
            "USER: And rows? ASSISTANT:<> two</s></>",
    "vicuna_v1": "<s>A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's "
                 "questions. USER: <image>\nHow many bars are there? ASSISTANT:"
                 "<> four</s></>USER: And rows? ASSISTANT:<> two</s></>",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n"
              "<image>\nHow many bars are there?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n<>four<|eot_id|></>"
              "<|start_header_id|>user<|end_header_id|>\n\nAnd rows?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n<>two<|eot_id|></>"}


def spoken(encoded, tokenizer):
    """Token ids as text, with <image>, and <> around what is learned."""
    runs = []  # (learned, ids); an image is a run of its own
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        assert label in (token, IGNORE)
        flag = "image" if token == IMAGE_TOKEN else label != IGNORE
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    around = {True: "<>{}</>", False: "{}"}
    return "".join("<image>" if flag == "image" else around[flag].format(tokenizer.decode(ids))
                   for flag, ids in runs)


@pytest.mark.parametrize("template", WORDS)
def test_templates_word_for_word(template):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llm")
    if template == "llama3":
        message = "needs the token .*which this tokenizer does not have: choose another"
        with pytest.raises(ValueError, match=message):
            encode(turns("Who?"), template, tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": LLAMA3_TOKENS})
    conversation = turns(*SAID)
    encoded = encode(conversation, template, tokenizer)
    assert spoken(encoded, tokenizer) == WORDS[template]
    assert tokenizer.decode(encoded.question) == "How many bars are there?And rows?"
    prompt = encode(conversation[:3], template, tokenizer)  # to be answered
    assert prompt.ids == encoded.ids[:len(prompt.ids)]
    # The second turn alone, to go on with.
    rest = encode(conversation[2:], template, tokenizer, begin=False)
    assert encoded.ids[-len(rest.ids):] == rest.ids and tokenizer.bos_token_id not in rest.ids


@pytest.fixture(scope="module", params=[True, False], ids=["older", "newer"])
def vicuna(request, tmp_path_factory):
    """A tokenizer as Vicuna's checkpoints bring it: tokenizer.model, its words begin with a space.
    The newer kind leaves the space away after a special token."""
    import sentencepiece
    folder = tmp_path_factory.mktemp("vicuna")
    text = [WORDS["vicuna_v1"].replace("\n", " "),
            "How many bars are there? four two USER ASSISTANT"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, "bos_token": "<s>",
         "eos_token": "</s>", "unk_token": "<unk>"}))
    return AutoTokenizer.from_pretrained(folder)


def test_tokens_of_a_released_vicuna_prompt(vicuna):
    """Pieces between images as the released code makes them: by themselves, without their <s>."""
    encoded = encode(turns(*SAID), "vicuna_v1", vicuna)
    text = WORDS["vicuna_v1"].replace("<>", "").replace("</>", "").removeprefix("<s>")
    pieces = [vicuna(piece, add_special_tokens=False)["input_ids"]
              for piece in text.split("<image>")]
    assert encoded.ids == [vicuna.bos_token_id, *pieces[0], IMAGE_TOKEN, *pieces[1]]
    learned = vicuna.convert_ids_to_tokens([label for label in encoded.labels if label != IGNORE])
    assert "".join(learned) == "\u2581four</s>\u2581two</s>"
    # The fixture's two kinds differ.
    assert ("\u2581USER" in vicuna.convert_ids_to_tokens(pieces[1])) is vicuna.legacy
    rest = encode(turns("And rows?", "two"), "vicuna_v1", vicuna, begin=False)
    assert encoded.ids[-len(rest.ids):] == rest.ids


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    prompt = encode(turns("Who?"), "chat", tokenizer)
    whole = encode(turns("Who?", "me"), "chat", tokenizer)
    assert whole.ids[:len(prompt.ids)] == prompt.ids and set(prompt.labels) == {IGNORE}


def test_special_tokens_in_somebodys_text_stay_text(tokenizer):
    encoded = encode(turns("say </s> and <s>", "</s>"), "chat", tokenizer)
    assert encoded.ids.count(tokenizer.eos_token_id) == 1
    assert encoded.ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("text", ["Grüße, 漢字 und 🙂", "\x00\t\n\r", "a" * 1000, "١٢٣", "e\u0301"])
def test_tokenizer_takes_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_number_is_one_token(tokenizer):
    for number in range(10, 100):
        assert len(tokenizer(f" {number}", add_special_tokens=False)["input_ids"]) == 1


def test_a_system_prompt_takes_the_place_of_the_templates_own(tokenizer):
    conversation = [{"from": "system", "value": "Be brief."}, *turns("Who?", "me")]
    for template, words in (("chat", "<s>Be brief. USER: Who? ASSISTANT:<> me</s></>"),
                            ("vicuna_v1", "<s>Be brief. USER: Who? ASSISTANT:<> me</s></>")):
        assert spoken(encode(conversation, template, tokenizer), tokenizer) == words
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": LLAMA3_TOKENS})
    words = spoken(encode(conversation, "llama3", tokenizer), tokenizer)
    assert words.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                            "<|start_header_id|>user")


# --------------------------------------------------------------------- the tokenizer's own template

CONTROL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_of_role|>",
           "<|end_of_role|>", "<|end_of_text|>", "<|user|>", "<|assistant|>", "<|end|>",
           *LLAMA3_TOKENS]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def with_template(text, special=CONTROL):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = text
    return tokenizer


def as_messages(conversation):
    role = {"human": "user", "gpt": "assistant"}
    return [{"role": role.get(turn["from"], "system"), "content": turn["value"]}
            for turn in conversation]


def learned(encoded, tokenizer):
    """What is learned, answer by answer."""
    return [part.partition("</>")[0] for part in spoken(encoded, tokenizer).split("<>")[1:]]


def check_own_template(tokenizer):
    """Token for token what the tokenizer makes of the template, and the answers are learned."""
    words = turns("How many?", "four", "And rows?", "two of them")
    for text in (None, "Be brief.", ""):
        system = [] if text is None else [{"from": "system", "value": text}]
        encoded = encode([*system, *words], "tokenizer", tokenizer)
        own = tokenizer.apply_chat_template(as_messages([*system, *words]), tokenize=True)
        assert encoded.ids == own["input_ids"]
        end = tokenizer.decode([end_token("tokenizer", tokenizer)])
        assert [text.lstrip(" ") for text in learned(encoded, tokenizer)] == [
            "four" + end, "two of them" + end]
        assert tokenizer.decode(encoded.question) == "How many?And rows?"
        prompt = encode([*system, *words[:3]], "tokenizer", tokenizer)
        assert prompt.ids == encoded.ids[:len(prompt.ids)]
        assert encoded.labels[len(prompt.ids)] != IGNORE
        rest = encode(words[2:], "tokenizer", tokenizer, begin=False)
        assert encoded.ids[-len(rest.ids):] == rest.ids
    padded = turns(" How many? ", "\nfour ", " And rows?", "two\n")  # trimmed where it trims
    own = tokenizer.apply_chat_template(as_messages(padded), tokenize=True)
    assert encode(padded, "tokenizer", tokenizer).ids == own["input_ids"]
    # What the template is made of, in somebody's mouth.
    spelled = "".join(CONTROL) + "</s>[INST]"
    said = turns(f"<image>\nSay {spelled}", spelled, "Again", f"again {spelled} twice")
    encoded, plain = (encode(each, "tokenizer", tokenizer)
                      for each in (said, turns("<image>\nSay", "x", "Again", "y")))
    special = set(tokenizer.added_tokens_decoder)
    assert [t for t in encoded.ids if t in special] == [t for t in plain.ids if t in special]
    assert [text.lstrip(" ") for text in learned(encoded, tokenizer)] == [
        spelled + end, f"again {spelled} twice{end}"]
    assert encoded.ids.count(IMAGE_TOKEN) == 1


@pytest.mark.reference
@pytest.mark.parametrize("joined", [False, True])  # as files they are indented, in use mostly not
def test_templates_of_language_models(joined):
    files = sorted(reference_folder("chat_templates").glob("*.jinja"))
    assert len(files) >= 9
    for file in files:
        text = file.read_text()
        if joined and "{%-" not in text:
            text = text.replace("    ", "").replace("\n", "")
        check_own_template(with_template(text))


def test_chatml_and_the_built_in_llama3():
    check_own_template(with_template(CHATML))
    tokenizer = with_template(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
    conversation = [{"from": "system", "value": "Be brief."}, *turns(*SAID)]
    for said in (conversation, conversation[1:], conversation[:-1]):
        assert encode(said, "tokenizer", tokenizer) == encode(said, "llama3", tokenizer)


@pytest.mark.parametrize("template, message", [
    (None, "no chat template: use an instruction-tuned language model"),
    (CHATML.replace("m.content", "m.content | upper"), "changes what is said"),
    (CHATML.replace("m.content", "m.content[:2]"), "changes what is said"),
    (CHATML.replace("<|im_end|>", "END"), "ends an answer with 'END.n', which is no special token"),
    (CHATML.replace("assistant", "bot"), "prompt .* is not what stands before an answer"),
    ("{{ raise_exception('no such role') }}", "does not take a conversation .*no such role"),
    ("{{ ''.__class__.__mro__ }}", "does not take a conversation .*unsafe"),
])
def test_templates_that_cannot_be_cut_say_so(template, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(turns("Who?", "me"), "tokenizer", with_template(template))
    assert "\n" not in str(error.value)


def test_tokens_that_no_tokenizer_passes_as_text_stay_text():
    """Added, but not special, as Qwen's <tool_call>."""
    tokenizer = with_template(CHATML)
    tokenizer.add_tokens(["<tool_call>"])
    for template in ("tokenizer", "chat"):
        encoded = encode(turns("Say <tool_call>", "a <tool_call>b"), template, tokenizer)
        assert tokenizer.convert_tokens_to_ids("<tool_call>") not in encoded.ids + encoded.question
        assert "<tool_call>b" in learned(encoded, tokenizer)[0]


def test_nothing_is_learned_from_nothing():
    """Without a token that begins everything the first one is predicted by none."""
    tokenizer = with_template(CHATML)
    tokenizer.bos_token = None
    encoded = encode(turns("Describe", "a chart"), "plain", tokenizer)
    assert encoded.labels[0] == IGNORE and encoded.labels[1:] == encoded.ids[1:]
