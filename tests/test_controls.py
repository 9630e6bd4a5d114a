"""The controls: LoRA with a given rank map, the map permuted, and LoRA that is cut once."""

import copy
import json
import random

import pytest
import torch
from test_methods import SCHEDULE, adam, fresh, train_steps
from tiny_runs import still_model, tiny, without_costs
from torch import nn

from drlora_ref import BudgetSchedule
from drlora_ref.experiments.methods import count_trainable, prepare, rank_pattern
from drlora_ref.experiments.methods.prune_once import balanced_svd
from drlora_ref.experiments.methods.rank_maps import permuted
from drlora_ref.experiments.replicas.many_runs import run_replicas, set_up_replicas
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.rank_maps import shared_donors
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.inject import default_target_modules, find_targets

MODEL = fresh()
MATRICES = find_targets(MODEL, default_target_modules(MODEL))
NAMES = list(MATRICES)
# Ranks 0, 1, 2, 3, 4, 2 in each layer: 24 in all, two for each of the twelve matrices.
MAP = dict(zip(NAMES, [0, 1, 2, 3, 4, 2] * 2, strict=True))


def lora_layers(prepared) -> dict[str, nn.Module]:
    named = prepared.model.base_model.model.named_modules()
    return {name: module for name, module in named if hasattr(module, "lora_A")}


# --- a rank map for LoRA -----------------------------------------------------------------------


def test_each_matrix_has_the_rank_of_the_map_and_the_scaling_of_uniform_lora():
    prepared = prepare("lora", fresh(), SCHEDULE, lora_alpha=8, rank_map=MAP)
    layers = lora_layers(prepared)
    assert {name: m.lora_A["default"].weight.shape[0] for name, m in layers.items()} == {
        name: rank for name, rank in MAP.items() if rank
    }
    assert {m.scaling["default"] for m in layers.values()} == {8 / 2}
    assert list(rank_pattern(prepared).items()) == list(MAP.items())  # with its zeros, in order
    sizes = {name: sum(m.weight.shape) for name, m in MATRICES.items()}
    counted = sum(rank * sizes[name] for name, rank in MAP.items())
    assert count_trainable(prepared)["adapter"] == counted


def test_a_map_of_equal_ranks_is_uniform_lora_bit_for_bit():
    uniform, trained = dict.fromkeys(NAMES, 2), []
    for given in ({}, {"rank_map": uniform}):
        prepared = prepare("lora", fresh(), SCHEDULE, **given)
        train_steps(prepared, adam(prepared), range(1, 6))
        trained.append([p.detach() for p in prepared.model.parameters() if p.requires_grad])
    one, other = trained
    assert all(map(torch.equal, one, other)) and len(one) == len(other)


def test_a_permuted_map_deals_the_same_ranks_within_each_shape():
    shapes = {name: tuple(m.weight.shape) for name, m in MATRICES.items()}
    maps = {seed: permuted(MAP, MATRICES, seed) for seed in range(1, 6)}
    for dealt in maps.values():
        for shape in set(shapes.values()):
            mine = [name for name in NAMES if shapes[name] == shape]
            assert sorted(dealt[n] for n in mine) == sorted(MAP[n] for n in mine)
    assert len({tuple(dealt.values()) for dealt in maps.values()}) > 1
    assert permuted(MAP, MATRICES, 2) == maps[2] and list(maps[2]) == NAMES
    counts = [
        count_trainable(prepare("lora", fresh(), SCHEDULE, rank_map=MAP, permute_map=seed))
        for seed in (0, 1, 2)
    ]
    assert counts[0] == counts[1] == counts[2]


# Of these, a single deal often changes nothing: the control would be the map itself.
SKEWED = {
    "two matrices": ({"a": 1, "b": 2}, {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}),
    "one exchange": (dict.fromkeys(NAMES, 2) | {NAMES[0]: 3, NAMES[1]: 1}, MATRICES),
    "one shape of three": (dict.fromkeys(NAMES, 2) | {NAMES[5]: 3, NAMES[11]: 1}, MATRICES),
}


@pytest.mark.parametrize("ranks, matrices", SKEWED.values(), ids=SKEWED)
def test_a_permuted_map_is_never_the_map_itself_and_else_the_first_deal(ranks, matrices):
    by_shape: dict[tuple, list[str]] = {}
    for name, matrix in matrices.items():
        by_shape.setdefault(tuple(matrix.weight.shape), []).append(name)
    unchanged = 0
    for seed in range(1, 201):
        first, rng = {}, random.Random(seed)
        for names in by_shape.values():
            own = [ranks[name] for name in names]
            rng.shuffle(own)
            first |= zip(names, own, strict=True)
        dealt = permuted(ranks, matrices, seed)
        assert dealt != ranks and (first == ranks or dealt == first)
        unchanged += first == ranks
    assert unchanged  # so the test met what it is about


@pytest.mark.parametrize(
    "change, message",
    [
        ({"roberta.encoder.layer.9.output.dense": 2}, "no matrix '.*layer.9.*nearest: .*output"),
        ({NAMES[1]: 33, NAMES[4]: 0}, "query|key.*: 33 must be a whole number from 0 to 32"),
        ({NAMES[1]: -1}, r"-1 must be a whole number from 0 to 32"),
        ({NAMES[1]: 1.0}, r"1.0 must be a whole number"),
        ({NAMES[1]: True}, r"True must be a whole number"),
        ({NAMES[1]: 2}, "25 components in all, but the budget is target_r = 2 times 12 .* = 24"),
    ],
)  # fmt: skip
def test_a_map_that_does_not_fit_is_refused_by_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        prepare("lora", fresh(), SCHEDULE, rank_map=MAP | change)


def test_a_map_that_leaves_a_matrix_out_is_refused():
    with pytest.raises(ValueError, match=f"no rank for {NAMES[3]}; 0 means no adapter"):
        prepare("lora", fresh(), SCHEDULE, rank_map={n: MAP[n] for n in NAMES if n != NAMES[3]})


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 1, 3, 3), (0, 0, 4, 4)])
def test_a_map_of_equal_ranks_within_each_shape_cannot_be_permuted(ranks):
    shapes = {"a": (3, 4), "b": (3, 4), "c": (4, 3), "d": (4, 3)}
    matrices = {name: nn.Linear(*shape) for name, shape in shapes.items()}
    message = "permute_map: no two matrices of one shape have different ranks"
    with pytest.raises(ValueError, match=message):
        permuted(dict(zip(matrices, ranks, strict=True)), matrices, seed=1)
    with pytest.raises(ValueError, match=message):  # of each shape there is one
        permuted({"a": 1, "c": 3}, {"a": matrices["a"], "c": matrices["c"]}, seed=1)


def test_a_run_and_a_replica_whose_map_cannot_be_permuted_are_refused(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps(dict.fromkeys(NAMES, 2)))
    given = lora_run(tmp_path / "run", rank_map=str(tmp_path / "map.json"), permute_map=1)
    for start in (one_run.set_up, lambda one: set_up_replicas([one])):
        with pytest.raises(ValueError, match="permute_map: no two matrices of one shape"):
            start(given)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(method="drlora", rank_map="map.yaml"), "only lora takes one, not drlora"),
        (dict(method="lora", permute_map=2), "permute_map = 2: there is no rank_map"),
        (dict(method="lora", rank_map="m", permute_map=-1), "permute_map = -1: must be 0 or more"),
    ],
)
def test_settings_refuse_what_could_not_be_meant(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


# --- where a map comes from --------------------------------------------------------------------


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    """Two short dynamic runs, of seeds 1 and 5: their folder and their records."""
    folder = tmp_path_factory.mktemp("donors")
    given = dict(max_steps=10, init_r=4)
    records = {s: one_run.run(tiny(folder / f"seed{s}", seed=s, **given)) for s in (1, 5)}
    return folder, records


def lora_run(folder, **given) -> Settings:
    return tiny(folder, method="lora", max_steps=4, **given)


@pytest.mark.parametrize("seed, donor", [(0, 1), (1, 5), (4, 5), (5, 1), (7, 1)])
def test_of_a_folder_a_run_gets_the_map_of_the_next_seed_and_never_its_own(
    tmp_path, donors, seed, donor
):
    folder, records = donors
    ready = one_run.set_up(lora_run(tmp_path, seed=seed, rank_map=str(folder)))
    assert rank_pattern(ready.prepared) == records[donor]["rank_pattern"]
    assert ready.rank_map.source == f"run seed{donor}, seed {donor}"


def test_a_record_says_which_map_it_was_given_and_has_no_path(tmp_path, donors):
    folder, records = donors
    given = str(folder / "seed5" / "record.json")
    record = one_run.run(lora_run(tmp_path / "a", rank_map=given, permute_map=2))
    assert record["rank_map"]["source"] == "run seed5, seed 5"
    assert record["parameters"]["rank_map"] == "record.json"
    assert str(folder) not in json.dumps(record)
    assert record["rank_pattern"] == permuted(records[5]["rank_pattern"], MATRICES, 2)


def test_the_key_is_of_the_maps_content_wherever_it_is(tmp_path, donors):
    folder, records = donors
    ranks = records[1]["rank_pattern"]
    (tmp_path / "map.yaml").write_text("".join(f"{n}: {r}\n" for n, r in ranks.items()))
    (tmp_path / "map.json").write_text(json.dumps(dict(reversed(ranks.items()))))
    other = permuted(ranks, MATRICES, 1)
    (tmp_path / "other.json").write_text(json.dumps(other))
    places = [folder / "seed1", tmp_path / "map.yaml", tmp_path / "map.json"]
    keys = [one_run.set_up(lora_run(tmp_path, rank_map=str(place))).key for place in places]
    assert len(set(keys)) == 1
    keys.append(one_run.set_up(lora_run(tmp_path, rank_map=str(tmp_path / "other.json"))).key)
    keys.append(one_run.set_up(lora_run(tmp_path)).key)
    assert len(set(keys)) == 3


def test_folders_and_files_that_hold_no_map_for_this_run_are_refused(tmp_path, donors):
    folder, records = donors

    def refused(rank_map, message, kind=ValueError, **given):
        with pytest.raises(kind, match=message):
            one_run.set_up(lora_run(tmp_path / "run", rank_map=str(rank_map), **given))

    refused(tmp_path / "none", "no such file or folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no record.json in or below .*empty")
    one = tmp_path / "one" / "run"
    one.mkdir(parents=True)
    (one / "record.json").write_text(json.dumps(records[5]))
    refused(tmp_path / "one", "no run of another seed in or below .*one", seed=5)
    twin = tmp_path / "one" / "twin"
    twin.mkdir()
    (twin / "record.json").write_text(json.dumps(records[5]))
    refused(tmp_path / "one", "run.record.json and .*twin.record.json are both of seed 5")
    moved = records[5] | {"model": {"source": "x", "sha256": "0123456789abcdef"}}
    (twin / "record.json").write_text(json.dumps(moved))
    refused(twin, "is of another model .sha256 0123456789ab, here")
    (twin / "record.json").write_text(json.dumps(records[5] | {"rank_pattern": {}}))
    refused(twin, "is of a method without ranks")
    (twin / "record.json").write_text('{"rank_pattern": ')
    refused(twin, "not a whole, strict JSON record")
    refused(folder, "24 components in all, but .* target_r = 1 times 12", target_r=1)
    assert not list((tmp_path / "run").iterdir())


def donor_folder(folder, records: dict[str, dict]):
    """A record for each name; what it does not say is as of a sound run of MAP."""
    model = one_run.resolve_model("tiny-roberta").about()
    for name, own in records.items():
        (folder / name).mkdir(parents=True)
        record = {"status": "completed", "model": model, "rank_pattern": MAP} | own
        (folder / name / "record.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "alien, message",
    [
        ({"model": {"sha256": "0123456789abcdef"}}, "s2.record.json is of another model"),
        ({"rank_pattern": {}}, "s2.record.json is of a method without ranks"),
    ],
)
def test_one_record_that_does_not_belong_in_a_folder_is_refused_for_every_seed(
    tmp_path, alien, message
):
    """Also for the seeds that would get the map of another run."""
    own = {f"s{seed}": {"seed": seed} for seed in range(3)}
    folder = donor_folder(tmp_path / "found", own | {"s2": {"seed": 2} | alien})
    for seed in range(4):
        with pytest.raises(ValueError, match=message):
            source_for(tmp_path, folder, seed)


def test_a_folder_with_a_run_that_has_not_ended_is_refused(tmp_path):
    """With its map the others would get other maps, and other keys."""
    folder = donor_folder(tmp_path / "found", {f"s{seed}": {"seed": seed} for seed in range(2)})
    (folder / "s2").mkdir()
    (folder / "s2" / "checkpoint.pt").write_bytes(b"begun")
    with pytest.raises(ValueError, match=r"rank_map: .*s2 has not ended"):
        source_for(tmp_path, folder, 0)


def test_a_record_that_does_not_name_its_seed_is_no_donor(tmp_path):
    folder = donor_folder(tmp_path / "found", {"a": {}, "b": {"seed": 2}})
    with pytest.raises(ValueError, match=r"a.record\.json: seed = None must be a whole number"):
        source_for(tmp_path, folder, 0)


def source_for(folder, rank_map, seed: int) -> str:
    ready = one_run.set_up(lora_run(folder / "run", seed=seed, rank_map=str(rank_map)))
    return ready.rank_map.source


def test_a_donor_that_diverged_is_passed_over_and_one_that_collapsed_is_not(tmp_path):
    """The first has found no map; of the second it is not for the control to judge."""
    status = {0: "completed", 1: "diverged", 2: "collapsed", 3: "diverged"}
    records = {f"s{seed}": {"seed": seed, "status": word} for seed, word in status.items()}
    folder = donor_folder(tmp_path / "found", records)
    sources = [source_for(tmp_path, folder, seed) for seed in range(4)]
    assert sources == [f"run s{donor}, seed {donor}" for donor in (2, 2, 0, 0)]
    assert source_for(tmp_path, folder / "s2", 9) == "run s2, seed 2"


def test_where_every_donor_diverged_its_status_is_named(tmp_path):
    records = {"a": {"seed": 1, "status": "diverged"}, "b": {"seed": 2, "status": "diverged"}}
    folder = donor_folder(tmp_path / "found", records)
    for place in (folder / "a", folder / "a" / "record.json"):
        with pytest.raises(ValueError, match=r"record\.json has the status 'diverged'.*no map"):
            source_for(tmp_path, place, 5)
    donor_folder(folder, {"own": {"seed": 5}})
    with pytest.raises(ValueError, match="of another seed only runs with the status 'diverged' in"):
        source_for(tmp_path, folder, 5)
    assert source_for(tmp_path, folder, 4) == "run own, seed 5"


@pytest.mark.parametrize("seed", [None, "one", 1.0, True, [1]])
def test_a_donor_whose_seed_is_no_number_is_refused_by_name(tmp_path, seed):
    folder = donor_folder(tmp_path / "found", {"sound": {"seed": 1}, "odd": {"seed": seed}})
    with pytest.raises(ValueError, match=r"odd.record\.json: seed = .* must be a whole number"):
        source_for(tmp_path, folder, 0)


def test_seeds_that_get_the_map_of_one_donor_are_named(tmp_path, monkeypatch):
    records = {f"s{seed}": {"seed": seed} for seed in (0, 1, 2)}
    folder = donor_folder(tmp_path / "found", records)
    assert shared_donors(str(folder), (0, 1, 2)) == {}  # each gets another one
    assert shared_donors(str(folder), (5, 7, 6, 6)) == {0: [5, 6, 7]}
    shared = shared_donors(str(folder), range(5))
    assert shared == {0: [2, 3, 4]}
    for donor, seeds in shared.items():
        assert {source_for(tmp_path, folder, seed) for seed in seeds} == {
            f"run s{donor}, seed {donor}"
        }
    donor_folder(folder, {"s3": {"seed": 3, "status": "diverged"}})
    assert shared_donors(str(folder), range(4)) == {0: [2, 3]}
    # One record offers no choice, nor does a folder of one, nor no map at all.
    one = donor_folder(tmp_path / "one", {"s8": {"seed": 8}})
    monkeypatch.chdir(folder)
    for place in (folder / "s0", folder / "s0" / "record.json", one, ""):
        assert shared_donors(str(place), (5, 6)) == {}


def test_runs_with_maps_are_replicas_like_any_other(tmp_path):
    """Each with its own map, a matrix of rank 0 among them, beside a dynamic one."""
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    changes = [
        dict(method="lora", rank_map=str(tmp_path / "map.json")),
        dict(method="lora", rank_map=str(tmp_path / "map.json"), permute_map=1, seed=1),
        dict(method="drlora", seed=2),
        dict(method="lora", seed=3),
    ]
    # Without dropout, which draws other numbers for four runs than for one.
    still_model(tmp_path / "still")
    given = dict(max_steps=12, lora_dropout=0.0, model_name=str(tmp_path / "still"))
    runs = [tiny(tmp_path / f"r{i}", **given, **change) for i, change in enumerate(changes)]
    together = run_replicas(runs)
    for i, (record, change) in enumerate(zip(together, changes, strict=True)):
        ready = one_run.set_up(tiny(tmp_path / f"alone{i}", **given, **change))
        alone = one_run.make_record(ready, one_run.train(ready))
        same = ("key", "trainable_parameters", "trained_bytes", "rank_map", "rank_pattern")
        for name in (*same, "budget_curve"):
            assert record[name] == alone[name], name
        assert record["loss_curve"] == pytest.approx(alone["loss_curve"], abs=3e-5)


def test_a_matrix_without_rank_in_every_replica_is_in_every_record(tmp_path):
    """As in the record of the run alone, in the same order; and the map serves another run."""
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    given = dict(rank_map=str(tmp_path / "map.json"))
    runs = [lora_run(tmp_path / f"r{seed}", seed=seed, **given) for seed in (0, 1)]
    for i, record in enumerate(run_replicas(runs)):
        alone = one_run.run(lora_run(tmp_path / f"alone{i}", seed=i, **given))
        for name in ("rank_pattern", "trainable_parameters", "trained_bytes", "key"):
            assert record[name] == alone[name], name
        assert list(record["rank_pattern"].items()) == list(MAP.items())
        assert list(alone["rank_pattern"]) == NAMES
        again = one_run.set_up(lora_run(tmp_path / "again", rank_map=str(tmp_path / f"r{i}")))
        assert again.rank_map.ranks == MAP


def test_the_map_of_one_replica_changes_no_bit_of_the_others(tmp_path):
    """With dropout, which is drawn in every matrix, whichever of them have components."""
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    given, histories = dict(rank_map=str(tmp_path / "map.json")), []
    for i, other in enumerate((given, given | {"permute_map": 1}, {})):
        runs = [
            lora_run(tmp_path / f"{i}a", **given),
            lora_run(tmp_path / f"{i}b", seed=1, **other),
        ]
        histories.append([trained.history for trained in set_up_replicas(runs)[1].run()])
    assert all(one == histories[0][0] for one, _ in histories)
    assert len({tuple(second.losses) for _, second in histories}) == 3


# --- prune once --------------------------------------------------------------------------------


def test_balanced_factors_have_the_product_and_their_first_k_are_its_best_approximation():
    A = torch.randn(3, 4, 7, dtype=torch.float64)
    B = torch.randn(3, 9, 4, dtype=torch.float64)
    new_A, new_B, S = balanced_svd(A, B)
    product = B @ A
    torch.testing.assert_close(new_B @ new_A, product)
    true = torch.linalg.svdvals(product)[:, :4]
    torch.testing.assert_close(S, true)
    for k in range(5):
        gap = product - new_B[..., :k] @ new_A[:, :k]
        torch.testing.assert_close(gap.square().sum((1, 2)), true[:, k:].square().sum(1))
    torch.testing.assert_close(new_A.norm(dim=2), S.sqrt())  # the two sides share the scale
    torch.testing.assert_close(new_B.norm(dim=1), S.sqrt())


def test_a_matrix_narrower_than_its_rank_has_zeros_for_the_rest():
    A, B = torch.randn(5, 3), torch.randn(8, 5)
    new_A, new_B, S = balanced_svd(A, B)
    assert new_A.shape == A.shape and new_B.shape == B.shape and not S[3:].any()
    torch.testing.assert_close(new_B @ new_A, B @ A, atol=1e-5, rtol=1e-5)


def products(prepared) -> dict[str, torch.Tensor]:
    return {
        name: m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
        for name, m in lora_layers(prepared).items()
    }


def test_the_cut_keeps_the_largest_singular_values_of_all_matrices_and_stays():
    prepared = prepare("prune-once", fresh(), SCHEDULE)
    optimizer = adam(prepared)
    train_steps(prepared, optimizer, range(1, SCHEDULE.t_end))
    # A copy takes the step in which the cut falls without the cut.
    uncut = copy.deepcopy(prepared)
    own = [p for p in uncut.model.parameters() if p.requires_grad]
    same = torch.optim.AdamW(own, lr=1e-2)
    same.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_steps(uncut._replace(allocator=None), same, range(SCHEDULE.t_end, SCHEDULE.t_end + 1))
    train_steps(prepared, optimizer, range(SCHEDULE.t_end, SCHEDULE.t_end + 1))
    before, after = products(uncut), products(prepared)
    values = torch.cat([torch.linalg.svdvals(P)[:3] for P in before.values()])
    threshold = values.sort(descending=True).values[12 * 2 - 1]
    ranks = rank_pattern(prepared)
    assert sum(ranks.values()) == 12 * 2 and len(set(ranks.values())) > 1
    for name, product in before.items():
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        kept = (S >= threshold * (1 - 1e-5)) & (torch.arange(len(S)) < 3)
        assert ranks[name] == int(kept.sum())
        best = (U[:, kept] * S[kept]) @ Vh[kept]
        torch.testing.assert_close(after[name], best, atol=1e-5, rtol=1e-4)
    train_steps(prepared, optimizer, range(SCHEDULE.t_end + 1, SCHEDULE.total_steps + 1))
    assert rank_pattern(prepared) == ranks
    for name, m in lora_layers(prepared).items():
        A, B = m.lora_A["default"].weight, m.lora_B["default"].weight
        assert not A[ranks[name] :].any() and not B[:, ranks[name] :].any()
        assert torch.linalg.matrix_rank(products(prepared)[name]) == ranks[name]
    sizes = {name: sum(m.weight.shape) for name, m in MATRICES.items()}
    expected = sum(rank * sizes[name] for name, rank in ranks.items())
    assert count_trainable(prepared)["adapter"] == expected


def test_until_the_cut_it_is_lora_of_the_first_rank():
    prune = prepare("prune-once", fresh(), SCHEDULE)
    lora = prepare("lora", fresh(), BudgetSchedule(3, 3, 30))
    for prepared in (prune, lora):
        train_steps(prepared, adam(prepared), range(1, SCHEDULE.t_end))
    for one, other in zip(prune.model.parameters(), lora.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cut_at", [17, 22])  # before and after the cut at step 20
def test_a_run_pruned_once_resumed_from_its_state_is_bit_identical(cut_at):
    straight = prepare("prune-once", fresh(), SCHEDULE)
    optimizer = adam(straight)
    train_steps(straight, optimizer, range(1, cut_at + 1))
    weights = {n: p.clone() for n, p in straight.model.named_parameters() if p.requires_grad}
    saved = copy.deepcopy((optimizer.state_dict(), straight.allocator.state_dict()))
    train_steps(straight, optimizer, range(cut_at + 1, 31))
    second = prepare("prune-once", fresh(), SCHEDULE)
    optimizer = adam(second)
    second.model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(saved[0])
    second.allocator.load_state_dict(saved[1])
    train_steps(second, optimizer, range(cut_at + 1, 31))
    assert rank_pattern(second) == rank_pattern(straight)
    for one, other in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_one_cut_refuses_a_step_left_out_and_a_foreign_state():
    allocator = prepare("prune-once", fresh(), SCHEDULE).allocator
    with pytest.raises(ValueError, match=r"step\(2\) after step 0"):
        allocator.step(2)
    other = prepare("prune-once", fresh(), BudgetSchedule(3, 2, 60)).allocator
    with pytest.raises(ValueError, match="of another schedule"):
        allocator.load_state_dict(other.state_dict())
    bart = prepare("prune-once", fresh("bart"), SCHEDULE).allocator
    with pytest.raises(ValueError, match="of another layers"):
        allocator.load_state_dict(bart.state_dict())


# --- when: tinit and tfinal --------------------------------------------------------------------


def test_the_default_shares_give_the_steps_of_appendix_e():
    for T in [*range(3, 2000), 24075, 10**9]:
        schedule = Settings().schedule(T)
        assert (schedule.tinit, schedule.tfinal) == (15 * T // 100, T // 2)


@pytest.mark.parametrize("method", ["prune-once", "drlora"])
def test_where_the_cut_is_the_last_act_the_last_evaluation_counts_and_is_after_it(tmp_path, method):
    record = one_run.run(tiny(tmp_path, method=method, tfinal=0, max_steps=12))
    assert record["budget_curve"][-1] == [12, 24]
    assert [e["step"] for e in record["evaluations"]] == [4, 8, 12]
    assert record["best"] == record["last"] == record["evaluations"][-1]["metric"]
    assert record["surviving_components"] == 24


def test_a_run_cut_once_is_killed_and_goes_on_to_the_same_record(tmp_path):
    given = dict(method="prune-once", max_steps=16)
    whole = one_run.run(tiny(tmp_path / "whole", **given))
    ready = one_run.set_up(tiny(tmp_path / "cut", **given))
    allocate = ready.prepared.allocator.step

    def power_cut(step):
        allocate(step)
        if step == 11:  # after the cut at step 8
            raise KeyboardInterrupt

    ready.prepared.allocator.step = power_cut
    with pytest.raises(KeyboardInterrupt):
        one_run.train(ready)
    assert without_costs(one_run.run(tiny(tmp_path / "cut", **given))) == without_costs(whole)
