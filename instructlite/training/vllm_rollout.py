"""Rollouts by vLLM: the frozen base stands there once more, and each cycle it is given the policy's adapter as it is now.

Each call writes the adapter to a directory of its own and names it anew: under an id or a name that it knows, vLLM computes with
the adapter, and the cached prefixes, that it had before. Nothing is merged, as TRL's VLLMGeneration does: that rounds the base. vLLM's
kernels round otherwise than those that train, so its log-probabilities come along, for the importance weights (`ppo_math`).
Written for vLLM 0.22 to 0.31.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx2

from ..config import vllm_rank
from ..errors import InstructLiteError, require
from ..models.roles import RoleModel
from ..models.sampling import Sampling, until_stop
from .cycle import mix
from .ppo_config import PPOConfig
from .rollout import Answers
from .work import launched

AT_ONCE = 64
"""Requests that a server is sent at a time; it batches them."""

Sampled = tuple[list[int], list[float]]  # ids and their log-probabilities


def vllm_sampler(model: RoleModel, args: PPOConfig, context: int) -> VLLMSampler:
    """The sampler that `args` asks for. context: tokens of the longest prompt with the longest answer."""
    rank = served_rank(model)
    if args.vllm_mode == "server":
        return VLLMSampler(Server(args.vllm_server_base_url.rstrip("/").removesuffix("/v1"), os.environ.get("VLLM_API_KEY")))
    return VLLMSampler(Colocated.load(model, args, rank, context))


def served_rank(model: RoleModel) -> int:
    """The least max_lora_rank that holds the policy; raises InstructLiteError for what vLLM does not serve."""
    config = model.peft_config["policy"]
    for option, value in {"use_dora": config.use_dora, "modules_to_save": config.modules_to_save, "bias": config.bias != "none"}.items():
        if value:
            raise InstructLiteError(f"rollout_engine=vllm: an adapter with {option} is not served by vLLM; use rollout_engine=hf")
    rank = max([config.r, *config.rank_pattern.values()])
    served = vllm_rank(rank)
    if served is None:
        raise InstructLiteError(f"rollout_engine=vllm: a LoRA of rank {rank} is larger than vLLM serves; use rollout_engine=hf")
    return served


class Engine(Protocol):
    """vLLM, here or elsewhere."""

    def complete(
        self, adapter: str, directory: Path, prompts: list[list[int]], sampling: Sampling, stop_ids: list[int], seeds: list[int]
    ) -> list[Sampled]:
        """Answers with the adapter of that name, which stands in the directory. seeds: one a prompt."""
        ...


@dataclass
class VLLMSampler:
    """A `Sampler` of rollout.py."""

    engine: Engine
    _number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def sample(self, model: RoleModel, prompts: list[list[int]], sampling: Sampling, stop_ids: list[int], seed: int) -> Answers:
        name = f"policy-{os.getpid()}-{next(self._number)}"
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="instructlite-", dir=memory if memory.is_dir() else None) as directory:
            # A server may be another user: mkdtemp gives 0700, and the adapter is no secret to who serves it.
            os.chmod(directory, 0o755)
            model.write_peft("policy", Path(directory) / name)
            seeds = [mix(seed, row) % 2**31 for row in range(len(prompts))]
            sampled = self.engine.complete(name, Path(directory) / name, prompts, sampling, stop_ids, seeds)
        ids = [until_stop(row, stop_ids) for row, _ in sampled]
        log_probs = [logps[: len(row)] for row, (_, logps) in zip(ids, sampled, strict=True)]
        if not all(len(row) == len(logps) > 0 and all(map(math.isfinite, logps)) for row, logps in zip(ids, log_probs, strict=True)):
            raise InstructLiteError("vLLM gave an empty answer, or a token without a finite log-probability")
        return Answers(ids, log_probs)


def _asked(sampling: Sampling, stop_ids: list[int]) -> dict[str, Any]:
    """Every option that the model's generation_config.json could fill in; stops are ours alone."""
    return {
        "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True,
        "stop_token_ids": stop_ids, "logprobs": 0,
    }  # fmt: skip


@dataclass
class Colocated:
    """vLLM in this process, on its GPU. sleeps: between two calls it gives its memory back."""

    llm: Any
    sleeps: bool = False
    _id: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @classmethod
    def load(cls, model: RoleModel, args: PPOConfig, rank: int, context: int) -> Colocated:
        base = model.base
        if base.quantization == "int8":
            raise InstructLiteError(
                "rollout_engine=vllm: vLLM cannot load a base as int8; use quantization=nf4 or none, or rollout_engine=hf"
            )
        options = {
            "model": str(base.path),
            "dtype": base.dtype,
            "quantization": "bitsandbytes" if base.quantization == "nf4" else None,
            "enable_lora": True,
            "max_lora_rank": rank,
            "max_loras": 1,
            "max_model_len": context,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
            "enable_sleep_mode": args.vllm_enable_sleep_mode,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from, temperature included
            "seed": args.seed,
        }
        if launched():  # otherwise vLLM would start processes of its own, under the launcher's variables
            options["distributed_executor_backend"] = "external_launcher"
        engine = cls(require("vllm", "vllm").LLM(**(options | (args.vllm_options or {}))), args.vllm_enable_sleep_mode)
        engine._rest()
        return engine

    def complete(
        self, adapter: str, directory: Path, prompts: list[list[int]], sampling: Sampling, stop_ids: list[int], seeds: list[int]
    ) -> list[Sampled]:
        vllm, lora = require("vllm", "vllm"), require("vllm.lora.request", "vllm")
        with self._awake():
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [vllm.SamplingParams(**_asked(sampling, stop_ids), seed=seed, detokenize=False) for seed in seeds],
                lora_request=lora.LoRARequest(adapter, next(self._id), str(directory)),
                use_tqdm=False,
            )
        answers = [output.outputs[0] for output in outputs]
        return [
            (list(answer.token_ids), [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True)])
            for answer in answers
        ]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self.sleeps:
            self.llm.wake_up()
        try:
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)


@dataclass
class Server:
    """A `vllm serve BASE --enable-lora --logprobs-mode processed_logprobs` with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True that reads this
    machine's files."""

    url: str
    key: str | None = None

    def complete(
        self, adapter: str, directory: Path, prompts: list[list[int]], sampling: Sampling, stop_ids: list[int], seeds: list[int]
    ) -> list[Sampled]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        asked = _asked(sampling, stop_ids) | {"model": adapter, "return_token_ids": True}
        with httpx2.Client(base_url=self.url, headers=headers, timeout=httpx2.Timeout(600, connect=10)) as client:
            self._post(client, "load_lora_adapter", {"lora_name": adapter, "lora_path": str(directory)})
            try:  # one request a prompt: with several in one, all would be drawn with one seed
                bodies = [asked | {"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    replies = list(pool.map(lambda body: self._post(client, "completions", body).json(), bodies))
            finally:
                self._post(client, "unload_lora_adapter", {"lora_name": adapter})
        choices = [reply["choices"][0] for reply in replies]
        return [(_ids(self.url, choice), [_number(x) for x in choice["logprobs"]["token_logprobs"]]) for choice in choices]

    def _post(self, client: httpx2.Client, path: str, body: dict[str, Any]) -> httpx2.Response:
        try:
            response = client.post(f"/v1/{path}", json=body)
        except httpx2.TransportError as error:
            raise InstructLiteError(
                f"{self.url}: no vLLM server is to be reached there ({error}); start it, or vllm_mode=colocate"
            ) from error
        if response.status_code == 404 and path == "load_lora_adapter":
            raise InstructLiteError(
                f"{self.url}: takes no adapters; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora"
            )
        if response.is_error:
            raise InstructLiteError(f"{self.url}/v1/{path}: {response.status_code}: {' '.join(response.text.split())[:300]}")
        return response


def _ids(url: str, choice: dict[str, Any]) -> Sequence[int]:
    if not choice.get("token_ids"):
        raise InstructLiteError(f"{url}: the server returns no token_ids; it needs vLLM 0.22 or newer")
    return choice["token_ids"]


def _number(x: float | None) -> float:
    return math.nan if x is None else x
