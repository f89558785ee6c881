"""Comparing objectives on pairs of answers: splits, measures, training, and the command as a user types it."""

import copy
import json
import pathlib
import sys

import pytest
import torch
import transformers
from typer.testing import CliRunner

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "preferences"))

import tiny_llama

from minimand.bench import Run
from minimand.bench.facts import fact_pairs, facts
from minimand.bench.memory import forget_peak, peak_megabytes
from minimand.bench.pair_training import (
    Drift,
    PairRecipe,
    PairSource,
    PreparedPairs,
    _mixed,
    drift,
    entangled,
    prepared,
    train,
)
from minimand.bench.preferences import (
    ENSEMBLE,
    UNTRAINED,
    PairSplit,
    PairSplits,
    TrainRewardHeads,
    drift_figure,
    preferences_study,
    prepare,
    winner_code,
)
from minimand.bench.readers import DataError
from minimand.cli import app
from minimand.preferences import DPOLoss, INPOLoss, IPOLoss, inpo_loss, train_only

ROWS = [dict(row) for row in tiny_llama.pairs(60)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, pairs, and a cache of their own."""
    root = tmp_path_factory.mktemp("preferences")
    tiny_llama.folder(root / "model")
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield root


def source(home, part="last:1"):
    return PairSource(str(home / "pairs.jsonl"), str(home / "model"), part)


@pytest.mark.parametrize("part", ["last:1", "last:2", "lora:2", "all"])
def test_a_policy_begins_as_the_reference_and_only_what_was_asked_for_learns(home, part):
    data = PreparedPairs(source(home, part))
    policy = data.policy()
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    found = drift(data, policy, range(10))
    assert max(found.chosen.abs().max(), found.rejected.abs().max()) < 1e-4
    assert abs(found.kl) < 1e-6
    assert found.accuracy() == 0.5
    trained = train(data, range(40), DPOLoss(), PairRecipe(steps=6), lr=1e-2, rounds=1, seed=0)
    moved = {name for name, weight in trained.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    if part.startswith("lora"):
        assert all("lora" in name for name in moved)
    if part == "last:1":
        assert (data.states is not None) == (part != "all")
        assert not any("embed" in name or "lm_head" in name for name in moved)
    after = drift(data, trained.policy, range(40))
    assert after.accuracy() > 0.8
    assert after.kl > 1e-4
    # The reference is what it was: training works on a copy.
    assert abs(drift(data, data.frozen, range(10)).kl) < 1e-6


def test_cutting_the_model_changes_nothing_but_the_time(home):
    cut, fresh = PreparedPairs(source(home)), PreparedPairs(source(home, "all"))
    fresh.policy = lambda: train_only(copy.deepcopy(fresh.frozen), "last:1")
    one = train(cut, range(40), DPOLoss(), PairRecipe(steps=4), lr=1e-3, rounds=1, seed=3).curves
    other = train(fresh, range(40), DPOLoss(), PairRecipe(steps=4), lr=1e-3, rounds=1, seed=3).curves
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert one["chosen drift"] == pytest.approx(other["chosen drift"], abs=1e-3)


def test_divergence_is_that_of_torch(home):
    data = PreparedPairs(source(home))
    policy = data.policy()
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    places = list(range(5))
    mine, theirs = (
        torch.cat(
            [
                scores[mask]
                for scores, mask in zip(found[:2], (found[2].chosen_mask, found[2].rejected_mask), strict=True)
            ]
        )
        for found in (data.logits(policy, places), data.logits(data.frozen, places))
    )
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=mine), torch.distributions.Categorical(logits=theirs)
    ).mean()
    assert drift(data, policy, places).kl == pytest.approx(float(wanted), rel=1e-4)
    assert float(wanted) > 0.01


def test_pairs_are_measured_in_their_own_order_whatever_their_length(home):
    data = PreparedPairs(source(home))
    policy = train(data, range(40), DPOLoss(), PairRecipe(steps=3), lr=1e-2, rounds=1, seed=0).policy
    places = [7, 3, 50, 12, 33, 8, 21, 5, 40]
    together = drift(data, policy, places)
    for rank, place in enumerate(places):
        alone = drift(data, policy, [place])
        assert float(together.chosen[rank]) == pytest.approx(float(alone.chosen), abs=1e-4)
        assert float(together.likelier[rank]) == pytest.approx(float(alone.likelier), abs=1e-4)


def test_a_tie_is_half_a_success():
    found = Drift(torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.zeros(4), torch.tensor([2.0, 3.0, -1.0, -1.0]), 0.0)
    assert found.accuracy() == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert found.ranking() == 0.5


def test_one_round_of_inpo_is_ipo_and_a_second_is_not(home):
    data = PreparedPairs(source(home))

    def losses(objective, rounds):
        return train(data, range(30), objective, PairRecipe(steps=6), lr=1e-2, rounds=rounds, seed=0).curves["loss"]

    assert losses(INPOLoss(eta=0.1), 1) == pytest.approx(losses(IPOLoss(beta=0.1), 1), rel=1e-4)
    two = losses(INPOLoss(eta=0.1), 2)
    assert two[:3] == pytest.approx(losses(INPOLoss(eta=0.1), 1)[:3], rel=1e-5)
    assert two[3:] != pytest.approx(losses(INPOLoss(eta=0.1), 1)[3:], rel=1e-3)


def test_a_later_round_is_inpos_loss_with_the_policy_it_began_with(home):
    data = PreparedPairs(source(home))
    policy, previous = data.policy(), data.policy()
    with torch.no_grad():
        for model, scale in ((policy, 0.02), (previous, 0.05)):
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(scale)
    tokens, before = data.tokens(policy, range(6)), data.tokens(previous, range(6))
    mixed = _mixed(tokens, before, INPOLoss(eta=0.1)).sums()
    sums, earlier = tokens.sums(), before.sums()
    fixed = {"prev_logp_chosen": earlier.chosen.detach(), "prev_logp_rejected": earlier.rejected.detach()}
    wanted = inpo_loss(sums.chosen, sums.rejected, *sums.references(), eta=0.1, **fixed).mean()
    mixed = mixed._replace(ref_chosen=mixed.ref_chosen.detach(), ref_rejected=mixed.ref_rejected.detach())
    assert torch.allclose(INPOLoss(eta=0.1).of(mixed), wanted, rtol=1e-4)
    assert not torch.allclose(INPOLoss(eta=0.1).of(sums), wanted, rtol=1e-2)


def test_reward_heads_tell_the_better_answer_of_pairs_they_have_not_seen():
    class Features:
        """Answers of which a few features, out of many, are what is preferred."""

        def features(self, places):
            noise = torch.randn(2, 200, 256, generator=torch.Generator().manual_seed(0))
            noise[0, :, :16] += 1
            return noise[0, places], noise[1, places]

    split = PairSplit(Features(), list(range(120)), [], list(range(120, 200)))
    assert TrainRewardHeads()(split, Run(0)).metrics["preference accuracy"] > 0.8


def test_entangled_pairs_are_those_whose_chosen_answer_a_small_step_lowers(home):
    data = PreparedPairs(source(home))
    policy, places = data.policy(), list(range(12))
    share = entangled(data, policy, DPOLoss(), places)
    fell = 0
    for place in places:
        stepped = data.policy()
        loss = DPOLoss().from_tokens(data.tokens(stepped, [place]))
        layers = [weight for name, weight in stepped.named_parameters() if weight.requires_grad and weight.dim() == 2]
        with torch.no_grad():
            for weight, gradient in zip(layers, torch.autograd.grad(loss, layers), strict=True):
                weight.sub_(1e-3 * gradient)
        fell += bool(drift(data, stepped, [place]).chosen < 0)
    assert share == pytest.approx(fell / len(places))


def test_a_model_that_cannot_be_cut_is_trained_whole_and_diagnosed_all_the_same(home):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20)  # positions that a second embedding would add again
    model.save_pretrained(home / "gpt2")
    tiny_llama.tokenizer().save_pretrained(home / "gpt2")
    data = PreparedPairs(PairSource(str(home / "pairs.jsonl"), str(home / "gpt2"), "last:1"))
    assert data.states is None
    trained = train(data, range(40), DPOLoss(), PairRecipe(steps=6), lr=1e-2, rounds=1, seed=0)
    assert drift(data, trained.policy, range(40)).accuracy() > 0.7
    assert 0 <= entangled(data, trained.policy, DPOLoss(), list(range(8))) <= 1


def test_no_prompt_is_both_seen_and_measured_and_wrong_labels_only_teach(home):
    rows = [row | {"prompt": f"w{place % 20} w1", "clean": place % 7 != 0} for place, row in enumerate(ROWS)]
    path = home / "noisy.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    problem = PairSplits(PairSource(str(path), str(home / "model"), "last:1"), seed=0)
    for seed in range(3):
        split = problem(None, seed)
        parts = [
            {split.data.pairs[place].prompt for place in part} for part in (split.train, split.validation, split.test)
        ]
        assert sum(map(len, parts)) == len(set().union(*parts))
        assert all(split.data.clean[place] for place in split.test)
        assert not all(split.data.clean[place] for place in split.train)
    assert problem(None, 0).train != problem(None, 1).train


def test_every_contender_runs_and_the_cell_repeats(home):
    study = preferences_study(
        str(home / "pairs.jsonl"),
        model=str(home / "model"),
        train="last:1",
        steps=3,
        rates=(1e-3,),
        objectives=("all",),
    )
    split = study.problem(None, 0)
    for name, contender in study.contenders.items():
        outcome = contender(split, Run(0))
        assert 0 <= outcome.metrics["preference accuracy"] <= 1, name
        if name not in (UNTRAINED, ENSEMBLE):
            again = contender(split, Run(0))
            assert {**again.metrics, "peak memory": 0} == {**outcome.metrics, "peak memory": 0}, name
            assert len(outcome.curves["loss"]) == 3
            assert outcome.metrics["chosen drift"] != 0, name
    assert study.contenders[UNTRAINED](split, Run(0)).metrics["preference accuracy"] == 0.5


def test_the_command_says_what_became_of_the_rows_and_writes_a_report(home):
    rows = [*ROWS, ROWS[0] | {"chosen": ""}, ROWS[1] | {"rejected": ROWS[1]["chosen"]}]
    path = home / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "compare",
        "preferences",
        str(path),
        "--model",
        str(home / "model"),
        "--train",
        "last:1",
        "--jobs",
        "1",
    ]
    arguments += [
        "--steps",
        "4",
        "--lr",
        "0.01",
        "--objective",
        "DPO",
        "--objective",
        "sft",
        "--out",
        str(home / "out"),
    ]
    arguments += ["--store", str(home / "store.sqlite")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert "60 pairs" in answer["data"]
    assert "1 left out for an empty answer" in answer["data"]
    assert "1 left out for identical answers" in answer["data"]
    assert {row["name"] for row in answer["contenders"]} == {UNTRAINED, "DPO", "SFT"}
    page = (home / "out" / "compare-preferences.html").read_text()
    assert "Where chosen and rejected answers went" in page
    assert "load_language_model" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["PAIRS", "--model", "nowhere"], "neither a folder, nor a name on the hub"),
        (["PAIRS", "--train", "first:2"], "--train must be last:BLOCKS, lora:RANK or all"),
        (["PAIRS", "--train", "last:9"], "the model has 2"),
        (["PAIRS", "--max-length", "100"], "reads at most 64 tokens"),
        (["PAIRS", "--objective", "dpoo"], "there is no 'dpoo'; there are all"),
        (["PAIRS", "--lr", "0"], "learning rates between 0 and 1"),
        (["PAIRS", "--steps", "0"], "--steps must be at least 1"),
        (["PAIRS", "--pairs", "5"], "--pairs must be at least 20"),
        (["PAIRS", "--seeds", "1"], "--seeds must be at least 2"),
        (["FEW"], "different prompts are too few"),
        (["BROKEN"], "row 2 has no 'rejected'"),
    ],
)
def test_wrong_input_is_answered_in_one_sentence(home, arguments, message):
    (home / "few.jsonl").write_text("\n".join(map(json.dumps, ROWS[:8])))
    (home / "broken.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"prompt": "a", "chosen": "b"}))
    files = {"PAIRS": "pairs.jsonl", "FEW": "few.jsonl", "BROKEN": "broken.jsonl"}
    filled = [str(home / files[argument]) if argument in files else argument for argument in arguments]
    if "--model" not in filled:
        filled += ["--model", str(home / "model")]
    result = CliRunner().invoke(app, ["compare", "preferences", *filled, "--out", str(home / "wrong")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_file_that_changes_meanwhile_is_refused(home):
    path = home / "changing.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    study = preferences_study(str(path), model=str(home / "model"), train="last:1")
    path.write_text("\n".join(map(json.dumps, ROWS[1:])))
    with pytest.raises(DataError, match="has changed since the comparison began"):
        study.problem(None, 0)


def test_pairs_are_drawn_from_a_larger_file_and_the_data_say_so(home):
    study = preferences_study(str(home / "pairs.jsonl"), model=str(home / "model"), train="last:1", pairs=30)
    described = prepare(study, lambda _: None).data
    assert "30 pairs" in described
    assert "30 drawn of 60" in described


@pytest.mark.parametrize("winner", ["DPO", "RPO", "sparse token mask", ENSEMBLE, UNTRAINED])
def test_the_code_of_the_winner_is_code(home, winner):
    study = preferences_study(str(home / "pairs.jsonl"), model=str(home / "model"), objectives=("all",))
    code = winner_code(study, winner)
    compile(code, "winner", "exec")
    assert ("PairLossTrainer" in code) == (winner not in (ENSEMBLE, UNTRAINED))
    assert len(code.splitlines()) <= 16


@pytest.mark.parametrize(("winner", "part"), [("sparse token mask", "last:1"), ("RPO", "lora:2"), (ENSEMBLE, "last:1")])
def test_the_code_of_the_winner_runs_as_it_stands(home, tmp_path, monkeypatch, winner, part):
    study = preferences_study(str(home / "pairs.jsonl"), model=str(home / "model"), train=part, objectives=("all",))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(winner_code(study, winner), names)
    if winner == ENSEMBLE:
        assert torch.isfinite(names["reward"](names["chosen"])).all()
    else:
        assert names["trainer"].state.global_step > 0


def test_the_figure_names_every_objective_inside_its_frame():
    study = preferences_study()
    names = [name for name in study.contenders if name not in (UNTRAINED, ENSEMBLE)]
    summary = {
        metric: [{"name": name, "mean": place * scale} for place, name in enumerate(names)]
        for metric, scale in (("chosen drift", 0.5), ("rejected drift", -1.5))
    }
    svg = drift_figure(study, {"summary": summary})[0]["svg"]
    assert all(f">{name}<" in svg for name in names)
    assert svg.count("<circle") == len(names)


def test_facts_are_distinct_and_a_tenth_of_their_pairs_is_wrong():
    assert len({(relation, subject) for relation, subject, _ in facts()}) == len(facts()) > 300
    rows = fact_pairs(seed=1)
    assert len(rows) == len(facts())
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert 0.05 < sum(not row["clean"] for row in rows) / len(rows) < 0.16
    assert all(fact[2] in row["chosen"] for row, fact in zip(fact_pairs(noise=0), facts(), strict=True))


def test_memory_at_its_height_is_seen_and_forgotten():
    forget_peak()
    before = peak_megabytes()
    block = torch.ones(50_000_000)
    assert peak_megabytes() - before > 150
    del block
    forget_peak()
    assert peak_megabytes() - before < 100


def test_preparing_again_in_the_same_process_costs_nothing(home):
    assert prepared(source(home)) is prepared(source(home))
