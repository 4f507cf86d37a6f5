"""Recipe files: what is read, what is refused, and what the message says."""

import pytest
import yaml

from instructlite.config import DataOptions, Lora, SFTOptions, load_loop, merge, recipes
from instructlite.errors import InstructLiteError


@pytest.fixture
def recipe(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(*arguments) -> str:
    with pytest.raises(InstructLiteError) as error:
        load_loop(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_precedence_is_defaults_then_file_then_key_value(recipe):
    path = recipe("model: m\nseed: 3\nppo: {kl_coef: 0.2}\n")
    loop = load_loop(path, ["ppo.kl_coef=0.3", "data.heldout=7"])
    assert (loop.model, loop.seed, loop.lora.r) == ("m", 3, 16)
    assert loop.options("ppo")["kl_coef"] == 0.3
    assert loop.data.heldout == 7
    assert load_loop(path).options("ppo")["kl_coef"] == 0.2


def test_top_level_options_hold_for_every_stage_unless_its_section_differs(recipe):
    loop = load_loop(recipe("model: m\nquantization: nf4\nseed: 5\nlora: {r: 8, top_layers: 2}\nreward: {seed: 6, lora: {r: 4}}\n"))
    assert loop.options("sft")["quantization"] == "nf4"
    assert loop.options("sft")["lora"] == Lora(r=8, top_layers=2)
    assert loop.options("reward")["lora"] == Lora(r=4, top_layers=2)
    assert (loop.options("sft")["seed"], loop.options("reward")["seed"]) == (5, 6)


def test_judge_holds_what_differs_from_reward(recipe):
    reward = "reward: {head_learning_rate_scale: 2.0, training: {learning_rate: 1e-4, max_steps: 3}}\n"
    loop = load_loop(recipe(f"model: m\n{reward}judge: {{training: {{max_steps: 9}}}}\n"))
    judge = loop.options("judge")
    assert judge["head_learning_rate_scale"] == 2.0
    assert judge["training"] == {"learning_rate": 1e-4, "max_steps": 9}
    assert loop.options("reward")["training"]["max_steps"] == 3


def test_what_stands_under_also_is_laid_over_the_section_of_its_kind(recipe):
    path = recipe(
        "model: m\nppo: {kl_coef: 0.2, training: {max_steps: 4}}\ndpo: {training: {beta: 0.3}}\nalso: {ppo-hot: {kl_coef: 0.0}}\n"
    )
    loop = load_loop(path, ["also.dpo=", "also.ppo-hot.training.max_steps=9"])
    assert loop.trained == ["sft", "reward", "judge", "ppo", "ppo-hot", "dpo"]
    assert loop.options("dpo")["training"] == {"beta": 0.3}
    hot = loop.options("ppo-hot")
    assert (hot["kl_coef"], hot["training"]["max_steps"]) == (0.0, 9)
    assert loop.options("ppo")["kl_coef"] == 0.2
    assert load_loop(recipe("model: m\ndpo: {training: {beta: 0.3}}\n")).trained == ["sft", "reward", "judge", "ppo"], (
        "only where asked for"
    )


def test_what_cannot_stand_under_also_is_refused(recipe):
    path = recipe("model: m\n")
    for name in ("ppo", "sft", "reward-2", "ppo-", "dpo-a/b", "dpoo"):
        assert f"also.{name} is no stage to add: there are dpo, and variants" in refused(path, [f"also.{name}="])
    assert "also must be a mapping of stages, such as 'dpo:'" in refused(path, ["also=dpo"])
    assert "also.dpo.betta is not an option" in refused(path, ["also.dpo.betta=1"])
    assert "also.ppo-b.kl_coef must be a number, not 'x'" in refused(path, ["also.ppo-b.kl_coef=x"])
    assert "also.ppo-b.reward is set by the loop itself" in refused(path, ["also.ppo-b.reward=r"])


def test_numbers_in_scientific_notation_are_numbers(recipe):
    loop = load_loop(recipe("model: m\nsft: {training: {learning_rate: 1e-3, weight_decay: 1E+2}}\n"), ["ppo.kl_coef=5e-2"])
    assert loop.sft["training"] == {"learning_rate": 0.001, "weight_decay": 100.0}
    assert loop.ppo["kl_coef"] == 0.05


def test_overrides_go_down_to_training_keys_and_leave_their_neighbours(recipe):
    path = recipe("model: m\nsft: {training: {learning_rate: 0.1, max_steps: 2}}\n")
    assert load_loop(path, ["sft.training.max_steps=5"]).sft["training"] == {"learning_rate": 0.1, "max_steps": 5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\nquantisation: nf4\n", "quantisation is not an option; did you mean 'quantization'?"),
        ("model: m\nsft: {lora: {drop: 0.1}}\n", "sft.lora.drop is not an option; did you mean 'dropout'?"),
        ("model: m\ndata: {compairsons: x}\n", "data.compairsons is not an option; did you mean 'comparisons'?"),
        ("model: m\nevaluation: {samples: two}\n", "evaluation.samples must be an integer, not 'two'"),
        ("model: m\nseed: true\n", "seed must be an integer, not True"),
        ("model: m\nquantization: nf5\n", "quantization must be none | nf4 | int8, not 'nf5'"),
        ("model: m\nsft: 3\n", "sft must be a mapping of options, not 3"),
        ("model: m\nppo: {training: [1]}\n", "ppo.training must be a mapping, not [1]"),
        ("model: m\nppo: {reward: there}\n", "ppo.reward is set by the loop itself"),
        ("model: m\nmodel: n\n", "the key 'model' stands twice"),
        ("- model\n", "a recipe is a mapping"),
        ("model: [\n", "not YAML"),
        ("model: m\nsft: {lora: {r: 0}}\n", "lora.r and lora.top_layers must be at least 1"),
        ("model: m\ndata: {judge: 0}\n", "data.judge is 0"),
        ("model: m\ndata: {judge: 0.5, heldout: 0.5}\n", "nothing is left to train on"),
    ],
)
def test_faults_in_a_file_are_named_with_the_file_and_the_key(recipe, text, said):
    path = recipe(text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.kl_coeff=1", "ppo.kl_coeff is not an option; did you mean 'kl_coef'?"),
        ("ppo.kl_coef=high", "ppo.kl_coef must be a number, not 'high'"),
        ("ppo.kl_coef", "written key=value"),
        ("ppo..kl_coef=1", "written key=value"),
        ("sft=[1", "not YAML"),
    ],
)
def test_faults_in_an_override_are_named_with_the_override(recipe, override, said):
    message = refused(recipe("model: m\n"), [override])
    assert message.startswith(f"'{override}': ")
    assert said in message


def test_required_keys_are_all_named_and_can_be_given(recipe):
    path = recipe("model: ???\ndata:\n  demonstrations: ???\n  comparisons: c.jsonl\n")
    message = refused(path)
    assert "required: model, data.demonstrations" in message
    assert "comparisons" not in message
    loop = load_loop(path, ["model=m", "data.demonstrations=[a.jsonl, b.jsonl]"])
    assert loop.data.demonstrations == ["a.jsonl", "b.jsonl"]
    assert "required: model" in refused(recipe("seed: 1\n"))


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path):
    assert "did you mean 'smollm2-135m'?" in refused("smolm2-135m")
    assert "cannot be read" in refused(_not_utf8(tmp_path))


def _not_utf8(directory):
    path = directory / "latin.yaml"
    path.write_bytes(b"model: caf\xe9\n")
    return path


def test_the_resolved_loop_reads_back_as_the_same_loop(tmp_path):
    loop = load_loop("smollm2-135m", ["lora.r=3", "ppo.lora.r=5", "data.heldout=0.25"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(loop.to_dict(), sort_keys=False), encoding="utf-8")
    assert load_loop(path) == loop
    assert load_loop(path, ["seed=9"]).options("sft")["seed"] == 9


def test_python_callers_get_the_same_checks():
    with pytest.raises(InstructLiteError, match=r"SFTOptions: quantization must be none \| nf4 \| int8, not 'nf5'"):
        SFTOptions(model="m", data="d", quantization="nf5")
    with pytest.raises(InstructLiteError, match="lora: alpha must be an integer"):
        Lora(alpha=0.5)
    with pytest.raises(InstructLiteError, match="data.heldout is 1.5"):
        DataOptions(heldout=1.5)


def test_merge_changes_neither_side():
    under, over = {"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}
    assert merge(under, over) == {"a": {"b": 1, "c": [3]}}
    assert (under, over) == ({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}})


def test_the_demo_recipe_is_listed():
    assert "smollm2-135m" in recipes()


def test_the_judge_has_a_seed_that_no_reward_model_has(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text("model: m\nseed: 5\nreward: {ensemble: 3}\n")
    assert load_loop(path).options("judge")["seed"] == 8
    assert load_loop(path, ["reward.seed=1"]).options("judge")["seed"] == 4
    assert load_loop(path, ["judge.seed=1"]).options("judge")["seed"] == 1
