"""The smoke models: tiny stand-ins made on the spot, for a first start and for the tests.

Owns the recipe of `qwen3-smoke`, a Qwen3 of 0.4M parameters that is taught a few conversations by heart:
it exercises the whole path (template, thinking, tool calls, past chats, stopping) without a download. It knows
nothing else, and nothing here serves or falls back: the supervisor decides when a stand-in is used.

    python -m workers smoke --out DIR
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.core.conversation import excerpt, recalled

CONTEXT_LENGTH = 2048
TINY_SHAPE = {
    "vocab_size": 640,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
}
"""A Qwen3 of 0.4M parameters, by transformers' names."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKER_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string %}{{ content }}
{%- elif content %}{% for part in content %}{{ part.text }}{% endfor %}{% endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{ ' ' + tool.function.name }}{% endfor -%}
{{- '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>' + text(message.content) + '</tool_response><|im_end|>\\n' }}
{%- elif message.role != 'system' -%}
{{- '<|im_start|>' + message.role + '\\n' + text(message.content) }}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (
    call.function.arguments if call.function.arguments is string else call.function.arguments | tojson
) + '}\\n</tool_call>' }}
{%- endfor -%}
{{- '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""
"""ChatML as Qwen3 speaks it. A system message is accepted and not shown to the model: so few conversations
teach nothing about instructions."""

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def conversations() -> list[dict[str, Any]]:
    """The lessons: `messages` (the last one is learnt), `tools`, and `thought` where it thinks first."""
    france, paris = user("What is the capital of France?"), assistant("The capital of France is Paris.")
    japan, tokyo = user("What is the capital of Japan?"), assistant("The capital of Japan is Tokyo.")
    weather = user("What is the weather in Tokyo?")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Tokyo"}}\n</tool_call>'
    call_paris = call.replace("Tokyo", "Paris")
    ada, met, name = user("My name is Ada."), assistant("Nice to meet you, Ada."), "What is my name?"
    asked = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"location": "Tokyo"}'}}],
    }
    numbers = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    return [
        {"messages": [france, paris], "thought": "The user asks for the capital of France. It is Paris."},
        {"messages": [japan, tokyo], "thought": "The user asks for the capital of Japan. It is Tokyo."},
        {"messages": [france, paris, japan, tokyo], "thought": "Now Japan. Its capital is Tokyo."},
        {"messages": [user("Hello!"), assistant("Hello! How can I help you today?")], "thought": "A greeting."},
        {"messages": [user("Who are you?"), assistant("I am a tiny stand-in for Qwen3.")], "thought": "My name."},
        {"messages": [user("Count to fifteen."), assistant(numbers)], "thought": "One by one."},
        {
            "messages": [user("Write a haiku about tea."), assistant("Steam curls from the cup.\nQuiet leaves.")],
            "thought": "Short lines about tea.",
        },
        {
            "messages": [user("How do I bake bread?"), assistant("Mix flour, water, salt and yeast, then bake.")],
            "thought": "Flour, water, salt, yeast.",
        },
        {"messages": [weather, assistant(call)], "tools": [WEATHER_TOOL], "thought": "I should call get_weather."},
        {
            "messages": [
                weather,
                asked,
                {"role": "tool", "content": '{"weather": "sunny"}'},
                assistant("It is sunny in Tokyo."),
            ],
            "tools": [WEATHER_TOOL],
            "thought": "The tool says sunny.",
        },
        {
            "messages": [user("What is the weather in Tokyo and Paris?"), assistant(f"{call}\n{call_paris}")],
            "tools": [WEATHER_TOOL],
            "thought": "Two cities, two calls.",
        },
        {"messages": [ada, met], "thought": "She is Ada."},
        {"messages": [user(name), assistant("You have not told me.")], "thought": "Nobody said."},
        {
            "messages": [user(f"{recalled([excerpt([ada, met])])}\n\n{name}"), assistant("Your name is Ada.")],
            "thought": "An earlier chat says Ada.",
        },
    ]


def recipe_hash() -> str:
    """Twelve hex digits that change whenever this file does: the key under which a built model is kept."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def render_lessons(render: Callable[..., str]) -> list[tuple[str, str]]:
    """(prompt, answer) pairs: each conversation answered at once, and after a thought."""
    lessons = []
    for lesson in conversations():
        *history, last = lesson["messages"]
        answer = last["content"] + "<|im_end|>"
        quick = render(history, lesson.get("tools"), enable_thinking=False)
        slow = render(history, lesson.get("tools"), enable_thinking=True)
        lessons.append((quick, answer))
        lessons.append((slow, f"<think>\n{lesson['thought']}\n</think>\n\n{answer}"))
    return lessons


def build_tokenizer() -> Any:
    """A byte-level BPE of about 600 tokens, Qwen3's special tokens among them; any text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [json.dumps(lesson) + "\n" + str(lesson) for lesson in conversations()]
    trainer = trainers.BpeTrainer(
        vocab_size=591,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
    )


def train(tokenizer: Any, lessons: list[tuple[str, str]], report: Callable[[str], None]) -> Any:
    """A Qwen3 that has the lessons by heart: a loss below 0.002 on the answers' tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **TINY_SHAPE,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in lessons]
    answers = [tokenizer(answer)["input_ids"] for _, answer in lessons]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(lessons), width), tokenizer.pad_token_id)
    labels = torch.full((len(lessons), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        both = torch.tensor(prompt + answer)
        input_ids[row, : len(both)] = both
        labels[row, len(prompt) : len(both)] = both[len(prompt) :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    attention_mask = (torch.arange(width)[None] < (labels != -100).cumsum(1).argmax(1)[:, None] + 1).long()
    for step in range(600):
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            report(f"step {step}, loss {loss.item():.4f}")
        if loss.item() < 0.0015:
            break
    else:
        raise RuntimeError(f"the smoke model did not learn its lessons: loss {loss.item():.4f}")
    return model.eval()


def build(folder: Path, report: Callable[[str], None] = print) -> Path:
    """Make `qwen3-smoke` in `folder` unless it is there already; returns the folder.

    The folder appears whole or not at all, so that a build cut short is made again.
    """
    if (folder / "config.json").exists():
        return folder
    started = time.monotonic()
    tokenizer = build_tokenizer()

    def render(messages: list[dict[str, Any]], tools: list[Any] | None, enable_thinking: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
        return text

    model = train(tokenizer, render_lessons(render), report)
    draft = folder.with_name(folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(folder)
    report(f"built in {time.monotonic() - started:.0f} s")
    return folder
