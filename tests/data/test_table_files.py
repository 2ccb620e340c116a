import pytest
from datasets import Dataset, DatasetDict

from lit_llm.data.documents import open_corpus
from lit_llm.data.image_sources import open_images
from lit_llm.data.tables import open_table
from tests.writing import exactly


@pytest.mark.parametrize("several", [True, False])
def test_what_the_library_keeps_in_its_own_format_is_refused_with_the_way_out(tmp_path, several) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["1", "0"]})
    (DatasetDict(train=rows, test=rows) if several else rows).save_to_disk(tmp_path / "x")
    message = (
        f"data.path must hold files that any program reads, but {tmp_path}/x was written by `save_to_disk`; open it "
        f"with `datasets.load_from_disk`, and write each split with `to_parquet`"
    )
    for open_any in (open_table, open_corpus, open_images):
        with pytest.raises(ValueError, match=exactly(message)):
            open_any(str(tmp_path / "x"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(("encoding", "byte"), [("latin1", "e9"), ("utf-16", "ff")])
@pytest.mark.parametrize("before", [0, 3000])
def test_a_table_that_is_not_utf8_is_refused_with_the_way_out(tmp_path, suffix, encoding, byte, before) -> None:
    path = tmp_path / f"x{suffix}"
    rows = ["text,label", *["cafe,a"] * before, "café,b"]
    path.write_bytes("\n".join(rows).replace(",", "\t" if suffix == ".tsv" else ",").encode(encoding))
    message = (
        f"data.path must be a table that can be read, but {path} is not: a table must be UTF-8 text, but has byte "
        f"0x{byte} where it is not; convert it, for example with `iconv -f {encoding} -t utf-8`"
    )
    for read in (open_table, lambda path: list(open_corpus(path).read())):
        with pytest.raises(ValueError, match=exactly(message)):
            read(str(path))
