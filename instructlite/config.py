"""What a recipe file may say: the options of every stage as dataclasses, and the loader of YAML plus `key=value`.

The dataclasses are also the constructor arguments of the recipe classes, so a recipe file and a Python call use the same
names. What stands under `training:` is not looked at here: TRL's own config classes (and our PPOConfig) check it.
"""

import difflib
import os
import re
import types
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import InstructLiteError

REQUIRED = "???"
EMBEDDED = "smollm2-135m"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_directory() -> Path:
    """Where the embedded model is kept once it is converted."""
    return Path(os.environ.get("INSTRUCTLITE_CACHE", Path.home() / ".cache" / "instructlite"))


STAGES = ("data", "sft", "reward", "judge", "ppo", "report")
"""Of every loop; what stands under `also` comes between the last two."""


@dataclass(kw_only=True)
class Lora:
    """The low-rank adapter that a stage trains (Hu et al. 2021)."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """On the adapter's input, while training. PPO needs 0: its ratios compare two passes over the same tokens."""
    targets: str | list[str] = "all-linear"
    """Module names that get an adapter, or "all-linear": every linear layer but the output head."""
    top_layers: int | None = None
    """Only the last n layers get adapters, so that all roles share one pass through the layers below. None: every layer."""

    def __post_init__(self) -> None:
        _check(Lora, vars(self), "lora")
        if self.r < 1 or (self.top_layers is not None and self.top_layers < 1):
            raise InstructLiteError(f"lora.r and lora.top_layers must be at least 1, not {self.r} and {self.top_layers}")


def vllm_rank(rank: int) -> int | None:
    """The least `max_lora_rank` of vLLM that holds an adapter of this rank; None: it serves none as large."""
    return next((served for served in (8, 16, 32, 64, 128, 256, 320, 512) if served >= rank), None)


@dataclass(kw_only=True)
class BaseOptions:
    """How the base model is loaded. Where `model` is an adapter, its manifest answers what is not given here."""

    quantization: Literal["none", "nf4", "int8"] = "none"
    """bitsandbytes' 4-bit NormalFloat or 8-bit weights for the frozen base; adapters stay in full precision."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the frozen base's weights. "auto" chooses by device."""
    chat_template: str | None = None
    """"chatml" or "plain", or the path of a .jinja file. None: the tokenizer's own."""
    revision: str | None = None
    """Branch, tag or commit of the base on the Hub."""

    def __post_init__(self) -> None:
        _check(BaseOptions, {name: getattr(self, name) for name in get_type_hints(BaseOptions)}, type(self).__name__)


@dataclass(kw_only=True)
class SFTOptions(BaseOptions):
    """Supervised fine-tuning on demonstrations."""

    model: Any
    """Hub id or path of a base model, or an Adapter (or its directory) to go on from."""
    data: Any
    """Demonstrations: a JSONL path, several, a Hub data set, "starter", or rows."""
    eval_data: Any = None
    """Held-out demonstrations. None: no evaluation."""
    lora: Lora = field(default_factory=Lora)
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    """Goes to trl.SFTConfig untouched."""


@dataclass(kw_only=True)
class RewardOptions(BaseOptions):
    """A scalar reward model from comparisons and rankings."""

    model: Any
    """The SFT adapter to start from (InstructGPT), a reward adapter to go on from, or a base model."""
    data: Any
    """Comparisons, rankings, or both."""
    eval_data: Any = None
    """Held-out comparisons and rankings: the accuracy is measured on them."""
    demonstrations: Any = None
    """The scores are shifted so that these score 0 on average. None: no shift."""
    ensemble: int = 1
    """So many reward models, with seeds `seed`, `seed` + 1, ...: heads, fresh adapters and the order of the data differ."""
    lora: Lora = field(default_factory=Lora)
    head_learning_rate_scale: float = 5.0
    """The new scalar head learns this many times faster than the adapter."""
    length_controlled: bool = False
    """Learn what the length of answers does not explain already (see `length_weight` in training/reward.py)."""
    policy_samples: float = 0.0
    """Share of the training prompts that get one answer more, sampled from the SFT adapter (see training/policy_samples.py)."""
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    """Goes to trl.RewardConfig untouched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensemble < 1:
            raise InstructLiteError(f"ensemble={self.ensemble}: at least 1, one reward model")
        if not 0 <= self.policy_samples <= 1:
            raise InstructLiteError(f"policy_samples={self.policy_samples}: a share of the prompts, from 0 to 1")


@dataclass(kw_only=True)
class DPOOptions(BaseOptions):
    """Direct preference optimisation (Rafailov et al. 2023): a policy from comparisons, without a reward model or sampling."""

    model: Any
    """The SFT adapter that the policy starts from and that is its reference, or a base model."""
    data: Any
    """Comparisons, rankings, or both."""
    eval_data: Any = None
    """Held-out comparisons and rankings: accuracy and margin are measured on them."""
    lora: Lora = field(default_factory=Lora)
    """Only used where `model` is a base without an adapter."""
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    """Goes to trl.DPOConfig untouched: `beta`, `loss_type`, …"""


@dataclass(kw_only=True)
class PPOOptions(BaseOptions):
    """PPO against a reward model, with a KL penalty to the policy it starts from."""

    model: Any
    """The adapter that the policy starts from, SFT's usually, or a base model."""
    reward: Any
    """A reward adapter of the same base, or another source of reward, or several (see `rewards_of` in training/rewards.py)."""
    data: Any
    """Prompts."""
    reference: Any = None
    """A policy adapter of the same base that the policy is held to, where that is not the one it starts from. None: what it starts from."""
    watch_reward: Any = None
    """Another reward adapter of the same base, trained on other comparisons: scored along the run, never optimised.
    In a recipe file "judge" is the loop's own judge; it costs one more forward pass over each rollout."""
    rewards: Any = None
    """More sources: "module:function" (TRL's signature), "hf:MODEL", a mapping with `model`, or reward adapters; a list, or
    a mapping {name: source}."""
    reward_weights: dict[str, float] | list[float] | None = None
    """Of the sources, by name or in order, after each was normalised. Those not named have 1."""
    reward_combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """What a response gets from an ensemble of reward adapters."""
    reward_std_weight: float = 0.5
    """How much of the members' standard deviation "mean_minus_std" takes off."""
    kl_coef: float = 0.05
    """Weight of the KL penalty in the reward, per token, in nats. Short for `training.kl_coef`."""
    ptx_data: Any = None
    """PPO-ptx: texts or demonstrations whose likelihood the policy keeps, as JSONL, a Hub data set or rows; "starter" is its prose.
    In a recipe file "demonstrations" are those of SFT. None: plain PPO."""
    ptx_coef: float | None = None
    """Weight of their mean log-likelihood a token; short for `training.ptx_coef`. None: 0.1 where there is `ptx_data`."""
    value_from: Literal["sft", "reward"] = "sft"
    """What the value adapter starts as: a copy of the policy's with a zero head, or of the reward model's (InstructGPT)."""
    lora: Lora = field(default_factory=Lora)
    """Only used where `model` is a base without an adapter."""
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    """Goes to PPOConfig untouched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ptx_coef and self.ptx_data is None:
            raise InstructLiteError(
                f"ptx_coef={self.ptx_coef:g} without ptx_data: give texts or demonstrations (ptx_data=starter), or leave it out"
            )


@dataclass(kw_only=True)
class EvaluationOptions:
    """How the candidates answer the held-out prompts."""

    candidates: list[str] | None = None
    """Stages, base, few-shot:4, context, best-of-4 (of SFT): see evaluation/candidates.py. None: base and all policies of the loop. The
    first words are about the last one."""
    prompts: int | None = None
    """The first n held-out prompts. None: all."""
    samples: int = 2
    """Answers to each prompt from each candidate."""
    max_new_tokens: int = 48
    max_prompt_length: int | None = None
    """Prompts of more tokens are left out. None: none is."""
    temperature: float = 1.0
    """1 samples from the distribution that PPO trained."""
    greedy: bool = True
    """Compare greedy answers too: they tell how much of a gain is only lower entropy."""
    side_effects: bool = False
    """Measure toxicity, truth, made-up answers, repetition … on prompts of their own, too: see evaluation/side_effects.py."""
    batch_size: int = 32
    seed: int = 0


@dataclass(kw_only=True)
class RoundOptions:
    """A round of votes: what is asked, and how much of what is learnt from it."""

    prompts: str | list[str] | None = None
    """What answers are written to and PPO goes through; none may be among the held-out ones. None: the run's own prompts."""
    prompt_limit: int | None = None
    """Answers to so many of them are put up, drawn anew each round. None: to all."""
    answers: int = 4
    """Answers to each prompt; equal ones are put up once."""
    max_new_tokens: int = 48
    temperature: float = 1.0
    batch_size: int = 32
    votes: int | None = None
    """The round goes on with so many new votes. None: with one for each item put up."""
    replay: int | None = None
    """The reward model sees so many of the old comparisons again, those of earlier rounds among them. None: all."""
    vote_weight: int = 1
    """The new votes stand this many times in its data."""
    reference: Literal["sft", "last"] = "sft"
    """What PPO is held to: the SFT adapter, or the policy that the round starts from."""

    def __post_init__(self) -> None:
        if not 2 <= self.answers <= 9:
            raise InstructLiteError(f"round.answers={self.answers}: 2 to 9 answers can be compared")
        if self.temperature <= 0:
            raise InstructLiteError(f"round.temperature={self.temperature}: must be above 0, or all answers to a prompt would be the same")
        for name in ("prompt_limit", "max_new_tokens", "batch_size", "votes", "vote_weight"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InstructLiteError(f"round.{name}={number}: must be at least 1")
        if self.replay is not None and self.replay < 0:
            raise InstructLiteError(f"round.replay={self.replay}: a number of comparisons, 0 for none")


@dataclass(kw_only=True)
class DataOptions:
    """Where the records come from and how they are split. No prompt is ever in two parts.

    A part is a number of rows (an int), a fraction of all rows (a float below 1), or a file of its own (a path).
    """

    demonstrations: str | list[str] = "starter"
    comparisons: str | list[str] = "starter"
    rankings: str | list[str] | None = None
    """Trained on and held out together with the comparisons."""
    prompts: str | list[str] | None = None
    """PPO's prompts. None: those of the reward model's comparisons."""
    heldout_demonstrations: int | float | str = 0.1
    """Perplexity is measured on these."""
    judge: int | float | str = 0.4
    """Comparisons for the judge: a second reward model that PPO never sees."""
    heldout: int | float | str = 0.15
    """Comparisons that neither reward model sees: their accuracy is measured on them, and evaluation uses their prompts."""
    demonstration_limit: int | None = None
    """At most so many rows train SFT. None: all that are left."""
    comparison_limit: int | None = None
    """At most so many rows train the reward model. None: all that are left."""
    answer_characters: int | None = None
    """Longer answers than PPO will write only teach its reward model to like length: comparisons with an answer longer than
    this go to the judge, beside its own part. None: no answer is too long."""
    prompt_characters: int | None = None
    """Conversations longer than this are no prompts for PPO and evaluation (a token is about four). None: all are."""
    prompt_limit: int | None = None
    """PPO goes through at most so many prompts, again and again. None: all."""
    seed: int = 0
    """Of the split."""

    def __post_init__(self) -> None:
        for name in ("heldout_demonstrations", "judge", "heldout"):
            part = getattr(self, name)
            if isinstance(part, (int, float)) and (part <= 0 or (isinstance(part, float) and part >= 1)):
                raise InstructLiteError(f"data.{name} is {part}: give a fraction between 0 and 1, a number of rows, or a file")
        whole = [part for part in (self.judge, self.heldout) if isinstance(part, float)]
        if sum(whole) >= 1:
            raise InstructLiteError(f"data.judge and data.heldout take {sum(whole):g} of the comparisons: nothing is left to train on")


@dataclass(kw_only=True)
class Loop:
    """One recipe file: the whole loop for one base model. A stage's section holds what differs from the top."""

    model: str
    """Hub id or path of the base; "smollm2-135m" is the embedded one."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    chat_template: str | None = None
    revision: str | None = None
    seed: int = 0
    report_to: str | list[str] = "none"
    """Trackers of every stage: trackio, tensorboard (extra `track`), wandb. metrics.jsonl is written in any case."""
    lora: Lora = field(default_factory=Lora)
    data: DataOptions = field(default_factory=DataOptions)
    sft: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    """What differs from `reward`: the judge is a reward model too."""
    ppo: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    """Used where `also` asks for DPO."""
    also: dict[str, Any] = field(default_factory=dict)
    """More policies from the same SFT adapter, compared in the same report: `dpo`, or a variant such as `ppo-ptx` or `dpo-ipo`, and what
    differs from the section that its name begins with. `also.dpo=` on the command line; `also.ppo-ptx.ptx_data=starter`."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    round: RoundOptions = field(default_factory=RoundOptions)
    """Of `instructlite round`; the loop itself does not look at it."""

    @property
    def trained(self) -> list[str]:
        """The stages that train, in their order."""
        return [*(stage for stage in STAGES if stage in SECTIONS), *self.also]

    @property
    def texts(self) -> dict[str, Any]:
        """For each PPO-ptx where its texts come from."""
        found = {stage: self.section(stage).get("ptx_data") for stage in self.trained if kind_of(stage) == "ppo"}
        return {stage: source for stage, source in found.items() if source is not None}

    def section(self, stage: str) -> dict[str, Any]:
        """What is said of a stage; of one under `also` laid over the section of its kind."""
        return merge(getattr(self, kind_of(stage)), self.also.get(stage) or {})

    def options(self, stage: str) -> dict[str, Any]:
        """The keyword arguments of the stage's recipe class, but for those that the pipeline wires (`model`, `data`, …)."""
        section = self.section(stage)
        top = {name: getattr(self, name) for name in ("quantization", "dtype", "chat_template", "revision", "seed")}
        if stage == "judge":  # one model judges, whatever the reward is made of
            section = merge({option: value for option, value in self.reward.items() if option not in ("ensemble", "seed")}, self.judge)
            # Started from the same random head as a reward model, it would agree with that one by this alone.
            top["seed"] = self.reward.get("seed", self.seed) + self.reward.get("ensemble", 1)
        lora = Lora(**merge(asdict(self.lora), section.get("lora", {})))
        if self.report_to not in ("none", []):
            section = {**section, "training": {"report_to": self.report_to, **section.get("training", {})}}
        return {**top, **section, "lora": lora}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `load_loop` reads back. Sections stay as given: filled in, they would override the top."""
        return asdict(self)


SECTIONS: dict[str, type] = {"sft": SFTOptions, "reward": RewardOptions, "judge": RewardOptions, "ppo": PPOOptions, "dpo": DPOOptions}
_WIRED = {"model", "data", "eval_data", "demonstrations", "reward", "reference"}


def kind_of(stage: str) -> str:
    """The section that a stage's options stand in: `ppo` of `ppo-ptx`."""
    return stage.partition("-")[0]


def is_optional(stage: str) -> bool:
    """Whether it may stand under `also`: `dpo`, and variants of `dpo` and `ppo`. The name is also that of its directory."""
    return stage == "dpo" or re.fullmatch(r"(dpo|ppo)-\w[\w-]*", stage) is not None


def load_loop(name_or_path: str | os.PathLike, overrides: Iterable[str] = (), *, complete: bool = True) -> Loop:
    """Read a recipe (a name that `instructlite recipes` lists, or a file) and lay `key=value` over it; dots go down: `sft.lora.r=8`.

    complete: False lets `???` stand where the recipe wants a value from the user.
    Raises InstructLiteError for an unknown key (with the nearest known one), a wrong type, and a `???` left unfilled.
    """
    path = recipe_path(name_or_path)
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InstructLiteError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InstructLiteError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise InstructLiteError(f"{path}: a recipe is a mapping of keys, such as 'model: smollm2-135m'")
    _check(Loop, values, str(path))
    for override in overrides:
        given = parse_override(override)
        _check(Loop, given, f"'{override}'")
        values = merge(values, given)
    missing = _unfilled({"model": REQUIRED, **values})
    if missing and (complete or "model" in missing):
        raise InstructLiteError(f"{path}: required: {', '.join(missing)}; add {' '.join(f'{key}=VALUE' for key in missing)} to the command")
    try:
        loop = _build(Loop, values)
        for stage in (*SECTIONS, *loop.also):
            loop.options(stage)  # what a section does to the top is checked before anything is trained
        return loop
    except InstructLiteError as error:
        raise InstructLiteError(f"{path}: {error}") from error


def recipes() -> dict[str, Path]:
    """The recipes that come with InstructLite, by name."""
    return {path.stem: path for path in sorted(_recipe_folder().glob("*.yaml"))}


def _recipe_folder() -> Path:
    inside = Path(__file__).parent / "recipes"  # in a wheel; in a checkout the folder stands beside the package
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_path(name_or_path: str | os.PathLike) -> Path:
    """The file of a recipe given by name or by path, or of a launcher's configuration ("accelerate/ddp")."""
    known = recipes() | {f"accelerate/{path.stem}": path for path in _recipe_folder().glob("accelerate/*.yaml")}
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise InstructLiteError(f"no recipe or file '{name_or_path}'{_nearest(path.stem, known)}; list the recipes: instructlite recipes")


def merge(under: Mapping, over: Mapping) -> dict:
    """`over` laid on `under`, mapping by mapping; a list replaces a list."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number (PyYAML's YAML 1.1 reads a string), and without keys that silently replace a twin."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain data only


def parse_override(override: str) -> dict:
    """{key: value} of "key=value", the value read as YAML; dots in the key go down."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InstructLiteError(f"'{override}': an option over a recipe is written key=value, such as ppo.kl_coef=0.1")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise InstructLiteError(f"'{override}': the value is not YAML: {' '.join(str(error).split())}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _unfilled(values: Mapping, above: str = "") -> list[str]:
    unfilled = []
    for key, value in values.items():
        unfilled += _unfilled(value, f"{above}{key}.") if isinstance(value, Mapping) else [above + key] * (value == REQUIRED)
    return unfilled


def _check(cls: type, values: Mapping, where: str, above: str = "") -> None:
    """Refuse keys that `cls` has not and values that its annotations do not allow. `where` opens the message."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise InstructLiteError(f"{where}: {above}{key} is not an option{_nearest(str(key), hints)}")
        if value == REQUIRED:
            continue
        if cls is Loop and key in SECTIONS:
            _check_section(key, value, where, key)
        elif cls is Loop and key == "also":
            _check_also(value, where)
        elif is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check(hints[key], value, where, f"{above}{key}.")
        elif not _fits(value, hints[key]):
            raise InstructLiteError(f"{where}: {above}{key} must be {_in_words(hints[key])}, not {value!r}")


def _check_section(name: str, values: Any, where: str, kind: str) -> None:
    if not isinstance(values, Mapping):
        raise InstructLiteError(f"{where}: {name} must be a mapping of options, not {values!r}")
    wired = next((key for key in values if key in _WIRED), None)
    if wired:
        raise InstructLiteError(f"{where}: {name}.{wired} is set by the loop itself: give 'model' or 'data.…' at the top")
    _check(SECTIONS[kind], values, where, f"{name}.")


def _check_also(values: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        raise InstructLiteError(f"{where}: also must be a mapping of stages, such as 'dpo:' or 'ppo-ptx:', not {values!r}")
    for stage, options in values.items():
        if not is_optional(str(stage)):
            raise InstructLiteError(f"{where}: also.{stage} is no stage to add: there are dpo, and variants named dpo-… and ppo-…")
        _check_section(f"also.{stage}", {} if options is None else options, where, kind_of(stage))


def _build(cls: type, values: Mapping) -> Any:
    hints = get_type_hints(cls)
    return cls(**{key: _build(hints[key], value) if is_dataclass(hints[key]) else value for key, value in values.items()})


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, *get_args(hint)) for one in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return "a list"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", dict: "a mapping", type(None): "null"}
    return words.get(get_origin(hint) or hint, "a mapping of options")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
