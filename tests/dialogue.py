"""What the tests of every dialect ask, and what the taught model answers."""

from typing import Any

MODEL = "qwen3-0.6b"
FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris."
WEATHER, SUNNY = "What is the weather in Tokyo?", "It is sunny in Tokyo."
TWO_CITIES = "What is the weather in Tokyo and Paris?"
PARAMETERS = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
FUNCTION = {"name": "get_weather", "description": "The weather in a city", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
RESPONSES_TOOL: Any = {"type": "function", **FUNCTION}
ANTHROPIC_TOOL: Any = {"name": "get_weather", "description": "The weather in a city", "input_schema": PARAMETERS}
QUICK = {"enable_thinking": False}
RESULT = '{"weather": "sunny"}'


def user(content: str) -> Any:
    return {"role": "user", "content": content}
