"""The blog post "Llama 3.2 in Keras", block by block, with Puna.

    pip install 'puna[jax]'
    python examples/article.py
    KERAS_BACKEND=torch python examples/article.py --preset hf://HuggingFaceTB/SmolLM2-135M-Instruct

`--preset` takes an `hf://` address, a directory or a `.gguf` file. Meta's checkpoints are gated:
accept their terms on the Hub and set `HF_TOKEN`.

The article: https://huggingface.co/blog/keras-llama-32
"""

import argparse
import tempfile

import numpy as np

import puna

LLAMA = "hf://meta-llama/Llama-3.2-1B-Instruct"


def main(preset: str, new_tokens: int, uri: str | None = None) -> None:
    model = first_words(preset, new_tokens)
    chat(model, new_tokens)
    tokenizer_and_backbone(preset)
    what_the_preprocessor_does(model)
    train(preset, new_tokens, uri)


def first_words(preset: str, new_tokens: int) -> puna.models.Llama3CausalLM:
    """A checkpoint from the Hub, converted on the fly, that generates from a string."""
    title("A model that takes strings")
    model = puna.models.Llama3CausalLM.from_preset(preset, dtype="bfloat16")
    # The prompt is part of the answer. Without max_new_tokens it may fill the preprocessor's
    # sequence_length; without a sampler, each token is one of the five most likely.
    show(model.generate("Hi there!", max_new_tokens=new_tokens))
    return model


def chat(model: puna.models.Llama3CausalLM, new_tokens: int) -> None:
    """Turn-by-turn conversation: by hand with the model's own template, and with a helper."""
    title("Chatting")
    messages = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
    ]
    prompt = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    show(prompt)
    show(model.generate(prompt, max_new_tokens=new_tokens, strip_prompt=True))

    # ChatState keeps the conversation, and keeps users from forging turns in it.
    conversation = puna.ChatState(
        model, system="You are a helpful assistant", max_new_tokens=new_tokens
    )
    show(conversation.send_message("Hello"))
    show(conversation.send_message("What did I just say?"))


def tokenizer_and_backbone(preset: str) -> None:
    """The parts of a model, each loaded alone; a tokenizer fetches no weights."""
    title("Lower level access")
    tokenizer = puna.models.Llama3Tokenizer.from_preset(preset)
    backbone = puna.models.Llama3Backbone.from_preset(preset, dtype="float16")
    show("tokenizer:", tokenizer.vocabulary_size(), "tokens")
    show("backbone:", f"{backbone.count_params():,}", "parameters")
    show("tokenizer('Hello') ->", tokenizer("Hello"))


def what_the_preprocessor_does(model: puna.models.Llama3CausalLM) -> None:
    """Start and end tokens, padding with a mask, and labels shifted by one."""
    title("Tokenizer, preprocessor")
    model.preprocessor.sequence_length = 6
    inputs, labels, weights = model.preprocessor("Hello")
    show("token_ids:   ", inputs["token_ids"])
    show("padding_mask:", inputs["padding_mask"])
    show("labels:      ", labels)
    show("weights:     ", weights)

    # Feeding the model manually. The backbone gives hidden states, the causal LM logits.
    batch, _, _ = model.preprocessor(["Hello", "Hi!"])
    show("model.backbone(batch) ->", tuple(model.backbone(batch).shape))
    show("model(batch)          ->", tuple(model(batch).shape))
    # More typically: model.generate, model.fit, model.predict, model.evaluate.


def train(preset: str, new_tokens: int, uri: str | None) -> None:
    """Keras's own trainer, on strings; then the model on disk, and back, and on the Hub."""
    title("Training on strings")
    # All weights are trained here, so they are loaded in float32: a step's change of a bfloat16
    # weight would mostly be rounded away. "mixed_bfloat16" computes faster, with float32 weights.
    # What is quantized, as in most GGUF files, can only be trained when it is dequantized.
    model = puna.models.Llama3CausalLM.from_preset(preset, dtype="float32", quantization="none")
    model.preprocessor.sequence_length = 64
    strings = [
        "Q: Aye there! A: Aye! What be on yer mind?",
        "Q: How are you? A: Fair winds, matey, and the rum is good.",
        "Q: Where is the station? A: Follow yer compass to the harbour, arr!",
        "Q: Can you help me? A: Shiver me timbers, that I can.",
    ]
    history = model.fit(strings, batch_size=4, epochs=3, verbose=0)
    show("loss:", [round(loss, 4) for loss in history.history["loss"]])

    title("Saving")
    with tempfile.TemporaryDirectory() as directory:
        # A Hugging Face directory: transformers, vLLM and keras-hub open it as it is.
        model.save_to_preset(f"{directory}/pirate-llama")
        again = puna.models.CausalLM.from_preset(f"{directory}/pirate-llama")
        ask = {"max_new_tokens": new_tokens, "sampler": "greedy"}
        answer, answer_again = (m.generate("Q: Aye there! A:", **ask) for m in (model, again))
        show(answer)
        show("the same after reloading:", answer == answer_again)

        title("Uploading")
        if uri is None:
            show("give --upload hf://you/your-repo, and HF_TOKEN, to publish it")
        else:
            show(puna.upload_preset(uri=uri, preset=f"{directory}/pirate-llama"))

    # The article goes on to a device mesh: see examples/model_parallel.py.


def title(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


def show(*values: object) -> None:
    arrays = [
        np.array2string(v, separator=", ") if isinstance(v, np.ndarray) else v for v in values
    ]
    print(*arrays, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The article's code blocks, with Puna.")
    parser.add_argument("--preset", default=LLAMA, help=f"default: {LLAMA}")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--upload", metavar="hf://YOU/REPO", help="where to publish what it made")
    arguments = parser.parse_args()
    main(arguments.preset, arguments.new_tokens, arguments.upload)
