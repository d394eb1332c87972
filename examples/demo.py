"""Load a small real Llama and ask it something: `make demo`.

Usage: python examples/demo.py PRESET [QUESTION]
"""

import sys
import time

import puna

DEFAULT_QUESTION = "What is the capital of France, and what is it famous for?"


def main(preset: str, question: str = DEFAULT_QUESTION) -> None:
    start = time.perf_counter()
    model = puna.models.CausalLM.from_preset(preset)
    print(f"Loaded {model.name} in {time.perf_counter() - start:.1f} s.")

    chat = puna.ChatState(model, sampler="greedy", max_new_tokens=128)
    print("Compiling for the first answer; this takes some seconds …")
    answer(chat, question)  # the second time shows the speed without compilation
    chat.reset()

    print(f"\nYou:   {question}")
    text, seconds = answer(chat, question)
    tokens = model.tokenizer.count_tokens(text)
    print(f"Model: {text}\n")
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s, prompt included.")


def answer(chat: "puna.ChatState", question: str) -> tuple[str, float]:
    start = time.perf_counter()
    text = chat.send_message(question)
    return text, time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
