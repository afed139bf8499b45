from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmprune.checkpoint import load_pruned, save_pruned
from llmprune.cli import app
from llmprune.errors import InputError
from llmprune.export import export
from llmprune.gguf_tokenizer import LLAMA3_SPLIT, read_tokenizer
from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune.surgery import cut
from llmprune.units import map_units
from tests.llmprune import tiny
from tests.llmprune.deci_reference import DeciLM
from tests.llmprune.test_compensation import means_of
from tests.llmprune.tiny import FAMILIES, logits, plan_for, tiny_model, use_double_norms

WIDTHS = ("heads", "kv_groups", "mlp_channels")
SUBLAYERS = ("attention_sublayers", "mlp_sublayers")
GGUF_VOCAB = 280


@pytest.fixture(autouse=True)
def _double_norms(monkeypatch):
    use_double_norms(monkeypatch)


def pruned(folder, model, plan, form="per_layer", **options):
    """The folder of a cut model, and the model."""
    cut_model = cut(model, plan, form=form, **options)
    save_pruned(cut_model, None, folder)
    return folder, cut_model


def plan_of(model, **kept):
    unit_map = map_units(model)
    return PrunePlan(model=unit_map.signature(), kept=kept, scale={})


def stock(folder):
    """The folder with plain transformers: no remote code, no class of ours."""
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    assert not type(model).__name__.startswith("Pruned")
    return model


def difference(found, expected):
    return float((found - expected).detach().abs().max())


EVERY_KIND = (*WIDTHS, *SUBLAYERS, "layers")
PADDED = [(family, EVERY_KIND) for family in FAMILIES]
# several KV groups of three, two and one query heads: a head must stay in its group
PADDED += [("llama", WIDTHS), ("phi3", WIDTHS)]


@pytest.mark.parametrize(("family", "kinds"), PADDED)
def test_padded_model_is_stock_and_computes_the_same(family, kinds, tmp_path):
    model = tiny_model(family, ratio=4, kv_groups=6, layers=4, tied=family == "llama")
    folder, narrow = pruned(tmp_path / "model", model, plan_for(model, kinds, differ=True))
    result = export(folder, tmp_path / "padded", "padded")
    wide = stock(tmp_path / "padded")
    assert difference(logits(wide), logits(narrow)) < 1e-10
    assert result.max_abs_difference < 1e-10
    assert result.parameters == wide.num_parameters() > narrow.num_parameters()
    assert result.source_parameters == narrow.num_parameters()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_padded_model_keeps_the_biases_of_compensation(family, tmp_path):
    model = tiny_model(family)
    # a Llama attends to everything, which is all the same where a window is longer than the text
    model.config.sliding_window = None
    plan = plan_for(model, (*WIDTHS, *SUBLAYERS), differ=True)
    folder, narrow = pruned(tmp_path / "model", model, plan, means=means_of(model))
    export(folder, tmp_path / "padded", "padded")
    assert difference(logits(stock(tmp_path / "padded")), logits(narrow)) < 1e-10


def test_hidden_channels_stay_as_narrow_as_they_are(tmp_path):
    model = tiny_model("llama")
    folder, narrow = pruned(tmp_path / "model", model, plan_for(model, UNIT_KINDS, differ=True))
    export(folder, tmp_path / "padded", "padded")
    wide = stock(tmp_path / "padded")
    assert wide.config.hidden_size == narrow.config.hidden_size < model.config.hidden_size
    assert difference(logits(wide), logits(narrow)) < 1e-10


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_padded_refuses_a_bias_that_no_stock_class_has(family, tmp_path):
    model = tiny_model(family)
    plan = plan_for(model, ("mlp_channels",), differ=True)
    folder, _ = pruned(tmp_path / "model", model, plan, means=means_of(model))
    with pytest.raises(InputError, match=r"no stock class computes .* use --format per_layer"):
        export(folder, tmp_path / "padded", "padded")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_padded_refuses_gpt2_heads_that_do_not_fit_its_hidden_size(tmp_path):
    model = tiny_model("gpt2")
    plan = plan_of(model, hidden_channels=tuple(range(30)))
    folder, _ = pruned(tmp_path / "model", model, plan)
    with pytest.raises(InputError, match="derives head_dim as hidden_size / heads"):
        export(folder, tmp_path / "padded", "padded")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_uniform_and_per_layer_turn_into_each_other(family, tmp_path):
    model = tiny_model(family)
    plan = plan_for(model, ("mlp_channels", "layers"))
    folder, cut_model = pruned(tmp_path / "model", model, plan, form="uniform")
    export(folder, tmp_path / "per_layer", "per_layer")
    assert type(load_pruned(tmp_path / "per_layer")).__name__.startswith("Pruned")
    export(tmp_path / "per_layer", tmp_path / "uniform", "uniform")
    for name in ("per_layer", "uniform"):
        assert difference(logits(load_pruned(tmp_path / name)), logits(cut_model)) < 1e-10
    assert difference(logits(stock(tmp_path / "uniform")), logits(cut_model)) < 1e-10


def test_a_per_layer_folder_loads_without_llmprune_and_a_run_folder_is_taken(tmp_path):
    model = tiny_model("llama")
    plan = plan_for(model, WIDTHS, differ=True)
    pruned(tmp_path / "run" / "model", model, plan)
    export(tmp_path / "run", tmp_path / "again", "per_layer")
    assert (tmp_path / "again" / "modeling_pruned.py").is_file()
    assert not list(tmp_path.glob(".*"))


def test_uniform_refuses_layers_that_differ_and_names_other_forms(tmp_path):
    model = tiny_model("llama")
    folder, _ = pruned(tmp_path / "model", model, plan_for(model, WIDTHS, differ=True))
    with pytest.raises(InputError, match="layers differ in width; use --format padded, per_layer"):
        export(folder, tmp_path / "out", "uniform")


@pytest.mark.parametrize(
    ("family", "first_lost"),
    [("llama", False), ("llama", True), ("mistral", False), ("qwen2", True), ("phi3", False)],
)
def test_deci_weights_compute_the_same_in_the_decilm_layout(family, first_lost, tmp_path):
    model = tiny_model(family, layers=4, tied=family == "mistral")
    plan = plan_of(
        model,
        attention_sublayers=(1, 3) if first_lost else (0, 3),
        mlp_sublayers=(0, 2, 3) if first_lost else (1, 2, 3),
        **{"layers.3.mlp_channels": tuple(range(7))},
    )
    folder, narrow = pruned(tmp_path / "model", model, plan)
    result = export(folder, tmp_path / "deci", "deci")
    reference = DeciLM(tmp_path / "deci")
    with torch.no_grad():
        found = reference.logits(tiny.tokens())
    assert difference(found, logits(narrow)) < 1e-10
    assert reference.config["architectures"] == ["DeciLMForCausalLM"]
    assert reference.config["model_type"] == "nemotron-nas"
    assert result.architecture == "DeciLMForCausalLM"
    assert result.parameters == sum(value.numel() for value in reference.weights.values())


def test_deci_widths_are_those_that_its_readers_compute(tmp_path):
    """A width that is a multiple of 256 costs nothing, whatever the hidden size."""
    from llmprune.deci import block_config
    from llmprune.units import LayerWidths
    from tests.llmprune.deci_reference import mlp_width

    for hidden in (32, 576, 960, 2048, 4096, 5120):
        for width in range(256, 20_480, 256):
            block = block_config(LayerWidths(4, 2, width), hidden)
            assert mlp_width(block["ffn"]["ffn_mult"], hidden) == width


def test_deci_blocks_are_read_as_attributes(tmp_path):
    model = tiny_model("qwen2")
    plan = plan_of(model, mlp_sublayers=(0, 2))
    folder, _ = pruned(tmp_path / "model", model, plan)
    export(folder, tmp_path / "deci", "deci")
    config = AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    assert [block.ffn.no_op for block in config.block_configs] == [False, True, False]
    assert config.block_configs[0].attention.n_heads_in_group == 2
    assert config.qkv_bias
    assert not config.attention_bias
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    assert config.rope_parameters == model.config.rope_parameters
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"][1]["ffn"]["no_op"] is True


def test_deci_refuses_what_it_cannot_express(tmp_path):
    def refused(model, plan, why, **options):
        folder, _ = pruned(tmp_path / "model", model, plan, **options)
        with pytest.raises(InputError, match=why):
            export(folder, tmp_path / "deci", "deci")
        assert [file.name for file in tmp_path.iterdir()] == ["model"]

    model = tiny_model("llama")
    groups = {"layers.1.kv_groups": (0,)}
    refused(model, plan_of(model, **groups), "same number of query heads, they have 2, 4")
    hidden = plan_of(model, hidden_channels=tuple(range(28)))
    refused(model, hidden, r"query heads times head_dim \(4 x 8\), it is 28")
    channels = plan_for(model, ("mlp_channels",))
    refused(model, channels, "biases are read on q, k and v only", means=means_of(model))
    for family in ("qwen3", "gpt2"):
        model = tiny_model(family)
        refused(model, plan_for(model, ("mlp_channels",)), f"{family} is no Llama")
    model = tiny_model("mistral")
    model.config.sliding_window = 5
    refused(model, plan_for(model, ("mlp_channels",)), "sliding window of 5 tokens")


# --- GGUF


@pytest.fixture
def byte_vocabulary(monkeypatch):
    monkeypatch.setattr(tiny, "VOCAB", GGUF_VOCAB)


def byte_tokenizer(rules="smollm", **options):
    """Byte-level BPE of 256 bytes, four merges, two special tokens and one added one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    words = ["<unk>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, **options)
    tokenizer = Tokenizer(model)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules in ("gpt-2", "smollm"))
    first = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(_regex(LLAMA3_SPLIT), "isolated")],
    }
    parts = [*first.get(rules, []), last]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else last
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _regex(pattern):
    from tokenizers import Regex

    return Regex(pattern)


def gguf_of(tmp_path, model, plan, *, form="per_layer", tokenizer=None, dtype=None, **options):
    """The exported file's path and the cut model."""
    folder, narrow = pruned(tmp_path / "model", model, plan, form=form, **options)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    out = tmp_path / "model.gguf"
    out.unlink(missing_ok=True)
    export(folder, out, "gguf", dtype=dtype)
    return out, narrow


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.usefixtures("byte_vocabulary")
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2"])
def test_transformers_reads_a_uniform_gguf_back_with_the_same_logits(family, tmp_path):
    model = tiny_model(family, tied=family == "llama")
    # heads go where transformers' reader takes head_dim from the file
    kinds = ("mlp_channels", "layers") if family == "qwen2" else ("kv_groups", "mlp_channels")
    path, narrow = gguf_of(tmp_path, model, plan_for(model, kinds), form="uniform")
    expected = "qwen2" if family == "qwen2" else "llama"
    assert fields(path)["general.architecture"] == expected
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    assert found.num_parameters() == narrow.num_parameters()
    # the file holds float32, also of eps
    assert difference(logits(found), logits(narrow)) < 1e-4


@pytest.mark.usefixtures("byte_vocabulary")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_stored_in_the_dtype_and_vectors_in_float32(dtype, tmp_path):
    model = tiny_model("llama")
    path, narrow = gguf_of(tmp_path, model, plan_for(model, WIDTHS), form="uniform", dtype=dtype)
    short = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    for tensor in gguf.GGUFReader(path).tensors:
        expected = short if len(tensor.shape) > 1 else "F32"
        assert tensor.tensor_type.name == expected, tensor.name
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    narrow = narrow.to(getattr(torch, dtype))
    assert difference(found.lm_head.weight.float(), narrow.lm_head.weight.float()) == 0


@pytest.mark.usefixtures("byte_vocabulary")
def test_layers_that_differ_are_written_as_arrays(tmp_path):
    model = tiny_model("qwen2", layers=4)
    plan = plan_of(
        model,
        attention_sublayers=(1, 2),
        mlp_sublayers=(0, 1, 3),
        **{"layers.1.kv_groups": (1,), "layers.3.mlp_channels": (0, 4, 5)},
    )
    path, _ = gguf_of(tmp_path, model, plan)
    found = fields(path)
    assert found["general.architecture"] == "deci"
    # the first layer's attention and the third's MLP are zeros that llama.cpp needs
    assert found["deci.attention.head_count"] == [1, 2, 4, 0]
    assert found["deci.attention.head_count_kv"] == [1, 1, 2, 0]
    assert found["deci.feed_forward_length"] == [40, 40, 1, 3]
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert not tensors["blk.0.attn_output.weight"].any()
    assert not tensors["blk.2.ffn_down.weight"].any()
    assert "blk.3.attn_q.weight" not in tensors
    assert tensors["blk.1.attn_q.bias"].any()


@pytest.mark.usefixtures("byte_vocabulary")
def test_gguf_refuses_what_llama_cpp_cannot_run(tmp_path):
    def refused(model, plan, why, **options):
        with pytest.raises(InputError, match=why):
            gguf_of(tmp_path, model, plan, **options)
        assert [file.name for file in tmp_path.iterdir()] == ["model"]

    for family in ("qwen3", "gpt2"):
        model = tiny_model(family)
        plan = plan_for(model, ("mlp_channels",), differ=True)
        refused(model, plan, "has the same widths in all layers; use --format padded first")
        plan = plan_for(model, ("mlp_channels",))
        if family == "qwen3":
            refused(model, plan, "has no biases of this kind", means=means_of(model))
    model = tiny_model("llama")
    plan = plan_for(model, WIDTHS)
    model.config.rope_parameters |= {"rope_type": "yarn", "factor": 2.0}
    refused(model, plan, "must be default, linear, llama3, they are yarn")
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    refused(model, plan, "float16 can't hold lm_head.weight", dtype="float16")


@pytest.mark.parametrize("rules", ["gpt-2", "smollm", "llama-bpe"])
def test_the_tokenizer_is_written_with_the_rules_it_splits_by(rules, tmp_path):
    tokenizer = byte_tokenizer(rules, ignore_merges=rules == "llama-bpe")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path, GGUF_VOCAB)
    assert found.pre == rules
    assert len(found.tokens) == len(found.types) == GGUF_VOCAB
    assert found.merges[2] == "Ġ the"
    names = dict(zip(found.tokens, found.types, strict=True))
    assert (names["<s>"], names["<think>"], names["a"], names["[PAD279]"]) == (3, 4, 1, 5)
    assert found.special == {"unk": 0, "bos": 1, "eos": 2}
    assert found.chat_template == "{{ messages }}"
    assert not found.add_bos


def test_a_first_token_that_the_tokenizer_adds_is_added_by_llama_cpp(tmp_path):
    tokenizer = byte_tokenizer("gpt-2")
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path, GGUF_VOCAB)
    assert found.add_bos
    assert not found.add_eos


def test_a_tokenizer_that_llama_cpp_has_no_rules_for_is_refused(tmp_path, saved_folder):
    with pytest.raises(InputError, match="must be byte-level BPE, it is WordLevel"):
        export(saved_folder, tmp_path / "words.gguf", "gguf")
    byte_tokenizer("unknown").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"none of those that llama.cpp has rules for"):
        read_tokenizer(tmp_path, GGUF_VOCAB)
    byte_tokenizer("smollm", ignore_merges=True).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ignore_merges must be False under the rules of smollm"):
        read_tokenizer(tmp_path, GGUF_VOCAB)
    byte_tokenizer("smollm").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it has 264 tokens and the model embeds 100"):
        read_tokenizer(tmp_path, 100)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        read_tokenizer(tmp_path, GGUF_VOCAB)


# --- the command


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    model = tiny_model("llama")
    folder, _ = pruned(tmp_path / "model", model, plan_for(model, ("mlp_channels",)))

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", fail)
    for form in ("per_layer", "deci"):
        with pytest.raises(InputError, match=r"No space left .* choose another OUT"):
            export(folder, tmp_path / "out", form)
        assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_the_tokenizer_goes_along_and_the_cost_of_zeros_is_said(tmp_path):
    model = tiny_model("llama")
    folder, _ = pruned(tmp_path / "model", model, plan_for(model, WIDTHS, differ=True))
    byte_tokenizer().save_pretrained(folder)
    result = CliRunner().invoke(
        app, ["export", str(folder), str(tmp_path / "padded"), "--format", "padded"]
    )
    assert result.exit_code == 0, result.output
    assert "of them zeros that this form needs" in result.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "padded")
    assert tokenizer("the 12").input_ids == byte_tokenizer()("the 12").input_ids
    again = ["export", str(folder), str(tmp_path / "bf16"), "--format", "padded"]
    result = CliRunner().invoke(app, [*again, "--dtype", "bfloat16", "--json"])
    assert json.loads(result.output)["architecture"] == "LlamaForCausalLM"
    assert stock(tmp_path / "bf16").dtype == torch.bfloat16


def test_arguments_that_cannot_be_meant_are_refused(tmp_path):
    with pytest.raises(InputError, match="OUT must be new, it exists"):
        export(tmp_path, tmp_path, "uniform")
    with pytest.raises(InputError, match=r"must end in .gguf"):
        export(tmp_path, tmp_path / "out", "gguf")
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="a run folder or a model folder, it holds no model"):
            export(source, tmp_path / "out", "uniform")
