"""Share configurations, prompts, a reference model and an HTTP stub between the tests of servers."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_srpo.config.load import load_config
from megatron_srpo.config.schema import Config
from megatron_srpo.distributed.layout import Layout
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.engine import Completion, Request, Sampling

ROOT = Path(__file__).parents[2]
START = ROOT / "examples/quickstart/start"
QUICKSTART = ROOT / "examples/quickstart/sglang.yaml"
KEY = "SRPO_TEST_KEY"  # the environment variable with the servers' API key
ALONE = Layout()


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports, below those that the system assigns itself."""
    for first in range(20000 + os.getpid() % 1000 * 10, 32000, 10):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


@contextlib.contextmanager
def listening(
    answer: Callable[[BaseHTTPRequestHandler, bytes], tuple[int, bytes]],
) -> Iterator[ThreadingHTTPServer]:
    """Serve HTTP on loopback. answer: called with a request and its body, returns (status, content)."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            status, content = answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = reply  # noqa: N815  (the library's names)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def config_of(run: Path, *overrides: str) -> Config:
    """Return the quick start's configuration with SGLang servers on this machine's CPU."""
    given = [
        f"model.hf_path={START}",
        f"rollout.sglang.python={os.environ['SGLANG_PYTHON']}",
        f"logging.dir={run}",
    ]
    return load_config(QUICKSTART, [*given, f"rollout.sglang.api_key_env={KEY}", *overrides])


@dataclass
class Servers:
    """Hold two servers, and the fp32 model whose weights they had last.

    They need a publication before they sample.
    """

    engine: object
    folder: HFFolder
    model: torch.nn.Module
    run: Path
    said: list[str]
    version: int = -1

    def publish(self, seed: int | None) -> str:
        """Publish the start model's weights as the next version, moved by noise when there is a seed."""
        weights = load_file(START / "model.safetensors")
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            weights = {
                name: tensor * (1 + 0.02 * torch.randn(tensor.shape, generator=generator))
                for name, tensor in weights.items()
            }
        self.model.load_state_dict(weights, strict=False)  # the tied matrix has two names
        self.version += 1
        self.engine.update_weights(weights.items(), str(self.version))
        return str(self.version)

    def forget_updates(self) -> None:
        """Make the next publication version "0", which counts as the first one."""
        self.version = -1
        self.engine.publisher.forget()

    def requests(self, count: int) -> list[Request]:
        """Return requests with different questions."""
        texts = [f"Compute {100 + 37 * number % 900} + {100 + 91 * number % 900}." for number in range(count)]
        return [
            Request(tuple(self.folder.encode([{"role": "user", "content": text}])), text) for text in texts
        ]

    def sampling(self, temperature: float = 1.0, max_tokens: int = 48, stops: bool = True) -> Sampling:
        """Return sampling settings; without `stops` a response runs to its limit."""
        return Sampling(temperature, 1.0, max_tokens, self.folder.stop_ids if stops else ())

    @torch.no_grad()
    def gap(
        self,
        requests: list[Request],
        completions: list[Completion],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> float:
        """Return the largest difference between a completion's log-probabilities and the model's own.

        top_p: The model's are those of the smallest set of tokens whose mass exceeds it.
        """
        largest = 0.0
        for request, completion in zip(requests, completions, strict=True):
            logits = self.model(torch.tensor([[*request.prompt_ids, *completion.ids]])).logits[
                0, len(request.prompt_ids) - 1 : -1
            ]
            logprobs = (logits / temperature).log_softmax(-1)
            if top_p < 1:
                ordered = logprobs.exp().sort(-1, descending=True).values
                mass = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0).sum(-1, keepdim=True)
                logprobs = logprobs - mass.log()
            expected = logprobs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            largest = max(largest, float((expected - torch.tensor(completion.logprobs)).abs().max()))
        return largest


def sample(
    engine, requests: list[Request], sampling: Sampling, enough=lambda done: False, seen=lambda done: None
) -> list[Completion]:
    """Return all completions in the requests' order.

    Each is yielded once; enough(number done) aborts the rest.
    """
    done: dict[int, Completion] = {}
    stop = threading.Event()
    for completions in engine.generate(requests, sampling, stop):
        assert not set(completions) & set(done)
        done.update(completions)
        seen(len(done))
        if enough(len(done)):
            stop.set()
    return [done[number] for number in range(len(requests))]
