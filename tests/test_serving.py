import asyncio
import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("litserve")

from fastapi import BackgroundTasks, HTTPException
from litserve.specs.openai import ChatCompletionRequest
from litserve.utils import LitAPIStatus
from pydantic import ValidationError

from lit_llm import serving
from lit_llm.checkpoints import save_model
from lit_llm.data.chat import prompt_ids, turn_ends, with_template
from lit_llm.data.image_processor import ImageProcessor
from lit_llm.data.tokenizer import boundary_id, byte_tokenizer
from lit_llm.generation import generate
from lit_llm.models.lenet import LeNet
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_masked_lm import PretrainedMaskedLM
from lit_llm.serving import (
    Chat,
    ChatRequest,
    CompletionRequest,
    Completions,
    ImageClasses,
    ImageRequest,
    TextClasses,
    TextRequest,
    endpoint_of,
)
from tests.examples import BERT, bytes_with_bos, twenty_tokens
from tests.writing import exactly


@pytest.fixture
def writer(tiny_llama: Any, tmp_path: Path) -> Any:
    """The endpoint of a model that continues bytes."""
    tokenizer = byte_tokenizer()
    network = tiny_llama(vocab_size=len(tokenizer))
    save_model(tmp_path / "writer", network, tokenizer)
    endpoint = endpoint_of(str(tmp_path / "writer"))
    endpoint.setup("cpu")
    return endpoint


def asked(endpoint: Completions, **fields: Any) -> dict[str, Any]:
    return endpoint.predict(CompletionRequest(**fields))


def test_a_continuation_is_what_generating_gives(writer: Completions) -> None:
    assert type(writer) is Completions
    answer = asked(writer, prompt="ab c", max_tokens=7, seed=3)
    boundary = boundary_id(writer.tokenizer)
    prompt = [boundary, *writer.tokenizer.encode("ab c", add_special_tokens=False)]
    [expected] = generate(writer.network, [prompt], 7, 0.8, None, 0.95, 3, boundary)
    [choice] = answer["choices"]
    assert "ab c" + choice["text"] == writer.tokenizer.decode(prompt[1:] + expected)
    assert choice["finish_reason"] == ("length" if len(expected) == 7 else "stop")
    usage = {"prompt_tokens": 5, "completion_tokens": len(expected), "total_tokens": 5 + len(expected)}
    assert answer["usage"] == usage
    assert answer["model"] == writer.model
    assert asked(writer, prompt="a", model="mine", max_tokens=0)["model"] == "mine"


def test_a_prompt_begins_with_the_bos_that_the_tokenizer_puts_there(tiny_llama: Any, tmp_path: Path) -> None:
    tokenizer = bytes_with_bos()
    save_model(tmp_path / "writer", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    endpoint = endpoint_of(str(tmp_path / "writer"))
    endpoint.setup("cpu")
    ids = tokenizer("ab c").input_ids
    [expected] = generate(endpoint.network, [ids], 20, temperature=0.0, stop=tokenizer.eos_token_id)
    [choice] = asked(endpoint, prompt="ab c", max_tokens=20, temperature=0)["choices"]
    assert "ab c" + choice["text"] == tokenizer.decode(ids[1:] + expected)


def test_several_prompts_are_continued_as_each_alone(writer: Completions) -> None:
    prompts = ["a", "bcd efg", ""]
    together = asked(writer, prompt=prompts, max_tokens=6, temperature=0)["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2]
    alone = [asked(writer, prompt=prompt, max_tokens=6, temperature=0)["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in together] == alone


def test_a_text_ends_before_a_stop(writer: Completions) -> None:
    whole = asked(writer, prompt="a", max_tokens=20, temperature=0)["choices"][0]["text"]
    stop = whole[5:7]
    [choice] = asked(writer, prompt="a", max_tokens=20, temperature=0, stop=[stop, "not there"])["choices"]
    assert choice == {"index": 0, "text": whole[: whole.index(stop)], "finish_reason": "stop"}


def test_a_field_that_is_null_has_its_default(writer: Completions) -> None:
    nothing = dict.fromkeys(("max_tokens", "temperature", "top_k", "top_p", "stop", "model", "stream"))
    assert CompletionRequest(prompt="ab", **nothing) == CompletionRequest(prompt="ab")
    assert asked(writer, prompt="ab", seed=3, **nothing)["choices"] == asked(writer, prompt="ab", seed=3)["choices"]


def test_a_continuation_without_stops_is_decoded_once(writer: Completions, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = asked(writer, prompt="ab", max_tokens=9, seed=3)["choices"]
    monkeypatch.setattr(serving.IncrementalDetokenizer, "add", lambda *args: pytest.fail("decoded token by token"))
    assert asked(writer, prompt="ab", max_tokens=9, seed=3)["choices"] == expected


def test_what_there_is_no_room_for_is_an_answer_of_status_400(writer: Completions) -> None:
    with pytest.raises(HTTPException) as refused:
        asked(writer, prompt="abc", max_tokens=61)
    assert refused.value.status_code == 400
    assert refused.value.detail.startswith("max_tokens must be at most 60, which is what the network's max_seq_len 64")
    assert len(asked(writer, prompt="abc", temperature=0)["choices"][0]["text"]) > 0  # as many tokens as fit


def test_half_a_character_is_an_answer_of_status_400(writer: Completions) -> None:
    with pytest.raises(HTTPException) as refused:
        asked(writer, prompt=["abc", "a\ud800"])
    assert refused.value.status_code == 400
    assert refused.value.detail == r"prompt must be UTF-8 text, but is 'a\ud800'"


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "m\ud800"}, r"model must be UTF-8 text, but is 'm\ud800'"),
        ({"stop": "\ud800"}, r"stop must be UTF-8 text, but is '\ud800'"),
        ({"stop": {"a": ["\ud800"]}}, r"stop must be UTF-8 text, but is '\ud800'"),
        ({"\ud800": 1}, r"name of a field must be UTF-8 text, but is '\ud800'"),
        ({"temperature": math.nan}, "temperature must be finite, but is nan"),
        ({"top_p": math.nan}, "top_p must be finite, but is nan"),
        ({"max_tokens": math.inf}, "max_tokens must be finite, but is inf"),
    ],
)
def test_what_no_answer_could_quote_is_an_answer_of_status_400(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(HTTPException) as refused:
        kind.model_validate(fields)
    assert (refused.value.status_code, refused.value.detail) == (400, message)


@pytest.mark.parametrize(
    "fields",
    [{"top_p": 0}, {"n": 2}, {"stream": True}, {"prompt": 3}, {"temperature": -1}, {"prompt": []}, {"stop": ""}],
)
def test_what_the_schema_does_not_have_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest(**({"prompt": "a"} | fields))


@pytest.fixture
def talker(tiny_llama: Any, tmp_path: Path) -> Any:
    tokenizer = with_template(byte_tokenizer())
    save_model(tmp_path / "talker", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    endpoint = endpoint_of(str(tmp_path / "talker"))
    endpoint.setup("cpu")
    return endpoint


def said(endpoint: Chat, **fields: Any) -> list[dict[str, Any]]:
    message = {"messages": [{"role": "user", "content": "ab"}], "temperature": 0, "max_tokens": 12}
    return list(endpoint.predict(ChatCompletionRequest(**(message | fields))))


def test_the_pieces_of_a_reply_are_what_generating_gives(talker: Chat) -> None:
    assert type(talker) is Chat
    *pieces, last = said(talker)
    ids = prompt_ids(talker.tokenizer, [{"role": "user", "content": "ab"}])
    [expected] = generate(talker.network, [ids], 12, temperature=0.0, stop=turn_ends(talker.tokenizer))
    text = talker.tokenizer.decode(expected)
    assert "".join(piece["content"] for piece in pieces) == text
    assert len(pieces) > 1
    assert last["content"] == ""
    assert (last["prompt_tokens"], last["completion_tokens"]) == (len(ids), len(expected))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert said(talker, messages=parts) == [*pieces, last]
    stop = text[3:5]
    assert "".join(piece["content"] for piece in said(talker, stop=stop)) == text[: text.index(stop)]
    [nothing] = said(talker, max_completion_tokens=0)
    assert nothing["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort must be left out, as it is not supported, but is 'low'"),
        ({"presence_penalty": 0.5}, "presence_penalty must be left out, as it is not supported, but is 0.5"),
        ({"temperature": -1}, "temperature must be finite and at least 0, but is -1.0"),
        ({"max_tokens": 500}, "max_tokens must be at most "),
        ({"max_tokens": 70_000}, "max_tokens must be at most 65536, but is 70000"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "content must be text, but is something else",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, r"prompt must be UTF-8 text, but is '\ud800'"),
        (
            {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "ab"}]},
            "role must be one of system, user, assistant in the default chat template, but is 'developer' in the "
            "conversation; one that renders it can be given by data.chat_template",
        ),
    ],
)  # fmt: skip
def test_what_would_be_passed_over_is_refused(talker: Chat, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(HTTPException) as refused:
        said(talker, **fields)
    assert refused.value.status_code == 400
    assert refused.value.detail.startswith(message)


def test_a_prompt_with_several_replies_is_counted_once(talker: Chat) -> None:
    replies = [
        [{"role": "assistant", "content": "ab"}, last] for last in (said(talker)[-1], said(talker, max_tokens=3)[-1])
    ]

    async def pieces(reply: list[dict[str, Any]]) -> Any:
        for piece in reply:
            yield json.dumps(piece), LitAPIStatus.OK

    request = ChatCompletionRequest(messages=[], n=2)
    answer = asyncio.run(talker.spec.non_streaming_completion(request, [pieces(reply) for reply in replies]))
    prompt, written = replies[0][-1]["prompt_tokens"], sum(last["completion_tokens"] for _, last in replies)
    assert [choice.message.content for choice in answer.choices] == ["ab", "ab"]
    assert answer.usage.model_dump() == {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be from 1 to 64, but is 0"),
        ({"n": 65}, "n must be from 1 to 64, but is 65"),
        ({"n": 2, "stream": True}, "n must be 1 where the reply is streamed, but is 2"),
    ],
)
def test_as_many_replies_as_cannot_be_given_are_refused(talker: Chat, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(HTTPException) as refused:
        asyncio.run(talker.spec.chat_completion(ChatRequest(messages=[], **fields), BackgroundTasks()))
    assert (refused.value.status_code, refused.value.detail) == (400, message)


FUNNEL = {"model_type": "funnel", "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1]}
"""An encoder that reads texts of any length."""


def classifier(tmp_path: Path, num_classes: int = 3, config: dict[str, Any] = BERT) -> TextClasses:
    network = PretrainedClassifier(num_classes, config=config | {"vocab_size": 20})
    with torch.no_grad():
        for p in network.parameters():
            p += 0.3 * torch.randn_like(p)
    if num_classes > 1:
        network.class_names = ["no", "maybe", "yes"]
    save_model(tmp_path / "classes", network, twenty_tokens())
    endpoint = endpoint_of(str(tmp_path / "classes"), max_batch_size=4)
    endpoint.setup("cpu")
    return endpoint


def test_texts_and_pairs_are_classed_together_as_each_alone(tmp_path: Path) -> None:
    endpoint = classifier(tmp_path)
    assert type(endpoint) is TextClasses
    assert endpoint.max_batch_size == 4
    requests = [TextRequest(text="a b"), TextRequest(text="c", text_pair="d e f"), TextRequest(text="a " * 90)]
    together = endpoint.predict(requests)
    for answer, request in zip(together, requests, strict=True):
        alone = endpoint.predict(request)
        assert answer["label"] == alone["label"] == max(alone["probabilities"], key=alone["probabilities"].get)
        assert answer["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
        assert list(answer["probabilities"]) == ["no", "maybe", "yes"]
    tokens = twenty_tokens()("c", "d e f", return_tensors="pt")
    expected = endpoint.network(**tokens)[0].softmax(-1)
    np.testing.assert_allclose(list(together[1]["probabilities"].values()), expected.tolist(), atol=1e-5)
    assert len({round(answer["probabilities"]["no"], 4) for answer in together}) == 3


def test_classes_that_do_not_exclude_each_other_have_each_a_probability_of_its_own(tmp_path: Path) -> None:
    endpoint = classifier(tmp_path, config=BERT | {"problem_type": "multi_label_classification"})
    answer = endpoint.predict(TextRequest(text="a b"))
    expected = endpoint.network(**twenty_tokens()("a b", return_tensors="pt"))[0].sigmoid()
    np.testing.assert_allclose(list(answer["probabilities"].values()), expected.tolist(), atol=1e-5)
    assert answer["label"] == endpoint.network.class_names[expected.argmax()]


def test_a_network_without_a_longest_text_reads_one_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = classifier(tmp_path, config=FUNNEL)
    assert endpoint.network.max_seq_len is None
    answers = [endpoint.predict(TextRequest(text="a b c " * n)) for n in (3, 30)]
    monkeypatch.setattr(serving, "MAX_TOKENS", 9)
    assert [endpoint.predict(TextRequest(text="a b c " * n)) for n in (3, 30)] == [answers[0]] * 2 != answers


def test_an_empty_text_is_classed_too_where_the_tokenizer_makes_nothing_of_it(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 16, "n_layer": 1, "n_head": 2}
    save_model(tmp_path, PretrainedClassifier(3, config=config), byte_tokenizer())
    endpoint = endpoint_of(str(tmp_path))
    endpoint.setup("cpu")
    empty = TextRequest(text="")
    alone, beside = endpoint.predict(empty), endpoint.predict([empty, TextRequest(text="a b")])[0]
    assert sum(alone["probabilities"].values()) == pytest.approx(1)
    assert alone["probabilities"] == pytest.approx(beside["probabilities"], abs=1e-6)


def test_a_text_is_cut_where_training_cut_it(tmp_path: Path) -> None:
    endpoint = classifier(tmp_path)
    long, short = TextRequest(text="a b c d " * 5), TextRequest(text="a b c d " * 2)
    assert endpoint.predict(long) != endpoint.predict(short)
    endpoint.tokenizer.model_max_length = 8  # as in the model directory of a run with this max_seq_len
    assert endpoint.predict(long) == endpoint.predict(short)


def test_no_request_copies_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = classifier(tmp_path)
    copied = lambda *args: pytest.fail("copied")  # noqa: E731
    monkeypatch.setattr(type(endpoint.tokenizer), "__deepcopy__", copied, raising=False)
    assert endpoint.predict(TextRequest(text="a b"))["label"] in endpoint.network.class_names


@pytest.mark.parametrize("name", ["text", "text_pair"])
def test_half_a_character_never_reaches_a_classifier(name: str) -> None:
    with pytest.raises(HTTPException) as refused:
        TextRequest(**({"text": "a"} | {name: "\ud800"}))
    assert refused.value.status_code == 400
    assert refused.value.detail == rf"{name} must be UTF-8 text, but is '\ud800'"


def test_a_regression_gives_a_value(tmp_path: Path) -> None:
    endpoint = classifier(tmp_path, num_classes=1)
    answer = endpoint.predict(TextRequest(text="a b"))
    expected = endpoint.network(**twenty_tokens()("a b", return_tensors="pt")).item()
    assert answer == {"value": pytest.approx(expected, abs=1e-5)}


def png(pixels: np.ndarray, **options: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return base64.b64encode(file.getvalue()).decode()


def test_images_are_read_as_the_model_wants_them(tmp_path: Path) -> None:
    network, processor = LeNet(3, image_size=8), ImageProcessor((1, 8, 8), [0.2], [0.5])
    save_model(tmp_path / "images", network, image_processor=processor.to_hf())
    endpoint = endpoint_of(str(tmp_path / "images"), max_batch_size=2)
    assert type(endpoint) is ImageClasses
    endpoint.setup("cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    answers = endpoint.predict([ImageRequest(image=png(image)) for image in pixels])
    images = torch.from_numpy(pixels[:, None].astype(np.float32) / 255)
    expected = network.eval()((images - 0.2) / 0.5).softmax(-1)
    for answer, row in zip(answers, expected.tolist(), strict=True):
        assert list(answer["probabilities"].values()) == pytest.approx(row, abs=1e-5)


def test_images_that_would_grow_are_refused() -> None:
    with pytest.raises(ValidationError, match="but is not: it has 2 × 200 pixels"):
        ImageRequest(image=png(np.zeros((200, 2), np.uint8)))


def test_a_look_at_an_image_makes_no_other_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *how: asked.append(size) or resize(image, size, *how)
    )
    ImageRequest(image=png(np.zeros((40, 60), np.uint8)))
    assert asked == [(1, 1)]


def tiff(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "TIFF")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "image", ["no base64!", base64.b64encode(b"no image").decode(), "", tiff(np.zeros((8, 8), np.float32))]
)
def test_what_is_no_image_never_reaches_the_model(image: str) -> None:
    with pytest.raises(ValidationError, match="image must be an image file in base64, but is not"):
        ImageRequest(image=image)


def test_an_image_whose_orientation_cannot_be_read_never_reaches_the_model() -> None:
    cut = png(np.zeros((8, 8), np.uint8), exif=b"MM\0*\0\0")
    with pytest.raises(ValidationError, match="image must be an image file in base64, but is not: unpack requires"):
        ImageRequest(image=cut)


def test_what_cannot_be_asked_is_not_served(tiny_llama: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "mute", tiny_llama())
    message = f"model must come with a tokeniser to read texts, but {tmp_path / 'mute'} has none"
    with pytest.raises(ValueError, match=exactly(message)):
        endpoint_of(str(tmp_path / "mute"))
    save_model(tmp_path / "masked", PretrainedMaskedLM(20, BERT), twenty_tokens())
    message = "model must be a causal language model or a classifier to be served, but is a PretrainedMaskedLM"
    with pytest.raises(ValueError, match=exactly(message)):
        endpoint_of(str(tmp_path / "masked"))
    save_model(tmp_path / "blind", LeNet(3, image_size=8))
    message = f"model must say how it reads images, but there is no preprocessor_config.json in {tmp_path / 'blind'}"
    with pytest.raises(ValueError, match=exactly(message)):
        endpoint_of(str(tmp_path / "blind"))
