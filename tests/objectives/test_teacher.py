from __future__ import annotations

import torch

from lit_llm.checkpoints import save_model
from lit_llm.objectives.divergences import SoftTargets
from lit_llm.objectives.teacher import Teacher, TeacherCache, row_keys


def test_rows_of_several_lengths_are_kept_side_by_side(tmp_path, tiny_llama, monkeypatch) -> None:
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model", tiny_llama(vocab_size=50))
    teacher = Teacher(str(tmp_path / "model"), "32-true")
    batches = [{"input_ids": torch.randint(50, (3, length))} for length in (8, 16, 8)]
    said = [SoftTargets.of(torch.randn(3, batch["input_ids"].shape[1], 50), 1.0) for batch in batches]
    kept = []
    for batch, taught in zip(batches, said, strict=True):
        cache = TeacherCache(teacher, 1.0, 4)  # each in a new run
        assert cache.read(batch) is None
        kept.append(cache.add(batch, taught))
    for reader in (cache, TeacherCache(teacher, 1.0, 4)):
        for batch, before, taught in zip(batches, kept, said, strict=True):
            found = reader.read(batch)
            assert torch.equal(found.index, taught.top(4).index)
            assert torch.equal(found.log_p, before.log_p)


def test_images_in_half_precision_have_keys_too() -> None:
    images = torch.randn(3, 1, 4, 4).bfloat16()
    first, second, third = row_keys({"pixel_values": images})
    assert len({first, second, third}) == 3
    assert row_keys({"pixel_values": images[1:]}) == [second, third]
