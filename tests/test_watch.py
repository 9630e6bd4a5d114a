"""The mean square of aᵀx that the score output_norm needs: over which rows, in which passes."""

import copy
import functools
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from conftest import layers_of_two_shapes
from torch import nn
from torch.utils.checkpoint import checkpoint

from drlora_ref import (
    BudgetSchedule,
    DynamicLoRALinear,
    RankAllocator,
    ZWatch,
    dynamic_layers,
    inject_adapters,
    merge_adapters,
    output_norms,
)
from drlora_ref.experiments.tasks.data import share

SCHEDULE = BudgetSchedule(init_r=3, target_r=2, total_steps=40, deltaT=5)  # t_end 20


class Encoder(nn.Module):
    """Layers of two shapes over (batch, length, 6), called with or without a mask."""

    def __init__(self, n: int = 3):
        super().__init__()
        self.layers = layers_of_two_shapes(n).double()
        for layer in self.layers:
            layer.lora_dropout.p = 0.0

    def forward(self, x, attention_mask=None):
        return sum(layer(x).square().sum() for layer in self.layers)


def mean_squares(model, x):
    """Literally, over all rows of x."""
    rows = x.reshape(-1, x.shape[-1])
    return [(rows @ m.lora_A.mT).square().mean(dim=0) for m in dynamic_layers(model).values()]


def watched(model) -> ZWatch:
    watch = ZWatch(list(dynamic_layers(model).values()))
    watch.follow(model)
    return watch


def batch(n: int = 4, length: int = 5) -> torch.Tensor:
    return torch.randn(n, length, 6, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(list(found), list(expected))


def test_the_mean_is_over_all_rows_of_the_step():
    model, x = Encoder(), batch()
    watch = watched(model)
    model(x)
    close(watch.mean(), mean_squares(model, x))


def test_micro_batches_count_by_their_rows():
    model, parts = Encoder(), [batch(1), batch(4), batch(2)]
    watch = watched(model)
    for x in parts:
        model(x)
    close(watch.mean(), mean_squares(model, torch.cat(parts)))


def test_each_step_starts_anew():
    model, (first, second) = Encoder(), (batch(), batch())
    watch = watched(model)
    model(first)
    watch.mean()
    model(second)
    close(watch.mean(), mean_squares(model, second))


@pytest.mark.parametrize("by_name", [True, False])
def test_padding_is_no_row(by_name):
    model, x = Encoder(), batch()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    watch = watched(model)
    model(x, attention_mask=mask) if by_name else model(x, mask)
    close(watch.mean(), mean_squares(model, x[mask.bool()]))


def test_a_batch_padded_to_another_width_has_the_same_mean():
    model, x, mask = Encoder(), batch(), torch.ones(4, 5)
    watch, found = watched(model), []
    for width in (0, 3):
        wider = torch.cat([x, batch(4, width)], dim=1)
        model(wider, attention_mask=nn.functional.pad(mask, (0, width)))
        found.append(watch.mean())
    close(*found)


def test_inputs_of_another_shape_than_the_mask_count_all_their_rows():
    model, x = Encoder(), batch()
    watch = watched(model)
    model(x, attention_mask=torch.zeros(4, 1, 5, 5))
    close(watch.mean(), mean_squares(model, x))
    model(x[:, 0], attention_mask=torch.ones(4, 5))
    close(watch.mean(), mean_squares(model, x[:, 0]))


def test_rows_that_follow_one_another_have_the_mask_too():
    model, x, mask = Encoder(), batch(), torch.arange(5).expand(4, -1) < 3
    watch = watched(model)
    model(x.flatten(0, 1), attention_mask=mask)
    close(watch.mean(), mean_squares(model, x[mask]))


@pytest.mark.parametrize(
    "places, mask",
    [
        ((20,), torch.arange(20) < 7),
        ((2, 2, 5), torch.arange(5).expand(2, 2, -1) < 3),
        ((2, 2, 5), (torch.arange(5).expand(2, 2, -1) < 3).float()),
    ],
)
def test_a_mask_of_the_shape_of_the_rows_is_theirs(places, mask):
    model, x = Encoder(), batch().reshape(*places, 6)
    watch = watched(model)
    model(x, attention_mask=mask)
    close(watch.mean(), mean_squares(model, x[mask.bool()]))


def test_a_mask_that_is_added_to_scores_is_none_of_rows():
    model, x, added = Encoder(), batch(), torch.zeros(4, 1, 5)  # 0: keep
    watch = watched(model)
    model(x, attention_mask=added)
    close(watch.mean(), mean_squares(model, x))


def test_the_choices_of_a_question_are_flattened_by_the_model_and_so_is_their_mask():
    from transformers import RobertaConfig, RobertaForMultipleChoice

    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    roberta = RobertaForMultipleChoice(RobertaConfig(vocab_size=50, **sizes))
    model = inject_adapters(roberta, r=2, lora_dropout=0.0).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    watch, found = watched(model), []
    ids, mask = torch.randint(3, 50, (2, 3, 6)), torch.arange(6).expand(2, 3, -1) < 4
    for width in (0, 3):
        wider = nn.functional.pad(ids, (0, width), value=1)  # 1 is RoBERTa's padding
        model(input_ids=wider, attention_mask=nn.functional.pad(mask, (0, width)).long())
        counted = watch.sums or watch._add_up() or watch.sums
        assert counted[1].unique().tolist() == [2 * 3 * 4]
        found.append(watch.mean())
    close(*found)


def test_a_mask_ends_with_the_call_that_brought_it():
    model, x, mask = Encoder(), batch(), torch.arange(5).expand(4, -1) < 2
    watch = watched(model)
    model.eval()(x, attention_mask=mask)  # evaluation through the model, training through a layer
    model.train()
    for layer in model.layers:
        layer(x)
    close(watch.mean(), mean_squares(model, x))


def test_a_pass_that_was_interrupted_leaves_no_mask_behind():
    model, x, mask = Encoder(), batch(), torch.arange(5).expand(4, -1) < 2
    watch = watched(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x, attention_mask=mask)
    handle.remove()
    watch.mean()
    for layer in model.layers:
        layer(x)
    close(watch.mean(), mean_squares(model, x))


def test_a_call_that_failed_leaves_no_mask_behind():
    model, x, mask = Encoder(), batch(), torch.arange(5).expand(4, -1) < 2
    watch = watched(model)
    with pytest.raises(RuntimeError):
        model(x[..., :3], attention_mask=mask)
    for layer in model.layers:
        layer(x)
    close(watch.mean(), mean_squares(model, x))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_mask_given_by_place_is_found_through_a_wrapper(wrap):
    model, x, mask = Encoder(), batch(), torch.arange(5).expand(4, -1) < 2
    wrapped = wrap(model)
    watch = watched(wrapped)
    wrapped(x, mask)
    close(watch.mean(), mean_squares(model, x[mask]))


def test_a_watched_model_compiles_as_one_graph():
    model, parts, mask = Encoder(), [batch(), batch()], torch.arange(5).expand(4, -1) < 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    watch = watched(model)
    for _ in range(2):
        for x in parts:
            compiled(x, attention_mask=mask)
        rows = torch.cat([x[mask] for x in parts])
        close(watch.mean(), mean_squares(model, rows))


@pytest.mark.parametrize("leave", ["merge", "freeze"])
def test_a_layer_that_does_not_train_is_not_watched(leave):
    model, x = Encoder(), batch()
    watch = watched(model)
    if leave == "merge":
        plain = merge_adapters(model)
        assert not watch.on and not plain._forward_pre_hooks and not plain._forward_hooks
    else:
        model.layers[0].lora_c.requires_grad_(False)
        model(x)
        assert not watch.mean()[0].any()


def test_a_layer_that_gets_no_row_counts_none():
    """As an expert to which no token goes."""
    model, x = Encoder(2), batch()
    watch = watched(model)
    model.layers[0](x.flatten(0, 1)[:0])
    model.layers[1](x)
    first, second = watch.mean()
    assert not first.any() and second.all()


def test_under_inference_mode_nothing_is_watched():
    model, x = Encoder(), batch()
    watch = watched(model)
    with torch.inference_mode():
        model(batch())
        model(batch())
    model(x)
    close(watch.mean(), mean_squares(model, x))


def test_a_pass_without_a_mask_does_not_use_the_mask_of_the_one_before():
    model, x = Encoder(), batch()
    watch = watched(model)
    model(x, attention_mask=torch.tensor([[1, 0, 0, 0, 0]] * 4))
    watch.mean()
    model(x)
    close(watch.mean(), mean_squares(model, x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, mask = Encoder(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    watch, parts, found = watched(model), [batch(2), batch(2)], []

    class Twice(nn.Module):
        def forward(self, x, attention_mask):
            return checkpoint(functools.partial(Encoder.forward, model), x,
                              use_reentrant=use_reentrant)  # fmt: skip

    twice = Twice()
    watch.follow(twice)
    for forward in (model, twice):
        for x in parts:
            forward(x.requires_grad_(), attention_mask=mask).backward()
        found.append(watch.mean())
    close(*found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_is_run_again_has_the_mask_that_it_had_the_first_time(use_reentrant):
    """Two forward passes before one backward pass: the first is run again after the second."""
    model, parts = Encoder(), [batch(2).requires_grad_(), batch(2).requires_grad_()]
    masks = torch.tensor([[[1, 1, 0, 0, 0]] * 2, [[1, 1, 1, 1, 1]] * 2])
    watch = watched(model)
    again = model.forward
    model.forward = lambda x, attention_mask: checkpoint(again, x, use_reentrant=use_reentrant)
    sum(model(x, attention_mask=mask) for x, mask in zip(parts, masks, strict=True)).backward()
    close(watch.mean(), mean_squares(model, torch.cat(parts)[masks.flatten(0, 1).bool()]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_padding_is_no_row_whatever_stands_there(value):
    """1e200 is finite, its square is not."""
    model, x, mask = Encoder(), batch(), torch.tensor([[1, 1, 1, 0, 0]] * 4)
    x[:, 3:] = value
    watch = watched(model)
    model(x, attention_mask=mask)
    close(watch.mean(), mean_squares(model, x[mask.bool()]))


class Decoder(nn.Module):
    """A layer that reads the decoder's own rows, and one that reads what the encoder gave."""

    def __init__(self):
        super().__init__()
        self.own, self.cross = layers_of_two_shapes(2).double()

    def forward(self, x, attention_mask=None, encoder_hidden_states=None, **_):
        return self.own(x).square().sum() + self.cross(encoder_hidden_states).square().sum()


class EncoderDecoder(nn.Module):
    """As transformers calls one: each part has its own mask."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.encoder, self.decoder = Encoder(1), Decoder()
        for layer in dynamic_layers(self).values():
            layer.lora_dropout.p = 0.0

    def get_decoder(self):
        return self.decoder

    def forward(self, x, y, attention_mask=None, decoder_attention_mask=None):
        loss = self.encoder(x, attention_mask)
        given = dict(encoder_hidden_states=x, encoder_attention_mask=attention_mask)
        return loss + self.decoder(y, attention_mask=decoder_attention_mask, **given)


@pytest.mark.parametrize("of_its_own", [True, False])
@pytest.mark.parametrize("length", [5, 4])
def test_the_rows_of_a_decoder_have_a_mask_of_their_own(length, of_its_own):
    """Also where they are as many as the encoder's, and what it reads of those has their mask."""
    model, x, y = EncoderDecoder(), batch(), batch(4, length)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    theirs = torch.ones(4, length) if not of_its_own else torch.arange(length).expand(4, -1) < 2
    watch = watched(model)
    for _ in range(2):
        model(x, y, mask, theirs if of_its_own else None).backward()
    seen = [x[mask.bool()], y[theirs.bool()], x[mask.bool()]]
    expected = [
        (rows @ m.lora_A.mT).square().mean(dim=0)
        for rows, m in zip(seen, dynamic_layers(model).values(), strict=True)
    ]
    close(watch.mean(), expected)
    copy.deepcopy(model)
    watch.stop()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_summarizer_sees_the_same_however_widely_its_sources_are_padded():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, dropout=0.0)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=16)
    bart = BartForConditionalGeneration(BartConfig(vocab_size=50, **sizes, **heads))
    model = inject_adapters(bart, r=2, lora_dropout=0.0).train()
    watch, found = watched(model), []
    source, target = torch.randint(3, 50, (2, 6)), torch.randint(3, 50, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    for width in (0, 1):
        wider, ones = (nn.functional.pad(t, (0, width)) for t in (source, mask))
        model(input_ids=wider, attention_mask=ones, decoder_input_ids=target)
        found.append(watch.mean())
    close(*found)


def test_evaluation_is_not_watched():
    model, x = Encoder(), batch()
    watch = watched(model)
    model(x)
    model.eval()(batch())
    close(watch.mean(), mean_squares(model, x))


def test_a_layer_that_is_run_twice_in_one_pass_counts_both():
    model, x, other = Encoder(1), batch(), batch()
    watch = watched(model)
    model.layers[0](x)
    model.layers[0](other)
    close(watch.mean(), mean_squares(model, torch.cat([x, other])))


def test_a_layer_that_was_not_run_has_zero_and_none_at_all_is_an_error():
    model = Encoder(2)
    watch = watched(model)
    with pytest.raises(ValueError, match="no layer was seen: make the allocator before"):
        watch.mean()
    model.layers[1](batch())
    first, second = watch.mean()
    assert not first.any() and second.all()


def test_under_autocast_in_bfloat16_the_sums_are_float32():
    model, x = Encoder().float(), batch().float()
    watch = watched(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    found = watch.mean()
    assert all(own.dtype == torch.float32 for own in found)
    torch.testing.assert_close(list(found), mean_squares(model, x), rtol=3e-2, atol=1e-3)


def test_a_watched_model_saves_what_it_always_saved_and_can_be_copied():
    model, x = Encoder(), batch()
    names = model.state_dict().keys()
    watch = watched(model)
    model(x)
    assert model.state_dict().keys() == names
    twin = copy.deepcopy(model)
    twin(batch())  # is watched by a copy of the watch
    close(watch.mean(), mean_squares(model, x))


def test_when_it_stops_nothing_is_left_and_a_later_watch_is_left_alone():
    model = Encoder()
    first, second = watched(model), watched(model)
    first.stop()
    model(batch())
    assert second.mean() and not first.seen
    second.stop()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert all(layer.watch is None for layer in model.layers)


def test_the_allocator_scores_what_the_layers_saw_and_stops_once_pruning_has_ended():
    model, x = Encoder(), batch()
    allocator = RankAllocator(model, SCHEDULE, score="output_norm")
    model(x)
    layers = list(model.layers)
    expected = [
        output_norms(m.lora_A, m.lora_B, m.lora_c, z_square=z)
        for m, z in zip(layers, mean_squares(model, x), strict=True)
    ]
    torch.testing.assert_close(allocator.scores(), torch.cat(expected))
    for step in range(1, SCHEDULE.t_end + 1):
        assert all(layer.watch for layer in layers)
        model(x)
        allocator.step(step)
    assert not any(layer.watch for layer in layers) and not model._forward_pre_hooks


def test_a_state_from_before_the_end_of_pruning_is_watched_again():
    model, x = Encoder(), batch()
    allocator = RankAllocator(model, SCHEDULE, score="output_norm")
    early = None
    for step in range(1, 25):
        model(x)
        allocator.step(step)
        early = early or copy.deepcopy(allocator.state_dict())
    allocator.load_state_dict(early)
    model(x)
    allocator.step(2)


@pytest.mark.parametrize("score", ["frobenius_share", "abs_c", "random", "loss_sensitivity"])
def test_scores_that_do_not_need_it_watch_nothing(score):
    model = Encoder()
    RankAllocator(model, SCHEDULE, score=score)
    assert not any(layer.watch for layer in model.layers) and not model._forward_pre_hooks


def test_a_function_may_ask_for_both_by_name():
    model, x, seen = Encoder(), batch(), []

    def mine(lora_A, lora_B, lora_c, *, c_grad, z_square):
        seen.append((c_grad.shape, z_square.shape))
        return c_grad.abs() * z_square

    allocator = RankAllocator(model, SCHEDULE, score=mine)
    model(x).backward()
    expected = [
        m.lora_c.grad.abs() * z for m, z in zip(model.layers, mean_squares(model, x), strict=True)
    ]
    torch.testing.assert_close(allocator.scores(), torch.cat(expected))
    assert seen == [((2, 3), (2, 3)), ((1, 3), (1, 3))]  # one call for each shape


def test_where_no_c_has_a_gradient_the_error_says_when_to_call():
    model = Encoder()
    allocator = RankAllocator(model, SCHEDULE, score="loss_sensitivity")
    with pytest.raises(ValueError, match=r"no layer's lora_c has a gradient: .* before optimizer"):
        allocator.step(1)


def own_rows(rank: int) -> torch.Tensor:
    return torch.randn(3 + rank, 4, generator=torch.Generator().manual_seed(rank)).double()


def one_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    layer = DynamicLoRALinear(nn.Linear(4, 4), 2, lora_dropout=0.0).double()
    watch = ZWatch([layer])
    layer(own_rows(rank))
    torch.save(watch.mean()[0], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_mean_over_the_rows_of_both(tmp_path):
    mp.start_processes(one_process, (str(tmp_path),), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, other)
    layer = DynamicLoRALinear(nn.Linear(4, 4), 2).double()
    rows = torch.cat([own_rows(0), own_rows(1)])
    torch.testing.assert_close(one, (rows @ layer.lora_A.mT).square().mean(dim=0))


def micro_batches() -> list[torch.Tensor]:
    """The last has fewer rows than there are processes."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=draw).double() for n in (4, 1, 2)]


def one_that_fills_up(rank: int, folder: str, processes: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    layer = DynamicLoRALinear(nn.Linear(4, 4), 2, lora_dropout=0.0).double()
    watch, unseen = ZWatch([layer]), 0
    for rows in micro_batches():
        mine, weight = share({"x": rows}, rank, processes)
        with nullcontext() if weight else watch.leave_out():
            layer(mine["x"])
        unseen += not weight
    torch.save((watch.mean()[0], unseen), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 5])
def test_rows_that_fill_up_a_processs_share_do_not_count(tmp_path, processes):
    """Of five processes the last has no row of its own at all."""
    given = (str(tmp_path), processes)
    mp.start_processes(one_that_fills_up, given, nprocs=processes, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    assert found[-1][1] == {2: 1, 5: 3}[processes]
    torch.manual_seed(0)
    layer = DynamicLoRALinear(nn.Linear(4, 4), 2).double()
    expected = (torch.cat(micro_batches()) @ layer.lora_A.mT).square().mean(dim=0)
    close([mean for mean, _ in found], [expected] * processes)


def test_the_script_that_times_the_scores_runs(monkeypatch):
    import transformers

    def tiny(**sizes):
        sizes |= dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        return whole(intermediate_size=16, **sizes)

    whole = transformers.RobertaConfig
    monkeypatch.setattr(transformers, "RobertaConfig", tiny)
    script = runpy.run_path(str(Path(__file__).parents[1] / "results" / "speed_scores.py"))
    work = script["ready"]()
    assert all(min(times) > 0 for times in script["in_turns"](work, 1).values())
    calls = script["count_calls"](work)
    assert calls["training step"] > calls["output_norm"] > calls["loss_sensitivity"] > 0
