"""A stand-in for vLLM, as far as training/vllm_rollout.py uses it: NOT vLLM, which needs a GPU; tests marked `gpu` run that.

Names, arguments and results follow vLLM 0.22 to 0.31 (LLM, SamplingParams, LoRARequest, RequestOutput, Logprob; of its server the
completions and the loading of adapters). As there, an adapter is known by its id once it was loaded. It computes with plain PEFT.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        assert self.lora_int_id > 0


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | None = None
    lora_request: LoRARequest | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class LLM:
    """skew: how much sharper than the policy's its distribution is. `requests`: what it was asked, `slept`: whether it sleeps now."""

    model: str
    dtype: str = "auto"
    quantization: str | None = None
    enable_lora: bool = False
    max_lora_rank: int = 16
    max_loras: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_sleep_mode: bool = False
    logprobs_mode: str = "raw_logprobs"
    seed: int = 0
    skew: float = 0.0
    requests: list[LoRARequest] = field(default_factory=list)
    adapters: dict[int, PeftModel] = field(default_factory=dict)
    slept: bool = False

    def __post_init__(self) -> None:
        assert self.enable_lora and self.max_lora_rank in (8, 16, 32, 64, 128, 256, 320, 512)

    def sleep(self, level: int = 1) -> None:
        assert self.enable_sleep_mode
        self.slept = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.slept = False

    def generate(
        self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool = True, lora_request: LoRARequest | None = None
    ) -> list[RequestOutput]:
        assert not self.slept and len(prompts) == len(sampling_params)
        self.requests.append(lora_request)
        model = self.load(lora_request)
        return [
            RequestOutput(str(i), prompt["prompt_token_ids"], [self.answer(model, prompt["prompt_token_ids"], asked, lora_request)])
            for i, (prompt, asked) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    def load(self, request: LoRARequest) -> PeftModel:
        if request.lora_int_id not in self.adapters:
            assert PeftConfig.from_pretrained(request.lora_path).r <= self.max_lora_rank
            base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            self.adapters[request.lora_int_id] = PeftModel.from_pretrained(base, request.lora_path).eval()
        return self.adapters[request.lora_int_id]

    @torch.no_grad()
    def answer(self, model: PeftModel, prompt: list[int], asked: SamplingParams, lora: LoRARequest | None) -> CompletionOutput:
        assert (asked.top_k, asked.top_p, asked.min_p, asked.repetition_penalty) == (0, 1.0, 0.0, 1.0), "filters are not stood in for"
        random = torch.Generator().manual_seed(asked.seed)
        ids, logprobs = [], []
        while len(ids) < asked.max_tokens and not (ids and ids[-1] in asked.stop_token_ids):
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            logps = (logits * (1 + self.skew) / asked.temperature).log_softmax(-1)
            ids.append(int(torch.multinomial(logps.exp(), 1, generator=random)))
            logprobs.append({ids[-1]: Logprob(logps[ids[-1]].item())})
        stopped = ids[-1] in asked.stop_token_ids
        total = sum(at[token].logprob for token, at in zip(ids, logprobs, strict=True))
        return CompletionOutput(0, "", ids, total, logprobs, "stop" if stopped else "length", ids[-1] if stopped else None, lora)


def install(monkeypatch, **defaults) -> list[LLM]:
    """`import vllm` gives the stand-in; every LLM that is made is in the list."""
    made: list[LLM] = []

    def llm(**options) -> LLM:
        made.append(LLM(**(options | defaults)))
        return made[-1]

    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams, request.LoRARequest = llm, SamplingParams, LoRARequest
    vllm.__spec__ = sys.modules["json"].__spec__  # importlib.util.find_spec asks for one
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


@contextmanager
def serving(model: str, key: str | None = None) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Its server: the URL, what was asked of it (path and model), and the adapters that are loaded."""
    asked: list[str] = []
    loaded: dict[str, LoRARequest] = {}
    engine, lock = LLM(model, enable_lora=True), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, reply = self.reply(self.path.removeprefix("/v1/"), body)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def reply(self, path: str, body: dict) -> tuple[int, object]:
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                return 401, {"error": "Unauthorized"}
            asked.append(path)
            if path == "load_lora_adapter":
                loaded[body["lora_name"]] = LoRARequest(body["lora_name"], len(asked), body["lora_path"])
                engine.load(loaded[body["lora_name"]])
            elif path == "unload_lora_adapter":
                del loaded[body["lora_name"]]
            else:
                own = {"model", "prompt", "return_token_ids"}
                params = SamplingParams(**{name: value for name, value in body.items() if name not in own})
                request = loaded[body["model"]]
                output = engine.answer(engine.load(request), body["prompt"], params, request)
                logprobs = [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
                choice = {"index": 0, "text": "", "token_ids": output.token_ids, "logprobs": {"token_logprobs": logprobs}}
                return 200, {"object": "text_completion", "choices": [choice]}
            return 200, "Success"

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, loaded
    finally:
        server.shutdown()
        server.server_close()
