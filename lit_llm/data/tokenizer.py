"""Tokenisers as transformers classes: bytes, characters, byte-pair encodings trained here, and any on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_llm.files import model_folder
from lit_llm.wording import first_line

BOUNDARY = "<|endoftext|>"
"""Token before every document in the tokenisers made here, which also ends the document before it."""

UNKNOWN = "<unk>"
"""Token of a character tokeniser for every character that it has not seen."""

WORDS = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+(?:\n+ *)?"
    r"|\s*[\r\n]+ *"
    r"|\s+(?!\S)|\s+"
)
"""Pattern of pre-tokens, across which nothing is merged: GPT-4's (github.com/openai/tiktoken, `cl100k_base`) with two
differences: at most two digits per token, and a line end stays with the punctuation before it and the indentation after
it, which gives 6 % more bytes per token on the standard library at a vocabulary of 4,096."""

MARKS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens of an encoder, instead of the boundary: `[CLS]` opens an example, `[SEP]` ends each text in it."""

SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""Tokens of an encoder-decoder that stand for spans that are left out of a text."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: no training, encodes any text, 257 tokens with the boundary.

    Example:
        >>> byte_tokenizer().decode(byte_tokenizer().encode("é 好"))
        'é 好'
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([BOUNDARY, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([BOUNDARY])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _dressed(tokenizer, decoders.ByteLevel())


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each Unicode character that occurs, after the boundary and the unknown token.

    Text of these characters is decoded unchanged. Any other character becomes the unknown token and is lost. This keeps
    the vocabulary to that of the corpus, as in nanoGPT, but makes bits per byte look too good on text with many
    unknown characters. `bytes` and `bpe-<size>` encode any text.

    Args:
        texts: Where the characters come from.

    Source:
        Karpathy, nanoGPT, `data/shakespeare_char/prepare.py` (65 characters, neither boundary nor unknown token).

    Example:
        >>> tokenizer = character_tokenizer(["好, ab"])
        >>> tokenizer.encode("b好é"), tokenizer.decode(tokenizer.encode("b好"))
        ([5, 6, 1], 'b好')
    """
    characters = sorted(set().union(*texts))
    vocab = {token: index for index, token in enumerate([BOUNDARY, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.add_special_tokens([BOUNDARY, UNKNOWN])
    return _dressed(tokenizer, decoders.Fuse(), unk_token=UNKNOWN)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level byte-pair encoding.

    Args:
        texts: What to train on.
        vocab_size: Size of the vocabulary with the 256 bytes and the boundary; a small corpus may yield less.

    Raises:
        ValueError: When `vocab_size` has no room for the bytes and the boundary.

    Source:
        Sennrich et al., 2016, arXiv:1508.07909, on bytes as Radford et al., 2019 (GPT-2).
    """
    return _dressed(_trained(texts, vocab_size, [BOUNDARY]), decoders.ByteLevel())


def train_bert_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level byte-pair encoding for an encoder, with BERT's `[PAD]`, `[CLS]`, `[SEP]` and `[MASK]`.

    One text becomes `[CLS] A [SEP]`, two become `[CLS] A [SEP] B [SEP]`, where `B [SEP]` has token type 1.

    Args:
        texts: What to train on.
        vocab_size: Size of the vocabulary with the 256 bytes and the special tokens; a small corpus may yield less.

    Raises:
        ValueError: When `vocab_size` has no room for the bytes and the special tokens.

    Source:
        Devlin et al., 2018, arXiv:1810.04805, figure 2; bytes instead of word pieces, so there is no `[UNK]`.

    Example:
        >>> tokenizer = train_bert_bpe(["ab ab"], 260)
        >>> tokenizer.convert_ids_to_tokens(tokenizer("a", "b").input_ids)
        ['[CLS]', 'a', '[SEP]', 'b', '[SEP]']
    """
    return _marked(_trained(texts, vocab_size, list(MARKS)))


def train_bert_uncased_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains the encoding of `train_bert_bpe` on lower-case words without accents, as read by BERT's uncased models.

    White space and control characters are lost, and each punctuation mark is a word of its own. A word therefore has
    the same tokens wherever it stands: at the start of a sentence, in `_a_name`, after a bracket. A word's first token
    begins with a space. Characters are decomposed as Unicode defines, including Korean syllables, which costs tokens.

    Args:
        texts: What to train on.
        vocab_size: As in `train_bert_bpe`.

    Raises:
        ValueError: As in `train_bert_bpe`.

    Source:
        Devlin et al., 2018, arXiv:1810.04805, `tokenization.py` (uncased); merged bytes instead of word pieces, so
        there is no `[UNK]`.

    Example:
        >>> tokenizer = train_bert_uncased_bpe(["Open: re_open"] * 9, 300)
        >>> tokenizer.convert_ids_to_tokens(tokenizer("RE_OPEN:").input_ids)
        ['[CLS]', 'Ġre', 'Ġ_', 'Ġopen', 'Ġ:', '[SEP]']
    """
    return _marked(_trained(texts, vocab_size, list(MARKS), uncased=True))


def train_t5_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level byte-pair encoding for an encoder-decoder, with T5's `<pad>`, `</s>` and 100 sentinels.

    Each text, also each of a pair, ends with `</s>`. The sentinels begin with `<extra_id_0>`.

    Args:
        texts: What to train on.
        vocab_size: Size of the vocabulary with the 256 bytes and the 102 special tokens; a small corpus may yield less.

    Raises:
        ValueError: When `vocab_size` has no room for the bytes and the special tokens.

    Source:
        Raffel et al., 2020, arXiv:1910.10683, sections 2.2 and 3.1.4; bytes instead of SentencePiece, so there is no
        `<unk>`.

    Example:
        >>> tokenizer = train_t5_bpe(["ab ab"], 360)
        >>> tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids), tokenizer.convert_tokens_to_ids("<extra_id_0>")
        (['a', '</s>'], 2)
    """
    padding, end = "<pad>", "</s>"
    tokenizer = _trained(texts, vocab_size, [padding, end, *SENTINELS])
    ended = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", ended)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=padding,
        eos_token=end,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _trained(texts: Iterable[str], vocab_size: int, special_tokens: list[str], uncased: bool = False) -> Tokenizer:
    least = 256 + len(special_tokens)
    if vocab_size < least:
        names = ", ".join(special_tokens[:4]) + (" …" if len(special_tokens) > 4 else "")
        raise ValueError(f"vocab_size must be at least {least} (the bytes and {names}), but is {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    if uncased:
        tokenizer.normalizer, words = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=uncased, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _marked(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    padding, opening, end, mask = MARKS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A {end}",
        pair=f"{opening} $A {end} $B:1 {end}:1",
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in (opening, end)],
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=padding,
        cls_token=opening,
        sep_token=end,
        mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _dressed(tokenizer: Tokenizer, decoder: decoders.Decoder, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        pad_token=BOUNDARY,
        clean_up_tokenization_spaces=False,
        **tokens,
    )


KINDS = {
    "bpe": train_bpe,
    "bert-bpe": train_bert_bpe,
    "bert-uncased-bpe": train_bert_uncased_bpe,
    "t5-bpe": train_t5_bpe,
}
"""Functions that train a tokeniser of a given size, by the name before the size."""

TRAINED = re.compile(rf"({'|'.join(KINDS)})-(\d+)")


def training_of(spec: str) -> Callable[[Iterable[str]], PreTrainedTokenizerFast] | None:
    """The function that trains a tokeniser such as `characters` or `bpe-<size>`; `None` if `spec` needs no training."""
    if spec == "characters":
        return character_tokenizer
    match = TRAINED.fullmatch(spec)
    return partial(KINDS[match[1]], vocab_size=int(match[2])) if match else None


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokeniser that needs no training.

    Args:
        spec: `bytes`, a folder with `tokenizer.json`, a run folder, or a name on the hub.

    Raises:
        FileNotFoundError: When there is no such tokeniser.
        ValueError: When it has no token to put between documents, or no fast implementation.
    """
    if str(spec) == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = open_tokenizer(spec)
    except Exception as error:  # the library raises nothing narrower for a file that is not a tokeniser
        sized = ", ".join(f"`{kind}-<size>`" for kind in KINDS)
        raise FileNotFoundError(
            f"tokenizer must be `bytes`, `characters`, {sized}, a folder made by `lit-llm tokenizer` or a name on the "
            f"hub, but is {str(spec)!r}: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer must have a tokenizer.json, but {spec} is a {type(tokenizer).__name__}")
    boundary_id(tokenizer)
    return tokenizer


def open_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Opens the tokeniser of a folder, of a run or of a name on the hub, without running any code that comes with it.

    Makes it save `legacy`, which transformers leaves out and by which Llama's reads text after a special token.
    """
    folder = model_folder(Path(source).expanduser(), "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(str(folder if folder.is_dir() else source), trust_remote_code=False)
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The files of a tokeniser by path relative to its folder; several chat templates are in a folder of their own."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


def write_tokenizer_files(files: dict[str, str], folder: Path) -> None:
    """Writes the files that `tokenizer_files` returned; never outside the folder, whatever the paths say."""
    for name, text in files.items():
        path = folder.joinpath(*(part for part in Path(name).parts if part not in ("..", Path(name).anchor)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def boundary_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before each document and after the last.

    Raises:
        ValueError: When the tokeniser has no end-of-text, beginning-of-text or separator token.
    """
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return token
    raise ValueError("tokenizer must have an eos, bos or sep token to put between documents, but has none")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the boundary if the tokeniser has none.

    Raises:
        ValueError: When it has neither.
    """
    return boundary_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens between the boundary and a document: BERT's `[CLS]`, or the BOS that a tokeniser puts before texts.

    Empty if that is the boundary itself, or there is no such token, as in the tokenisers made here for decoders.
    """
    opening = tokenizer.cls_token_id
    if opening is None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        opening = tokenizer.bos_token_id
    return [] if opening is None or opening == boundary_id(tokenizer) else [opening]


def first_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a text that is to be continued: the one that opens a document, or else the boundary."""
    return [boundary_id(tokenizer), *opening_ids(tokenizer)][-1]


def require_utf_8(text: str, name: str = "prompt") -> None:
    """Refuses a text that cannot be encoded as UTF-8, because no tokeniser reads it.

    Python makes such text from bytes on the command line that are not UTF-8, and from half a surrogate pair in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, but is {text!r:.60}") from error


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of whole documents, computed on all cores, without added tokens.

    Text that spells a special token is encoded as the characters it consists of.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    as_text, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = as_text


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that determines how text becomes tokens."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()
