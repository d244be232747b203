"""One copy of a model in vLLM, in a process of its own: prompts come in as lines, completions go out as they finish."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from worker.companion import greeted

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks vLLM makes room for (its MaxLoRARanks)."""
AHEAD = 2
"""Prompts that vLLM is given, in multiples of those it runs at once: what finishes is followed by another at once."""
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
Frame = dict[str, Any]


def serve(source: BinaryIO, out: BinaryIO) -> int:
    """Load what the first line asks for, say so, and answer each further line, until there are no more.

    Frames out: `ready` with how many prompts it takes at once; `number` with the tokens of that prompt, or `error`;
    `failed` or `died` with what was raised, as the last.
    """
    hello, answers = greeted(source, out)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    stage = "failed"
    try:
        copy = Copy(hello)
        _send(answers, [{"ready": copy.takes}])
        stage = "died"
        copy.run(_lines(source), answers)
    except Exception as error:  # noqa: BLE001 -- vLLM raises what its many parts raise; the parent says it to the user
        _send(answers, [{stage: f"{type(error).__name__}: {error}"[:2000]}])
        return 1
    return 0


class Copy:
    """vLLM's engine with the model and the adapter that were asked for."""

    def __init__(self, hello: Mapping[str, Any]) -> None:
        import vllm
        from vllm.usage.usage_lib import UsageContext

        adapter = _local(hello["adapter"]) if hello["adapter"] else None
        arguments = {**hello["arguments"], **_lora_arguments(adapter), **_arguments_of_a_cpu(hello["arguments"])}
        offline = (
            UsageContext.LLM_CLASS
        )  # the sizes vLLM chooses for its own offline loop: 1024 rows at once on an H100
        self._engine: Any = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments), usage_context=offline)
        self.takes = AHEAD * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._lora = _adopted(self._engine, adapter) if adapter else None
        self._sampling: Frame = {}

    def run(self, lines: queue.Queue[Frame | None], answers: BinaryIO) -> None:
        """Answer each line; returns when there are no more and all are answered."""
        is_over = False
        while not is_over or self._engine.has_unfinished_requests():
            made: list[Frame] = []
            while not is_over and not (lines.empty() and self._engine.has_unfinished_requests()):
                frame = lines.get()
                is_over = frame is None
                made += self._begun(frame) if frame else []
                if made:
                    break
            if self._engine.has_unfinished_requests():
                made += [_answer(output) for output in self._engine.step() if output.finished]
            _send(answers, made)

    def _begun(self, frame: Frame) -> list[Frame]:
        """Take how to draw, or hand a prompt to the engine; what is wrong with it, if it does not take it."""
        if "sampling" in frame:
            self._sampling = frame["sampling"]
            return []
        prompt = {"prompt_token_ids": frame["ids"]}
        try:
            self._engine.add_request(
                str(frame["number"]), prompt, self._parameters(frame["seed"]), lora_request=self._lora
            )
        except ValueError as error:  # of this prompt alone: too long, or without tokens
            return [{"number": frame["number"], "error": str(error)}]
        return []

    def _parameters(self, seed: int) -> Any:
        """How a completion is drawn, as the transformers engine does it: nothing of the model's own settings."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        greedy = self._sampling["temperature"] == 0
        stops = self._sampling["stop"]
        return vllm.SamplingParams(
            temperature=self._sampling["temperature"],
            top_p=self._sampling["top_p"],
            max_tokens=self._sampling["max_new_tokens"],
            seed=None if greedy else seed,
            stop=stops,
            stop_token_ids=self._sampling["ends"],
            detokenize=bool(stops),  # only to find them: the text is made of the tokens, the same for every engine
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _answer(output: Any) -> Frame:
    """The tokens of a finished request, the one that ended it among them."""
    made = output.outputs[0]
    frame = {"number": int(output.request_id), "ids": list(made.token_ids), "reason": made.finish_reason}
    if made.finish_reason not in ("stop", "length"):
        frame["error"] = f"vLLM ended it with {made.finish_reason!r}"
    return frame


def _arguments_of_a_cpu(arguments: Mapping[str, Any]) -> Frame:
    """What vLLM needs to be told where there is no GPU: its build for processors draws with a seed only from prompts
    that were not cut into chunks, and is compiled for longer than small runs take.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    tokens = max(int(arguments["max_model_len"]), 8192)
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens, "enforce_eager": True}


def _lora_arguments(adapter: Path | None) -> Frame:
    if adapter is None:
        return {}
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    fitting = [size for size in LORA_RANKS if size >= rank]
    if not fitting:
        raise ValueError(f"vLLM runs adapters up to rank {LORA_RANKS[-1]}; this one has {rank}")
    return {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": 1}


def _adopted(engine: Any, adapter: Path) -> Any:
    """The adapter loaded, so that one that does not fit is found now."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(adapter))
    engine.add_lora(request)
    return request


def _local(name: str) -> Path:
    """The folder of an adapter that is a folder, or in a repository of the Hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))


def _lines(source: BinaryIO) -> queue.Queue[Frame | None]:
    """The frames that come, None at their end; read by a thread, so that whoever writes them is never held up."""
    found: queue.Queue[Frame | None] = queue.Queue()

    def read() -> None:
        for line in source:
            found.put(json.loads(line))
        found.put(None)

    threading.Thread(target=read, name="prompts", daemon=True).start()
    return found


def _send(answers: BinaryIO, frames: list[Frame]) -> None:
    if frames:
        answers.write(b"".join(json.dumps(frame).encode() + b"\n" for frame in frames))
        answers.flush()
