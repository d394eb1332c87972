"""Teach a small model to talk like a pirate, on a CPU: `make pirate`.

Usage: python examples/pirate/pirate.py PRESET [DIRECTORY]

In DIRECTORY (./pirate unless it is given) it leaves `model`, which opens in transformers too,
`adapter`, the adapter alone as PEFT has it, and the curve of the loss.
"""

import importlib.util
import json
import math
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from word_test import is_pirate

import puna
from puna.tuning import TextData, read_rows

HERE = Path(__file__).parent
QUESTIONS = json.loads((HERE / "questions.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Settings:
    """How it is trained: few tokens a step, so that few tokens suffice for many steps."""

    rank: int = 16
    learning_rate: float = 2e-3
    epochs: int = 1  # a second one learns the rows by heart: the held-out loss rises
    sequence_length: int = 256  # tokens of a sequence, which several dialogues share
    new_tokens: int = 80  # of an answer


def main(preset: str, directory: str = "pirate", settings: Settings = Settings()) -> None:
    start = time.perf_counter()
    # What is quantized can have an adapter too; but plain matrices are faster to train beside.
    model = puna.models.CausalLM.from_preset(preset, dtype="bfloat16", quantization="none")
    step(f"Loaded {preset}", start)

    before = answers(model, settings)
    model.enable_lora(rank=settings.rank)
    trained, total = (
        sum(math.prod(v.shape) for v in model.trainable_variables),
        model.count_params(),
    )
    step(f"Answered. Adapters: {trained:,} of {total:,} numbers are trained", start)

    losses, held_out = train(model, settings, start)
    after = answers(model, settings)
    compare(before, after)
    fall = 1 - held_out[-1] / held_out[0]
    print(f"\nHeld-out loss: {held_out[0]:.3f} before, {held_out[-1]:.3f} after, {fall:.0%} less.")

    out = Path(directory)
    model.save_to_preset(out / "model")  # with the adapter merged: a model like any other
    model.save_to_preset(out / "adapter", adapter="only")
    draw(losses, held_out, out / "curve.png")
    step(f"Saved in {out}", start)

    chat(puna.models.CausalLM.from_preset(out / "model"), settings)
    step("Done", start)


def answers(model: puna.models.Llama3CausalLM, settings: Settings) -> list[str]:
    """What the model says to the ten questions, all of them in one batch."""
    prompts = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    return model.generate(
        prompts, sampler="greedy", max_new_tokens=settings.new_tokens, strip_prompt=True
    )


def train(
    model: puna.models.Llama3CausalLM, settings: Settings, start: float
) -> tuple[list[float], list[float]]:
    """Fit the adapters; the loss of each step, and that on the held-out rows after each epoch."""
    import keras  # after Puna, which chooses the backend where the user has not

    learned, held_out = (
        TextData(
            read_rows(HERE / name),
            loss_on="assistant",
            packing=True,
            sequence_length=settings.sequence_length,
        )
        for name in ("dialogues.jsonl", "held_out.jsonl")
    )
    steps = settings.epochs * len(learned.batches(model.preprocessor, batch_size=1))
    warmup = max(1, steps // 20)
    rate = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=settings.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps - warmup,
    )
    model.compile(optimizer=keras.optimizers.Adam(rate, clipnorm=1.0))

    first = model.evaluate(held_out, batch_size=1, return_dict=True, verbose=0)["loss"]
    step(f"Held-out loss before: {first:.3f}. Training, {steps} steps", start)
    means: list[float] = []
    losses: list[float] = []

    def on_batch_end(batch: int, logs: dict[str, float]) -> None:
        # Keras tells the mean of the epoch so far; the step's own loss is what it adds to it.
        before = means[-1] * batch if batch else 0.0
        means.append(logs["loss"])
        losses.append(means[-1] * (batch + 1) - before)
        if len(losses) % 20 == 0:
            step(f"Step {len(losses)} of {steps}, loss {sum(losses[-20:]) / 20:.3f}", start)

    history = model.fit(
        learned,
        validation_data=held_out,
        batch_size=1,
        epochs=settings.epochs,
        verbose=2,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=on_batch_end)],
    )
    return losses, [first, *history.history["val_loss"]]


def compare(before: list[str], after: list[str]) -> None:
    """Print all answers, and how many are in pirate speech."""
    said = zip(QUESTIONS, before, after, strict=True)
    for number, (question, plain, pirate) in enumerate(said, start=1):
        print(f"\n{number}. {question}")
        for when, text in (("before", plain), ("after", pirate)):
            mark = "pirate" if is_pirate(text) else "plain"
            print(
                textwrap.fill(
                    " ".join(text.split()),
                    width=100,
                    initial_indent=f"   {when:6} {mark:6} ",
                    subsequent_indent=" " * 17,
                )
            )
    for when, texts in (("before", before), ("after", after)):
        passed = sum(map(is_pirate, texts))
        print(f"\nIn pirate speech {when}: {passed} of {len(texts)}.", end="")
    print()


def draw(losses: list[float], held_out: list[float], path: Path) -> None:
    """Draw the loss of the steps, smoothed, and of the held-out rows after each epoch."""
    if importlib.util.find_spec("matplotlib") is None:
        print("No curve is drawn: it needs matplotlib (pip install matplotlib).")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = range(1, len(losses) + 1)
    smooth = [sum(part) / len(part) for part in (losses[max(0, n - 10) : n] for n in places)]
    axes.plot(places, losses, alpha=0.25, label="a step")
    axes.plot(places, smooth, color="C0", label="mean of 10 steps")
    epochs = len(held_out) - 1
    at = [len(losses) * n / epochs for n in range(epochs + 1)]
    axes.plot(at, held_out, "o-", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def chat(model: puna.models.Llama3CausalLM, settings: Settings) -> None:
    """Two turns with the model that was saved."""
    conversation = puna.ChatState(model, sampler="greedy", max_new_tokens=settings.new_tokens)
    print("\nThe saved model, loaded again:")
    for message in ("Hello! I would like to learn to cook.", "What should I start with?"):
        print(f"  You:    {message}")
        print(f"  Pirate: {conversation.send_message(message)}")


def step(what: str, start: float) -> None:
    print(f"[{time.perf_counter() - start:5.0f} s] {what}.", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
