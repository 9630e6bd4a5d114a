"""What transformers' models ask of the GPU in every forward pass, answered before it is asked.

Each question makes the CPU wait until the GPU has caught up, and ends the recording of a graph. The
models here are those of inject.BASE_MODELS; the answers are the same numbers.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bart.modeling_bart import shift_tokens_right

from drlora_ref.inject import BASE_MODELS

# The least number of bfloat16, which float32 has too: what is added to the score of padding.
NEVER = torch.finfo(torch.bfloat16).min


def without_waits(model: nn.Module) -> nn.Module:
    """Let this model's training pass ask for no value, in place; returns it. Evaluation stays.

    - A 2-D mask is asked whether it holds any padding (masking_utils), so the pretrained part is
      given the 4-D mask that is added to the scores; BART's decoder, and Llama's kin, a causal one.
    - BART's classifier asks how many ends of sentences there are; it reads the last one anyway.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    >>> model = without_waits(BertModel(BertConfig(**sizes, intermediate_size=8)).to("meta"))
    >>> ids = torch.ones(2, 5, dtype=torch.long, device="meta")  # where nothing has a value
    >>> model(input_ids=ids, attention_mask=ids).last_hidden_state.shape
    torch.Size([2, 5, 8])
    """
    inside = plain(model)
    body = cast(nn.Module, inside.base_model)
    body.register_forward_pre_hook(_additive_masks, with_kwargs=True)
    if isinstance(inside, BartForSequenceClassification):
        whole = inside.forward

        def forward(**batch: Any) -> Any:
            return _classified(inside, **batch) if inside.training else whole(**batch)

        vars(inside)["forward"] = forward
    return model


def plain(model: nn.Module) -> Any:
    """The model of transformers inside PEFT's wrapper."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def additive(mask: Tensor) -> Tensor:
    """(batch, length) of 0 and 1 -> (batch, 1, 1, length): 0 where a token is, NEVER where none is.

    >>> additive(torch.tensor([[1, 0]])) == torch.tensor([[[[0, NEVER]]]])
    tensor([[[[True, True]]]])
    """
    return (1.0 - mask[:, None, None, :].float()) * NEVER


def causal(ids: Tensor) -> Tensor:
    """(batch, length) -> (length, length): NEVER for each token after the one that reads, else 0.

    >>> causal(torch.tensor([[7, 8]])) == torch.tensor([[0, NEVER], [0, 0]])
    tensor([[True, True],
            [True, True]])
    """
    n = ids.shape[1]
    return torch.ones(n, n, device=ids.device).triu(1) * NEVER


def _additive_masks(body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    mask = kwargs.get("attention_mask")
    if not body.training or mask is None or mask.dim() != 2:
        return args, kwargs
    kwargs = kwargs | {"attention_mask": additive(mask)}
    config = cast(Any, body).config
    kind = BASE_MODELS.get(config.model_type)
    if kind and kind.causal:
        kwargs["attention_mask"] = torch.minimum(kwargs["attention_mask"], causal(mask))
    if config.is_encoder_decoder and kwargs.get("decoder_attention_mask") is None:
        ids = kwargs.get("decoder_input_ids")
        if ids is None:  # the decoder reads what the encoder reads
            ids = args[0] if args else kwargs["input_ids"]
            starts = config.pad_token_id, config.decoder_start_token_id
            kwargs["decoder_input_ids"] = ids = shift_tokens_right(ids, *starts)
        kwargs["decoder_attention_mask"] = causal(ids).expand(len(ids), 1, -1, -1)
    return args, kwargs


def _classified(
    model: Any, input_ids: Tensor, labels: Tensor | None = None, **batch: Any
) -> SequenceClassifierOutput:
    """BART's classification: the state of the last end of a sentence, through the head."""
    states = model.model(input_ids, **batch)[0]
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (input_ids.eq(model.config.eos_token_id) * places).argmax(dim=1)
    logits = model.classification_head(states[torch.arange(len(last), device=last.device), last])
    loss = None
    if labels is not None and model.config.problem_type == "regression":
        loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    elif labels is not None:
        loss = F.cross_entropy(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)


class OwnSpans:
    """Lets a question-answering head see no position beyond its own run's longest row.

    Its loss is a softmax over all positions, padding included. Rows that are padded further than
    their own batch would be, to a length of graphs or to the longest row of other replicas, have
    more of it. Here the positions that no row of the same replica fills are left out: the loss is
    that of the run alone, whose batch is as wide as its longest row. In training only.
    """

    def __init__(self, model: nn.Module, replicas: int = 1):
        self.replicas, self.mask = replicas, None
        model.register_forward_pre_hook(self._read_mask, with_kwargs=True)
        head = plain(model).qa_outputs  # PEFT's wrapper of it, where there is one
        head.register_forward_hook(self._hide)

    def _read_mask(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.mask = kwargs.get("attention_mask")

    def _hide(self, head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        if self.mask is None or not head.training:
            return logits
        filled = self.mask.reshape(self.replicas, -1, self.mask.shape[-1]).amax(dim=1)
        rows = logits.reshape(self.replicas, -1, *logits.shape[1:])
        hidden = rows.masked_fill(filled[:, None, :, None] == 0, torch.finfo(logits.dtype).min)
        return hidden.reshape(logits.shape)
