"""Bits per byte of general-purpose compressors on the documents that `llama_stdlib.yaml` validates on.

Each sees the whole validation split as one stream, so it adapts to earlier documents, which the model does not.
"""

import bz2
import gzip
import lzma
from collections import Counter

from lit_llm.data.cleaning import Cleaning
from lit_llm.data.documents import open_corpus
from lit_llm.data.token_cache import split_documents

documents = split_documents(open_corpus("stdlib"), Cleaning(), 0.02, 0.02, Counter())
text = "".join(document.text for document, _, split in documents if split == "validation").encode()
print("| compressor | bits per byte |\n| --- | ---: |")
for name, compress in {"gzip -9": gzip.compress, "bzip2 -9": bz2.compress, "xz -9": lzma.compress}.items():
    print(f"| {name} | {8 * len(compress(text)) / len(text):.2f} |")
