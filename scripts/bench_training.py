"""Tokens per second of a LoRA training, against Trainer with peft and TRL's SFTTrainer; saving; memory."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import transformers
from figures import Figure, show

from jobs import rundir, spec, training_memory
from jobs.decoders import Shape
from jobs.training_memory import Recipe
from worker import held, lora, tiny, train
from worker.batches import Budget, Plan
from worker.conversations import Sample
from worker.curriculum import Prepared
from worker.models import ModelRequest

ROOT = Path(__file__).resolve().parent.parent
TRL = os.environ.get("GPU_TRL_PYTHON", str(ROOT / ".venv-trl" / "bin" / "python"))
ROUNDS, STEPS, WARM, THREADS = 3, 22, 2, 1
LARGER = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 2000}
"""A random Qwen2 of 1 million parameters: as on a GPU, a short row alone costs more in calls than in products."""
TINY = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192, "vocab_size": 512}
"""The built-in model's."""
ROWS, SHORTEST, LONGEST, MOST = 512, 16, 96, 512
"""Rows of so many tokens, and tokens of a packed micro-batch. Unpacked, a micro-batch is one row, as people run it."""
RECIPE = {"rank": 8, "alpha": 16.0, "targets": "q_proj,v_proj", "lr": 2e-4, "optimizer": "adamw"}
ACCUMULATION = 4
THEIRS = r"""
import importlib.metadata, json, sys, time
import torch, transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
folder, kind, packing, steps, warm, most, accumulation, threads = sys.argv[1:9]
torch.set_num_threads(int(threads))
rows = json.load(open(folder + "/rows.json"))
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
how = dict(output_dir=folder + "/out", max_steps=int(steps), per_device_train_batch_size=1, learning_rate=2e-4,
           gradient_accumulation_steps=int(accumulation), logging_steps=1, save_strategy="no", report_to=[],
           disable_tqdm=True, use_cpu=True, seed=0, max_grad_norm=1.0, dataloader_num_workers=0)

class Clock(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        if state.global_step == int(warm): self.began = time.process_time()
    def on_step_end(self, args, state, control, **more):
        self.ended = time.process_time()

clock, seen = Clock(), []
def counted(batch):
    labels = batch["labels"]
    seen.append((int(batch["position_ids"].numel()) if "position_ids" in batch else int(batch["input_ids"].numel()),
                 int((labels != -100).sum())))
if kind == "trl":
    import trl
    args = trl.SFTConfig(**how, packing=packing == "1", completion_only_loss=True, max_length=int(most),
                         gradient_checkpointing=False)
    data = Dataset.from_list([{"input_ids": r["ids"], "completion_mask": r["mask"]} for r in rows])
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tok, peft_config=lora,
                             callbacks=[clock])
else:
    class Rows(torch.utils.data.Dataset):
        def __len__(self): return len(rows)
        def __getitem__(self, at):
            row = rows[at]
            return {"input_ids": row["ids"], "labels": [i if m else -100 for i, m in zip(row["ids"], row["mask"])]}
    collate = transformers.default_data_collator
    if packing == "1":
        collate = transformers.DataCollatorWithFlattening()
        groups, group = [], []
        for at, row in enumerate(rows):
            if group and sum(len(rows[i]["ids"]) for i in group) + len(row["ids"]) > int(most):
                groups.append(group); group = []
            group.append(at)
        class Packed(Rows):
            def __len__(self): return len(groups)
            def __getitem__(self, at): return [Rows.__getitem__(self, i) for i in groups[at]]
        flat = collate
        collate = lambda batch: flat(batch[0])
    trainer = transformers.Trainer(model=get_peft_model(model, lora), callbacks=[clock], data_collator=collate,
        args=transformers.TrainingArguments(**how), train_dataset=(Packed if packing == "1" else Rows)())
inner = trainer.compute_loss
def compute_loss(model, inputs, *more, **named):
    counted(inputs)
    return inner(model, inputs, *more, **named)
trainer.compute_loss = compute_loss
trainer.train()
done = seen[int(warm) * int(accumulation):]
version = importlib.metadata.version("trl" if kind == "trl" else "transformers")
print(json.dumps({"seconds": clock.ended - clock.began, "tokens": sum(t for t, _ in done), "version": version,
                  "targets": sum(t for _, t in done)}))
"""
"""A peer in a process of its own: the same model, rows, rank, rate, accumulation and thread; nothing saved."""


def make_model(folder: Path, sizes: dict[str, int]) -> None:
    """A random Qwen2, a tokenizer that TRL wants to see, and rows of random tokens whose second half is learned."""
    tiny.save_tokenizer(folder)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    rows = [
        {"ids": list(sample.ids), "mask": [int(at >= sample.spans[0][0]) for at in range(len(sample))]}
        for sample in samples()
    ]
    (folder / "rows.json").write_text(json.dumps(rows))


def samples() -> list[Sample]:
    """Short rows of many lengths, the same ones every time."""
    chance = Random(0)  # noqa: S311
    lengths = [chance.randint(SHORTEST, LONGEST) for _ in range(ROWS)]
    return [
        Sample(number, array("q", chance.choices(range(300), k=size)), ((size // 2, size),))
        for number, size in enumerate(lengths)
    ]


def training(folder: Path, *, packing: bool) -> train.Training:
    """Ours, on the same model and rows."""
    job = spec.find("train-lora", [spec.CATALOG])
    words = {"steps": STEPS, "accumulation": ACCUMULATION, "packing": packing, "device": "cpu", "dtype": "float32"}
    words |= {"batch_tokens": MOST} if packing else {"batch_size": 1}
    params = job.fill({**{name: str(value) for name, value in RECIPE.items()}, **{k: str(v) for k, v in words.items()}})
    request = ModelRequest(str(folder), dtype="float32", device="cpu")
    found, settings = samples(), lora.Settings.of(params)
    plan = Plan([len(each) for each in found], Budget(None if packing else 1, MOST, packing), 0)
    prepared = Prepared(params, request, settings, None, found, [], plan, None, {}, {"model_digest": ""}, "cpu")
    learner = lora.load(request, settings)
    torch.set_num_threads(THREADS)
    return train.Training(rundir.Run(folder / "run"), prepared, learner)


def ours(folder: Path, *, packing: bool) -> tuple[float, float]:
    """Real and learned tokens per second of CPU time: neighbours on the same cores do not count."""
    steps = training(folder, packing=packing).steps()
    list(itertools.islice(steps, WARM))
    began = time.process_time()
    lines = list(steps)
    took = time.process_time() - began
    return sum(line["tokens"] for line in lines) / took, sum(line["targets"] for line in lines) / took


def theirs(python: str, folder: Path, kind: str, *, packing: bool) -> tuple[float, float, str]:
    """The same of a peer, and its version."""
    words = [kind, str(int(packing)), *map(str, (STEPS, WARM, MOST, ACCUMULATION, THREADS))]
    done = subprocess.run([python, "-W", "ignore", "-c", THEIRS, str(folder), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} does not run: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["tokens"] / found["seconds"], found["targets"] / found["seconds"], found["version"]


def compared(folder: Path) -> Iterator[Figure | str]:
    """Rounds in turns, unpacked and packed; medians."""
    peers = [("Trainer", sys.executable, "trainer")]
    if Path(TRL).exists():
        peers.append(("SFTTrainer", TRL, "trl"))
    rates: dict[tuple[str, bool], list[float]] = {}
    versions: dict[str, str] = {}
    for number in range(ROUNDS):
        for packing in (False, True):
            rounds = [("ours", "", ""), *peers]
            for name, python, kind in rounds if number % 2 else reversed(rounds):
                if not kind:
                    rate = ours(folder, packing=packing)[0]
                else:
                    rate, _, versions[name] = theirs(python, folder, kind, packing=packing)
                rates.setdefault((name, packing), []).append(rate)
    middle = {key: statistics.median(each) for key, each in rates.items()}
    for name, packing in middle:
        if name != "ours":
            own, other = middle["ours", packing], middle[name, packing]
            words = f"{own:.0f} against {other:.0f} tokens/s; {name} {versions[name]}"
            how = "packed" if packing else "one row a micro-batch"
            yield Figure(f"{how}, of {name}'s tokens/s", own / other, "times", words, at_least=1.0)
    gain = middle["ours", True] / middle["ours", False]
    yield Figure("packed, of ours unpacked", gain, "times", f"{middle['ours', True]:.0f} tokens/s")
    if len(peers) == 1:
        yield "Not measured: TRL's SFTTrainer (scripts/test --all makes its environment)."


def packing(folder: Path) -> Iterator[Figure]:
    """What packing brings where calls cost more than products, as short rows do on a GPU."""
    rates = [[ours(folder, packing=packed)[0] for packed in (False, True)] for _ in range(ROUNDS)]
    alone, packed = (statistics.median(each) for each in zip(*rates, strict=True))
    ratios = [round(each[1] / each[0], 2) for each in rates]
    words = f"{packed:.0f} against {alone:.0f} tokens/s; {min(ratios)} to {max(ratios)}"
    yield Figure("packed, of ours unpacked, the built-in's shape", packed / alone, "times", words, at_least=2)


def saving(folder: Path) -> Iterator[Figure]:
    """A checkpoint after each step, durable."""
    made = training(folder, packing=True)
    took = []
    for _ in made.steps():
        began = time.monotonic()
        made.save()
        took.append(time.monotonic() - began)
    size = sum(path.stat().st_size for path in made.run.checkpoints()[-1].iterdir())
    words = f"slowest {1000 * max(took):.0f}; {size / 1e6:.2f} MB, 6 files, each synced"
    yield Figure("checkpoint, median", 1000 * statistics.median(took), "ms", words, at_most=60)


def memory(folder: Path) -> Iterator[Figure]:
    """Bytes of all tensors that live at once in two whole steps, against the formula."""
    shape = Shape.of(json.loads((folder / "config.json").read_text()))
    assert shape is not None
    for packing in (False, True):
        made = training(folder, packing=packing)
        with held.counting() as tally:
            list(itertools.islice(made.steps(), 2))
        micros = [m for _, m in itertools.islice(made.prepared.plan.stream(), 2 * ACCUMULATION)]
        most = max(sum(made.prepared.plan.lengths[index] for index in micro) for micro in micros)
        recipe = replace(Recipe.of(made.prepared.params, "float32", most), learned=0.5)
        said = training_memory.needs(shape, recipe).tensors
        words = f"{tally.most / 1e6:.1f} MB counted, {said / 1e6:.1f} by the formula; tensors, not RSS"
        how = "packed" if packing else "one row"
        yield Figure(f"memory, off the formula, {how}", 100 * abs(said / tally.most - 1), "%", words, at_most=10)


def figures() -> Iterator[Figure | str]:
    """Everything, on one model."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = folder / "tiny"
        for place, sizes in ((folder, LARGER), (small, TINY)):
            (place / "run").mkdir(parents=True)
            make_model(place, sizes)
        yield (
            f"transformers {transformers.__version__}, torch {torch.__version__}; a random Qwen2 of {LARGER}, float32, "
            f"{THREADS} thread; LoRA r 8 on q and v; {ROWS} rows of {SHORTEST} to {LONGEST} tokens, half learned; "
            f"{ACCUMULATION} micro-batches a step, packed ones of {MOST} tokens; {STEPS - WARM} steps; tokens a second "
            f"of CPU time; medians of {ROUNDS} rounds in turns"
        )
        yield from compared(folder)
        yield from packing(small)
        yield from saving(small)
        yield from memory(folder)


if __name__ == "__main__":
    sys.exit(show(figures()))
