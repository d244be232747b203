"""vLLM's own offline loop and our engine over vLLM, on the same prompts in turns; run by a Python that has vLLM."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 4
TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 1.0, 0.9, 200
BATCH = 16
ENDS = frozenset(range(2, 8))
"""Tokens that end a row: several, so that rows of a random model end at many lengths."""
ROOT = Path(__file__).resolve().parent.parent


def main(folder: str) -> None:
    """Load both, let each go first as often as the other, and print what they took as one line of JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    sys.path.insert(0, str(ROOT))
    wanted = json.load(sys.stdin)
    import vllm
    from transformers import AutoTokenizer

    from worker.generators import Prompt, Sampling
    from worker.generators.texts import Texts
    from worker.generators.vllm import Load, VllmGenerator
    from worker.models import ModelRequest

    longest = max(len(ids) for _, ids, _ in wanted) + MAX_NEW_TOKENS
    load = Load(ModelRequest(folder), "float32", longest, BATCH, [])
    on_a_cpu = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "enforce_eager": True}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = Texts(tokenizer, ENDS, ())
    raw = vllm.LLM(**{**load.arguments(), **on_a_cpu})
    shared = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_tokens": MAX_NEW_TOKENS, "stop_token_ids": sorted(ENDS)}
    told: dict[str, Any] = {"raw_s": [], "ours_s": [], "first_s": [], "version": vllm.__version__}

    def run_raw() -> dict[str, str]:
        began_s = time.perf_counter()
        asked = [{"prompt_token_ids": ids} for _, ids, _ in wanted]
        drawn = [vllm.SamplingParams(**shared, seed=seed) for _, _, seed in wanted]
        made = raw.generate(asked, drawn, use_tqdm=False)
        told["raw_s"].append(time.perf_counter() - began_s)
        told["tokens"] = sum(len(one.outputs[0].token_ids) for one in made)
        tokens = [list(one.outputs[0].token_ids) for one in made]  # LLM's own texts drop what is no whole character
        keys = [key for key, _, _ in wanted]
        return {key: texts.completion(Prompt(key, (), 0), ids).text for key, ids in zip(keys, tokens, strict=True)}

    with VllmGenerator(load, tokenizer, ENDS) as ours:

        def run_ours() -> dict[str, str]:
            began_s, found, first_s = time.perf_counter(), {}, 0.0
            asked = [Prompt(key, tuple(ids), seed) for key, ids, seed in wanted]
            for prompt, completion in ours.generate(asked, Sampling(TEMPERATURE, TOP_P, MAX_NEW_TOKENS)):
                first_s = first_s or time.perf_counter() - began_s
                found[prompt.key] = completion.text
            told["ours_s"].append(time.perf_counter() - began_s)
            told["first_s"].append(first_s)
            return found

        for number in range(ROUNDS + 1):
            both = [run() for run in ([run_raw, run_ours] if number % 2 else [run_ours, run_raw])]
            if not number:  # the first time warms up, and fills the caches of prefixes
                for name in ("raw_s", "ours_s", "first_s"):
                    told[name].clear()
    told |= {"rows": len(wanted), "differ": sum(both[0][key] != both[1][key] for key in both[0])}
    out.write(json.dumps(told) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1])
