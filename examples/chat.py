"""A chat with a directory of `{format: genai}`: `python examples/chat.py build/serve`. An empty line ends it."""

import json
import sys

import onnxruntime_genai as og

og.disable_telemetry_events()
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)  # which adds no special tokens unless told to: the chat template has them
messages: list[dict[str, str]] = []
while line := input("> "):
    messages.append({"role": "user", "content": line})
    text = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    generator, stream, answer = og.Generator(model, og.GeneratorParams(model)), tokenizer.create_stream(), ""
    generator.append_tokens(tokenizer.encode(text))
    while not generator.is_done():
        generator.generate_next_token()
        piece = stream.decode(generator.get_next_tokens()[0])
        answer += piece
        print(piece, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": answer})
