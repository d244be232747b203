"""Drawing the next token so that a draw depends on its seed, its step and the scores alone, never on batch or device.

Letters: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from typing import Any

# splitmix64, a counter through a bijective mixer: Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014; the mixing constants are Stafford's variant 13.
INCREMENT = 0x9E3779B97F4A7C15
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31

CANDIDATES, WIDENING = 64, 16
"""How many of the likeliest tokens are looked at first, and how many times more while the nucleus does not fit."""

NOT_A_TOKEN = -1
"""What `greedy` and `draw` give for a row whose scores are not numbers."""


def row_key(seed: int, step: int) -> int:
    """The key of one draw: output number `step` of splitmix64 seeded with `seed`, as a signed 64-bit integer."""
    state = (seed + (step + 1) * INCREMENT) % 2**64
    for shift, factor in MIXERS:
        state = (state ^ (state >> shift)) * factor % 2**64
    return _signed(state ^ (state >> LAST_SHIFT))


def row_keys(seeds: Any, steps: Any) -> Any:
    """`row_key` of each row: int64 (B) from int64 seeds (B) and steps (B)."""
    return _outputs(seeds, steps)


def gumbel(keys: Any, token_ids: Any) -> Any:
    """Standard Gumbel noise, float64 (B, K), for row keys (B) and token ids (B, K) or (1, K), both int64.

    A token's uniform is the top 52 bits of output number `token_id` of splitmix64 seeded with the row's key, plus half
    a unit: every value is exact in float64 and lies strictly between 0 and 1, which a 53rd bit would not allow.
    """
    bits = _outputs(keys[:, None], token_ids)
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_()


def greedy(logits: Any) -> Any:
    """The likeliest token of each row, int64 (B); among equals the lowest id."""
    best, tokens = logits.max(dim=-1)
    return tokens.masked_fill_(~best.isfinite(), NOT_A_TOKEN)


def draw(logits: Any, temperature: float, top_p: float, keys: Any) -> Any:
    """One token per row, int64 (B), from softmax(logits / temperature) cut to its nucleus of mass `top_p`.

    The draw is the Gumbel-max trick: the largest of log-probability plus noise. The nucleus is every token at least as
    likely as the last one needed to reach `top_p`, so that tokens of equal score are in or out together.
    """
    import torch

    if logits.device.type == "mps":
        logits = logits.cpu()  # Apple's GPUs have no float64
    keys = keys.to(logits.device)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (B, V)
    if top_p >= 1:
        every_token = torch.arange(scores.shape[1], device=scores.device)[None]
        return _finite(*(scores.double() + gumbel(keys, every_token)).max(dim=-1))
    norm = scores.logsumexp(dim=-1, keepdim=True).double()  # (B, 1)
    tokens, whole = _draw_among(CANDIDATES, scores, norm, top_p, keys)
    limit, rows = CANDIDATES, torch.arange(len(scores), device=scores.device)
    while not whole.all():
        limit, rows = limit * WIDENING, rows[~whole]
        tokens[rows], whole = _draw_among(limit, scores[rows], norm[rows], top_p, keys[rows])
    return tokens


def _draw_among(limit: int, scores: Any, norm: Any, top_p: float, keys: Any) -> tuple[Any, Any]:
    """A token per row drawn among its `limit` likeliest, and whether those held the whole nucleus, each (B)."""
    values, token_ids = scores.topk(min(limit, scores.shape[1]), dim=-1)  # (B, K), falling
    values = values.double()
    masses = (values - norm).exp()
    needed = (masses.cumsum(dim=-1) - masses < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
    least = values.gather(1, needed - 1)
    # A nucleus that reaches the last candidate's score may go on among the tokens not looked at.
    whole = (least > values[:, -1:])[:, 0] | (limit >= scores.shape[1])
    noisy = (values + gumbel(keys, token_ids)).masked_fill_(values < least, float("-inf"))
    best, places = noisy.max(dim=-1)
    return _finite(best, token_ids.gather(1, places[:, None])[:, 0]), whole


def _finite(best: Any, tokens: Any) -> Any:
    return tokens.masked_fill(~best.isfinite(), NOT_A_TOKEN)


def _outputs(seeds: Any, numbers: Any) -> Any:
    """Outputs `numbers` of splitmix64 seeded with `seeds`: int64 tensors, whose arithmetic wraps as it must."""
    state = (numbers + 1) * _signed(INCREMENT) + seeds
    for shift, factor in MIXERS:
        state.bitwise_xor_(_shifted(state, shift)).mul_(_signed(factor))
    return state.bitwise_xor_(_shifted(state, LAST_SHIFT))


def _shifted(state: Any, places: int) -> Any:
    """A logical right shift of int64, whose own shift would copy the sign bit down."""
    return (state >> places).bitwise_and_(2 ** (64 - places) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
