from __future__ import annotations

import pytest
import torch

from lit_llm.compression.inheritance import inherit, layer_map
from lit_llm.models.pretrained import PretrainedCausalLM
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_pooling import PairClassifier
from tests.examples import BERT

MODERNBERT = {
    "model_type": "modernbert",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def test_a_student_of_all_blocks_is_its_teacher(tiny_llama):
    teacher, student, ids = tiny_llama(seed=1), tiny_llama(), torch.randint(37, (1, 5))
    inherit(student, teacher)
    assert torch.equal(student(ids), teacher(ids))


def test_a_student_of_some_blocks_is_its_teacher_without_the_others():
    teacher, student = (PretrainedClassifier(3, config=BERT | {"num_hidden_layers": n}).eval() for n in (4, 2))
    assert layer_map(student, teacher) == [1, 3]
    inherit(student, teacher, [0, 3])
    layers = teacher.model.base_model.encoder.layer
    for index in (2, 1):
        del layers[index]
    ids = {"input_ids": torch.randint(20, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    assert torch.equal(student(**ids), teacher(**ids))


def test_a_narrow_student_has_the_first_heads_and_the_first_of_each_fused_part():
    teacher = PretrainedClassifier(3, config=MODERNBERT)
    student = PretrainedClassifier(
        3, config=MODERNBERT | {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6}
    )
    inherit(student, teacher)
    theirs, mine = teacher.state_dict(), student.state_dict()
    for name, parts, kept in (("attn.Wqkv", 3, 8), ("mlp.Wi", 2, 6), ("attn.Wo", 1, 8)):
        weight = next(n for n in mine if n.endswith(f"layers.1.{name}.weight"))
        pieces = [piece[:kept, : mine[weight].shape[1]] for piece in theirs[weight].chunk(parts)]
        assert torch.equal(mine[weight], torch.cat(pieces))


def test_where_outputs_are_columns_it_is_columns_that_fused_parts_are_cut_from():
    def gpt2(width: int, heads: int) -> PretrainedCausalLM:
        size = {"n_embd": width, "n_head": heads, "n_layer": 1, "n_positions": 8}
        return PretrainedCausalLM(16, config={"model_type": "gpt2", **size})

    teacher, student = gpt2(16, 4), gpt2(8, 2)
    inherit(student, teacher)
    theirs, mine = (network.model.transformer.h[0] for network in (teacher, student))
    pieces = [piece[:8, :8] for piece in theirs.attn.c_attn.weight.chunk(3, dim=1)]
    assert torch.equal(mine.attn.c_attn.weight, torch.cat(pieces, dim=1))
    assert torch.equal(mine.mlp.c_fc.weight, theirs.mlp.c_fc.weight[:8, :32])


def test_of_vectors_that_a_matrix_reads_side_by_side_each_is_cut_by_itself():
    wide, narrow = ({"hidden_size": 16}, {"hidden_size": 8, "num_attention_heads": 2})
    teacher, student = (PairClassifier(3, config=MODERNBERT | size) for size in (wide, narrow))
    inherit(student, teacher)
    theirs, mine = teacher.model.pooled_head, student.model.pooled_head
    for layer, rows, parts in (("compare", 8, 4), ("aggregate", 3, 2)):
        pieces = [piece[:rows, :8] for piece in getattr(theirs, layer).weight.chunk(parts, dim=1)]
        assert torch.equal(getattr(mine, layer).weight, torch.cat(pieces, dim=1))


@pytest.mark.parametrize(
    ("changes", "layers", "message"),
    [
        ({"num_layers": 3}, None, r"^student must have from 1 to as many blocks as its teacher, 2, but has 3$"),
        ({}, [0, 2], r"^layers must name for each of the student's 2 blocks one of the teacher's, from 0 to 1, but are \[0, 2\]$"),
        ({}, [1], r"^layers must name for each of the student's 2 blocks .*, but are \[1\]$"),
        ({"num_heads": 8}, None, r"^student must have heads as wide as its teacher's, 8, but has 4$"),
        ({"d_ff": 64}, None, r"^student must be at most as large as its teacher, but its layers.0.mlp.\w+.weight is "),
        ({"qk_norm": True}, None, r"^student must be of its teacher's architecture, but the teacher has no layers.0.self_attn.q_norm"),
    ],
)  # fmt: skip
def test_what_is_no_part_of_its_teacher_is_refused(tiny_llama, changes, layers, message):
    with pytest.raises(ValueError, match=message):
        inherit(tiny_llama(**changes), tiny_llama(), layers)
