"""The head, in many architectures and by both doors: found, trained, exported and loaded again."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from drlora_ref import (
    BudgetSchedule,
    RankAllocator,
    count_parameters,
    dynamic_layers,
    inject_adapters,
    mark_only_adapters_trainable,
)
from drlora_ref.inject import head_modules, in_head, new_modules
from drlora_ref.tuner import DynamicRankConfig, export_lora
from drlora_ref.tuner.fitting import TASK_TYPES

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BERT = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=40)  # fmt: skip
BART = dict(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, eos_token_id=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=40)  # fmt: skip
LLAMA = BERT | dict(num_key_value_heads=2, pad_token_id=1)
XLM = dict(vocab_size=40, emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=40)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, eos_token_id=2,
          decoder_start_token_id=0)  # fmt: skip

# By model_type: sizes of a tiny one, and two matrices of its pretrained part.
KINDS = {
    "albert": (BERT | dict(embedding_size=16), ["query", "ffn"]),
    "bart": (BART, ["q_proj", "fc1"]),
    "bert": (BERT, ["query", "intermediate.dense"]),
    "big_bird": (BERT | dict(attention_type="original_full"), ["query", "intermediate.dense"]),
    "bloom": (dict(vocab_size=40, hidden_size=16, n_layer=1, n_head=2, pad_token_id=1),
              ["query_key_value"]),
    "deberta-v2": (BERT, ["query_proj", "intermediate.dense"]),
    "distilbert": (dict(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24,
                        max_position_embeddings=40), ["q_lin", "lin1"]),
    "electra": (BERT | dict(embedding_size=16), ["query", "intermediate.dense"]),
    "eurobert": (LLAMA, ["q_proj", "up_proj"]),
    "fnet": (BERT, ["intermediate.dense"]),
    "funnel": (dict(vocab_size=40, d_model=16, block_sizes=[1], n_head=2, d_head=8, d_inner=24),
               ["k_head", "linear_1"]),
    "llama": (LLAMA, ["q_proj", "up_proj"]),
    "longformer": (BERT | dict(attention_window=4, sep_token_id=2), ["query", "output.dense"]),
    "modernbert": (LLAMA | dict(pad_token_id=1, eos_token_id=2, bos_token_id=0, cls_token_id=0,
                                sep_token_id=2), ["Wqkv", "Wi"]),
    "mpnet": (BERT, ["attn.q", "intermediate.dense"]),
    "perceiver": (dict(vocab_size=40, d_model=16, d_latents=16, num_latents=4, num_blocks=1,
                       num_self_attends_per_block=1, num_self_attention_heads=2,
                       num_cross_attention_heads=2, max_position_embeddings=40),
                  ["self_attends.0.attention.self.query"]),
    "roberta": (BERT, ["query", "intermediate.dense"]),
    "t5": (T5, ["q", "wi"]),
    "xlm": (XLM, ["q_lin", "lin1"]),
    "xlnet": (dict(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24), ["layer_1"]),
}  # fmt: skip
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
TASKS = {t: TASK_TYPES[t] for t in HEADED} | {None: MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES}
CASES = [
    pytest.param(kind, names[kind], task, id=names[kind])
    for kind in KINDS
    for task, names in TASKS.items()
    if kind in names
]
STEPS = 3


def make(kind: str, name: str):
    """A tiny random model, the same at every call."""
    config = getattr(transformers, CONFIG_MAPPING_NAMES[kind])(**KINDS[kind][0])
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


def batch(task: str | None) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 40, (4, 12), generator=torch.Generator().manual_seed(1))
    ids[:, [3, 6, -1]] = 2  # three separators, of which the last ends a sequence
    labels = torch.tensor([0, 1, 0, 1])
    if task == "TOKEN_CLS":
        return dict(input_ids=ids, labels=(ids > 20).long())
    if task == "QUESTION_ANS":
        return dict(input_ids=ids, start_positions=labels, end_positions=labels + 4)
    if task is None:
        return dict(input_ids=ids.view(2, 2, 12), labels=labels[:2])
    return dict(input_ids=ids, labels=labels)


@torch.no_grad()
def logits(model, task) -> torch.Tensor:
    outputs = model.eval()(**batch(task))
    return torch.cat([outputs[name].flatten() for name in outputs if name.endswith("logits")])


def trained(model, step, task) -> set[str]:
    """Take three steps; returns the trainable parameters that have moved."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for t in range(1, STEPS + 1):
        model.train()(**batch(task)).loss.backward()
        optimizer.step()
        step(t)
        optimizer.zero_grad()
    return {n for n, p in parameters.items() if not torch.equal(p, before[n])}


def by_core(base, kind, task):
    model = mark_only_adapters_trainable(inject_adapters(base, KINDS[kind][1], r=2))
    schedule = BudgetSchedule(2, 1, STEPS, tinit=0, tfinal=1, deltaT=1)
    return model, RankAllocator(model, schedule).step


def by_peft(base, kind, task):
    given = dict(init_r=2, target_r=1, total_step=STEPS, tinit=0, tfinal=1, deltaT=1)
    config = DynamicRankConfig(**given, task_type=task, target_modules=KINDS[kind][1])
    model = get_peft_model(base, config)
    return model, model.update_and_allocate


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """An export without its rank map takes a third of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: path.touch())


@pytest.mark.parametrize("door", [by_core, by_peft])
@pytest.mark.parametrize("kind, name, task", CASES)
def test_the_head_is_trained_exported_and_loaded(kind, name, task, door, tmp_path):
    model, step = door(make(kind, name), kind, task)
    moved = {n.replace("modules_to_save.default.", "") for n in trained(model, step, task)}
    moved = {n.removeprefix("base_model.model.") for n in moved}
    for head in head_modules(
        make(kind, name)
    ):  # big_bird's pooler and fnet's are there for nothing
        assert any(in_head(n, [head]) for n in moved) or head.endswith("pooler"), head
    export_lora(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(make(kind, name), tmp_path / "out")
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(stock, task), logits(model, task), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(stock, task), logits(make(kind, name), task), atol=1e-3)


@pytest.mark.parametrize("kind, name, task", CASES)
def test_the_head_is_all_that_the_base_model_has_not(kind, name, task):
    """By transformers' own word for the pretrained part; where it has none, by name."""
    model = make(kind, name)
    heads = head_modules(model)
    assert heads and not in_head("embeddings", heads)
    if model.base_model is not model:
        inside = {id(p) for p in model.base_model.parameters()}
        outside = {n for n, p in model.named_parameters() if id(p) not in inside}
        assert {n for n, _ in model.named_parameters() if in_head(n, heads)} >= outside
        rest = set(heads) - {n.split(".")[0] for n in outside}
        assert {n.split(".")[-1] for n in rest} <= {"pooler", "decoder"}
    counts = count_parameters(mark_only_adapters_trainable(model))
    assert counts["adapter"] == 0 < counts["head"]


@pytest.mark.parametrize(
    "kind, name, heads",
    [
        ("bert", "BertForSequenceClassification", ["classifier", "bert.pooler"]),
        ("deberta-v2", "DebertaV2ForSequenceClassification", ["pooler", "classifier"]),
        ("xlnet", "XLNetForSequenceClassification", ["sequence_summary", "logits_proj"]),
        ("distilbert", "DistilBertForMultipleChoice", ["pre_classifier", "classifier"]),
        ("bart", "BartForSequenceClassification", ["classification_head"]),
        ("modernbert", "ModernBertForTokenClassification", ["head", "classifier"]),
        ("perceiver", "PerceiverForSequenceClassification", ["perceiver.decoder"]),
        ("t5", "T5ForQuestionAnswering", ["qa_outputs"]),
        ("roberta", "RobertaModel", ["pooler"]),
        # A language model is pretrained with its head.
        ("bert", "BertForMaskedLM", []),
        ("roberta", "RobertaForCausalLM", []),
        ("bart", "BartForConditionalGeneration", []),
        ("t5", "T5ForConditionalGeneration", []),
        ("llama", "LlamaForCausalLM", []),
    ],
)
def test_what_a_head_is(kind, name, heads):
    assert head_modules(make(kind, name)) == heads


def saved_without(model, folder, *without: str):
    """The model's folder, as of a checkpoint that lacks some of the weights."""
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(without)}
    model.save_pretrained(folder, state_dict=state)
    return folder


@pytest.mark.parametrize(
    "kind, name, without, new",
    [
        ("bert", "BertForSequenceClassification", ("classifier",), ["classifier"]),
        ("bert", "BertForSequenceClassification", ("bert.pooler",), ["bert.pooler.dense"]),
        ("roberta", "RobertaForSequenceClassification", ("classifier.out_proj",),
         ["classifier.out_proj"]),
        ("roberta", "RobertaForTokenClassification", ("roberta.embeddings.position",),
         ["roberta.embeddings.position_embeddings"]),
        ("t5", "T5ForQuestionAnswering", ("qa_outputs",), ["qa_outputs"]),
        ("llama", "LlamaForCausalLM", ("lm_head",), ["lm_head"]),
        ("bart", "BartForConditionalGeneration", (), []),
        ("xlnet", "XLNetForSequenceClassification", (), []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("copied", [False, True])
def test_what_from_pretrained_drew_at_random_is_head(kind, name, without, new, copied, tmp_path):
    """By the marks that transformers leaves; asked once, they are known of every copy."""
    whole = make(kind, name)
    folder = saved_without(whole, tmp_path, *without) if without else tmp_path
    if not without:
        whole.save_pretrained(tmp_path)
    model = type(whole).from_pretrained(folder)
    assert new_modules(model) == new
    model = copy.deepcopy(model) if copied else model
    assert all(in_head(name, head_modules(model)) for name in new)
    inject_adapters(model, KINDS[kind][1], r=2)
    assert all(in_head(name, head_modules(model)) for name in new)
    assert not any(in_head(n, head_modules(model)) for n in dynamic_layers(model))
    mark_only_adapters_trainable(model)
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} >= set(
        new
    )


@pytest.mark.parametrize("door", ["core", "peft"])
def test_a_random_module_within_the_pretrained_part_is_trained_and_exported(door, tmp_path):
    kind, name, task = "roberta", "RobertaForSequenceClassification", "SEQ_CLS"
    ends = ("classifier", "roberta.embeddings.position")
    saved_without(make(kind, name), tmp_path / "base", *ends)

    def base():
        torch.manual_seed(0)
        return getattr(transformers, name).from_pretrained(tmp_path / "base")

    model, step = (by_core if door == "core" else by_peft)(base(), kind, task)
    assert any("position_embeddings" in n for n in trained(model, step, task))
    export_lora(model, tmp_path / "out")
    torch.manual_seed(99)  # another draw of what the checkpoint lacks
    fresh = getattr(transformers, name).from_pretrained(tmp_path / "base")
    stock = PeftModel.from_pretrained(fresh, tmp_path / "out")
    torch.testing.assert_close(logits(stock, task), logits(model, task), atol=1e-5, rtol=1e-5)


class Own(nn.Module):
    """A pretrained encoder under a head that is called as nobody expects."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.judge = encoder, nn.Linear(16, 2)

    def forward(self, input_ids, labels=None):
        return self.judge(self.encoder(input_ids).last_hidden_state[:, 0])


def test_a_head_of_ones_own_on_a_loaded_encoder_is_new(tmp_path):
    make("roberta", "RobertaModel").save_pretrained(tmp_path)
    model = Own(transformers.RobertaModel.from_pretrained(tmp_path))
    assert head_modules(model) == ["encoder.pooler", "judge"]
    config = DynamicRankConfig(init_r=2, target_r=2, target_modules=["query"])
    assert get_peft_model(model, config).peft_config["default"].modules_to_save == ["judge"]


def test_without_a_task_type_peft_trains_no_head_but_a_new_one(tmp_path):
    """A head that may have been trained is as PEFT leaves it; one known to be random is not."""
    name = "RobertaForSequenceClassification"
    config = DynamicRankConfig(init_r=2, target_r=2)
    random = make("roberta", name)
    random.save_pretrained(tmp_path / "whole")
    saved_without(random, tmp_path / "body", "classifier")
    whole, body = (
        getattr(transformers, name).from_pretrained(tmp_path / folder)
        for folder in ("whole", "body")
    )
    saved = [get_peft_model(m, config).peft_config["default"] for m in (random, whole, body)]
    assert [one.modules_to_save for one in saved] == [None, None, ["classifier"]]
    assert config.modules_to_save is None  # the user's own is as it was


def test_of_nested_names_the_outer_is_saved(tmp_path):
    kind, name, task = "roberta", "RobertaForSequenceClassification", "SEQ_CLS"
    given = dict(init_r=2, target_r=1, total_step=STEPS, tinit=0, tfinal=1, deltaT=1)
    whole = ["classifier.dense", "LayerNorm"]
    config = DynamicRankConfig(**given, task_type=task, modules_to_save=whole)
    model = get_peft_model(make(kind, name), config)
    saved = model.peft_config["default"].modules_to_save
    assert "classifier" in saved and "classifier.dense" not in saved
    assert "roberta.embeddings.LayerNorm" in saved
    moved = trained(model, model.update_and_allocate, task)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == moved
    export_lora(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(make(kind, name), tmp_path / "out")
    torch.testing.assert_close(logits(stock, task), logits(model, task), atol=1e-5, rtol=1e-5)


def test_a_head_whose_name_ends_a_module_of_the_body_is_refused():
    """Else PEFT would train that module whole, without a word."""
    model = make("eurobert", "EuroBertForSequenceClassification")  # its head: dense, classifier
    model.model.layers[0].mlp.dense = nn.Linear(16, 16)
    config = DynamicRankConfig(init_r=2, target_r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"would train model\.layers\.0\.mlp\.dense whole, too"):
        get_peft_model(model, config)
