"""HTTP endpoints for models, on LitServe: completions, chat, and classification of texts and images.

The server checks a request against a schema, which `/docs` shows, and hands it to a process that holds the model.
"""

import base64
import io
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import litserve
import numpy as np
import torch
from fastapi import BackgroundTasks, HTTPException
from litserve.specs.openai import ChatCompletionRequest, ChatCompletionResponse, OpenAISpec, UsageInfo
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_llm.checkpoints import load_model, read_image_processor
from lit_llm.data.chat import prompt_ids, turn_ends
from lit_llm.data.collation import Collation
from lit_llm.data.image_cache import decoded, read_image
from lit_llm.data.image_processor import ImageProcessor
from lit_llm.data.tokenizer import boundary_id, first_id, require_utf_8
from lit_llm.generation import IncrementalDetokenizer, continuations, stream_tokens, until

NEW_TOKENS = 128
"""Most tokens of a reply if the request sets no limit."""

MAX_TOKENS, MAX_PROMPTS = 65_536, 64
"""Limits of one request, so that it cannot block all others indefinitely."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Image formats that are accepted. (Pillow knows others, some of which are programs.)"""

MAX_PIXELS, MAX_SKEW = 50_000_000, 50
"""Limits of an image: pixels, and aspect ratio, since an image is scaled to cover a square before it is cropped."""


class Quotable(BaseModel):
    """A request that an error response can quote: its strings are valid Unicode and its numbers finite."""

    @model_validator(mode="before")
    @classmethod
    def _is_quotable(cls, data: Any) -> Any:
        with _refusing():
            for name, value in data.items() if isinstance(data, dict) else [("request", data)]:
                require_utf_8(name, "name of a field")
                parts = [value]
                for part in parts:  # grows while it is read
                    if isinstance(part, list):
                        parts += part
                    elif isinstance(part, dict):
                        parts += [*part, *part.values()]
                    elif isinstance(part, str):
                        require_utf_8(part, name)
                    elif isinstance(part, float) and not math.isfinite(part):
                        raise ValueError(f"{name} must be finite, but is {part}")
        return data


class Request(Quotable):
    """Base of the request schemas; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


NotEmpty = Annotated[str, Field(min_length=1)]


class CompletionRequest(Request):
    """OpenAI's completion request, with `top_k`; several prompts are continued together."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(examples=["def read_file("])
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="128, or what the context allows")
    temperature: float | None = Field(0.8, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(0.95, gt=0, le=1)
    seed: int | None = None
    stop: NotEmpty | list[NotEmpty] | None = []
    model: str | None = Field(None, description="Ignored, and returned as given: there is only one model")
    stream: Literal[False] | None = False

    @field_validator("temperature", "top_p", "stop", "stream", mode="before")
    @classmethod
    def _or_default(cls, value: Any, info: Any) -> Any:
        """Replaces `null` by the default, as OpenAI's API does."""
        return cls.model_fields[info.field_name].get_default() if value is None else value


class TextRequest(Request):
    """A text to classify, or a pair of texts."""

    text: str
    text_pair: str | None = None


class ImageRequest(Request):
    """An image to classify."""

    image: str = Field(description=f"An image file ({', '.join(FORMATS)}) in base64")

    @field_validator("image")
    @classmethod
    def _is_an_image(cls, value: str) -> str:
        try:
            with Image.open(io.BytesIO(base64.b64decode(value, validate=True)), formats=FORMATS) as image:
                short, long = sorted(image.size)
                if short * long > MAX_PIXELS or long > MAX_SKEW * short:
                    raise OSError(f"it has {image.width} × {image.height} pixels")
                decoded(image, 3, 1, 1)  # failing later would fail the whole batch
        except Exception as error:  # each format's decoder raises its own types
            raise ValueError(f"image must be an image file in base64, but is not: {error}") from error
        return value


class Endpoint(litserve.LitAPI, ABC):
    """A model that answers requests at a path.

    Args:
        model: A model directory, a run folder or a checkpoint file.
        max_batch_size: Largest number of waiting requests that are answered together.

    Attributes:
        path: Path of the endpoint's URL.
    """

    path: str
    network: nn.Module
    tokenizer: PreTrainedTokenizerBase | None

    def __init__(self, model: str, max_batch_size: int = 1, **options: Any) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=0.005, api_path=self.path, **options)
        self.model = model

    def setup(self, device: str) -> None:
        """Loads the model; LitServe calls this in the process that answers."""
        self.network, self.tokenizer = load_model(self.model)
        self.network.eval().to(device)

    @abstractmethod
    def predict(self, request: Any) -> Any:
        """Answers a request, or a list of requests with a list of answers."""


class Completions(Endpoint):
    """A language model that continues prompts, through OpenAI's completions API."""

    path = "/v1/completions"

    def decode_request(self, request: CompletionRequest) -> CompletionRequest:
        """Returns the request unchanged; its type is the schema."""
        return request

    def predict(self, request: CompletionRequest) -> dict[str, Any]:
        """Generates the continuations of one request."""
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        stops = [request.stop] if isinstance(request.stop, str) else request.stop
        with _refusing():
            first = first_id(self.tokenizer)
            ids = [[first, *self.tokenizer.encode(prompt, add_special_tokens=False)] for prompt in prompts]
            room = _room(self.network, ids, request.max_tokens)
            how = request.temperature, request.top_k, request.top_p, request.seed
            steps = stream_tokens(self.network, ids, room, *how, {boundary_id(self.tokenizer)})
            found = continuations(self.tokenizer, [prompt[1:] for prompt in ids], steps, stops)
        choices = []
        for index, (tokens, text, stopped) in enumerate(found):
            ended = stopped or len(tokens) < room
            choices.append({"index": index, "text": text, "finish_reason": "stop" if ended else "length"})
        return {
            "id": f"cmpl-{uuid.uuid4().hex[:12]}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model or self.model,
            "choices": choices,
            "usage": _usage(sum(map(len, ids)), sum(len(one.tokens) for one in found)),
        }


class ChatRequest(Quotable, ChatCompletionRequest):
    """LitServe's schema of a chat request."""


class ChatForm(OpenAISpec):
    """LitServe's chat API of OpenAI's form, corrected for several replies (`n`).

    LitServe generates replies one by one: it would count the prompt's tokens for each of them, and end all streamed
    replies when the first one ends.
    """

    async def chat_completion(self, request: ChatRequest, background_tasks: BackgroundTasks) -> Any:
        """Answers a request, whole or as a stream of pieces."""
        request.n = 1 if request.n is None else request.n
        with _refusing():
            if not 1 <= request.n <= MAX_PROMPTS:
                raise ValueError(f"n must be from 1 to {MAX_PROMPTS}, but is {request.n}")
            if request.stream and request.n > 1:
                raise ValueError(f"n must be 1 where the reply is streamed, but is {request.n}")
        return await super().chat_completion(request, background_tasks)

    async def non_streaming_completion(
        self, request: ChatCompletionRequest, generator_list: list[Any]
    ) -> ChatCompletionResponse:
        """Answers a request, and counts the prompt's tokens once in its usage."""
        answer = await super().non_streaming_completion(request, generator_list)
        prompt = answer.usage.prompt_tokens // request.n
        answer.usage = UsageInfo(**_usage(prompt, answer.usage.completion_tokens))
        return answer


class Chat(Endpoint):
    """A language model that chats through OpenAI's API, with its tokeniser's chat template; replies can be streamed.

    LitServe parses the request: it ignores fields that it does not know, `seed` among them, and reports every reply's
    `finish_reason` as `stop`.
    """

    path = "/v1/chat/completions"

    def __init__(self, model: str) -> None:
        super().__init__(model, spec=ChatForm())

    def predict(self, request: ChatCompletionRequest) -> Iterator[dict[str, Any]]:
        """Yields the pieces of a reply, and last the numbers of tokens."""
        with _refusing():
            _require_known(request)
            messages = [{"role": m.role, "content": _text(m.content)} for m in request.messages]
            ids = prompt_ids(self.tokenizer, messages)
            wanted = request.max_completion_tokens
            wanted = request.max_tokens if wanted is None else wanted
            room = _room(self.network, [ids], wanted)
            stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
            temperature = 0.7 if request.temperature is None else request.temperature  # LitServe's own defaults
            top_p = 1.0 if request.top_p is None else request.top_p
            writing = IncrementalDetokenizer(self.tokenizer)
            new = stream_tokens(self.network, [ids], room, temperature, None, top_p, stop=turn_ends(self.tokenizer))
            for piece in until(writing.pieces(new), stops):
                yield {"role": "assistant", "content": piece}
        yield {"role": "assistant", "content": "", **_usage(len(ids), len(writing.tokens))}


class Classes(Endpoint):
    """A classifier, which gives the probability of each class, or a regression model, which gives a value."""

    path = "/classify"

    def predict(self, request: Any) -> Any:
        """Gives for each request `label`, the likeliest class, and `probabilities`; for a regression `value`.

        In multi-label classification (a network's `multi_label`) the probabilities of the classes are independent.
        """
        together = isinstance(request, list)
        requests = request if together else [request]
        with torch.inference_mode():
            logits = self.logits(requests).float()
        answers = [self._answer(row) for row in logits]
        return answers if together else answers[0]

    @abstractmethod
    def logits(self, requests: list[Any]) -> torch.Tensor:
        """Computes the logits of several requests at once, one row each."""

    def _answer(self, logits: torch.Tensor) -> dict[str, Any]:
        if len(logits) == 1:
            return {"value": logits.item()}
        found = logits.sigmoid() if getattr(self.network, "multi_label", False) else logits.softmax(dim=-1)
        probabilities = dict(zip(self.network.class_names, found.tolist(), strict=True))
        return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


class TextClasses(Classes):
    """A classifier of texts or pairs of texts."""

    def decode_request(self, request: TextRequest) -> TextRequest:
        """Returns the request unchanged; its type is the schema."""
        return request

    def logits(self, requests: list[TextRequest]) -> torch.Tensor:
        """Computes logits; texts are truncated as in training, or to the network's limit, and padded to the longest."""
        paired = [request.text_pair is not None for request in requests]
        longest = min(getattr(self.network, "max_seq_len", None) or MAX_TOKENS, self.tokenizer.model_max_length)
        device = next(self.network.parameters()).device
        found: dict[int, torch.Tensor] = {}
        for with_pair in set(paired):  # single texts and pairs are separate batches
            places = [place for place, it in enumerate(paired) if it == with_pair]
            texts = [requests[place].text for place in places]
            pairs = [requests[place].text_pair for place in places] if with_pair else None
            batch = Collation(texts, pairs, None, self.tokenizer, longest).batch(np.arange(len(places)))
            del batch["rows"]
            said = self.network(**{name: tensor.to(device) for name, tensor in batch.items()})
            found |= zip(places, said)
        return torch.stack([found[place] for place in range(len(requests))])


class ImageClasses(Classes):
    """A classifier of images."""

    def setup(self, device: str) -> None:
        """Loads the model and its image preprocessing."""
        super().setup(device)
        self.processor = ImageProcessor.from_hf(read_image_processor(self.model))

    def decode_request(self, request: ImageRequest) -> ImageRequest:
        """Returns the request unchanged; its type is the schema."""
        return request

    def logits(self, requests: list[ImageRequest]) -> torch.Tensor:
        """Computes logits; images get the network's size and channels and are normalised, as in the data modules."""
        files = [{"bytes": base64.b64decode(request.image)} for request in requests]
        pixels = np.stack([read_image(file, *self.processor.shape) for file in files]).astype(np.float32) / 255
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.processor.mean, self.processor.std))
        images = torch.from_numpy((pixels - mean) / std)
        return self.network(pixel_values=images.to(next(self.network.parameters()).device))


def endpoint_of(model: str, max_batch_size: int = 1) -> Endpoint:
    """The endpoint for a model: chat, completions, or classification of texts or images.

    Args:
        model: A model directory, a run folder or a checkpoint file.
        max_batch_size: As in `Endpoint`; a language model answers one request at a time.

    Raises:
        ValueError: When the model is of another kind, or lacks its tokeniser or image preprocessing.
    """
    network, tokenizer = load_model(model)
    if hasattr(network, "new_cache"):
        _require(tokenizer, model)
        return Chat(model) if tokenizer.chat_template else Completions(model)
    if not hasattr(network, "class_names"):
        raise ValueError(
            f"model must be a causal language model or a classifier to be served, but is a {type(network).__name__}"
        )
    if not getattr(network, "reads_images", hasattr(network, "image_shape")):
        _require(tokenizer, model)
        return TextClasses(model, max_batch_size)
    if read_image_processor(model) is None:
        raise ValueError(f"model must say how it reads images, but there is no preprocessor_config.json in {model}")
    return ImageClasses(model, max_batch_size)


def _require(tokenizer: PreTrainedTokenizerBase | None, model: str) -> None:
    if tokenizer is None:
        raise ValueError(f"model must come with a tokeniser to read texts, but {model} has none")


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns an error in a request into a response with status 400 and the error's message."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise HTTPException(400, str(error).replace("max_new_tokens", "max_tokens")) from error


def _room(network: nn.Module, prompts: list[list[int]], wanted: int | None) -> int:
    """Number of tokens to generate; `stream_tokens` refuses a `wanted` that the network has no room for."""
    if wanted is not None and wanted > MAX_TOKENS:
        raise ValueError(f"max_tokens must be at most {MAX_TOKENS}, but is {wanted}")
    if wanted is not None:
        return wanted
    limit = getattr(network, "max_seq_len", None)
    return NEW_TOKENS if limit is None else max(1, min(NEW_TOKENS, limit - max(map(len, prompts))))


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _require_known(request: ChatCompletionRequest) -> None:
    """Refuses fields of OpenAI's API that this endpoint would ignore."""
    given = {name: getattr(request, name) for name in ("tools", "response_format", "reasoning_effort")}
    given |= {name: getattr(request, name) or None for name in ("presence_penalty", "frequency_penalty")}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must be left out, as it is not supported, but is {value!r:.60}")


def _text(content: Any) -> str:
    """The text of a message; other content is refused."""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else getattr(part, "text", None) for part in parts]
    if None in texts:
        raise ValueError("content must be text, but is something else")
    return "".join(texts)
