"""The README of an exported network: its inputs and outputs, and a program that uses it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_llm.data.image_processor import ImageProcessor
from lit_llm.data.tokenizer import first_id

if TYPE_CHECKING:
    from lit_llm.export import Exported

OPEN = {
    "onnx": 'model = onnxruntime.InferenceSession("model.onnx")',
    "torch": 'model = torch.export.load("model.pt2").module()',
}
INSTALL = {"onnx": "onnxruntime", "torch": "torch"}
MEANINGS = {
    "input_ids": "int64, batch × tokens",
    "attention_mask": "int64, same shape: 1 for tokens, 0 for padding",
    "token_type_ids": "int64, same shape: 0 for the first text, 1 for the second",
    "pixel_values": "float32, batch × channels × height × width, normalised",
}


def card(
    exported: Exported,
    form: str,
    names: tuple[str, ...],
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    processor: dict[str, Any] | None,
    source: str,
) -> str:
    """Markdown about the file, with a program that runs in its folder.

    Args:
        exported: What was written.
        form: `onnx` or `torch`.
        names: Names of the inputs.
        network: The exported network.
        tokenizer: The network's tokeniser, if it has one.
        processor: The network's image preprocessing, if it is known.
        source: Name or path of the model.
    """
    inputs = [f"- `{name}`: {MEANINGS[name]}" for name in names]
    longest = getattr(network, "max_seq_len", None)
    limit = [f"- at most {longest} tokens"] if "input_ids" in names and longest else []
    packages = [INSTALL[form], *(["transformers"] if tokenizer is not None else [])]
    packages += ["pillow"] if "pixel_values" in names else []
    ending = ", with a picture of yours as `image.png`" if "pixel_values" in names else ""
    lines = [
        f"# {exported.file.name}",
        "",
        f"{source}, exported by lit-llm. Logits differ from the network's by at most {exported.difference:.1e}; their "
        f"standard deviation is {exported.spread:.3g}.",
        "",
        *inputs,
        *limit,
        f"- gives `logits`: {_meaning(network, names)}",
        "",
        f"In this folder, after `pip install {' '.join(packages)}`{ending}:",
        "",
        "```python",
        *_program(form, names, network, tokenizer, processor),
        "```",
        "",
    ]
    return "\n".join(lines)


def _meaning(network: nn.Module, names: tuple[str, ...]) -> str:
    if hasattr(network, "logits_at"):
        return "float32, batch × tokens × vocabulary, for the token at each position"
    if names == ("input_ids",):
        return "float32, batch × tokens × vocabulary, for the next token (padding on the right has no effect)"
    if getattr(network, "num_classes", None) == 1:
        return "float32, batch × 1, the predicted value"
    return "float32, batch × classes, which `id2label` in `config.json` names"


def _program(
    form: str,
    names: tuple[str, ...],
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    processor: dict[str, Any] | None,
) -> list[str]:
    if names == ("pixel_values",):
        return _of_images(form, network, processor)
    open_tokenizer = ["from transformers import AutoTokenizer"] if tokenizer is not None else []
    opened = [OPEN[form], *(['tokenizer = AutoTokenizer.from_pretrained(".")'] if tokenizer is not None else [])]
    if names == ("input_ids",):
        start = "[1, 2, 3]"
        if tokenizer is not None:
            start = f'[{first_id(tokenizer)}, *tokenizer.encode("def ", add_special_tokens=False)]'
        ask = _asked(form, "input_ids=[ids]")
        return [
            *_imports(form, open_tokenizer),
            "",
            *opened,
            f"ids = {start}",
            "for _ in range(20):",
            f"    logits = {ask}",
            "    ids.append(int(logits[0, -1].argmax()))",
            "print(tokenizer.decode(ids))" if tokenizer is not None else "print(ids)",
        ]
    if tokenizer is None:
        batch = "batch = {name: [[1, 1, 1]] for name in " + _quoted(names) + "}"
    else:
        mask = tokenizer.mask_token if hasattr(network, "logits_at") else None
        texts = [[f"this is {mask}", f"so is {mask} too"] if mask else ["a text", "another text"]]
        if getattr(network, "reads_pairs", False):
            texts.append(["the text beside it", "the other's"])
        batch = f"batch = tokenizer({', '.join(map(_quoted, texts))}, padding=True{_cut(network, tokenizer)})"
    ask = _asked(form, "**{name: batch[name] for name in " + _quoted(names) + "}")
    words = hasattr(network, "logits_at")
    lines = ["", *opened, batch, f"logits = {ask}"]
    if not words:
        lines += ['names = json.load(open("config.json"))["id2label"]']
        lines += ["print([names[str(int(row.argmax()))] for row in logits])"]
        if network.num_classes == 1:
            lines[-2:] = ["print(logits[:, 0])"]
    else:
        lines += ["print([tokenizer.decode(row.argmax(-1)) for row in logits])" if tokenizer else "print(logits)"]
    return _imports(form, open_tokenizer, with_json=any("json." in line for line in lines)) + lines


def _cut(network: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokeniser's truncation arguments, as in `predict` and `serve`: as in training, or to the network's limit."""
    longest = min(getattr(network, "max_seq_len", None) or sys.maxsize, tokenizer.model_max_length)
    return f", truncation=True, max_length={longest}" if longest < sys.maxsize else ""


def _of_images(form: str, network: nn.Module, processor: dict[str, Any] | None) -> list[str]:
    channels, height, width = network.image_shape
    mean, std = [0.0] * channels, [1.0] * channels
    if processor is not None:
        read = ImageProcessor.from_hf(processor)
        mean, std, (_, height, width) = read.mean, read.std, read.shape
    height, width = height or 224, width or 224
    mode = "L" if channels == 1 else "RGB"
    return [
        *_imports("onnx", [], with_json=True)[:3],
        f"import {INSTALL[form]}",
        "from PIL import Image, ImageOps",
        "",
        OPEN[form],
        'image = ImageOps.exif_transpose(Image.open("image.png"))',
        'if image.mode.startswith("I"):  # of 16 bits of grey the upper 8 are read',
        "    image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))",
        f'pixels = np.asarray(ImageOps.fit(image.convert("{mode}"), ({width}, {height}), Image.BILINEAR)) / 255',
        f"pixels = ((pixels.reshape({height}, {width}, {channels}) - {mean}) / {std}).astype(np.float32)",
        f"logits = {_asked(form, 'pixel_values=pixels.transpose(2, 0, 1)[None]')}",
        'print(json.load(open("config.json"))["id2label"][str(int(logits[0].argmax()))])',
    ]


def _imports(form: str, more: list[str], with_json: bool = False) -> list[str]:
    own = ["import numpy as np", "import onnxruntime"] if form == "onnx" else ["import torch"]
    return [*(["import json", ""] if with_json else []), *own, *more]


def _quoted(names: Iterable[str]) -> str:
    return f"[{', '.join(json.dumps(name) for name in names)}]"


def _asked(form: str, inputs: str) -> str:
    """Source code that calls the model; `inputs` are keyword arguments as source code."""
    if inputs.startswith("**"):
        given = inputs[2:]
        if form == "onnx":
            return f'model.run(["logits"], {given.replace("batch[name]", "np.array(batch[name])")})[0]'
        return f"model(**{given.replace('batch[name]', 'torch.tensor(batch[name])')})"
    name, _, value = inputs.partition("=")
    if form == "onnx":
        value = value if name == "pixel_values" else f"np.array({value})"
        return f'model.run(["logits"], {{"{name}": {value}}})[0]'
    return f"model({name}=torch.tensor({value}))"
